package objectstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"net/url"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
)

// Objects is the table of objects: "ACCOUNT/ID" is the key of each. A copy of the
// database has its records wrapped under another key ring: [Store.Rewrap].
const Objects = "kms-object"

// Derived reports whether a copy of the database goes without a table: what it
// holds follows from the objects ([Unpack], [Store.Index]), or is about their key
// ring.
func Derived(table string) bool {
	return slices.Contains([]string{"kms-name", "kms-names", "kms-date", "kms-index", "kms-epoch"}, table)
}

// PerEpoch is how many objects share a KEK.
const PerEpoch = perEpoch

// Rewrap returns the record of an object, at key, with its material wrapped under
// an epoch of another ring, and reports whether there is material. What the object
// is goes into digest as [Digest] says.
//
// The record may be an old one. If its KEK was erased since, the material is taken
// of the record that is there now; if the object was destroyed since, so is the
// one returned.
func (s *Store) Rewrap(ctx context.Context, key string, record []byte, to *keyring.Ring, epoch uint64, digest hash.Hash) (_ []byte, material bool, err error) {
	account, id, err := splitKey(key)
	if err != nil {
		return nil, false, err
	}
	clear, secret, err := s.unsealOld(ctx, key, account, id, record)
	if err != nil {
		return nil, false, fmt.Errorf("object %s: %w", key, err)
	}
	defer secret.Close()
	addDigest(digest, key, clear, secret)
	if secret == nil {
		epoch = keyring.Metadata
	}
	clear = slices.Clone(clear)
	binary.BigEndian.PutUint64(clear[8:], epoch)
	sealed, err := to.Seal(epoch, aad(account, id, clear), secret)
	return append(clear, sealed...), secret != nil, err
}

// unsealOld returns what [Store.Rewrap] takes of a record: its clear part and its
// material.
func (s *Store) unsealOld(ctx context.Context, key, account, id string, record []byte) (clear []byte, secret *keymem.Key, err error) {
	clear, sealed, epoch, err := split(record)
	if err != nil {
		return nil, nil, err
	}
	secret, err = s.ring.Unseal(epoch, aad(account, id, clear), sealed)
	for attempt := 1; errors.Is(err, keyring.ErrNoEpoch) && attempt < attempts; attempt++ {
		if err := s.keeper.CatchUp(ctx); err != nil {
			return nil, nil, err
		}
		record, err := s.objects.Get(ctx, key)
		if err != nil {
			return nil, nil, err
		}
		newer, sealed, epoch, err := split(record)
		if err != nil {
			return nil, nil, err
		}
		if secret, err = s.ring.Unseal(epoch, aad(account, id, newer), sealed); err == nil {
			if secret == nil {
				clear = newer
			}
			return clear, secret, nil
		}
		if !errors.Is(err, keyring.ErrNoEpoch) {
			return nil, nil, err
		}
	}
	return clear, secret, err
}

// splitKey takes the key of a record apart.
func splitKey(key string) (account, id string, err error) {
	escaped, id, _ := strings.Cut(key, "/")
	account, err = url.PathUnescape(escaped)
	if err != nil || !isID(id) || checkAccount(account) != nil || accountPrefix(account)+id != key {
		return "", "", fmt.Errorf("object %.256q: %w", key, errCorrupt)
	}
	return account, id, nil
}

// addDigest adds one object to a digest over many, whichever KEK it is wrapped
// under:
//
//	u32(length of key) || key || u32(length of clear) || clear, its epoch 0 || u32(length of material) || material
func addDigest(digest hash.Hash, key string, clear []byte, material *keymem.Key) {
	part := func(parts ...[]byte) {
		n := 0
		for _, p := range parts {
			n += len(p)
		}
		digest.Write(binary.BigEndian.AppendUint32(nil, uint32(n)))
		for _, p := range parts {
			digest.Write(p)
		}
	}
	part([]byte(key))
	part(clear[:8], make([]byte, 8), clear[16:])
	if material == nil {
		part()
		return
	}
	part(material.Bytes())
}

// Unpack opens the record of an object under ring, adds it to digest, and returns
// what is to be stored of it: the record and its names. With a time of destruction
// that is not zero the object is stored as destroyed then, unless it is destroyed.
// It reports whether there was material, and whether what is stored has it.
func Unpack(ring *keyring.Ring, key string, record []byte, destroyed time.Time, digest hash.Hash) (stored []store.Record, had, has bool, err error) {
	account, id, err := splitKey(key)
	if err != nil {
		return nil, false, false, err
	}
	o, _, err := unseal(ring, account, id, record)
	if err != nil {
		return nil, false, false, fmt.Errorf("object %s: %w", key, err)
	}
	secret := o.Material
	defer secret.Close()
	clear, _, _, err := split(record)
	if err != nil {
		return nil, false, false, err
	}
	addDigest(digest, key, clear, secret)
	if secret != nil && !destroyed.IsZero() {
		o.Destroy(destroyed)
		if record, err = seal(ring, account, o, keyring.Metadata); err != nil {
			return nil, false, false, err
		}
	}
	stored = append(stored, store.Record{Name: Objects + "/" + key, Value: record})
	for _, name := range namesOf(o) {
		stored = append(stored, store.Record{Name: "kms-name/" + loosePrefix(account, name) + id, Value: []byte{1}})
	}
	return stored, secret != nil, o.Material != nil, nil
}

// Digest reads every object as it is now, its material too, and adds it to digest,
// in byte order of their keys. It returns how many there are, and how many of them
// have material.
func (s *Store) Digest(ctx context.Context, digest hash.Hash) (objects, keys int64, err error) {
	err = s.db.View(ctx, func(tx *store.Tx) error {
		digest.Reset()
		objects, keys = 0, 0
		var bad error
		err := s.objects.In(tx).Scan(ctx, "", func(e store.Entry[[]byte]) bool {
			var material bool
			if _, material, _, bad = Unpack(s.ring, e.Key, e.Value, time.Time{}, digest); bad != nil {
				return false
			}
			objects++
			if material {
				keys++
			}
			return true
		})
		return errors.Join(err, bad)
	})
	return objects, keys, err
}
