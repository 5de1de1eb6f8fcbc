package volumed

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/errs"
)

// suspension holds the requests of all disks back.
type suspension struct {
	mu    sync.Mutex
	ended bool    // guarded by mu
	gates []*gate // guarded by mu: those that it has closed
}

// Suspend implements [volumectl.Handler].
func (e *engine) Suspend(ctx context.Context, limit time.Duration) (resume func() error, err error) {
	e.change.Lock()
	defer e.change.Unlock()
	e.mu.Lock()
	disks := slices.Collect(maps.Values(e.disks))
	e.mu.Unlock()
	for _, d := range disks {
		if err := d.undisturbed(); err != nil {
			return nil, err
		}
	}
	// Most of what is to become durable does before anybody has to wait.
	if err := flushAll(disks); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errs.New(errs.Unavailable, "the disks did not come to rest, or were not copied, within %v", limit).
		WithHint("try again when the datastore is less busy"))
	s := new(suspension)
	began := time.Now()
	stop := context.AfterFunc(ctx, func() {
		if s.end() {
			e.log.LogAttrs(ctx, slog.LevelWarn, "suspended disks go on by themselves", slog.Duration("after", limit))
		}
	})
	end := func() error {
		stop()
		defer cancel()
		if !s.end() {
			return context.Cause(ctx)
		}
		e.log.LogAttrs(ctx, slog.LevelInfo, "disks were suspended", slog.Duration("took", time.Since(began)))
		return nil
	}
	for _, d := range disks {
		if err = s.hold(ctx, d.device.gate); err != nil {
			break
		}
	}
	if err == nil {
		err = flushAll(disks)
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = end()
		return nil, err
	}
	return end, nil
}

// undisturbed returns an error if the files of a disk are being rewritten by
// others than its users.
func (d *disk) undisturbed() error {
	if d.conversion != nil {
		return errs.New(errs.InvalidState, "disk %s is being converted", d.spec.Name).WithHint("wait for the task that converts it")
	}
	return d.notRekeying()
}

// flushAll makes all that was written to disks durable, around their gates.
func flushAll(disks []*disk) error {
	var group errgroup.Group
	for _, d := range disks {
		group.Go(func() error { return errs.Wrap(classify(d.device.now().Flush()), "disk %s", d.spec.Name) })
	}
	return group.Wait()
}

// hold closes a gate, unless the suspension has ended.
func (s *suspension) hold(ctx context.Context, g *gate) error {
	if err := g.close(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		g.open()
		return context.Cause(ctx)
	}
	s.gates = append(s.gates, g)
	return nil
}

// end lets the requests go on. It reports whether they were held back till now.
func (s *suspension) end() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.ended = true
	for _, g := range s.gates {
		g.open()
	}
	return true
}
