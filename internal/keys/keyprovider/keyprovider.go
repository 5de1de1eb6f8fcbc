// Package keyprovider is where KEKs come from: the contract of a key provider,
// the native provider and its backup, the set of providers that a controller or
// host holds, and the cache in which a host keeps KEKs of standard providers.
// The standard provider itself is package standard.
//
// Formats: docs/spec/native-provider.md (derivation of KEKs and the secrets
// blob) and docs/spec/native-backup.md (the .p12 file).
//
// Invariants: keys are in [keymem] only; a key reference is always (provider
// name, key id), and a name never comes to mean other key material, so that a
// safe found years later opens with the provider of that name or not at all.
// Whether a provider was backed up, is active or is the default one is the
// business of the controller's inventory, not of this package.
//
// All types are safe for concurrent use.
package keyprovider

import (
	"context"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// KEKSize is the length of every KEK in bytes: AES-256.
const KEKSize = keysafe.KEKSize

// The outcomes that a caller of a [Provider] or [Set] tells apart with
// errors.Is. Each carries the kind with which it crosses a role boundary.
var (
	// ErrWrongProvider is reported for a reference to another provider's key.
	// The caller may try another provider. It is no statement about the key.
	ErrWrongProvider = errs.New(errs.Invalid, "key belongs to another provider")
	// ErrNotFound is reported for a reference to a key that this provider does
	// not have and never will: trying again is of no use.
	ErrNotFound = errs.New(errs.NotFound, "key provider does not have this key")
	// ErrLocked is reported for a key that exists but may not be used here and
	// now: revoked, or the host does not fulfil the provider's constraints.
	ErrLocked = errs.New(errs.Locked, "key may not be used here")
	// ErrUnavailable is reported when the answer is not known, because the
	// provider cannot be asked. The same call may succeed later.
	ErrUnavailable = errs.New(errs.Unavailable, "key provider is not available")
	// ErrClosed is reported when a closed provider or set is used.
	ErrClosed = errs.New(errs.InvalidState, "key provider is closed")
	// ErrUnknownProvider is reported by a [Set] that has no provider of the
	// name: what needs its keys is locked until it is added or imported.
	ErrUnknownProvider = errs.New(errs.Locked, "no key provider of this name here")
	// ErrNameCollision is reported when a name would come to mean other key
	// material.
	ErrNameCollision = errs.New(errs.Exists, "key provider of this name exists with other key material")
)

// Kind is how a provider gets its keys. Kinds are stored and sent: never change
// a value.
type Kind string

// The kinds.
const (
	KindNative   Kind = "native"   // derived from a KDK that hosts hold
	KindStandard Kind = "standard" // made and kept by a key server, asked over KMIP
)

// Provider hands out KEKs.
//
// Every method that takes a context returns early, with the context's error in
// the chain, when that is done. A call that fails returns no key. KEKs handed
// out are the caller's: the caller must close them, and they stay good when the
// provider is closed. References returned are valid (keysafe.Ref.Validate) and
// good for ever.
//
// An implementation is verified with package providertest.
type Provider interface {
	// Name is the provider's name, which never changes.
	Name() string

	// Kind is how the provider gets its keys.
	Kind() Kind

	// NewKEK makes a KEK for a new object and returns it with its address.
	// objectID is random and used for this KEK only; a native provider
	// derives the KEK from it, others label the key with it. Repeated with the
	// same object id it returns the same key, also when an earlier call was
	// interrupted or failed half-way: so no key is made that nobody knows of.
	//
	// It returns an error wrapping [ErrLocked], [ErrUnavailable] or
	// [ErrClosed].
	NewKEK(ctx context.Context, objectID uuid.UUID) (keysafe.Ref, *keymem.Key, error)

	// KEK returns the key at ref.
	//
	// It returns an error wrapping [ErrWrongProvider] if ref names another
	// provider: the caller may try that one. [ErrNotFound] means that this
	// provider has no such key: do not retry. [ErrLocked] means that the key
	// exists but may not be used here and now. [ErrUnavailable] means that
	// the answer is unknown: retry. [ErrClosed] means that the provider was
	// closed. It returns nothing else but errors of ctx and of memory.
	KEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error)

	// Close wipes all keys that the provider holds, after the calls that are
	// under way. It is idempotent and never fails.
	Close() error
}
