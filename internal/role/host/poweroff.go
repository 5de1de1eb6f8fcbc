package host

import (
	"context"
	"errors"
	"time"

	"strongroom/internal/errs"
)

// cleanupTimeout is how long a VM that is off may take to flush its disks.
const cleanupTimeout = 60 * time.Second

// powerOff asks the guest to shut down and waits, or with hard cuts the power.
// A VM that is off is no error.
func (h *Host) powerOff(ctx context.Context, what string, hard bool, timeout time.Duration) error {
	m, release, err := h.reserve(ctx, what)
	if err != nil {
		return err
	}
	defer release()
	reg, _ := m.state()
	r := m.run()
	if r == nil {
		return nil
	}
	if hard {
		r.order()
		err = r.qemu.Kill(ctx)
	} else {
		err = powerDown(ctx, r, timeout)
	}
	if err != nil {
		return errs.Wrap(err, "cannot power off VM %s", reg.Name)
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	select {
	case <-r.gone:
		return nil
	case <-ctx.Done():
		return errs.New(errs.Unavailable, "VM %s is off, but its disks are not closed yet", reg.Name)
	}
}

func powerDown(ctx context.Context, r *running, timeout time.Duration) error {
	wait, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := r.qemu.PowerDown(wait)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return errs.New(errs.Unavailable, "the guest did not shut down within %v", timeout).
			WithHint("wait longer with --timeout, or cut the power with --hard")
	}
	return err
}
