package volumed

import (
	"context"
	"log/slog"
	"os"
	"sync"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/mirror"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// conversion moves a disk to another file while it is in use.
type conversion struct {
	from   blockdev.Device // the disk's old device
	target *disk           // of the new file; it is not served
	mirror *mirror.Mirror
	stop   context.CancelFunc
	ended  chan struct{} // closed when the copy has ended

	mu          sync.Mutex // guards what follows
	done, total int64
	err         error // of the copy
	held        bool
}

// Convert implements [volumectl.Handler].
func (e *engine) Convert(_ context.Context, name string, format volumectl.Format, file *os.File, dek *keymem.Key, rate int64) error {
	defer dek.Close() // the volume has made what it needs of it
	e.change.Lock()
	defer e.change.Unlock()
	d, err := e.find(name)
	if err == nil {
		err = convertible(d)
	}
	if err == nil && e.isDown() {
		err = errShutDown()
	}
	if err != nil {
		file.Close()
		return err
	}
	target, err := open(volumectl.Disk{Name: name, Format: format}, file, dek, nil)
	if err != nil {
		return classify(err)
	}
	c := &conversion{target: target, ended: make(chan struct{}), total: 2 * d.device.Size()}
	err = d.device.swap(func(old blockdev.Device) (blockdev.Device, error) {
		c.from = old
		c.mirror, err = mirror.New(old, target.device.now())
		return c.mirror, err
	})
	if err != nil {
		target.device.Close()
		return errs.New(errs.Invalid, "%w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	e.mu.Lock()
	d.conversion = c
	e.mu.Unlock()
	go func() {
		defer close(c.ended)
		// A plain file may hold zeros that the guest wrote as holes; those of a
		// volume were never written.
		err := c.mirror.Copy(ctx, mirror.CopyOptions{KeepHoles: d.volume != nil, Rate: rate, Progress: c.progress})
		if err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "disk not converted", slog.String("disk", name), slog.Any("err", err))
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = classify(err)
	}()
	return nil
}

func convertible(d *disk) error {
	switch {
	case d.conversion != nil:
		return errs.New(errs.Exists, "disk %s is being converted already", d.spec.Name)
	case d.spec.ReadOnly:
		return errs.New(errs.InvalidState, "disk %s is read-only", d.spec.Name)
	}
	return d.notRekeying()
}

func (c *conversion) progress(done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done, c.total = done, total
}

// status tells how far it has come.
func (c *conversion) status() *volumectl.Conversion {
	copied := c.copied()
	parted := c.mirror.Parted()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &volumectl.Conversion{Phase: volumectl.Copying, Done: c.done, Total: c.total}
	err := c.err
	if err == nil {
		err = classify(parted)
	}
	switch {
	case err != nil:
		s.Phase, s.Failure = volumectl.Failed, volumectl.FailureOf(err)
	case c.held:
		s.Phase = volumectl.Held
	case copied:
		s.Phase = volumectl.Synced
	}
	return s
}

func (c *conversion) copied() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// HoldConversion implements [volumectl.Handler].
func (e *engine) HoldConversion(_ context.Context, name string) error {
	e.change.Lock()
	defer e.change.Unlock()
	_, c, err := e.converting(name)
	if err != nil {
		return err
	}
	if err := c.mirror.Hold(); err != nil {
		return classify(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = true
	return nil
}

// converting returns a disk that is being converted. e.change is held.
func (e *engine) converting(name string) (*disk, *conversion, error) {
	d, err := e.find(name)
	if err != nil {
		return nil, nil, err
	}
	if d.conversion == nil {
		return nil, nil, errs.New(errs.InvalidState, "disk %s is not being converted", name)
	}
	return d, d.conversion, nil
}

// SwitchDisk implements [volumectl.Handler].
func (e *engine) SwitchDisk(_ context.Context, name string) error {
	e.change.Lock()
	defer e.change.Unlock()
	d, c, err := e.converting(name)
	if err != nil {
		return err
	}
	if c.status().Phase != volumectl.Held {
		return errs.New(errs.InvalidState, "the conversion of disk %s is not held", name)
	}
	d.rekey.end() // none is at work, and none may begin
	c.end(d, c.target.device.now())
	// The old disk's value may still be in the hands of a request that found it.
	next := &disk{spec: d.spec, device: d.device, volume: c.target.volume, vhost: e.vhostOf(d)}
	next.spec.Format = c.target.spec.Format
	e.mu.Lock()
	e.disks[name] = next
	e.mu.Unlock()
	if err := c.from.Close(); err != nil { // it is not needed any more
		e.log.LogAttrs(context.Background(), slog.LevelWarn, "old file of a disk not closed well", slog.String("disk", name), slog.Any("err", err))
	}
	return nil
}

// end stops the copy, if it has not ended, and leaves disk d with a device.
func (c *conversion) end(d *disk, device blockdev.Device) {
	c.stop()
	<-c.ended
	_ = d.device.swap(func(blockdev.Device) (blockdev.Device, error) {
		c.mirror.Release()
		return device, nil
	})
}

// conversionOf returns the conversion of a disk, or nil.
func (e *engine) conversionOf(d *disk) *conversion {
	e.mu.Lock()
	defer e.mu.Unlock()
	return d.conversion
}

// StopConversion implements [volumectl.Handler].
func (e *engine) StopConversion(_ context.Context, name string) error {
	e.change.Lock()
	defer e.change.Unlock()
	d, err := e.find(name)
	if err != nil || d.conversion == nil {
		return err
	}
	c := d.conversion
	c.end(d, c.from)
	e.mu.Lock()
	d.conversion = nil
	e.mu.Unlock()
	return classify(c.target.device.Close())
}

// stopCopy stops the copy of a disk that is about to be closed; both files are
// closed with it. e.change is held.
func (d *disk) stopCopy() {
	if d.conversion != nil {
		d.conversion.stop()
		<-d.conversion.ended
	}
}
