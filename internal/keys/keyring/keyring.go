// Package keyring holds the KEKs under which a KMS keeps its managed keys, one
// per epoch, and forgets them: what was wrapped under the KEK of a shredded
// epoch opens nowhere any more (docs/spec/kms-keyring.md).
//
// Invariants: a KEK is on the ring durably before anything is sealed under it,
// and wiped only after the ring without it is durable; KEKs are in keymem only.
// AES key schedules are made by the standard library in ordinary memory and
// live for one call. A [Ring] is safe for concurrent use.
package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// Sizes and limits of docs/spec/kms-keyring.md, in bytes unless noted.
const (
	EpochsMax = 16384 // count
	Overhead  = 28    // by which sealed bytes are longer: nonce and tag

	kekSize    = 32
	nonceSize  = 12
	tagSize    = 16
	headerSize = 16
	entrySize  = 8 + kekSize

	magic   = "SRkring\x00"
	version = 1
)

// Metadata is the epoch under which no key is sealed and which is never
// shredded: it authenticates records without key material.
const Metadata = 0

var (
	// ErrNoEpoch is reported for an epoch that is not on the ring: it was
	// shredded, or never was.
	ErrNoEpoch = errors.New("the KEK of the epoch is gone")
	// ErrDoesNotOpen is reported for what was sealed under another KEK, for
	// another purpose, or was altered.
	ErrDoesNotOpen = errors.New("sealed key does not open")
	// ErrCorrupt is reported for bytes that are no key ring.
	ErrCorrupt = errors.New("key ring is damaged")
	// errOther: the metadata epochs differ.
	errOther = errors.New("that key ring is another KMS's")
)

// Save makes a ring's encoding durable, whole or not at all. The encoding stays
// the caller's.
type Save func(encoded *keymem.Key) error

// Ring is the KEKs of all epochs.
type Ring struct {
	save Save

	change sync.Mutex // one change at a time
	mu     sync.RWMutex
	keks   map[uint64]*keymem.Key
	newest uint64   // highest number ever used, as far as the ring tells
	erased []func() // [Ring.OnErase]
}

// OnErase has f called whenever KEKs went off the ring, before [Ring.Shred] returns:
// what was opened with them is to go, too. f may read the ring, and not change it.
func (r *Ring) OnErase(f func()) {
	r.change.Lock()
	defer r.change.Unlock()
	r.erased = append(r.erased, f)
}

// New returns a ring with the metadata epoch alone, which it has saved.
func New(save Save) (*Ring, error) {
	kek, err := keymem.Random(kekSize)
	if err != nil {
		return nil, err
	}
	r := &Ring{save: save, keks: map[uint64]*keymem.Key{Metadata: kek}}
	if err := r.write(r.keks); err != nil {
		kek.Close()
		return nil, errs.Wrap(err, "cannot make a key ring")
	}
	return r, nil
}

// Load returns the ring that encoded holds; encoded stays the caller's. used is
// the highest number of an epoch that is known to have been used elsewhere: no
// new epoch gets that number or a lower one.
func Load(encoded *keymem.Key, used uint64, save Save) (*Ring, error) {
	keks, err := decode(encoded.Bytes())
	if err != nil {
		return nil, err
	}
	r := &Ring{save: save, keks: keks, newest: used}
	for n := range keks {
		r.newest = max(r.newest, n)
	}
	return r, nil
}

// Close wipes the ring from memory. It is idempotent and never fails.
func (r *Ring) Close() error {
	r.change.Lock()
	defer r.change.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	closeAll(r.keks)
	r.keks = nil
	return nil
}

func closeAll(keks map[uint64]*keymem.Key) {
	for _, k := range keks {
		k.Close()
	}
}

// Begin adds an epoch with a KEK of its own and returns its number when the
// ring with it is durable.
func (r *Ring) Begin() (uint64, error) {
	r.change.Lock()
	defer r.change.Unlock()
	if len(r.keks) >= EpochsMax {
		return 0, errs.New(errs.NoSpace, "cannot begin an epoch: the key ring is full with %d", EpochsMax)
	}
	kek, err := keymem.Random(kekSize)
	if err != nil {
		return 0, err
	}
	n := r.newest + 1
	next := maps.Clone(r.keks)
	next[n] = kek
	if err := r.replace(next, n); err != nil {
		kek.Close()
		return 0, errs.Wrap(err, "cannot begin an epoch")
	}
	return n, nil
}

// Shred removes epochs for ever and returns when the ring without them is
// durable. An epoch that is not on the ring is no error. After an error they may
// be gone from what is stored and are still in memory: call it again.
func (r *Ring) Shred(epochs ...uint64) error {
	r.change.Lock()
	defer r.change.Unlock()
	next := maps.Clone(r.keks)
	for _, n := range epochs {
		if n == Metadata {
			return errs.New(errs.Invalid, "cannot shred the metadata epoch")
		}
		delete(next, n)
	}
	if len(next) == len(r.keks) {
		return nil
	}
	if err := r.write(next); err != nil {
		return errs.Wrap(err, "cannot shred epochs %d", epochs)
	}
	r.drop(next)
	for _, f := range r.erased {
		f()
	}
	return nil
}

// drop wipes the KEKs that are not in next, which is what is on the ring then.
func (r *Ring) drop(next map[uint64]*keymem.Key) {
	r.mu.Lock() // waits for whoever uses a KEK
	defer r.mu.Unlock()
	for n, kek := range r.keks {
		if next[n] == nil {
			kek.Close()
		}
	}
	r.keks = next
}

// Has reports whether an epoch is on the ring.
func (r *Ring) Has(epoch uint64) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.keks[epoch] != nil
}

// Seal returns secret, which stays the caller's, wrapped under the KEK of epoch
// and bound to aad, with [Overhead] bytes more. A nil secret is empty: only aad
// is authenticated.
func (r *Ring) Seal(epoch uint64, aad []byte, secret *keymem.Key) ([]byte, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	aead, err := r.aead(epoch)
	if err != nil {
		return nil, err
	}
	var clear []byte
	if secret != nil {
		clear = secret.Bytes()
	}
	out := make([]byte, nonceSize, Overhead+len(clear))
	rand.Read(out) // never fails: it ends the process instead
	return aead.Seal(out, out, clear, aad), nil
}

// Unseal is the reverse of [Ring.Seal]. The caller closes the secret; it is nil
// if it was.
func (r *Ring) Unseal(epoch uint64, aad, sealed []byte) (*keymem.Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	aead, err := r.aead(epoch)
	if err != nil {
		return nil, err
	}
	if len(sealed) < Overhead {
		return nil, ErrDoesNotOpen
	}
	nonce, text := sealed[:nonceSize], sealed[nonceSize:]
	if len(text) == tagSize {
		if _, err := aead.Open(nil, nonce, text, aad); err != nil {
			return nil, ErrDoesNotOpen
		}
		return nil, nil
	}
	secret, err := keymem.New(len(text) - tagSize)
	if err != nil {
		return nil, err
	}
	if _, err := aead.Open(secret.Bytes()[:0], nonce, text, aad); err != nil {
		secret.Close()
		return nil, ErrDoesNotOpen
	}
	return secret, nil
}

func (r *Ring) aead(epoch uint64) (cipher.AEAD, error) {
	kek := r.keks[epoch]
	if kek == nil {
		return nil, fmt.Errorf("epoch %d: %w", epoch, ErrNoEpoch)
	}
	block, err := aes.NewCipher(kek.Bytes())
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (r *Ring) write(keks map[uint64]*keymem.Key) error {
	encoded, err := encode(keks)
	if err != nil {
		return err
	}
	defer encoded.Close()
	return r.save(encoded)
}

func encode(keks map[uint64]*keymem.Key) (*keymem.Key, error) {
	encoded, err := keymem.New(headerSize + entrySize*len(keks))
	if err != nil {
		return nil, err
	}
	b := append(encoded.Bytes()[:0], magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(keks)))
	for _, n := range slices.Sorted(maps.Keys(keks)) {
		b = binary.BigEndian.AppendUint64(b, n)
		b = append(b, keks[n].Bytes()...)
	}
	return encoded, nil
}

// decode is the reverse of encode and accepts exactly what that makes.
func decode(b []byte) (_ map[uint64]*keymem.Key, err error) {
	if len(b) < headerSize || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: it does not begin like one", ErrCorrupt)
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != version {
		return nil, errs.New(errs.InvalidState, "key ring of unknown version %d", v)
	}
	count := binary.BigEndian.Uint32(b[12:])
	if count < 1 || count > EpochsMax || len(b) != headerSize+int(count)*entrySize {
		return nil, fmt.Errorf("%w: %d epochs in %d bytes", ErrCorrupt, count, len(b))
	}
	keks := make(map[uint64]*keymem.Key, count)
	defer func() {
		if err != nil {
			closeAll(keks)
		}
	}()
	last := uint64(0)
	for i := range int(count) {
		entry := b[headerSize+i*entrySize:][:entrySize]
		n := binary.BigEndian.Uint64(entry)
		if i == 0 && n != Metadata || i > 0 && n <= last {
			return nil, fmt.Errorf("%w: epoch %d behind %d", ErrCorrupt, n, last)
		}
		last = n
		kek, err := keymem.New(kekSize)
		if err != nil {
			return nil, err
		}
		copy(kek.Bytes(), entry[8:])
		keks[n] = kek
	}
	return keks, nil
}
