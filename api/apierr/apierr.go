// Package apierr carries errors over the API: an [errs.Error] becomes a Connect
// error with an ErrorDetail, and on the other side an errs.Error again, with
// the same text, kind, reason and hint.
//
// An error that has no kind is an internal one: its text may name files, peers
// or worse, so it stays in the server's log under a random id, and the caller
// gets the id.
//
// All functions are safe for concurrent use.
package apierr

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"strings"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
)

// Reasons that clients branch on.
const (
	// ReasonUnauthenticated is that of an [errs.Denied] error whose caller is not
	// logged in, or whose session or token has ended. One that is logged in but
	// lacks a privilege has another reason or none.
	ReasonUnauthenticated = "Unauthenticated"
	// ReasonThrottled is that of an [errs.Unavailable] error for who asks, or fails to
	// log in, too often: HTTP's 429.
	ReasonThrottled = "Throttled"
	// ReasonPasswordNeeded is that of the error of ImportProvider for a backup
	// that has a password, if none was given.
	ReasonPasswordNeeded = "PasswordNeeded"
)

// textMax is the longest error text that is sent, in bytes: errors travel in
// HTTP headers under some protocols, and those are bounded.
const textMax = 4096

// codes is the one mapping of kinds to Connect codes. Kinds that share a code
// are told apart by the ErrorDetail.
var codes = map[errs.Kind]connect.Code{
	errs.Other:        connect.CodeInternal,
	errs.Invalid:      connect.CodeInvalidArgument,
	errs.NotFound:     connect.CodeNotFound,
	errs.Exists:       connect.CodeAlreadyExists,
	errs.Denied:       connect.CodePermissionDenied,
	errs.Locked:       connect.CodeFailedPrecondition,
	errs.Unavailable:  connect.CodeUnavailable,
	errs.Corrupt:      connect.CodeDataLoss,
	errs.InvalidState: connect.CodeFailedPrecondition,
	errs.NoSpace:      connect.CodeResourceExhausted,
	errs.Canceled:     connect.CodeCanceled,
}

// kinds is the reverse, for errors without an ErrorDetail: those that the RPC
// library or something between client and server made.
var kinds = map[connect.Code]errs.Kind{
	connect.CodeCanceled:           errs.Canceled,
	connect.CodeInvalidArgument:    errs.Invalid,
	connect.CodeOutOfRange:         errs.Invalid,
	connect.CodeUnimplemented:      errs.Invalid,
	connect.CodeDeadlineExceeded:   errs.Unavailable,
	connect.CodeUnavailable:        errs.Unavailable,
	connect.CodeAborted:            errs.Unavailable,
	connect.CodeNotFound:           errs.NotFound,
	connect.CodeAlreadyExists:      errs.Exists,
	connect.CodePermissionDenied:   errs.Denied,
	connect.CodeUnauthenticated:    errs.Denied,
	connect.CodeResourceExhausted:  errs.NoSpace,
	connect.CodeFailedPrecondition: errs.InvalidState,
	connect.CodeDataLoss:           errs.Corrupt,
}

// To returns what a server answers for err; nil for nil. An error without a
// kind is logged to [slog.Default] and answered with a generic text; a context
// that ended is Canceled or Unavailable; a *connect.Error passes unchanged.
func To(err error) *connect.Error {
	if err == nil {
		return nil
	}
	var e *errs.Error
	if errors.As(err, &e) && e.Kind != errs.Other {
		return encode(e.Kind, e.Reason, e.Hint, err.Error())
	}
	if ce, ok := err.(*connect.Error); ok { // not errors.As: text around it would be lost
		return ce
	}
	switch {
	case errors.Is(err, context.Canceled):
		return encode(errs.Canceled, "", "", "the request was cancelled")
	case errors.Is(err, context.DeadlineExceeded):
		return encode(errs.Unavailable, "", "", "the request took longer than it was given")
	}
	id := incidentID()
	slog.Default().LogAttrs(context.Background(), slog.LevelError, "internal error",
		slog.String("incident", id), slog.Any("err", err))
	return encode(errs.Other, "", "look for incident "+id+" in the server's log", "internal error (incident "+id+")")
}

// From returns the [errs.Error] that a server's answer stands for; nil for nil.
// Errors that are not Connect errors pass unchanged, io.EOF among them. Texts
// are cut to a bound: a server cannot flood its caller.
func From(err error) error {
	var ce *connect.Error
	if err == nil || !errors.As(err, &ce) {
		return err
	}
	if d := detailOf(ce); d != nil {
		return &errs.Error{
			Kind:   errs.ParseKind(d.GetKind()),
			Reason: cut(d.GetReason()),
			Hint:   cut(d.GetHint()),
			Err:    errors.New(cut(ce.Message())),
		}
	}
	e := &errs.Error{Kind: kinds[ce.Code()], Err: errors.New(cut(ce.Message()))} // unknown code: errs.Other
	if ce.Code() == connect.CodeUnauthenticated {
		e.Reason = ReasonUnauthenticated
	}
	return e
}

func encode(kind errs.Kind, reason, hint, text string) *connect.Error {
	code := codes[kind]
	if kind == errs.Denied && reason == ReasonUnauthenticated {
		code = connect.CodeUnauthenticated
	}
	if kind == errs.Unavailable && reason == ReasonThrottled {
		code = connect.CodeResourceExhausted
	}
	ce := connect.NewError(code, errors.New(cut(text)))
	d, err := connect.NewErrorDetail(&strongroomv1.ErrorDetail{Kind: kind.String(), Reason: cut(reason), Hint: cut(hint)})
	if err == nil { // it fails only for a message that cannot be encoded, such as one with broken UTF-8, and cut mends that
		ce.AddDetail(d)
	}
	return ce
}

func detailOf(ce *connect.Error) *strongroomv1.ErrorDetail {
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if detail, ok := v.(*strongroomv1.ErrorDetail); ok {
				return detail
			}
		}
	}
	return nil
}

// cut makes s valid UTF-8 of at most textMax bytes.
func cut(s string) string {
	if len(s) > textMax {
		s = s[:textMax]
	}
	return strings.ToValidUTF8(s, "")
}

func incidentID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
