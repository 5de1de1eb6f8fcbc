package volume

import (
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
)

// CancelRekey undoes a deep rekey that has moved no data yet: the volume is then
// as it was before, with its old DEK, and nothing is left of the new one. It
// returns [ErrRekeying] if data have been moved, which only [Volume.Rekey] can
// bring to an end, or if that runs. Without a rekey it does nothing.
//
// After another error the volume works on and needs both DEKs until CancelRekey
// or Rekey has succeeded.
func (v *Volume) CancelRekey() error {
	if err := v.cancelRekey(); err != nil {
		return fmt.Errorf("cannot undo the rekey of volume %s: %w", v.uuid, err)
	}
	return nil
}

func (v *Volume) cancelRekey() error {
	if v.readOnly {
		return blockdev.ErrReadOnly
	}
	if !v.rekeying.TryLock() {
		return fmt.Errorf("%w: by another call", ErrRekeying)
	}
	defer v.rekeying.Unlock()
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return err
	}
	defer v.guard.Leave(pass)
	if v.next == nil {
		return nil
	}
	if v.boundary.Load() != 0 {
		return fmt.Errorf("%w: part of its data is under the new key", ErrRekeying)
	}
	r := &rekey{v: v, storage: watchedStorage{v}}
	if r.header, err = r.readHeader(); err != nil {
		return err
	}
	if err := r.locked(r.undo); err != nil {
		return err
	}
	return v.forgetNext()
}

// undo writes the header of before the rekey, inside locked, and wipes what is
// left of the rekey.
func (r *rekey) undo() error {
	_, underWay, err := r.header.Reencryption()
	if err != nil {
		return err
	}
	if underWay {
		if err := r.header.CancelReencryption(); err != nil {
			return err
		}
	}
	// Also if the header says so already: an earlier call may have reached one
	// copy only.
	if err := r.header.VerifyKey(r.v.dek); err != nil {
		return fmt.Errorf("%w: its key is another one", errors.Join(ErrChanged, err))
	}
	if err := r.header.Commit(r.storage); err != nil {
		return err
	}
	return wipeFree(r.v.dev, r.storage, r.header)
}

// forgetNext makes the old key the only one.
func (v *Volume) forgetNext() error {
	all, err := v.guard.EnterAll()
	if err != nil {
		return err
	}
	defer v.guard.Leave(all)
	v.next.Close()
	v.nextDEK.Close()
	v.nextDEK, v.next = nil, nil
	return nil
}
