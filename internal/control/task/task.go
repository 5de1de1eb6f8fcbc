// Package task runs long work as persistent data: a task is a list of steps,
// each with do and undo, whose state is stored before and after every step. A
// controller that is killed at any instant and started again goes on where the
// store says the task was.
//
// Rules for those who write steps:
//   - Do is idempotent: it may run again after it succeeded, failed half-way or
//     was killed. Undo too, and it must cope with a step that only began.
//   - Do and Undo return soon after their context ends.
//   - Arguments and data are stored in plain text: no secrets.
//
// A task that fails or is canceled undoes its begun steps, last first, unless a
// step marked NoReturn has begun: then there is no way back, only an error that
// says how to go forward.
//
// All coordination is through the store: [Engine.Submit] and [Engine.Cancel]
// only write, and [Engine.Run] follows the writes. An [Engine] is safe for
// concurrent use; of one store one Engine runs at a time.
package task

import (
	"encoding/json"
	"slices"
	"time"

	"strongroom/internal/errs"
)

// State of a task.
type State string

// The states of a task, as in vSphere, plus canceled.
const (
	Queued   State = "queued"
	Running  State = "running" // at work, waiting for a retry, or undoing
	Success  State = "success"
	Failed   State = "error"    // Error says why
	Canceled State = "canceled" // stopped on request, and undone
)

// Ended reports whether s is final.
func (s State) Ended() bool { return s == Success || s == Failed || s == Canceled }

// StepState is how far a step is.
type StepState string

// The states of a step.
const (
	StepPending StepState = "pending" // Do was never begun
	StepRunning StepState = "running" // Do was begun
	StepDone    StepState = "done"    // Do succeeded
	StepUndone  StepState = "undone"  // Undo succeeded, or failed for good (the task's error tells)
)

// Step is one step of a task as it is stored.
type Step struct {
	Name     string    `json:"name"`
	State    StepState `json:"state"`
	Attempts int       `json:"attempts,omitempty"` // of Do, by this count of starts
	Started  time.Time `json:"started,omitzero"`
	Ended    time.Time `json:"ended,omitzero"`
}

// Progress of the running step.
type Progress struct {
	Done  int64  `json:"done"`
	Total int64  `json:"total"` // 0 if unknown
	Unit  string `json:"unit"`  // "bytes" or "items"
	// Remaining is how long the step takes yet at its speed so far, in seconds; 0
	// if unknown.
	Remaining int64 `json:"remaining,omitempty"`
}

// Failure is an error as it is stored.
type Failure struct {
	Kind   string `json:"kind"` // a name of [errs.Kind]
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
	Text   string `json:"text"`
}

// Err returns f as an error with its kind, reason and hint.
func (f *Failure) Err() error {
	if f == nil {
		return nil
	}
	e := errs.New(errs.ParseKind(f.Kind), "%s", f.Text)
	e.Reason, e.Hint = f.Reason, f.Hint
	return e
}

func failureOf(err error) *Failure {
	return &Failure{Kind: errs.KindOf(err).String(), Reason: errs.ReasonOf(err), Hint: errs.HintOf(err), Text: err.Error()}
}

// Waiting says that a step will be tried again.
type Waiting struct {
	Until  time.Time `json:"until"`
	Reason string    `json:"reason"`
}

// Task is a task as it is stored.
type Task struct {
	ID     string `json:"id"`     // UUID, in order of creation
	Kind   string `json:"kind"`   // "vm.encrypt"
	Target string `json:"target"` // "vm/web-1"
	// Locks name what it has for itself until it has ended.
	Locks []string `json:"locks,omitempty"`
	Owner string   `json:"owner"` // the principal who asked for it
	State State    `json:"state"`
	// Undoing: the task is on its way back.
	Undoing         bool      `json:"undoing,omitempty"`
	CancelRequested bool      `json:"cancel_requested,omitempty"`
	Steps           []Step    `json:"steps"`
	Progress        *Progress `json:"progress,omitempty"`
	Waiting         *Waiting  `json:"waiting,omitempty"`
	// Error is why it failed, or what failed while undoing.
	Error   *Failure        `json:"error,omitempty"`
	Args    json.RawMessage `json:"args,omitempty"`
	Data    json.RawMessage `json:"data,omitempty"` // what steps leave for later ones
	Created time.Time       `json:"created"`
	Started time.Time       `json:"started,omitzero"`
	Ended   time.Time       `json:"ended,omitzero"`
}

// CurrentStep returns the name of the step that is being done or undone, or "".
func (t Task) CurrentStep() string {
	i := t.next()
	if t.Undoing {
		i = t.lastBegun()
	}
	if t.State != Running || i < 0 {
		return ""
	}
	return t.Steps[i].Name
}

// Err returns the task's error with its kind and hint; nil unless it failed or
// was canceled.
func (t Task) Err() error {
	switch {
	case t.State == Canceled:
		return errs.New(errs.Canceled, "task %s was canceled", t.ID)
	case t.State == Failed && t.Error != nil:
		return t.Error.Err()
	}
	return nil
}

// next is the first step that is not done, or -1.
func (t Task) next() int {
	return slices.IndexFunc(t.Steps, func(s Step) bool { return s.State != StepDone })
}

// lastBegun is the last step that has something to undo, or -1.
func (t Task) lastBegun() int {
	for i := len(t.Steps) - 1; i >= 0; i-- {
		if s := t.Steps[i].State; s == StepDone || s == StepRunning {
			return i
		}
	}
	return -1
}
