package rootkey

import (
	"context"
	"errors"
	"slices"
	"sync"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/shamir"
	"strongroom/internal/errs"
)

// ErrSealed is reported when people must give a passphrase or shares first.
var ErrSealed = errors.New("sealed: its root key is not here")

// Lock is the root file of one vault: the source of its root key, and while that
// is being changed the next one. It is safe for concurrent use. It must be
// closed.
type Lock struct {
	path string
	// opens returns an error wrapping [sealed.ErrWrongKey] if the vault is sealed
	// under another key.
	opens func(root *keymem.Key) error

	mu      sync.Mutex
	sources []Source
	given   Given       // by people, so far
	next    *keymem.Key // the root key of sources[1]; nil if there is none
}

// Load reads the root file at path; without one the root key comes from
// fallback. opens tells whether the vault opens with a root key: it returns an
// error wrapping [sealed.ErrWrongKey] if it is sealed under another.
func Load(path string, fallback Source, opens func(root *keymem.Key) error) (*Lock, error) {
	sources, err := readFile(path)
	if errs.KindOf(err) == errs.NotFound {
		sources, err = []Source{fallback}, nil
	}
	if err != nil {
		return nil, err
	}
	return &Lock{path: path, opens: opens, sources: sources}, nil
}

// Close wipes what was given, and forgets a change that was not confirmed. It is
// idempotent and never fails.
func (l *Lock) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.given.Close()
	l.next.Close()
	l.next = nil
	return nil
}

// Sources returns the source in force and, while it is being changed, the next.
func (l *Lock) Sources() []Source {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.sources)
}

// Given returns how many shares were given that are still awaited.
func (l *Lock) Given() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.given.Shares)
}

// Open returns the root key, which the caller closes, if it can be had without
// people; else an error that wraps [ErrSealed], or says why the sources that
// need nobody do not give it.
func (l *Lock) Open(ctx context.Context) (*keymem.Key, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var failed error
	people := false
	for i, s := range l.sources {
		if s.People() > 0 {
			people = true
			continue
		}
		root, err := l.try(ctx, i)
		if err == nil {
			l.settle(i)
			return root, nil
		}
		failed = errors.Join(failed, err)
	}
	if people {
		return nil, errs.New(errs.Locked, "%w", ErrSealed)
	}
	return nil, failed
}

// Give takes a passphrase or the text of a share, which stays the caller's, and
// returns the root key when that was what was still missing, else nil.
func (l *Lock) Give(ctx context.Context, secret *keymem.Key) (*keymem.Key, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if shamir.IsText(secret.Bytes()) && slices.ContainsFunc(l.sources, func(s Source) bool { return s.Shares != nil }) {
		return l.giveShare(ctx, secret)
	}
	l.given.Passphrase = secret
	defer func() { l.given.Passphrase = nil }()
	err := error(errs.New(errs.Invalid, "that is no share, and no passphrase is needed"))
	for i, s := range l.sources {
		if s.Passphrase == nil {
			continue
		}
		var root *keymem.Key
		if root, err = l.try(ctx, i); err == nil {
			l.settle(i)
			return root, nil
		}
		if errs.KindOf(err) != errs.Denied {
			break
		}
	}
	return nil, err
}

func (l *Lock) giveShare(ctx context.Context, text *keymem.Key) (*keymem.Key, error) {
	share, err := shamir.Parse(text.Bytes())
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(l.sources, func(s Source) bool { return s.Shares != nil && s.Shares.belongs(share) })
	if at < 0 {
		share.Value.Close()
		return nil, errs.New(errs.Invalid, "that share is of another set (%x): the root key was split anew since, or it belongs elsewhere", share.Set)
	}
	for _, other := range l.given.Shares {
		if other.Set == share.Set && other.Point == share.Point {
			share.Value.Close()
			return nil, errs.New(errs.Exists, "share %d was given already", share.Point)
		}
	}
	l.given.Shares = append(l.given.Shares, share)
	own := 0
	for _, s := range l.given.Shares {
		if s.Set == share.Set {
			own++
		}
	}
	if own < l.sources[at].Shares.Threshold {
		return nil, nil
	}
	root, err := l.try(ctx, at)
	l.given.Close() // right or wrong, they are used up
	if err != nil {
		return nil, err
	}
	l.settle(at)
	return root, nil
}

// try returns the root key of source i if the vault opens with it.
func (l *Lock) try(ctx context.Context, i int) (*keymem.Key, error) {
	root, err := l.sources[i].Open(ctx, l.given)
	if err != nil {
		return nil, err
	}
	err = l.opens(root)
	if errors.Is(err, sealed.ErrWrongKey) && len(l.sources) > 1 {
		err = errs.New(errs.Denied, "the change from %s to %s was interrupted: the vault is sealed with the other one", l.sources[0], l.sources[1])
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// settle ends a change that was interrupted: source i, with which the vault
// opens, stays. If that cannot be written down now, both stay in the root file,
// where [Lock.Sources] shows them, and the next start or change tries again.
func (l *Lock) settle(i int) {
	l.given.Close()
	if len(l.sources) > 1 {
		_ = l.keep(i)
	}
}

// keep retires the source that is not i and writes the root file with i alone.
func (l *Lock) keep(i int) error {
	kept, gone := l.sources[i], l.sources[1-i]
	if err := gone.Retire(); err != nil {
		return errs.Wrap(err, "cannot remove the source not in force, %s", gone)
	}
	if err := writeFile(l.path, []Source{kept}); err != nil {
		return errs.Wrap(err, "cannot write root file %s", l.path)
	}
	l.sources = []Source{kept}
	l.next.Close()
	l.next = nil
	return nil
}

// Begin makes a new root key and has source wrap it, beside the one in force,
// durably. The vault stays as it is until [Lock.Confirm]; a change begun before
// is dropped. The shares, if it has any, are the caller's.
func (l *Lock) Begin(source func(root *keymem.Key) (Source, []shamir.Share, error)) ([]shamir.Share, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.drop(); err != nil {
		return nil, err
	}
	root, err := keymem.Random(Size)
	if err != nil {
		return nil, err
	}
	made, shares, err := source(root)
	if err != nil {
		root.Close()
		return nil, err
	}
	next := []Source{l.sources[0], made}
	if err := writeFile(l.path, next); err != nil {
		root.Close()
		shamir.Close(shares)
		return nil, errors.Join(errs.Wrap(err, "cannot write root file %s", l.path), made.Retire())
	}
	l.sources, l.next = next, root
	return shares, nil
}

// drop forgets a change that was begun: the source with which the vault opens
// stays.
func (l *Lock) drop() error {
	l.given.Close()
	if len(l.sources) == 1 {
		return nil
	}
	if l.next == nil { // it was interrupted, and could not be settled then
		return errs.New(errs.InvalidState, "the change from %s to %s is not settled", l.sources[0], l.sources[1]).WithHint("start the service again")
	}
	switch err := l.opens(l.next); {
	case err == nil: // it was confirmed, and could not be written down then
		return l.keep(1)
	case errors.Is(err, sealed.ErrWrongKey):
		return l.keep(0)
	default:
		return err
	}
}

// Confirm ends a change that was begun: it opens the new source with what people
// give (the passphrase, or shares enough, which stay the caller's), has reseal
// seal the vault under the new root key, and retires the old source. reseal may
// be called again if it failed.
//
// If only the old source cannot be removed the new one is in force nevertheless;
// the error says so.
//
// After a crash at any instant the vault opens by the old source or by the new
// one, and [Lock.Open] or [Lock.Give] tells which.
func (l *Lock) Confirm(ctx context.Context, secrets []*keymem.Key, reseal func(root *keymem.Key) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next == nil {
		return errs.New(errs.InvalidState, "no change of the root key's source was begun")
	}
	var given Given
	defer func() { shamir.Close(given.Shares) }()
	for _, secret := range secrets {
		if l.sources[1].Shares == nil {
			given.Passphrase = secret
			continue
		}
		share, err := shamir.Parse(secret.Bytes())
		if err != nil {
			return err
		}
		given.Shares = append(given.Shares, share)
	}
	root, err := l.sources[1].Open(ctx, given)
	if err != nil {
		return errs.Wrap(err, "the new source does not open, the old one stays in force")
	}
	defer root.Close()
	if !root.Equal(l.next) {
		return errs.New(errs.Denied, "the new source gives another key, the old one stays in force")
	}
	if err := reseal(root); err != nil {
		return err
	}
	made := l.sources[1]
	return errs.Wrap(l.keep(1), "%s is in force now", made)
}
