package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"sync"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Run is what a step sees of its task. It is used by the step's goroutine, only
// during the step; Progress may be called from others, too.
type Run struct {
	r    *runner
	task Task // as it was at the beginning of the step, plus what the step set

	mu     sync.Mutex // guards what follows
	stored time.Time  // when progress was stored last
	since  time.Time  // of the first progress with this total
	first  Progress
}

// Task returns the task, as it was when the step began.
func (r *Run) Task() Task { return r.task }

// Args decodes the task's arguments into v.
func (r *Run) Args(v any) error {
	if err := json.Unmarshal(r.task.Args, v); err != nil {
		return errs.New(errs.Corrupt, "arguments of task %s: %w", r.task.ID, err)
	}
	return nil
}

// Data decodes what the last SetData stored into v; v stays as it is if there
// was none.
func (r *Run) Data(v any) error {
	if len(r.task.Data) == 0 {
		return nil
	}
	if err := json.Unmarshal(r.task.Data, v); err != nil {
		return errs.New(errs.Corrupt, "data of task %s: %w", r.task.ID, err)
	}
	return nil
}

// SetData stores v for this and later steps, and for their undo, before it
// returns: what a step is about to create belongs here first, so that it can be
// found again. It returns an error if the engine stops; the step should return
// then.
func (r *Run) SetData(ctx context.Context, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("data of task %s: %w", r.task.ID, err)
	}
	r.task.Data = b
	_, err = r.r.save(ctx, func(t *Task) { t.Data = b })
	return err
}

// Progress tells how far the step is; total 0 means unknown, unit is "bytes" or
// "items". It may be called as often as one likes.
func (r *Run) Progress(ctx context.Context, done, total int64, unit string) {
	r.mu.Lock()
	now := time.Now()
	p := Progress{Done: done, Total: total, Unit: unit}
	if r.since.IsZero() || p.Total != r.first.Total || p.Done < r.first.Done {
		r.since, r.first = now, p
	}
	if gone := p.Done - r.first.Done; gone > 0 {
		p.Remaining = int64(math.Ceil(now.Sub(r.since).Seconds() / float64(gone) * float64(p.Total-p.Done)))
	}
	due := now.Sub(r.stored) >= progressEvery || total > 0 && done >= total
	if due {
		r.stored = now
	}
	r.mu.Unlock()
	if due {
		// Nobody depends on it: a lost progress is not an error.
		_, _ = r.r.save(ctx, func(t *Task) { t.Progress = &p })
	}
}

// runner runs one task in one goroutine.
type runner struct {
	e  *Engine
	id string

	mu       sync.Mutex // guards the fields below
	canceled bool
	stop     context.CancelFunc // ends the running Do, nil between steps
}

func (r *runner) requestCancel() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.canceled = true
	if r.stop != nil {
		r.stop()
	}
}

// doing registers the running Do for requestCancel.
func (r *runner) doing(stop context.CancelFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stop = stop
	if r.canceled && stop != nil {
		stop()
	}
}

// errGone says that the task is not in the store any more.
var errGone = errors.New("task is gone")

// save applies f to the stored task and returns the result. It tries until it
// succeeds or ctx has ended; f may run more than once.
func (r *runner) save(ctx context.Context, f func(*Task)) (Task, error) {
	return r.saveEnd(ctx, f, false)
}

// saveEnd is save; with end it also gives the task's locks up.
func (r *runner) saveEnd(ctx context.Context, f func(*Task), end bool) (Task, error) {
	var out Task
	pause := storeRetryMin
	for {
		// What a step did should be noted even while the engine stops: a
		// transaction that was begun is finished.
		err := r.e.write(context.WithoutCancel(ctx), func(tx *store.Tx) error {
			ctx := context.WithoutCancel(ctx)
			t, err := r.e.tasks.In(tx).Get(ctx, r.id)
			if errors.Is(err, store.ErrNotFound) {
				return errGone
			}
			if err != nil {
				return err
			}
			f(&t)
			out = t
			if err := r.e.tasks.In(tx).Put(ctx, r.id, t); err != nil || !end {
				return err
			}
			return r.unlock(ctx, tx, t)
		})
		if err == nil || errors.Is(err, errGone) {
			return out, err
		}
		r.e.log.LogAttrs(ctx, slog.LevelWarn, "cannot store state of task", slog.String("task", r.id), slog.Any("err", err))
		select {
		case <-ctx.Done():
			return Task{}, err
		case <-time.After(pause):
		}
		pause = min(2*pause, storeRetryMax)
	}
}

// unlock gives the locks of t up that it holds.
func (r *runner) unlock(ctx context.Context, tx *store.Tx, t Task) error {
	for _, name := range t.Locks {
		held, err := r.e.locks.In(tx).Get(ctx, name)
		if errors.Is(err, store.ErrNotFound) || err == nil && held.Task != r.id {
			continue
		}
		if err != nil {
			return err
		}
		if err := r.e.locks.In(tx).Delete(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// run takes the task from wherever it is to its end, or until ctx has ended.
func (r *runner) run(ctx context.Context) {
	for ctx.Err() == nil {
		ended, err := r.advance(ctx)
		if err != nil || ended {
			break
		}
	}
}

// advance takes one step forth or back.
func (r *runner) advance(ctx context.Context) (ended bool, err error) {
	// Decide and note what comes next in one transaction, so that a request to
	// cancel is either seen here, or comes when the step is begun already.
	act, step := actNothing, 0
	t, err := r.save(ctx, func(t *Task) { act, step = r.e.next(t) })
	if err != nil {
		return false, err
	}
	switch k := r.e.kinds[t.Kind]; act {
	case actDo:
		return false, r.do(ctx, t, k, step)
	case actUndo:
		return false, r.undo(ctx, t, k, step)
	case actEnd:
		return true, r.end(ctx)
	default:
		return true, nil
	}
}

type action uint8

const (
	actNothing action = iota // it has ended already
	actDo
	actUndo
	actEnd
)

// next decides what comes next and changes t to say so.
func (e *Engine) next(t *Task) (action, int) {
	now := time.Now().UTC()
	k, known := e.kinds[t.Kind]
	if t.State.Ended() {
		return actNothing, 0
	}
	if t.State == Queued {
		t.State, t.Started = Running, now
	}
	if !known || len(k.Steps) != len(t.Steps) {
		t.Error = failureOf(errs.New(errs.InvalidState, "this release does not know how to go on with a %s", t.Kind))
		return actEnd, 0
	}
	if !t.Undoing && t.CancelRequested && !e.beyondReturn(*t) && t.next() >= 0 {
		t.Undoing, t.Waiting, t.Progress = true, nil, nil
	}
	if t.Undoing {
		i := t.lastBegun()
		if i < 0 {
			return actEnd, 0
		}
		return actUndo, i
	}
	i := t.next()
	if i < 0 || t.Error != nil {
		return actEnd, 0
	}
	s := &t.Steps[i]
	if t.Waiting == nil {
		s.Attempts++
	}
	if s.State == StepPending {
		s.State, s.Started, t.Progress = StepRunning, now, nil
	}
	return actDo, i
}

// do runs step i forth.
func (r *runner) do(ctx context.Context, t Task, k Kind, i int) error {
	stepCtx, stop := context.WithCancel(ctx)
	defer stop()
	if !k.Steps[i].NoReturn {
		r.doing(stop)
		defer r.doing(nil)
	}
	if t.Waiting != nil {
		if wait(stepCtx, time.Until(t.Waiting.Until)) != nil {
			return ctx.Err() // canceled: advance sees it
		}
		var err error
		if t, err = r.save(ctx, func(t *Task) { t.Waiting = nil; t.Steps[i].Attempts++ }); err != nil {
			return err
		}
	}
	run := &Run{r: r, task: t}
	err := r.call(stepCtx, k.Steps[i].Do, run)
	var retry *Retry
	switch {
	case err == nil:
		_, err = r.save(ctx, func(t *Task) {
			t.Steps[i].State, t.Steps[i].Ended = StepDone, time.Now().UTC()
			t.Progress = nil
		})
	case ctx.Err() != nil:
		return ctx.Err() // the engine stops: the step is begun, and goes on another time
	case errors.As(err, &retry):
		_, err = r.save(ctx, func(t *Task) {
			t.Waiting = &Waiting{Until: time.Now().UTC().Add(retry.After), Reason: retry.Reason}
		})
	case stepCtx.Err() != nil:
		return nil // canceled: advance sees it
	default:
		r.e.log.LogAttrs(ctx, slog.LevelWarn, "task step failed", slog.String("task", t.ID), slog.String("op", t.Kind),
			slog.String("step", k.Steps[i].Name), slog.Any("err", err))
		_, err = r.save(ctx, func(t *Task) {
			t.Error, t.Waiting = failureOf(err), nil
			t.Undoing = !r.e.beyondReturn(*t)
		})
	}
	return err
}

// undo runs step i back.
func (r *runner) undo(ctx context.Context, t Task, k Kind, i int) error {
	if t.Waiting != nil {
		if err := wait(ctx, time.Until(t.Waiting.Until)); err != nil {
			return err
		}
		var err error
		if t, err = r.save(ctx, func(t *Task) { t.Waiting = nil }); err != nil {
			return err
		}
	}
	var err error
	if undo := k.Steps[i].Undo; undo != nil {
		err = r.call(ctx, undo, &Run{r: r, task: t})
	}
	var retry *Retry
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &retry):
		_, err = r.save(ctx, func(t *Task) {
			t.Waiting = &Waiting{Until: time.Now().UTC().Add(retry.After), Reason: retry.Reason}
		})
	default:
		if err != nil {
			r.e.log.LogAttrs(ctx, slog.LevelError, "task step cannot be undone", slog.String("task", t.ID),
				slog.String("op", t.Kind), slog.String("step", k.Steps[i].Name), slog.Any("err", err))
		}
		_, err = r.save(ctx, func(t *Task) {
			t.Steps[i].State, t.Steps[i].Ended = StepUndone, time.Now().UTC()
			if err != nil {
				t.Error = undoFailure(t.Error, k.Steps[i].Name, err)
			}
		})
	}
	return err
}

// undoFailure adds to the error of a task that one of its steps could not be
// undone: the user has to know both.
func undoFailure(was *Failure, step string, err error) *Failure {
	f := failureOf(fmt.Errorf("cannot undo step %q: %w", step, err))
	if was == nil {
		f.Kind = errs.KindOf(err).String()
		return f
	}
	c := *was
	c.Text += "; then: " + f.Text
	return &c
}

// end makes the task's final state durable.
func (r *runner) end(ctx context.Context) error {
	t, err := r.saveEnd(ctx, func(t *Task) {
		if t.State.Ended() {
			return
		}
		switch {
		case t.Error != nil:
			t.State = Failed
		case t.Undoing:
			t.State = Canceled
		default:
			t.State = Success
		}
		t.Ended, t.Waiting, t.Progress = time.Now().UTC(), nil, nil
	}, true)
	if err != nil {
		return err
	}
	r.e.log.LogAttrs(ctx, slog.LevelInfo, "task ended", slog.String("task", t.ID), slog.String("op", t.Kind),
		slog.String("target", t.Target), slog.String("state", string(t.State)))
	if r.e.ended.Add(1) >= pruneEvery {
		if err := r.e.prune(ctx); err != nil {
			r.e.log.LogAttrs(ctx, slog.LevelWarn, "cannot delete old tasks", slog.Any("err", err))
		}
	}
	return nil
}

// call runs f in a slot of the engine. A panic becomes an error: one broken
// step must not take the controller down again at every start.
func (r *runner) call(ctx context.Context, f func(context.Context, *Run) error, run *Run) (err error) {
	select {
	case r.e.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-r.e.slots }()
	defer func() {
		if p := recover(); p != nil {
			r.e.log.LogAttrs(ctx, slog.LevelError, "task step panicked", slog.String("task", r.id),
				slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			err = errs.New(errs.Other, "internal error: %v", p)
		}
	}()
	return f(ctx, run)
}

// wait returns nil after d, or ctx's error.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
