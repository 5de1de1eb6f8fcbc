// Package keymem holds secrets (KEKs, KDKs, DEKs, passwords, cipher key
// schedules) in memory that is never swapped, never dumped, wiped on release
// and never printed.
//
// Memory comes from memfd_secret(2), which even the kernel's own mappings do
// not show; where the kernel has none, from an anonymous mapping that is
// locked (mlock) and left out of core dumps (MADV_DONTDUMP). The garbage
// collector never sees, moves or copies it.
//
// Invariants: every byte outside a live [Key] is zero; a Key's bytes are never
// copied out by this package; fmt, log/slog and the encoders of the standard
// library print [Redacted] for a Key.
//
// All functions are safe for concurrent use. A Key is too, except that Close
// must not run while another goroutine still uses a slice from [Key.Bytes].
package keymem

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync/atomic"
)

// Redacted is what a Key prints as, everywhere.
const Redacted = "[redacted]"

// SizeMax is the largest Key, in bytes.
const SizeMax = 1 << 20

// ErrClosed is reported when a released Key is used.
var ErrClosed = errors.New("keymem: key is closed")

// Key is a secret of a fixed length in locked memory. It must be released by
// [Key.Close]; a Key that is forgotten is wiped when it is garbage collected,
// which is a safety net and not a way to release it.
type Key struct {
	block  *block
	closed atomic.Bool
	clean  runtime.Cleanup
}

// New returns a Key of n zero bytes, 1 <= n <= [SizeMax]. Its start is aligned
// to 64 bytes.
func New(n int) (*Key, error) {
	if n < 1 || n > SizeMax {
		return nil, fmt.Errorf("keymem: cannot hold a secret of %d bytes: it must have 1 to %d", n, SizeMax)
	}
	b, err := process.allocate(n)
	if err != nil {
		return nil, err
	}
	k := &Key{block: b}
	k.clean = runtime.AddCleanup(k, (*block).release, b)
	return k, nil
}

// Random returns a Key of n bytes from the system's random source.
func Random(n int) (*Key, error) {
	k, err := New(n)
	if err != nil {
		return nil, err
	}
	rand.Read(k.block.bytes()) // never fails: it ends the process instead
	return k, nil
}

// Take returns a Key with the bytes of secret and wipes secret, also when it
// fails.
func Take(secret []byte) (*Key, error) {
	defer Wipe(secret)
	k, err := New(len(secret))
	if err != nil {
		return nil, err
	}
	copy(k.block.bytes(), secret)
	return k, nil
}

// Read returns a Key of exactly n bytes read from r, without a copy of them
// elsewhere. It returns [io.ErrUnexpectedEOF] if r ends early.
func Read(r io.Reader, n int) (*Key, error) {
	k, err := New(n)
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(r, k.block.bytes()); err != nil {
		k.Close()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return k, nil
}

// Bytes returns the secret itself, not a copy. The slice must not be used
// after Close, retained, converted to a string or handed to code that keeps
// it. It does not keep the Key from being collected and wiped: the Key must be
// closed, or kept by [runtime.KeepAlive], after the last use of the slice.
// Bytes panics with [ErrClosed] on a closed Key.
func (k *Key) Bytes() []byte {
	if k.closed.Load() {
		panic(ErrClosed)
	}
	return k.block.bytes()
}

// Len returns the length of the secret in bytes.
func (k *Key) Len() int { return k.block.len }

// Clone returns a second Key with the same bytes.
func (k *Key) Clone() (*Key, error) {
	c, err := New(k.Len())
	if err != nil {
		return nil, err
	}
	copy(c.block.bytes(), k.Bytes())
	runtime.KeepAlive(k)
	return c, nil
}

// Equal reports whether both hold the same bytes, in time that depends on
// their lengths only.
func (k *Key) Equal(other *Key) bool {
	equal := subtle.ConstantTimeCompare(k.Bytes(), other.Bytes()) == 1
	runtime.KeepAlive(k)
	runtime.KeepAlive(other)
	return equal
}

// Close wipes and releases the secret. It is idempotent and never fails; a nil
// Key may be closed.
func (k *Key) Close() error {
	if k == nil || k.closed.Swap(true) {
		return nil
	}
	k.clean.Stop()
	k.block.release()
	runtime.KeepAlive(k) // or its cleanup could be queued before Stop
	return nil
}

// Wipe overwrites b with zeros. It is for secrets that had to pass through
// ordinary memory, such as the output of a library.
//
//go:noinline
func Wipe(b []byte) { clear(b) } // not inlined, hence not removed as a dead store

// Format implements [fmt.Formatter], so that no verb prints the secret.
func (k *Key) Format(f fmt.State, _ rune) { io.WriteString(f, Redacted) }

// String implements [fmt.Stringer].
func (k *Key) String() string { return Redacted }

// GoString implements [fmt.GoStringer].
func (k *Key) GoString() string { return Redacted }

// LogValue implements [slog.LogValuer].
func (k *Key) LogValue() slog.Value { return slog.StringValue(Redacted) }

// MarshalText implements [encoding.TextMarshaler].
func (k *Key) MarshalText() ([]byte, error) { return []byte(Redacted), nil }

// MarshalJSON implements [json.Marshaler].
func (k *Key) MarshalJSON() ([]byte, error) { return []byte(`"` + Redacted + `"`), nil }
