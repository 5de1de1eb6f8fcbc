package host

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// errPowerChanged: the VM was powered on or off, or is to be, so that the rekey
// goes on elsewhere.
var errPowerChanged = errors.New("the VM was powered on or off meanwhile")

const (
	// rekeyPoll is how often a volume process is asked how far a rekey is.
	rekeyPoll = 200 * time.Millisecond
	// rekeyStop bounds the time until a rekey has stopped: that of a zone.
	rekeyStop = 30 * time.Second
)

// deepRekeyVM gives the encrypted ones among the disks named new DEKs under the
// KEK at ref. The volume process of a VM that runs does it, this process that of
// one that is off; when the VM is powered on or off, it goes on there.
func (h *Host) deepRekeyVM(ctx context.Context, id string, disks []string, ref keysafe.Ref, perSecond int64, r report) error {
	rate := volume.NewRate(perSecond)
	for {
		m, err := h.machine(id)
		if err != nil {
			return err
		}
		end := m.rekeysAt(rate)
		if running := m.run(); running != nil {
			err = h.deepRekeyRunning(ctx, m, running, disks, ref, rate, r)
		} else {
			err = h.deepRekeyOffline(ctx, id, disks, ref, rate, r)
		}
		end()
		if !errors.Is(err, errPowerChanged) || ctx.Err() != nil {
			return err
		}
	}
}

// setRekeyRate changes how fast the deep rekey of a VM that is under way here may
// rewrite, in bytes a second; 0: any number.
func (h *Host) setRekeyRate(id string, perSecond int64) error {
	m, err := h.machine(id)
	if err != nil {
		return err
	}
	if perSecond < 0 {
		return errs.New(errs.Invalid, "a rate of %d bytes a second", perSecond)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rekeyRate == nil {
		return errs.New(errs.InvalidState, "no deep rekey of %s is at work", m.reg.Name)
	}
	m.rekeyRate.Set(perSecond)
	return nil
}

// deepRekeyOffline rekeys the disks of a VM that is off, until it is to be
// powered on.
func (h *Host) deepRekeyOffline(ctx context.Context, id string, disks []string, ref keysafe.Ref, rate *volume.Rate, r report) error {
	o, err := h.takeOffline(ctx, id, "this")
	if errors.Is(err, errPoweredOn) {
		return errPowerChanged
	}
	if err != nil {
		return err
	}
	defer o.release()
	ctx, end := o.m.interruptible(ctx)
	defer end()
	indices, err := o.encrypted(disks)
	if err == nil {
		err = o.withoutSnapshots()
	}
	if err != nil {
		return err
	}
	p := newDisksProgress(r, o.vm, indices, 1)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("rekeying "+d.Name, d.SizeBytes)
		if err := recrypt.DeepRekey(ctx, o.folder(), d.File, ref, h.kek, rate, progress); err != nil {
			return errs.Wrap(err, "cannot rekey %s of %s", d.Name, o.vm.Name)
		}
		h.logRekey(ctx, o.vm, d, ref, "deep")
		done()
	}
	return o.setKey(len(disks) == 0, ref)
}

// deepRekeyRunning rekeys the disks of a VM that runs, until it is off. The VM is
// not reserved meanwhile: whatever else wants it finds its disks being rekeyed.
func (h *Host) deepRekeyRunning(ctx context.Context, m *machine, running *running, disks []string, ref keysafe.Ref, rate *volume.Rate, r report) error {
	o, err := h.online(m)
	if err != nil {
		return err
	}
	indices, err := o.encrypted(disks)
	if err == nil {
		err = o.withoutSnapshots()
	}
	if err != nil {
		return err
	}
	p := newDisksProgress(r, o.vm, indices, 1)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("rekeying "+d.Name, d.SizeBytes)
		live := liveRekey{h, m, running, d.Name, filepath.Join(o.dir, d.File), ref, rate}
		if err := live.run(ctx, progress); err != nil {
			return errs.Wrap(err, "cannot rekey %s of %s", d.Name, o.vm.Name)
		}
		h.logRekey(ctx, o.vm, d, ref, "deep")
		done()
	}
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	if o, err = h.online(m); err != nil {
		return err
	}
	return o.setKey(len(disks) == 0, ref)
}

// online returns a VM that runs, as its folder tells of it.
func (h *Host) online(m *machine) (*offline, error) {
	reg, _ := m.state()
	dir, vm, err := h.read(reg)
	if err != nil {
		return nil, err
	}
	return &offline{m: m, dir: dir, vm: vm}, nil
}

// liveRekey is the deep rekey of a disk that a volume process has open.
type liveRekey struct {
	h       *Host
	m       *machine
	running *running
	disk    string
	path    string
	ref     keysafe.Ref
	rate    *volume.Rate
}

// run follows the rekey to its end. It finds one at work that an earlier agent
// began, and begins again in a volume process that was started anew. When ctx
// ends, the rekey stops, or is undone if no data were moved yet.
func (l *liveRekey) run(ctx context.Context, progress recrypt.Progress) error {
	began := false // by this call, which then knows what a failure is about
	for {
		rekey, err := l.status(ctx)
		switch {
		case err != nil:
		case rekey != nil && rekey.Running:
			progress(rekey.Done, rekey.Total)
			if rate := l.rate.PerSecond(); rekey.Rate != rate {
				err = l.running.process().Rekey(ctx, l.disk, nil, nil, rate)
			}
		case began && rekey != nil && rekey.Failure != nil:
			return rekey.Failure.Err()
		default:
			var finished bool
			if finished, err = l.begin(ctx, began); finished {
				return nil
			}
			began = began || err == nil
		}
		if err := l.wait(ctx, err); err != nil {
			return err
		}
	}
}

// status asks the volume process about the rekey; nil: there is none.
func (l *liveRekey) status(ctx context.Context) (*volumectl.Rekey, error) {
	p := l.running.process()
	if p == nil {
		return nil, errRestarting()
	}
	status, err := p.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range status.Disks {
		if d.Disk == l.disk {
			return d.Rekey, nil
		}
	}
	return nil, errRestarting()
}

func errRestarting() error {
	return errs.New(errs.Unavailable, "the volume process is being started again").WithHint("try again")
}

// begin has the volume process begin the rekey, or go on with it. If this call
// has begun it before, it may be finished.
func (l *liveRekey) begin(ctx context.Context, began bool) (finished bool, err error) {
	release, err := l.m.acquire(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	safes, info, err := peek(l.path)
	if err != nil {
		return false, err
	}
	if began && safes.Next == nil && safes.Current.KEK == l.ref {
		return true, nil
	}
	// A snapshot may have been made since the last disk was done.
	o, err := l.h.online(l.m)
	if err == nil {
		err = o.withoutSnapshots()
	}
	if err != nil {
		return false, err
	}
	// Of a rekey that was finished by an earlier call, too: it may have been cut
	// short after its last commit.
	dek, safe, err := recrypt.NextDEK(ctx, info.UUID, safes, l.ref, l.h.kek)
	if err != nil {
		return false, err
	}
	defer dek.Close()
	p := l.running.process()
	if p == nil {
		return false, errRestarting()
	}
	return false, p.Rekey(ctx, l.disk, dek, safe, l.rate.PerSecond())
}

// wait returns when it is time to look again, or with err if that will not pass
// by itself.
func (l *liveRekey) wait(ctx context.Context, err error) error {
	timer := time.NewTimer(rekeyPoll)
	defer timer.Stop()
	select {
	case <-l.running.gone:
		return errPowerChanged
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), l.stop(context.WithoutCancel(ctx)))
	case <-timer.C:
	}
	if err == nil || passing(err) {
		return nil
	}
	return err
}

// stop stops the rekey at a safe point. A volume process that is gone has none
// at work.
func (l *liveRekey) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rekeyStop)
	defer cancel()
	p := l.running.process()
	if p == nil {
		return nil
	}
	err := p.StopRekey(ctx, l.disk)
	if errs.KindOf(err) == errs.Unavailable || errs.KindOf(err) == errs.NotFound {
		return nil
	}
	return err
}

// notRekeying returns an error if a deep rekey of one of the disks named is under
// way, or an encryption in place. A header that cannot be read is for others to tell
// of.
func (o *offline) notRekeying(disks []string) error {
	indices, err := chosen(o.vm, disks)
	if err == nil {
		err = notEncrypting(o.vm, indices)
	}
	if err != nil {
		return err
	}
	for _, i := range indices {
		d := o.vm.Disks[i]
		if d.Format != bundle.FormatLUKS {
			continue
		}
		if safes, _, err := peek(filepath.Join(o.dir, d.File)); err == nil && safes.Next != nil {
			return errs.New(errs.InvalidState, "a deep rekey of %s of %s is under way", d.Name, o.vm.Name).
				WithReason(strongroomv1.ReasonRekeyInProgress).WithHint("finish it first: strongroom vm rekey %s --deep", o.vm.Name)
		}
	}
	return nil
}
