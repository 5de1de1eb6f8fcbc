package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
)

// Rotation gives a standard provider a new wrapping key, by the rules of
// docs/spec/standard-provider.md. Only the key is the task's affair: the VMs
// follow when they can, see follow.go.

const taskRotate = "provider.rotate"

// A key server that makes no key is asked again after the first of these, and
// at last after the second.
const (
	rotateAgainMin = 2 * time.Second
	rotateAgainMax = 10 * time.Minute
)

// rotateArgs are the arguments of a rotation. Its data are a [madeKey].
type rotateArgs struct {
	Provider string `json:"provider"`
}

func (c *Controller) rotateKind() task.Kind {
	return task.Kind{Name: taskRotate, Steps: []task.StepFuncs{
		{Name: stepNewKey, Do: c.makeWrappingKey, Undo: c.unmakeWrappingKey},
		{Name: "use the key", Do: c.useWrappingKey},
	}}
}

func (c providers) RotateProvider(ctx context.Context, req *connect.Request[strongroomv1.RotateProviderRequest]) (*connect.Response[strongroomv1.Task], error) {
	t, err := c.submitRotation(ctx, req.Msg.GetName())
	if err != nil {
		return nil, errs.Wrap(err, "cannot rotate the wrapping key of key provider %s", req.Msg.GetName())
	}
	return connect.NewResponse(taskToAPI(t)), nil
}

func (c *Controller) submitRotation(ctx context.Context, name string) (task.Task, error) {
	// The provider must not be deleted, or changed, between the look and the task.
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	p, err := c.inv.Provider(ctx, name)
	if err != nil {
		return task.Task{}, err
	}
	if err := mayRotate(p); err != nil {
		return task.Task{}, err
	}
	return c.tasks.Submit(ctx, task.Request{
		Kind: taskRotate, Target: "provider/" + name, Locks: []string{"provider/" + name + "/rotation"}, Owner: callerName(ctx), Args: rotateArgs{Provider: name},
	})
}

func mayRotate(p inventory.Provider) error {
	switch {
	case p.Standard == nil:
		return errs.New(errs.InvalidState, "it is a %s provider, whose key never changes", p.Type).
			WithHint("make a new one and rekey the VMs to it: strongroom provider create-native NAME")
	case !p.Standard.Wrapping.On():
		return errs.New(errs.InvalidState, "each of its VMs has a key of its own").
			WithHint("to rotate those: strongroom vm rekey VM; to have one for all: strongroom provider update %s --wrapping-key", p.Name)
	case p.Standard.Established.IsZero():
		return errs.New(errs.InvalidState, "it is not established: no key was got from its key server yet").WithReason("NotEstablished").
			WithHint("strongroom provider check %s", p.Name)
	case len(p.Standard.Wrapping.Replaced) >= inventory.ReplacedMax:
		return errs.New(errs.InvalidState, "%d replaced keys are not destroyed yet, the limit", inventory.ReplacedMax).
			WithHint("strongroom provider orphans %s --older-than 400d --destroy", p.Name)
	}
	return nil
}

// rotationStep is a step of a rotation: it concludes what do came to.
func (c *Controller) rotationStep(ctx context.Context, r *task.Run, do func(name string, made *madeKey) error) error {
	var a rotateArgs
	if err := r.Args(&a); err != nil {
		return err
	}
	var made madeKey
	if err := r.Data(&made); err != nil {
		return err
	}
	return do(a.Provider, &made)
}

// makeWrappingKey has the key server make the key. Whatever keeps it from that,
// the key in use stays, people are told, and it is asked again.
func (c *Controller) makeWrappingKey(ctx context.Context, r *task.Run) error {
	return c.rotationStep(ctx, r, func(name string, made *madeKey) error {
		if made.Object == "" {
			made.Object = uuid.NewString()
			if err := r.SetData(ctx, made); err != nil {
				return err
			}
		}
		p, err := c.inv.Provider(ctx, name)
		if err == nil {
			err = mayRotate(p)
		}
		if err != nil {
			return err // it was deleted or changed meanwhile
		}
		ref, err := c.newKey(ctx, name, made.Object, standard.Labels{Component: standard.ComponentWrapping, Name: name})
		if err == nil {
			made.Key = &ref
			return r.SetData(ctx, made)
		}
		if ctx.Err() != nil {
			return err
		}
		if err := c.noteProblem(ctx, name, err.Error()); err != nil {
			return err
		}
		return &task.Retry{After: rotateAgain(r.Task()), Reason: err.Error()}
	})
}

// rotateAgain is how long after its last attempt a step is tried again.
func rotateAgain(t task.Task) time.Duration {
	wait := rotateAgainMin
	for _, s := range t.Steps {
		if s.State == task.StepRunning {
			for n := 1; n < s.Attempts && wait < rotateAgainMax; n++ {
				wait *= 2
			}
		}
	}
	return min(wait, rotateAgainMax)
}

// noteProblem notes why a provider has no new wrapping key; empty: nothing is
// in the way.
func (c *Controller) noteProblem(ctx context.Context, name, problem string) error {
	p, err := c.inv.Provider(ctx, name)
	if err != nil || p.Standard == nil || p.Standard.Wrapping == nil || p.Standard.Wrapping.Problem == problem {
		return err
	}
	_, err = c.updateStandard(ctx, name, func(s *inventory.Standard) error {
		if s.Wrapping != nil {
			s.Wrapping.Problem = problem
		}
		return nil
	})
	return err
}

// unmakeWrappingKey destroys the key of a rotation that failed or was canceled,
// unless it came into use.
func (c *Controller) unmakeWrappingKey(ctx context.Context, r *task.Run) error {
	return c.rotationStep(ctx, r, func(name string, made *madeKey) error {
		if made.Object == "" {
			return nil
		}
		p, err := c.inv.Provider(ctx, name)
		if err != nil {
			return err
		}
		if made.Key != nil && p.Standard != nil && p.Standard.Wrapping.Holds(made.Key.KeyID) {
			return nil
		}
		return errors.Join(c.discard(ctx, r, name, made.Object), c.noteProblem(ctx, name, ""))
	})
}

// useWrappingKey makes the key the one that wraps what is new, and tells of it.
func (c *Controller) useWrappingKey(ctx context.Context, r *task.Run) error {
	return c.rotationStep(ctx, r, func(name string, made *madeKey) error {
		var follow int
		var before string
		p, err := c.updateStandard(ctx, name, func(s *inventory.Standard) error {
			w := s.Wrapping
			if !w.On() {
				return errs.New(errs.InvalidState, "key provider %s has gone back to a key for each VM", name)
			}
			before = "none"
			if w.Current != nil && w.Current.KeyID != made.Key.KeyID {
				before = w.Current.KeyID
			}
			now := c.now().UTC()
			return w.Turn(&inventory.WrappingKey{KeyID: made.Key.KeyID, Object: made.Object, Made: now}, now)
		})
		if err != nil {
			return err
		}
		vms, err := c.inv.VMs(ctx, "")
		if err != nil {
			return err
		}
		for _, v := range vms {
			if len(p.Standard.Wrapping.Strays(name, v)) > 0 {
				follow++
			}
		}
		t := r.Task()
		if _, err := c.audit.Append(audit.Entry{
			Actor: t.Owner, Action: taskRotate, Object: "/" + t.Target, Outcome: audit.Success,
			Details: map[string]string{"task": t.ID, "provider": name, "key_id": made.Key.KeyID, "replaced": before},
		}); err != nil {
			return errs.Wrap(err, "cannot write the audit log")
		}
		c.post(ctx, event.New{Type: event.WrappingKeyRotated, Principal: t.Owner, Target: t.Target, Args: map[string]string{"key_id": made.Key.KeyID, "vms": fmt.Sprint(follow)}})
		ring(c.stray)
		return nil
	})
}

// rotate has the wrapping keys made that are due: soon after something changed,
// and at every kms.remediation_interval. It looks at the clock again and again
// instead of waiting for a time, so that a clock that is set right is noticed.
func (c *Controller) rotate(ctx context.Context) error {
	interval := time.NewTicker(time.Duration(c.cfg.KMS.RemediationInterval))
	defer interval.Stop()
	for {
		if err := c.rotateDue(ctx); err != nil && ctx.Err() == nil {
			c.log.LogAttrs(ctx, slog.LevelError, "wrapping keys not rotated; it is tried again", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.due:
		case <-interval.C:
		}
	}
}

// rotateDue starts the rotations that are due.
func (c *Controller) rotateDue(ctx context.Context) error {
	all, err := c.inv.Providers(ctx)
	if err != nil {
		return err
	}
	var failed error
	for _, p := range all {
		if p.Standard == nil || !p.Standard.Wrapping.Due(c.now()) || p.Standard.Established.IsZero() {
			continue
		}
		if _, err := c.submitRotation(ctx, p.Name); err != nil && errs.ReasonOf(err) != "TaskInProgress" && errs.KindOf(err) != errs.NotFound {
			failed = errors.Join(failed, errs.Wrap(err, "key provider %s", p.Name), c.noteProblem(ctx, p.Name, err.Error()))
		}
	}
	return failed
}
