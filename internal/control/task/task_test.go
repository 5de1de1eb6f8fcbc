package task_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"strongroom/internal/control/store"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func open(t *testing.T) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

// start runs e until the returned stop is called, or the test ends.
func start(t *testing.T, e *task.Engine) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

var errKilled = errors.New("killed")

// world is what the steps change, and where time can stop: the n-th point of
// interest (before or after each write of the engine and each effect of a step)
// kills the controller, and from then on nothing happens any more.
type world struct {
	mu      sync.Mutex
	effects []string
	points  int
	killAt  int // 0: never
	dead    bool
	onDeath func()
}

func (w *world) point() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		return errKilled
	}
	w.points++
	if w.points == w.killAt {
		w.dead = true
		w.onDeath()
		return errKilled
	}
	return nil
}

// add and remove are idempotent, as a step has to be.
func (w *world) add(name string) error {
	if err := w.point(); err != nil {
		return err
	}
	w.mu.Lock()
	if !slices.Contains(w.effects, name) {
		w.effects = append(w.effects, name)
	}
	w.mu.Unlock()
	return w.point()
}

func (w *world) remove(name string) error {
	if err := w.point(); err != nil {
		return err
	}
	w.mu.Lock()
	w.effects = slices.DeleteFunc(w.effects, func(s string) bool { return s == name })
	w.mu.Unlock()
	return w.point()
}

// outcome is what must be the same with and without a kill.
type outcome struct {
	State   task.State
	Error   string
	Effects []string
	Steps   []task.StepState
}

// TestKilledAnywhere kills the engine at every point of a task that succeeds,
// one that fails, one that is canceled, and one that fails beyond its point of
// no return, and starts it again: the end must always be the same.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, scenario := range []string{"succeed", "fail", "cancel", "fail beyond return", "retry"} {
		t.Run(scenario, func(t *testing.T) {
			t.Parallel()
			db := open(t)
			want, points := killedAt(t, db, scenario, 0)
			t.Logf("%d points, outcome %+v", points, want)
			if points < 10 {
				t.Fatalf("only %d points of interest", points)
			}
			for n := 1; n <= points; n++ {
				got, _ := killedAt(t, db, scenario, n)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("killed at point %d of %d: %s", n, points, diff)
				}
			}
		})
	}
}

// killedAt runs a task of the scenario, kills the engine at point n, runs
// another engine without faults, and returns the outcome.
func killedAt(t *testing.T, db *store.DB, scenario string, n int) (outcome, int) {
	t.Helper()
	ctx := deadline(t)
	w := &world{killAt: n}
	var engine *task.Engine
	kind := task.Kind{Name: "test", Steps: []task.StepFuncs{
		{
			Name: "one",
			Do: func(ctx context.Context, r *task.Run) error {
				if err := r.SetData(ctx, map[string]string{"made": "one"}); err != nil {
					return err
				}
				return w.add("one")
			},
			Undo: func(_ context.Context, r *task.Run) error {
				var made struct{ Made string }
				if err := r.Data(&made); err != nil {
					return err
				}
				if made.Made == "" {
					return nil // killed before it was noted: nothing was made
				}
				return w.remove(made.Made)
			},
		},
		{
			Name:     "two",
			NoReturn: scenario == "fail beyond return",
			Do: func(ctx context.Context, r *task.Run) error {
				if err := w.add("two"); err != nil {
					return err
				}
				if scenario == "cancel" {
					if _, err := engine.Cancel(context.WithoutCancel(ctx), r.Task().ID); err != nil {
						return err
					}
					<-ctx.Done()
					return ctx.Err()
				}
				if scenario == "retry" && r.Task().Steps[1].Attempts < 2 {
					return &task.Retry{After: time.Millisecond, Reason: "not yet"}
				}
				return nil
			},
			Undo: func(context.Context, *task.Run) error { return w.remove("two") },
		},
		{
			Name: "three",
			Do: func(_ context.Context, r *task.Run) error {
				if err := w.add("three"); err != nil {
					return err
				}
				if strings.HasPrefix(scenario, "fail") {
					return errs.New(errs.NoSpace, "no room").WithHint("make room")
				}
				return nil
			},
			Undo: func(context.Context, *task.Run) error { return w.remove("three") },
		},
	}}
	request := task.Request{Kind: "test", Target: fmt.Sprintf("vm/%s-%d", scenario, n), Owner: "me"}
	newEngine := func() *task.Engine { return task.NewEngine(task.Config{DB: db, Kinds: []task.Kind{kind}}) }

	// The first life.
	engine = newEngine()
	life, kill := context.WithCancel(ctx)
	defer kill()
	w.onDeath = kill
	engine.SetFault(func(bool) error { return w.point() })
	ended := make(chan error, 1)
	go func() { ended <- engine.Run(life) }()
	submitted, err := engine.Submit(life, request)
	if err == nil {
		if _, err = engine.Wait(life, submitted.ID); err == nil {
			kill()
		}
	}
	if err != nil && n == 0 {
		t.Fatal(err)
	}
	<-life.Done()
	if err := <-ended; err != nil {
		t.Fatalf("Run: %v", err)
	}

	// The second life, without faults.
	w.mu.Lock()
	points := w.points
	w.killAt, w.dead = 0, false
	w.mu.Unlock()
	engine = newEngine()
	life2, end := context.WithCancel(ctx)
	defer end()
	go func() { ended <- engine.Run(life2) }()
	all, err := engine.List(ctx, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(x task.Task) bool { return x.Target == request.Target })
	if i < 0 { // killed before Submit took effect
		again, err := engine.Submit(ctx, request)
		if err != nil {
			t.Fatal(err)
		}
		all, i = []task.Task{again}, 0
	}
	final, err := engine.Wait(ctx, all[i].ID)
	if err != nil {
		t.Fatal(err)
	}
	// Its target is free again.
	if _, err := engine.Cancel(ctx, final.ID); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("Cancel of an ended task: %v", err)
	}
	end()
	if err := <-ended; err != nil {
		t.Fatalf("Run: %v", err)
	}
	if _, err := task.NewEngine(task.Config{DB: db, Kinds: []task.Kind{kind}}).Submit(ctx, request); err != nil {
		t.Errorf("the target is not free after the end: %v", err)
	}
	drop(t, db, request.Target)

	o := outcome{State: final.State, Effects: w.effects}
	slices.Sort(o.Effects)
	if final.Error != nil {
		o.Error = final.Error.Kind + ": " + final.Error.Text + " (" + final.Error.Hint + ")"
	}
	for _, s := range final.Steps {
		o.Steps = append(o.Steps, s.State)
	}
	if len(o.Effects) == 0 {
		o.Effects = nil
	}
	return o, points
}

// drop removes the queued task of a target, so that a later engine does not run
// it.
func drop(t *testing.T, db *store.DB, target string) {
	t.Helper()
	e := task.NewEngine(task.Config{DB: db})
	active, err := e.List(t.Context(), 0, true)
	if err != nil || len(active) != 1 || active[0].Target != target {
		t.Fatalf("active tasks: %+v, %v", active, err)
	}
	if err := store.NewTable[task.Task](db, "task", 1).Delete(t.Context(), active[0].ID); err != nil {
		t.Fatal(err)
	}
}

func TestOneTaskPerTarget(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	release := make(chan struct{})
	e := task.NewEngine(task.Config{DB: open(t), Kinds: []task.Kind{{Name: "wait", Steps: []task.StepFuncs{{
		Name: "wait",
		Do: func(ctx context.Context, r *task.Run) error {
			r.Progress(ctx, 1, 2, "items")
			r.Progress(ctx, 2, 2, "items") // complete: stored at once
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
	}}}}})
	start(t, e)
	first, err := e.Submit(ctx, task.Request{Kind: "wait", Target: "vm/web-1", Owner: "ann", Args: map[string]int{"a": 1}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = e.Submit(ctx, task.Request{Kind: "wait", Target: "vm/web-1", Owner: "bob"})
	if errs.KindOf(err) != errs.InvalidState || !strings.Contains(err.Error(), first.ID) || !strings.Contains(errs.HintOf(err), first.ID) {
		t.Errorf("second task of a target: %v (hint %q)", err, errs.HintOf(err))
	}
	if _, err := e.Submit(ctx, task.Request{Kind: "nonsense"}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("unknown kind: %v", err)
	}
	released := false
	sawProgress := false
	err = e.Watch(ctx, first.ID, func(x task.Task) error {
		if p := x.Progress; p != nil && *p == (task.Progress{Done: 2, Total: 2, Unit: "items"}) && x.CurrentStep() == "wait" {
			sawProgress = true
			if !released {
				released = true
				close(release)
			}
		}
		return nil
	})
	if err != nil || !sawProgress {
		t.Fatalf("Watch: %v, progress seen: %v", err, sawProgress)
	}
	got, err := e.Get(ctx, first.ID)
	if err != nil || got.State != task.Success || got.Err() != nil || got.Owner != "ann" || got.Started.IsZero() || got.Ended.IsZero() {
		t.Errorf("ended task: %+v, %v", got, err)
	}
	if _, err := e.Submit(ctx, task.Request{Kind: "wait", Target: "vm/web-1", Owner: "bob"}); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	for _, id := range []string{"nonsense", "", "01980000-0000-7000-8000-000000000000"} {
		if _, err := e.Wait(ctx, id); errs.KindOf(err) != errs.NotFound {
			t.Errorf("Wait for task %q: %v", id, err)
		}
	}
}

func TestPanicFailsTheTaskOnly(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	undone := make(chan struct{}, 1)
	e := task.NewEngine(task.Config{DB: open(t), Kinds: []task.Kind{{Name: "bad", Steps: []task.StepFuncs{{
		Name: "bad",
		Do:   func(context.Context, *task.Run) error { panic("oh no") },
		Undo: func(context.Context, *task.Run) error { undone <- struct{}{}; return errors.New("stuck") },
	}}}}})
	start(t, e)
	sub, err := e.Submit(ctx, task.Request{Kind: "bad", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.Wait(ctx, sub.ID)
	if err != nil || got.State != task.Failed || !strings.Contains(got.Error.Text, "oh no") || !strings.Contains(got.Error.Text, `cannot undo step "bad": stuck`) {
		t.Errorf("%+v, %v", got, err)
	}
	<-undone
}

func TestCancelWhileWaitingForRetry(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	e := task.NewEngine(task.Config{DB: open(t), Kinds: []task.Kind{{Name: "retry", Steps: []task.StepFuncs{{
		Name: "never",
		Do: func(context.Context, *task.Run) error {
			return &task.Retry{After: time.Hour, Reason: "host does not answer"}
		},
	}}}}})
	start(t, e)
	sub, err := e.Submit(ctx, task.Request{Kind: "retry", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	asked := false // it is stored as waiting more than once
	err = e.Watch(ctx, sub.ID, func(x task.Task) error {
		if x.Waiting != nil && !asked {
			asked = true
			if x.Waiting.Reason != "host does not answer" {
				t.Errorf("reason %q", x.Waiting.Reason)
			}
			_, err := e.Cancel(ctx, sub.ID)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.Get(ctx, sub.ID); err != nil || got.State != task.Canceled || errs.KindOf(got.Err()) != errs.Canceled {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestBeyondReturnCannotBeCanceled(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	begun, release := make(chan struct{}), make(chan struct{})
	e := task.NewEngine(task.Config{DB: open(t), Kinds: []task.Kind{{Name: "switch", Steps: []task.StepFuncs{{
		Name: "switch", NoReturn: true,
		Do: func(context.Context, *task.Run) error { close(begun); <-release; return nil },
	}}}}})
	start(t, e)
	sub, err := e.Submit(ctx, task.Request{Kind: "switch", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	if _, err := e.Cancel(ctx, sub.ID); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("Cancel: %v", err)
	}
	close(release)
	if got, err := e.Wait(ctx, sub.ID); err != nil || got.State != task.Success {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestUnknownKindAfterUpgrade(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	db := open(t)
	old := task.NewEngine(task.Config{DB: db, Kinds: []task.Kind{{Name: "old", Steps: []task.StepFuncs{{
		Name: "s", Do: func(context.Context, *task.Run) error { return nil },
	}}}}})
	sub, err := old.Submit(ctx, task.Request{Kind: "old", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	e := task.NewEngine(task.Config{DB: db})
	start(t, e)
	if got, err := e.Wait(ctx, sub.ID); err != nil || got.State != task.Failed || !strings.Contains(got.Error.Text, "does not know") {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestOldTasksAreDeleted(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	db := open(t)
	cfg := task.Config{DB: db, KeepFinished: 5, Kinds: []task.Kind{{Name: "quick", Steps: []task.StepFuncs{{
		Name: "s", Do: func(context.Context, *task.Run) error { return nil },
	}}}}}
	e := task.NewEngine(cfg)
	stop := start(t, e)
	var last task.Task
	for range 12 {
		sub, err := e.Submit(ctx, task.Request{Kind: "quick"})
		if err != nil {
			t.Fatal(err)
		}
		if last, err = e.Wait(ctx, sub.ID); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	e = task.NewEngine(cfg)
	if _, err := e.Submit(ctx, task.Request{Kind: "quick"}); err != nil { // has not ended: stays
		t.Fatal(err)
	}
	stop = start(t, e) // prunes when it starts
	active, err := e.List(ctx, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range active {
		if _, err := e.Wait(ctx, a.ID); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	all, err := e.List(ctx, 0, false)
	if err != nil || len(all) != 6 || all[1].ID != last.ID {
		t.Errorf("%d tasks are left, %v; want the last 5 and the new one", len(all), err)
	}
	if two, err := e.List(ctx, 2, false); err != nil || len(two) != 2 || two[1].ID != last.ID {
		t.Errorf("List of two: %+v, %v", two, err)
	}
}

// TestLocks: tasks of one target run side by side if they share no lock, and each
// gives up its own at its end.
func TestLocks(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	release := make(chan struct{})
	e := task.NewEngine(task.Config{DB: open(t), Kinds: []task.Kind{{Name: "wait", Steps: []task.StepFuncs{{
		Name: "wait",
		Do: func(ctx context.Context, r *task.Run) error {
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
	}}}}})
	start(t, e)
	submit := func(locks ...string) (task.Task, error) {
		return e.Submit(ctx, task.Request{Kind: "wait", Target: "vm/web-1", Locks: locks})
	}
	disks, err1 := submit("vm/web-1/disks")
	power, err2 := submit("vm/web-1")
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	for _, c := range []struct {
		locks []string
		by    task.Task
	}{{[]string{"vm/web-1/disks"}, disks}, {[]string{"vm/web-1"}, power}, {[]string{"vm/web-1/disks", "vm/web-1"}, disks}, {nil, power}} {
		if _, err := submit(c.locks...); errs.KindOf(err) != errs.InvalidState || !strings.Contains(err.Error(), c.by.ID) {
			t.Errorf("with locks %q: %v, want it to name task %s", c.locks, err, c.by.ID)
		}
	}
	close(release)
	for _, id := range []string{disks.ID, power.ID} {
		if got, err := e.Wait(ctx, id); err != nil || got.State != task.Success {
			t.Errorf("task %+v, %v", got, err)
		}
	}
	if _, err := submit("vm/web-1", "vm/web-1/disks"); err != nil {
		t.Errorf("after both have ended: %v", err)
	}
}

// TestRemaining: progress tells how long the step takes yet, once there is a speed,
// also if the step began in the middle.
func TestRemaining(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	db := open(t)
	var seen []task.Progress
	e := task.NewEngine(task.Config{DB: db, Kinds: []task.Kind{{Name: "copy", Steps: []task.StepFuncs{{
		Name: "copy",
		Do: func(ctx context.Context, r *task.Run) error {
			for _, done := range []int64{1 << 40, 1<<40 + 1, 1 << 41} {
				r.Progress(ctx, done, done, "bytes") // complete: stored at once
				got, err := store.NewTable[task.Task](db, "task", 1).Get(ctx, r.Task().ID)
				if err != nil {
					return err
				}
				seen = append(seen, *got.Progress)
			}
			r.Progress(ctx, 0, 1<<50, "bytes")
			for {
				r.Progress(ctx, 1, 1<<50, "bytes") // stored when it is due
				got, err := store.NewTable[task.Task](db, "task", 1).Get(ctx, r.Task().ID)
				if err != nil {
					return err
				}
				if got.Progress.Total == 1<<50 && got.Progress.Done == 1 {
					seen = append(seen, *got.Progress)
					return nil
				}
			}
		},
	}}}}})
	start(t, e)
	submitted, err := e.Submit(ctx, task.Request{Kind: "copy", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.Wait(ctx, submitted.ID); err != nil || got.State != task.Success {
		t.Fatalf("task %+v, %v", got, err)
	}
	for i, p := range seen {
		if known := p.Remaining > 0; known != (i == 3) {
			t.Errorf("progress %+v", p)
		}
	}
}
