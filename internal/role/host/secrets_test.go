package host

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

func TestJoinState(t *testing.T) {
	t.Parallel()
	cfg, ca := newConfig(t), newCA(t)
	_, err := openSecrets(cfg)
	wantKind(t, "a host that has not joined", err, errs.NotFound)
	if errs.HintOf(err) == "" {
		t.Error("no hint how to join")
	}

	// A join that was cut short after its first step can be repeated.
	key, err := keyfile.Create(cfg.KeyFile, sealed.KeySize)
	check(t, err)
	check(t, key.Close())
	want := joinCA(t, cfg, ca)
	s, err := openSecrets(cfg)
	check(t, err)
	defer s.Close()
	if diff := cmp.Diff(want, s.identity); diff != "" {
		t.Error(diff)
	}
	wantKind(t, "joining again", Join(t.Context(), cfg, JoinRequest{Controller: "127.0.0.1:1", Token: "t", Name: "esx-1"}), errs.Exists)
}

// TestBadVault: a sealed configuration that does not open says why, and what to
// do, and is not touched.
func TestBadVault(t *testing.T) {
	t.Parallel()
	cfg := newConfig(t)
	joinCA(t, cfg, newCA(t))
	path := filepath.Join(cfg.DataDir, vaultName)
	good, err := os.ReadFile(path)
	check(t, err)
	key, err := os.ReadFile(cfg.KeyFile)
	check(t, err)
	fails := func(name string, kind errs.Kind) {
		t.Helper()
		before, err := os.ReadFile(path)
		check(t, err)
		s, err := openSecrets(cfg)
		if s != nil {
			s.Close()
			t.Fatalf("%s: it opened", name)
		}
		wantKind(t, name, err, kind)
		if kind != errs.NotFound && errs.HintOf(err) == "" {
			t.Errorf("%s: %v has no hint", name, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the file was changed (error %v)", name, err)
		}
		check(t, os.WriteFile(path, good, 0o600))
		check(t, os.WriteFile(cfg.KeyFile, key, 0o600))
	}
	check(t, os.WriteFile(cfg.KeyFile, make([]byte, sealed.KeySize), 0o600))
	fails("another key", errs.Denied)
	check(t, os.Chmod(cfg.KeyFile, 0o644))
	fails("a key file that all may read", errs.Denied)
	check(t, os.Chmod(cfg.KeyFile, 0o600))
	check(t, os.Remove(cfg.KeyFile))
	fails("no key file", errs.NotFound)
	bad := slices.Clone(good)
	bad[len(bad)-1] ^= 1
	check(t, os.WriteFile(path, bad, 0o600))
	fails("a changed bit", errs.Corrupt)
	check(t, os.WriteFile(path, good[:len(good)/2], 0o600))
	fails("half of it", errs.Corrupt)
	s, err := openSecrets(cfg) // whole again
	check(t, err)
	s.Close()
}

func TestOnlyOne(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "host.lock")
	unlock, err := onlyOne(path)
	check(t, err)
	_, err = onlyOne(path)
	wantKind(t, "a second agent", err, errs.InvalidState)
	unlock()
	again, err := onlyOne(path)
	check(t, err)
	again()
}

// TestRegistry: what was registered is there after a restart, changes are whole
// or not at all, and ids go before names.
func TestRegistry(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	one := registered{ID: uuid.NewString(), Name: "one", Datastore: "ds-1", Folder: "one"}
	two := registered{ID: uuid.NewString(), Name: one.ID, Datastore: "ds-1", Folder: "two"} // a name like an id
	check(t, b.register(two))
	check(t, b.register(one))
	for what, want := range map[string]registered{one.ID: one, "one": one, two.ID: two} {
		if got, err := b.secrets.find(what); err != nil || got != want {
			t.Errorf("find(%s) = %+v, %v", what, got, err)
		}
	}
	wantKind(t, "a name that is taken", b.register(registered{ID: uuid.NewString(), Name: "one", Datastore: "ds-1", Folder: "three"}), errs.Exists)
	wantKind(t, "a folder that is taken", b.register(registered{ID: uuid.NewString(), Name: "three", Datastore: "ds-1", Folder: "one"}), errs.Exists)
	renamed := two
	renamed.Name = "one"
	wantKind(t, "a new name that is taken", b.register(renamed), errs.Exists)
	renamed.Name = "deux"
	check(t, b.register(renamed))
	if m, err := b.machine(two.ID); err != nil || m.reg != renamed {
		t.Errorf("the machine is %+v, %v", m, err)
	}
	failure := errors.New("no")
	if err := b.secrets.updateRegistry(func(r *registry) error { r.VMs = nil; return failure }); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
	check(t, b.unregister(uuid.NewString())) // is not there
	want := registry{Datastores: []datastore{{Name: "ds-1", Type: "dir", Path: b.root}}, VMs: []registered{renamed, one}}
	for _, s := range []*secrets{b.secrets, openHost(t, b.cfg).secrets} {
		if diff := cmp.Diff(want, s.snapshot()); diff != "" {
			t.Error(diff)
		}
	}
	// A datastore that has VMs stays, though it is wanted no more.
	check(t, b.syncDatastores(nil))
	if diff := cmp.Diff(want, b.secrets.snapshot()); diff != "" {
		t.Error(diff)
	}
	wantKind(t, "a relative path", b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-2", Path: "tmp"}}), errs.Invalid)
}

// TestSyncProviders: a host holds what its controller wants, also after a
// restart, and nothing else.
func TestSyncProviders(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ref := b.newRef(t)
	check(t, b.haveKEK(t.Context(), ref))
	check(t, openHost(t, b.cfg).haveKEK(t.Context(), ref))

	second, err := keyprovider.CreateNative("kp-2", false, time.Now())
	check(t, err)
	defer second.Close()
	impostor, err := keyprovider.CreateNative("kp-1", false, time.Now())
	check(t, err)
	defer impostor.Close()
	held := &strongroomv1.WantedProvider{Name: "kp-1", KeyId: b.provider.Info().KeyID.String()}
	renamed, changed, elsewhere := b.wanted(t, second), b.wanted(t, second), wantedBy(t, second, uuid.NewString(), b.secrets.parcel.PublicKey())
	renamed.Name = "kp-3"
	changed.Parcel[len(changed.Parcel)-1] ^= 1
	badID := b.wanted(t, second)
	badID.KeyId = "x"
	for name, c := range map[string]struct {
		wanted *strongroomv1.WantedProvider
		kind   errs.Kind
	}{
		"a parcel for another host":       {elsewhere, errs.Denied},
		"a parcel of another name":        {renamed, errs.Denied},
		"a parcel with a changed bit":     {changed, errs.Denied},
		"another provider of a name held": {b.wanted(t, impostor), errs.Exists},
		"a key id that is none":           {badID, errs.Invalid},
	} {
		wantKind(t, name, b.syncProviders([]*strongroomv1.WantedProvider{held, c.wanted}), c.kind)
		if got := b.secrets.providers.Names(); !slices.Equal(got, []string{"kp-1"}) {
			t.Fatalf("%s: the host holds %v", name, got)
		}
	}
	check(t, b.haveKEK(t.Context(), ref))

	// One that fails does not keep the next away, nor off the disk.
	wantKind(t, "a bad and a good one", b.syncProviders([]*strongroomv1.WantedProvider{held, elsewhere, b.wanted(t, second)}), errs.Denied)
	again := openHost(t, b.cfg)
	for _, h := range []*Host{b.Host, again} {
		if got := h.secrets.providers.Names(); !slices.Equal(got, []string{"kp-1", "kp-2"}) {
			t.Errorf("the host holds %v", got)
		}
	}
	if got := again.held(); len(got) != 2 || got[1].GetKeyId() != second.Info().KeyID.String() {
		t.Errorf("held tells %v", got)
	}

	// What is wanted no more is gone, from memory and from the disk.
	check(t, b.syncProviders([]*strongroomv1.WantedProvider{{Name: "kp-2", KeyId: second.Info().KeyID.String()}}))
	for _, h := range []*Host{b.Host, openHost(t, b.cfg)} {
		_, err := h.kek(t.Context(), ref)
		wantKind(t, "a key of a provider that was removed", err, errs.Locked)
		if errs.ReasonOf(err) != reasonProviderUnknown || errs.HintOf(err) == "" {
			t.Errorf("reason %q, hint %q", errs.ReasonOf(err), errs.HintOf(err))
		}
	}
}

// TestUnsavedProviders: a provider that could not be stored is stored by the
// next sync, though the controller has nothing to send any more.
func TestUnsavedProviders(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	second, err := keyprovider.CreateNative("kp-2", false, time.Now())
	check(t, err)
	defer second.Close()
	held := &strongroomv1.WantedProvider{Name: "kp-1"}
	block := filepath.Join(b.cfg.DataDir, vaultName+".new") // where the new vault would be written
	check(t, os.MkdirAll(filepath.Join(block, "x"), 0o700))
	if err := b.syncProviders([]*strongroomv1.WantedProvider{held, b.wanted(t, second)}); err == nil {
		t.Fatal("a sync that stored nothing succeeded")
	}
	if got := openHost(t, b.cfg).secrets.providers.Names(); len(got) != 1 {
		t.Fatalf("stored are %v", got)
	}
	check(t, os.RemoveAll(block))
	check(t, b.syncProviders([]*strongroomv1.WantedProvider{held, {Name: "kp-2"}}))
	if got := openHost(t, b.cfg).secrets.providers.Names(); len(got) != 2 {
		t.Errorf("stored are %v", got)
	}
}

// TestKeyReasons: why a key cannot be had is told with vSphere's names.
func TestKeyReasons(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ref := b.newRef(t)
	for name, c := range map[string]struct {
		ref    keysafe.Ref
		reason string
	}{
		"another provider": {keysafe.Ref{Provider: "kp-9", KeyID: ref.KeyID}, reasonProviderUnknown},
		"another KDK":      {keysafe.Ref{Provider: "kp-1", KeyID: uuid.NewString() + "/" + uuid.NewString()}, reasonKeyMissing},
	} {
		key, err := b.kek(t.Context(), c.ref)
		if key != nil || errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != c.reason || errs.HintOf(err) == "" {
			t.Errorf("%s: %v, %v, reason %q, hint %q; want %q", name, key, err, errs.ReasonOf(err), errs.HintOf(err), c.reason)
		}
	}
}

// TestNothingInTheClear looks for every key in what the host has on its disk.
func TestNothingInTheClear(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	kdk, err := b.provider.KDK()
	check(t, err)
	defer kdk.Close()
	parcelKey, err := b.secrets.parcel.Secret()
	check(t, err)
	defer parcelKey.Close()
	tlsKey, err := b.secrets.vault.Get(secretTLSKey)
	check(t, err)
	defer tlsKey.Close()
	check(t, filepath.WalkDir(b.cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		check(t, err)
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		text, err := os.ReadFile(path)
		check(t, err)
		for name, key := range map[string][]byte{"KDK": kdk.Bytes(), "parcel key": parcelKey.Bytes(), "TLS key": tlsKey.Bytes()} {
			if bytes.Contains(text, key) || bytes.Contains(text, []byte(hex.EncodeToString(key))) {
				t.Errorf("%s holds the %s", path, name)
			}
		}
		return nil
	}))
}
