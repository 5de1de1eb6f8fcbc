package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

func TestExplain(t *testing.T) {
	t.Parallel()
	if explain(nil) != nil {
		t.Error("no error became one")
	}
	for cause, want := range map[error]errs.Kind{
		blockdev.ErrNoSpace:          errs.NoSpace,
		syscall.ENOSPC:               errs.NoSpace,
		blockdev.ErrInUse:            errs.InvalidState,
		blockdev.ErrNotStorage:       errs.Invalid,
		volume.ErrWrongKey:           errs.Corrupt,
		volume.ErrUnsupported:        errs.InvalidState,
		volume.ErrCorrupt:            errs.Corrupt,
		volume.ErrTruncated:          errs.Corrupt,
		volume.ErrNotVolume:          errs.Corrupt,
		keysafe.ErrVersion:           errs.InvalidState,
		keysafe.ErrInvalid:           errs.Corrupt,
		keyprovider.ErrNameCollision: errs.Exists,
		keyprovider.ErrInvalidNative: errs.Invalid,
		parcel.ErrDoesNotOpen:        errs.Denied,
		fs.ErrNotExist:               errs.NotFound,
		fs.ErrExist:                  errs.Exists,
		fs.ErrPermission:             errs.Denied,
		syscall.EIO:                  errs.Unavailable,
		context.Canceled:             errs.Other, // the API knows it
		errors.New("a bug"):          errs.Other,
	} {
		err := fmt.Errorf("cannot do it: %w", cause)
		got := explain(err)
		if errs.KindOf(got) != want || !errors.Is(got, cause) || got.Error() != err.Error() {
			t.Errorf("explain(%v) is of kind %v, want %v", err, errs.KindOf(got), want)
		}
		if again := explain(got); again != got {
			t.Errorf("explaining twice changes %v to %v", got, again)
		}
	}
	// What has a kind keeps it, though a cause below would give another.
	kept := errs.New(errs.Locked, "%w", fs.ErrNotExist).WithHint("h")
	if got := explain(kept); errs.KindOf(got) != errs.Locked || errs.HintOf(got) != "h" {
		t.Errorf("explain(%v) = %v", kept, got)
	}
}
