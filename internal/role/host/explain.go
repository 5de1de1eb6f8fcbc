package host

import (
	"errors"
	"io/fs"
	"syscall"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// causes gives the errors of the layers below their kind and the next step. The
// first that fits is taken.
var causes = []struct {
	cause error
	kind  errs.Kind
	hint  string
}{
	{blockdev.ErrNoSpace, errs.NoSpace, "free space on the datastore, then repeat the command; the VM is as it was"},
	{syscall.ENOSPC, errs.NoSpace, "free space on the datastore, then repeat the command; the VM is as it was"},
	{blockdev.ErrInUse, errs.InvalidState, "find out which process has the disk open"},
	{blockdev.ErrNotStorage, errs.Invalid, ""},
	{volume.ErrWrongKey, errs.Corrupt, "the key safe and the disk do not belong together; restore the VM folder from a backup"},
	{volume.ErrRekeying, errs.InvalidState, "finish the deep rekey that is under way: strongroom vm rekey NAME --deep"},
	{volume.ErrEncrypting, errs.InvalidState, "finish its encryption in place: strongroom vm encrypt NAME --in-place"},
	{volume.ErrUsed, errs.InvalidState, "somebody has written to the plain disk; restore it from a backup, or cut its file at that size"},
	{volume.ErrTooSmall, errs.Invalid, "encrypt it without --in-place"},
	{volume.ErrUnsupported, errs.InvalidState, "finish what another program began on it, with cryptsetup"},
	{volume.ErrCorrupt, errs.Corrupt, "restore the header from a backup: cryptsetup luksHeaderRestore"},
	{volume.ErrTruncated, errs.Corrupt, "restore the disk from a backup"},
	{volume.ErrNotVolume, errs.Corrupt, "restore the disk from a backup"},
	{keysafe.ErrVersion, errs.InvalidState, "use a newer release"},
	{keysafe.ErrInvalid, errs.Corrupt, "restore the VM folder from a backup"},
	{keyprovider.ErrNameCollision, errs.Exists, "remove this host's provider of that name first"},
	{keyprovider.ErrInvalidNative, errs.Invalid, ""},
	{parcel.ErrDoesNotOpen, errs.Denied, "join the host again"},
	{fs.ErrNotExist, errs.NotFound, ""},
	{fs.ErrExist, errs.Exists, ""},
	{fs.ErrPermission, errs.Denied, ""},
}

// explain gives err a kind if it has none and the cause is known. A failed
// system call that nothing else explains is storage or the machine failing.
func explain(err error) error {
	if err == nil || errs.KindOf(err) != errs.Other {
		return err
	}
	for _, c := range causes {
		if errors.Is(err, c.cause) {
			return &errs.Error{Kind: c.kind, Hint: c.hint, Err: err}
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return &errs.Error{Kind: errs.Unavailable, Err: err}
	}
	return err
}
