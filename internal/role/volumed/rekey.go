package volumed

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// errStopped ends a rekey at its next safe point.
var errStopped = errors.New("it was stopped")

// rekeys is what becomes of the deep rekeys of one disk: at most one is at work.
type rekeys struct {
	change sync.Mutex // held while one is begun or stopped

	mu   sync.Mutex
	last *rekeying // guarded by mu: the one at work, or that failed; nil: none
	down bool      // guarded by mu: none may begin any more
}

// rekeying is a deep rekey that was begun in this process.
type rekeying struct {
	rate  *volume.Rate
	stop  context.CancelCauseFunc
	ended chan struct{}
	err   error // why it failed, before ended is closed

	mu          sync.Mutex // guards what follows
	done, total int64      // bytes; total is 0 before the first zone
	since       time.Time  // when the first zone was done
	first       int64      // done at that time
}

// Rekey implements [volumectl.Handler].
func (e *engine) Rekey(_ context.Context, name string, next *keymem.Key, safe *keysafe.Safe, rate int64) error {
	d, err := e.find(name)
	if err == nil {
		err = d.canRekey()
	}
	if err == nil && e.conversionOf(d) != nil {
		err = errs.New(errs.InvalidState, "disk %s is being converted", name).WithHint("wait for the task that converts it")
	}
	if err != nil {
		next.Close()
		return err
	}
	d.rekey.change.Lock()
	defer d.rekey.change.Unlock()
	if r := d.rekey.atWork(); r != nil {
		next.Close()
		if next != nil {
			return errs.New(errs.InvalidState, "a rekey of disk %s is at work", name)
		}
		r.rate.Set(rate)
		return nil
	}
	ctx, stop := context.WithCancelCause(context.Background())
	r := &rekeying{rate: volume.NewRate(rate), stop: stop, ended: make(chan struct{})}
	if !d.rekey.begin(r) {
		stop(nil)
		next.Close()
		return errShutDown()
	}
	log := e.log.With(slog.String("disk", name))
	log.LogAttrs(ctx, slog.LevelInfo, "deep rekey begins", slog.Bool("new", next != nil), slog.Int64("rate", rate))
	go func() {
		defer close(r.ended)
		defer stop(nil)
		defer next.Close()
		err := d.volume.Rekey(ctx, volume.RekeyOptions{NewDEK: next, NewSafe: safe, Rate: r.rate, Progress: r.progress})
		switch {
		case err == nil:
			log.LogAttrs(ctx, slog.LevelInfo, "deep rekey is done")
		case errors.Is(err, errStopped):
			log.LogAttrs(ctx, slog.LevelInfo, "deep rekey stopped")
		default:
			r.err = classify(err)
			log.LogAttrs(ctx, slog.LevelError, "deep rekey failed", slog.Any("err", err))
		}
	}()
	return nil
}

func (d *disk) canRekey() error {
	switch {
	case d.volume == nil:
		return errs.New(errs.Invalid, "disk %s is not encrypted", d.spec.Name)
	case d.spec.ReadOnly:
		return errs.New(errs.InvalidState, "disk %s is read-only", d.spec.Name)
	}
	return nil
}

// notRekeying returns an error if a deep rekey of the disk is under way.
func (d *disk) notRekeying() error {
	if d.volume == nil {
		return nil
	}
	info, err := d.volume.Inspect()
	if err != nil {
		return classify(err)
	}
	if info.Rekey != nil || d.rekey.atWork() != nil {
		return errs.New(errs.InvalidState, "a deep rekey of disk %s is under way", d.spec.Name)
	}
	return nil
}

// StopRekey implements [volumectl.Handler].
func (e *engine) StopRekey(_ context.Context, name string) error {
	d, err := e.find(name)
	if err == nil {
		err = d.canRekey()
	}
	if err != nil {
		return err
	}
	d.rekey.change.Lock()
	defer d.rekey.change.Unlock()
	d.rekey.halt()
	err = d.volume.CancelRekey()
	if errors.Is(err, volume.ErrRekeying) { // data were moved: it can only go on
		err = nil
	}
	return classify(err)
}

// begin notes r as the one at work, unless the disk is being closed.
func (k *rekeys) begin(r *rekeying) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.down {
		k.last = r
	}
	return !k.down
}

// atWork returns the rekey that is at work, or nil.
func (k *rekeys) atWork() *rekeying {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last == nil || k.last.hasEnded() {
		return nil
	}
	return k.last
}

// halt stops the rekey that is at work, if one is, waits for it, and forgets it.
func (k *rekeys) halt() {
	k.mu.Lock()
	r := k.last
	k.last = nil
	k.mu.Unlock()
	if r != nil {
		r.stop(errStopped)
		<-r.ended
	}
}

// end is halt for a disk that is being closed.
func (k *rekeys) end() {
	k.mu.Lock()
	k.down = true
	k.mu.Unlock()
	k.halt()
}

// status describes the rekey of a disk whose header tells of it as info; nil if
// there is nothing to tell.
func (k *rekeys) status(info *volume.RekeyInfo) *volumectl.Rekey {
	k.mu.Lock()
	r := k.last
	k.mu.Unlock()
	out := new(volumectl.Rekey)
	if info != nil {
		out.Done, out.Total = info.Done, info.Total
	}
	switch {
	case r == nil && info == nil:
		return nil
	case r == nil:
	case !r.hasEnded():
		out.Running, out.Rate = true, r.rate.PerSecond()
		r.report(out)
	case r.err != nil:
		out.Failure = volumectl.FailureOf(r.err)
	case info == nil:
		return nil
	}
	return out
}

func (r *rekeying) hasEnded() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

func (r *rekeying) progress(done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.total == 0 {
		r.since, r.first = time.Now(), done
	}
	r.done, r.total = done, total
}

// report puts how far r is into out, which holds what the header says.
func (r *rekeying) report(out *volumectl.Rekey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.total == 0 {
		return
	}
	out.Done, out.Total = r.done, r.total
	if took := time.Since(r.since); took > 0 {
		out.Speed = int64(float64(r.done-r.first) / took.Seconds())
	}
}
