package inventory

import (
	"context"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Retired is a key of a standard provider that no VM here needs any more, as far
// as is known. The key is still at its key server.
type Retired struct {
	Key   KeyRef    `json:"key"`
	VM    string    `json:"vm"`    // the name of the VM that needed it last
	Since time.Time `json:"since"` // when it did so last
}

// KeptVM is a VM that was unregistered. Its folder is still there and can be
// registered again, so its keys are needed. There is one for each VM that was in a
// folder: that another is there now does not say that it is gone.
type KeptVM struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Datastore string    `json:"datastore"`
	Folder    string    `json:"folder"`
	Keys      []KeyRef  `json:"keys"`
	Since     time.Time `json:"since"`
}

// retiredKey is the record's key: a key server may give any identifier.
func retiredKey(k KeyRef) string { return k.Provider + "/" + hex.EncodeToString([]byte(k.KeyID)) }

// retire notes that a VM needs those keys no more, as long as nobody else does.
func (inv *Inventory) retire(ctx context.Context, tx *store.Tx, vm string, keys []KeyRef) error {
	for _, k := range keys {
		p, err := inv.providers.In(tx).Get(ctx, k.Provider)
		if errors.Is(err, store.ErrNotFound) || err == nil && p.Standard == nil {
			continue // there is no such key anywhere
		}
		if err != nil {
			return err
		}
		if err := inv.retired.In(tx).Put(ctx, retiredKey(k), Retired{Key: k, VM: vm, Since: inv.now()}); err != nil {
			return err
		}
	}
	return nil
}

// retireDropped notes the keys that v needed before, and now needs no more.
func (inv *Inventory) retireDropped(ctx context.Context, tx *store.Tx, v VM, before []KeyRef) error {
	needed := v.Keys()
	return inv.retire(ctx, tx, v.Name, slices.DeleteFunc(before, func(k KeyRef) bool { return slices.Contains(needed, k) }))
}

// Retired returns the keys of a provider that VMs needed once, by key id. Some of
// them may be in use again.
func (inv *Inventory) Retired(ctx context.Context, provider string) (map[string]Retired, error) {
	all, err := inv.retired.Scan(ctx, store.Range{Prefix: provider + "/"})
	if err != nil {
		return nil, errs.Wrap(err, "cannot list the retired keys of key provider %s", provider)
	}
	out := make(map[string]Retired, len(all))
	for _, e := range all {
		out[e.Value.Key.KeyID] = e.Value
	}
	return out, nil
}

// ForgetRetired forgets a key that is destroyed. One that is not known is no
// error.
func (inv *Inventory) ForgetRetired(ctx context.Context, k KeyRef) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if err := inv.retired.In(tx).Delete(ctx, retiredKey(k)); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		return inv.forgetReplaced(ctx, tx, k)
	})
	return errs.Wrap(err, "cannot forget key %s of key provider %s", k.KeyID, k.Provider)
}

// keptOf returns what is kept of v, which is or was in its folder, and the record's
// key; nil if nothing is, and then the key for it.
func (inv *Inventory) keptOf(ctx context.Context, tx *store.Tx, v VM) (key string, kept *KeptVM, err error) {
	free := true
	for _, key := range []string{folderKey(v), folderKey(v) + "/" + v.ID} { // the second if another VM has the first
		k, err := inv.kept.In(tx).Get(ctx, key)
		switch {
		case err == nil && k.ID == v.ID:
			return key, &k, nil
		case err == nil && key == folderKey(v):
			free = false
		case err != nil && !errors.Is(err, store.ErrNotFound):
			return "", nil, err
		}
	}
	if free {
		return folderKey(v), nil, nil
	}
	return folderKey(v) + "/" + v.ID, nil, nil
}

// keep notes that a VM's folder, which is not touched, needs keys. What it was known
// to need before, and did not tell since, it may need still.
func (inv *Inventory) keep(ctx context.Context, tx *store.Tx, v VM, keys []KeyRef) error {
	key, before, err := inv.keptOf(ctx, tx, v)
	if err != nil {
		return err
	}
	if before != nil {
		keys = append(slices.Clone(keys), slices.DeleteFunc(slices.Clone(before.Keys), func(k KeyRef) bool { return slices.Contains(keys, k) })...)
	}
	return inv.kept.In(tx).Put(ctx, key, KeptVM{ID: v.ID, Name: v.Name, Datastore: v.Datastore, Folder: v.Folder, Keys: keys, Since: inv.now()})
}

// unkeep forgets what is kept of v, which is registered: unless v does not tell of a
// key that its folder needed, as of a snapshot that cannot be read.
func (inv *Inventory) unkeep(ctx context.Context, tx *store.Tx, v VM) error {
	key, kept, err := inv.keptOf(ctx, tx, v)
	if err != nil || kept == nil {
		return err
	}
	needed := v.Keys()
	if slices.ContainsFunc(kept.Keys, func(k KeyRef) bool { return !slices.Contains(needed, k) }) {
		return nil
	}
	return inv.kept.In(tx).Delete(ctx, key)
}

// KeptVMs returns the VMs that were unregistered and not registered or deleted
// since.
func (inv *Inventory) KeptVMs(ctx context.Context) ([]KeptVM, error) { return inv.kept.List(ctx) }

// UnregisterVM forgets the VM with that id and notes that its folder, which is
// not touched, still needs its keys. Forgetting a VM that is not there is no
// error.
func (inv *Inventory) UnregisterVM(ctx context.Context, id string) error {
	return errs.Wrap(inv.removeVM(ctx, id, true), "cannot unregister VM %s", id)
}

// ForgetKept forgets the VM that was unregistered with id from a folder that is
// gone. Its keys are retired from now on, for all that is known here. It returns
// an error of kind [errs.NotFound] if that VM is not kept for that folder.
func (inv *Inventory) ForgetKept(ctx context.Context, id, datastore, folder string) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		key, kept, err := inv.keptOf(ctx, tx, VM{ID: id, Datastore: datastore, Folder: folder})
		if err != nil {
			return err
		}
		if kept == nil {
			return errs.New(errs.NotFound, "no VM %s was unregistered from there", id)
		}
		if err := inv.retire(ctx, tx, kept.Name, kept.Keys); err != nil {
			return err
		}
		return inv.kept.In(tx).Delete(ctx, key)
	})
	return errs.Wrap(err, "cannot forget the VM of folder %s on datastore %s", folder, datastore)
}
