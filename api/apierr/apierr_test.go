package apierr_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/internal/errs"
)

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for k := errs.Invalid; k <= errs.Canceled; k++ {
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			cause := errs.New(k, "provider kp-1: %w", io.ErrUnexpectedEOF).WithReason("SomeReason").WithHint("strongroom provider show kp-1")
			sent := apierr.To(errs.Wrap(cause, "cannot rekey VM web-1"))
			got := apierr.From(sent)
			if want := "cannot rekey VM web-1: provider kp-1: unexpected EOF"; got.Error() != want {
				t.Errorf("text %q, want %q", got, want)
			}
			if errs.KindOf(got) != k || errs.ReasonOf(got) != "SomeReason" || errs.HintOf(got) != "strongroom provider show kp-1" {
				t.Errorf("got %#v", got)
			}
		})
	}
}

func TestKindsHaveOwnCodes(t *testing.T) {
	t.Parallel()
	for kind, want := range map[errs.Kind]connect.Code{
		errs.NotFound:    connect.CodeNotFound,
		errs.Denied:      connect.CodePermissionDenied,
		errs.Unavailable: connect.CodeUnavailable,
		errs.Locked:      connect.CodeFailedPrecondition,
	} {
		if got := apierr.To(errs.New(kind, "x")).Code(); got != want {
			t.Errorf("%v has code %v, want %v", kind, got, want)
		}
	}
	e := errs.New(errs.Denied, "session ended").WithReason(apierr.ReasonUnauthenticated)
	if got := apierr.To(e).Code(); got != connect.CodeUnauthenticated {
		t.Errorf("without a session: code %v", got)
	}
}

func TestNil(t *testing.T) {
	t.Parallel()
	if apierr.To(nil) != nil || apierr.From(nil) != nil {
		t.Error("nil is not nil")
	}
}

// TestInternalErrorDoesNotLeak changes the default logger, so it is not
// parallel.
func TestInternalErrorDoesNotLeak(t *testing.T) {
	var log bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(old)

	sent := apierr.To(fmt.Errorf("open /var/lib/secret-place: %w", io.ErrClosedPipe))
	got := apierr.From(sent)
	if strings.Contains(got.Error()+errs.HintOf(got), "secret-place") {
		t.Errorf("the cause leaked: %v", got)
	}
	if errs.KindOf(got) != errs.Other || sent.Code() != connect.CodeInternal {
		t.Errorf("kind %v, code %v", errs.KindOf(got), sent.Code())
	}
	_, id, ok := strings.Cut(strings.TrimSuffix(got.Error(), ")"), "incident ")
	if !ok || !strings.Contains(log.String(), "incident="+id) || !strings.Contains(log.String(), "secret-place") {
		t.Errorf("text %q and log %q do not belong together", got, log.String())
	}
}

func TestContextErrors(t *testing.T) {
	t.Parallel()
	if k := errs.KindOf(apierr.From(apierr.To(fmt.Errorf("wait: %w", context.Canceled)))); k != errs.Canceled {
		t.Errorf("cancelled is %v", k)
	}
	if k := errs.KindOf(apierr.From(apierr.To(context.DeadlineExceeded))); k != errs.Unavailable {
		t.Errorf("deadline is %v", k)
	}
}

func TestForeignErrors(t *testing.T) {
	t.Parallel()
	if err := apierr.From(io.EOF); !errors.Is(err, io.EOF) {
		t.Errorf("io.EOF became %v", err)
	}
	err := apierr.From(connect.NewError(connect.CodeUnauthenticated, errors.New("no")))
	if errs.KindOf(err) != errs.Denied || errs.ReasonOf(err) != apierr.ReasonUnauthenticated {
		t.Errorf("got %#v", err)
	}
	if got := apierr.To(connect.NewError(connect.CodeInvalidArgument, errors.New("bad"))); got.Code() != connect.CodeInvalidArgument {
		t.Errorf("a Connect error changed: %v", got)
	}
}

func TestTextIsBoundedAndValid(t *testing.T) {
	t.Parallel()
	got := apierr.From(apierr.To(errs.New(errs.Invalid, "%s\xff", strings.Repeat("x", 1<<20)).WithHint("\xff\xfe")))
	if n := len(got.Error()); n > 4096 {
		t.Errorf("text of %d bytes", n)
	}
	if errs.KindOf(got) != errs.Invalid || errs.HintOf(got) != "" {
		t.Errorf("the detail was lost: %#v", got)
	}
}
