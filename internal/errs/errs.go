// Package errs holds the one error type that crosses a role boundary (RPC, CLI
// exit code, audit record). Inside a package, plain wrapped errors are used; a
// kind, a reason and a hint are added where the caller's caller needs them.
//
// Values are immutable and safe for concurrent use. No error ever holds key
// material.
package errs

import (
	"errors"
	"fmt"
)

// Kind is the class of an error: what the caller can do about it. Kinds go over
// the wire and into exit codes: never reorder or reuse a value, add at the end.
type Kind uint8

// The kinds.
const (
	Other        Kind = iota // unclassified; a bug if a user sees it
	Invalid                  // the request can never succeed as sent
	NotFound                 // the named object does not exist
	Exists                   // the named object exists already
	Denied                   // the caller lacks the privilege, or is not who it must be
	Locked                   // the object's key cannot be had on this host
	Unavailable              // a dependency is down; the same request may succeed later
	Corrupt                  // stored bytes fail authentication or a checksum
	InvalidState             // the object's state does not allow it (powered on, in use, not backed up)
	NoSpace                  // the storage is full
	Canceled                 // the caller or an operator stopped it
)

var kindNames = [...]string{
	"Other", "Invalid", "NotFound", "Exists", "Denied", "Locked", "Unavailable",
	"Corrupt", "InvalidState", "NoSpace", "Canceled",
}

// String returns the kind's name, as it stands in the API.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// ParseKind is the reverse of [Kind.String]; an unknown name is Other.
func ParseKind(name string) Kind {
	for i, n := range kindNames {
		if n == name {
			return Kind(i)
		}
	}
	return Other
}

// Error is an error with what a user needs: the class, a machine-readable
// reason where one is defined (such as "KeyStateMissingInCache"), and a hint
// that names the next command.
type Error struct {
	Kind   Kind
	Reason string // may be empty
	Hint   string // may be empty; one sentence, no "hint:" in front, no period
	Err    error  // never nil
}

// Error implements error. It is the text of the cause alone: kind, reason and
// hint are shown apart.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New returns an error of kind k; format and args as in [fmt.Errorf], %w
// included.
func New(k Kind, format string, args ...any) *Error {
	return &Error{Kind: k, Err: fmt.Errorf(format, args...)}
}

// WithHint returns e with a hint added: the next command to try.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// WithReason returns e with a machine-readable reason added.
func (e *Error) WithReason(reason string) *Error {
	c := *e
	c.Reason = reason
	return &c
}

// Wrap puts context in front of err and keeps its kind, reason and hint, so
// that they survive the way up. It returns nil if err is nil.
func Wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	wrapped := fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
	var e *Error
	if !errors.As(err, &e) {
		return wrapped
	}
	return &Error{Kind: e.Kind, Reason: e.Reason, Hint: e.Hint, Err: wrapped}
}

// KindOf returns the kind of the first [Error] in err's chain, or Other.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Other
}

// HintOf returns the hint of the first [Error] in err's chain, or "".
func HintOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Hint
	}
	return ""
}

// ReasonOf returns the reason of the first [Error] in err's chain, or "".
func ReasonOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
