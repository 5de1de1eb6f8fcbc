package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Kind is a sort of task: its name and its steps, in order.
type Kind struct {
	Name  string // "vm.encrypt"
	Steps []StepFuncs
}

// StepFuncs is the code of a step.
type StepFuncs struct {
	Name string
	// Do does the step. It returns [*Retry] to be called again later.
	Do func(ctx context.Context, r *Run) error
	// Undo takes back what Do did, or began; nil if there is nothing to take
	// back. It may return [*Retry], too.
	Undo func(ctx context.Context, r *Run) error
	// NoReturn: once this step has begun, the task can neither be canceled nor
	// undone.
	NoReturn bool
}

// Retry is the error of a step that wants to be tried again.
type Retry struct {
	After  time.Duration
	Reason string
}

// Error implements error.
func (r *Retry) Error() string { return "to be retried: " + r.Reason }

// Defaults and limits of an [Engine].
const (
	DefaultMaxRunning   = 32
	DefaultKeepFinished = 1000

	// progressEvery bounds how often progress is stored.
	progressEvery = 500 * time.Millisecond
	// A store that does not answer is asked again after this, doubled up to the
	// maximum.
	storeRetryMin = 50 * time.Millisecond
	storeRetryMax = 5 * time.Second
	// pruneEvery is how many finished tasks are let pass between prunings.
	pruneEvery = 50
)

// Config of an [Engine].
type Config struct {
	DB    *store.DB
	Log   *slog.Logger // nil discards
	Kinds []Kind
	// MaxRunning bounds the steps at work at a time. Default: 32.
	MaxRunning int
	// KeepFinished is how many ended tasks are kept. Default: 1000.
	KeepFinished int
}

// Engine runs tasks. Its methods are safe for concurrent use.
type Engine struct {
	cfg   Config
	log   *slog.Logger
	kinds map[string]Kind
	tasks *store.Table[Task]
	locks *store.Table[lock]
	slots chan struct{}
	ended atomic.Int64 // since the last pruning

	// onWrite is called before and after each write of the engine; an error
	// stands for a store that failed before, or after, the write took effect.
	// Tests set it.
	onWrite func(after bool) error

	mu      sync.Mutex         // guards running
	running map[string]*runner // by task id
}

// lock is held by a task that has not ended, under a name of its Locks.
type lock struct {
	Task string `json:"task"`
}

// NewEngine returns an engine over cfg.DB. A kind without name or steps, or
// given twice, is a bug and panics.
func NewEngine(cfg Config) *Engine {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxRunning <= 0 {
		cfg.MaxRunning = DefaultMaxRunning
	}
	if cfg.KeepFinished <= 0 {
		cfg.KeepFinished = DefaultKeepFinished
	}
	e := &Engine{
		cfg:     cfg,
		log:     cfg.Log,
		kinds:   map[string]Kind{},
		tasks:   store.NewTable[Task](cfg.DB, "task", 1),
		locks:   store.NewTable[lock](cfg.DB, "task-target", 1),
		slots:   make(chan struct{}, cfg.MaxRunning),
		running: map[string]*runner{},
		onWrite: func(bool) error { return nil },
	}
	for _, k := range cfg.Kinds {
		if _, dup := e.kinds[k.Name]; dup || k.Name == "" || len(k.Steps) == 0 {
			panic(fmt.Sprintf("task: kind %q is there twice, or has no name or steps", k.Name))
		}
		for _, s := range k.Steps {
			if s.Name == "" || s.Do == nil {
				panic(fmt.Sprintf("task: kind %q has a step without name or Do", k.Name))
			}
		}
		e.kinds[k.Name] = k
	}
	return e
}

// Run resumes the tasks that have not ended, runs those that are submitted, and
// returns when ctx has ended and every step has returned. Tasks that are cut off
// so go on at the next Run. An error other than ctx's is the store's.
func (e *Engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before wg.Wait: steps must not outlive a store that failed
	if err := e.prune(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("cannot run tasks: %w", err)
	}
	err := e.tasks.Watch(ctx, "", 0, func(c store.Change[Task]) error {
		if c.Op != store.Put || c.Value.State.Ended() {
			return nil
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		r := e.running[c.Key]
		if r == nil {
			r = &runner{e: e, id: c.Key}
			e.running[c.Key] = r
			wg.Go(func() {
				defer func() {
					e.mu.Lock()
					delete(e.running, r.id)
					e.mu.Unlock()
				}()
				r.run(ctx)
			})
		}
		if c.Value.CancelRequested {
			r.requestCancel()
		}
		return nil
	})
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("cannot run tasks: %w", err)
}

// Request asks for a task.
type Request struct {
	Kind   string
	Target string // what it works on; may be empty
	// Locks name what it has for itself: no two tasks of one lock at a time. Nil:
	// its target, if it has one.
	Locks []string
	Owner string // the principal
	Args  any    // JSON; no secrets
}

// Submit stores a new task and returns it. If a task that has not ended holds one
// of its locks, it is refused with an InvalidState error that names that task.
func (e *Engine) Submit(ctx context.Context, q Request) (Task, error) {
	t, err := e.submit(ctx, q)
	if err != nil {
		return Task{}, errs.Wrap(err, "cannot start %s of %s", q.Kind, q.Target)
	}
	return t, nil
}

func (e *Engine) submit(ctx context.Context, q Request) (Task, error) {
	k, ok := e.kinds[q.Kind]
	if !ok {
		return Task{}, errs.New(errs.Invalid, "no task kind %q", q.Kind)
	}
	args, err := json.Marshal(q.Args)
	if err != nil {
		return Task{}, fmt.Errorf("arguments: %w", err)
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Task{}, err
	}
	t := Task{
		ID: id.String(), Kind: q.Kind, Target: q.Target, Locks: q.Locks, Owner: q.Owner, State: Queued,
		Args: args, Created: time.Now().UTC(),
	}
	if t.Locks == nil && t.Target != "" {
		t.Locks = []string{t.Target}
	}
	for _, s := range k.Steps {
		t.Steps = append(t.Steps, Step{Name: s.Name, State: StepPending})
	}
	err = e.write(ctx, func(tx *store.Tx) error {
		for _, name := range t.Locks {
			held, err := e.locks.In(tx).Get(ctx, name)
			switch {
			case err == nil:
				return e.busy(ctx, tx, q.Target, held.Task)
			case !errors.Is(err, store.ErrNotFound):
				return err
			}
			if err := e.locks.In(tx).Create(ctx, name, lock{Task: t.ID}); err != nil {
				return err
			}
		}
		return e.tasks.In(tx).Create(ctx, t.ID, t)
	})
	return t, err
}

func (e *Engine) busy(ctx context.Context, tx *store.Tx, target, id string) error {
	what := "task " + id
	if other, err := e.tasks.In(tx).Get(ctx, id); err == nil {
		what = fmt.Sprintf("%s (%s, %s)", what, other.Kind, other.State)
	}
	return errs.New(errs.InvalidState, "%s is busy with %s", target, what).
		WithReason("TaskInProgress").WithHint("strongroom task wait %s", id)
}

// Get returns the task with that id.
func (e *Engine) Get(ctx context.Context, id string) (Task, error) {
	t, err := e.tasks.Get(ctx, id)
	return t, noTask(err, id)
}

func noTask(err error, id string) error {
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) {
		return errs.New(errs.NotFound, "no task %s", id).WithHint("strongroom task ls")
	}
	return err
}

// List returns tasks, newest first: at most limit (0: all), with active only
// those that have not ended.
func (e *Engine) List(ctx context.Context, limit int, active bool) ([]Task, error) {
	r := store.Range{Descending: true}
	if !active {
		r.Limit = limit
	}
	entries, err := e.tasks.Scan(ctx, r)
	if err != nil {
		return nil, errs.Wrap(err, "cannot list tasks")
	}
	var out []Task
	for _, en := range entries {
		if active && en.Value.State.Ended() {
			continue
		}
		if limit > 0 && len(out) == limit {
			break
		}
		out = append(out, en.Value)
	}
	return out, nil
}

// Cancel asks the task to stop and to undo what it did, and returns at once. A
// task that has ended or passed its point of no return is refused with
// InvalidState.
func (e *Engine) Cancel(ctx context.Context, id string) (Task, error) {
	var out Task
	err := e.write(ctx, func(tx *store.Tx) error {
		t, err := e.tasks.In(tx).Get(ctx, id)
		if err != nil {
			return noTask(err, id)
		}
		switch {
		case t.State.Ended():
			return errs.New(errs.InvalidState, "it has ended: %s", t.State)
		case !t.Undoing && e.beyondReturn(t):
			return errs.New(errs.InvalidState, "it is beyond the point of no return and will go on to its end")
		}
		t.CancelRequested = true
		out = t
		return e.tasks.In(tx).Put(ctx, id, t)
	})
	if err != nil {
		return Task{}, errs.Wrap(err, "cannot cancel task %s", id)
	}
	return out, nil
}

// SetArgs replaces the arguments of a task that has not ended by what change
// makes of them. A step that is at work has those of before; the next one, and
// this one when it is begun again, have the new ones. An error of change is
// returned, and nothing is changed.
func (e *Engine) SetArgs(ctx context.Context, id string, change func(args json.RawMessage) (any, error)) (Task, error) {
	var out Task
	err := e.write(ctx, func(tx *store.Tx) error {
		t, err := e.tasks.In(tx).Get(ctx, id)
		if err != nil {
			return noTask(err, id)
		}
		if t.State.Ended() || t.Undoing {
			return errs.New(errs.InvalidState, "it has ended, or is being undone")
		}
		args, err := change(t.Args)
		if err != nil {
			return err
		}
		if t.Args, err = json.Marshal(args); err != nil {
			return err
		}
		out = t
		return e.tasks.In(tx).Put(ctx, id, t)
	})
	if err != nil {
		return Task{}, errs.Wrap(err, "cannot change task %s", id)
	}
	return out, nil
}

// beyondReturn reports whether a step without return has begun.
func (e *Engine) beyondReturn(t Task) bool {
	k := e.kinds[t.Kind]
	for i, s := range t.Steps {
		if i < len(k.Steps) && k.Steps[i].NoReturn && s.State != StepPending {
			return true
		}
	}
	return false
}

// errEnded ends a watch.
var errEnded = errors.New("ended")

// Watch calls f with the task as it is now and at every change, until it has
// ended (then it returns nil), f returns an error, or ctx ends.
func (e *Engine) Watch(ctx context.Context, id string, f func(Task) error) error {
	seen := false
	err := e.tasks.Watch(ctx, id, 0, func(c store.Change[Task]) error {
		switch {
		case c.Op == store.Put && c.Key == id:
			seen = true
			if err := f(c.Value); err != nil {
				return err
			}
			if c.Value.State.Ended() {
				return errEnded
			}
		case c.Op == store.Deleted && c.Key == id, c.Op == store.Synced && !seen:
			return noTask(store.ErrNotFound, id)
		}
		return nil
	})
	if err == errEnded {
		return nil
	}
	return err
}

// Wait returns the task when it has ended. Its own failure is in the task, not
// in the error.
func (e *Engine) Wait(ctx context.Context, id string) (Task, error) {
	var last Task
	err := e.Watch(ctx, id, func(t Task) error { last = t; return nil })
	if err != nil {
		return Task{}, errs.Wrap(err, "cannot wait for task %s", id)
	}
	return last, nil
}

// write is a transaction of the store, with the tests' faults around it.
func (e *Engine) write(ctx context.Context, f func(tx *store.Tx) error) error {
	if err := e.onWrite(false); err != nil {
		return err
	}
	if err := e.cfg.DB.Txn(ctx, f); err != nil {
		return err
	}
	return e.onWrite(true)
}

// prune deletes the oldest ended tasks beyond the limit.
func (e *Engine) prune(ctx context.Context) error {
	e.ended.Store(0)
	entries, err := e.tasks.Scan(ctx, store.Range{Descending: true})
	if err != nil {
		return err
	}
	kept := 0
	for _, en := range entries {
		if !en.Value.State.Ended() {
			continue
		}
		if kept++; kept <= e.cfg.KeepFinished {
			continue
		}
		if err := e.tasks.Delete(ctx, en.Key); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return nil
}
