package localvolume

import (
	"context"
	"errors"
	"path/filepath"

	"strongroom/internal/block/blockfuse"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
)

// newFUSE shows the volume as a file.
func newFUSE(v *volume.Volume, opts ServeOptions) (front, error) {
	file, err := filepath.Abs(opts.File)
	if err != nil {
		return front{}, err
	}
	m, err := blockfuse.New(opts.Mount, v, blockfuse.Options{ReadOnly: opts.ReadOnly, Source: file})
	switch {
	case errors.Is(err, blockfuse.ErrMountPoint):
		return front{}, errs.New(errs.Invalid, "%w", err).WithHint("give the path of a file that is empty or not there; the volume appears in its place")
	case errors.Is(err, blockfuse.ErrMounted):
		return front{}, errs.New(errs.Exists, "%w", err).WithHint("choose another file, or unmount it: umount %s", opts.Mount)
	case errors.Is(err, blockfuse.ErrDead):
		return front{}, errs.New(errs.InvalidState, "%w", err).WithHint("unmount it: fusermount3 -u %s", opts.Mount)
	case err != nil:
		return front{}, explain(err)
	}
	return front{
		address: m.Path(),
		serve: func() error {
			<-m.Done()
			return nil
		},
		stop: func(ctx context.Context) error {
			err := m.Unmount(ctx)
			if errors.Is(err, blockfuse.ErrBusy) {
				err = errs.New(errs.InvalidState, "%w: those who use it get errors from now on", err).
					WithHint("when they have ended: fusermount3 -u %s", m.Path())
			}
			return err
		},
	}, nil
}
