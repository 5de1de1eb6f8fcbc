package kmipserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// Rotation is when the keys of an account are replaced (NIST SP 800-57 part 1,
// section 5.3: cryptoperiods). Zero durations mean never.
type Rotation struct {
	// Every is the age, since its activation, at which an active symmetric key is
	// re-keyed.
	Every time.Duration
	// DeactivateAfter is how long after its replacement was made a key is
	// deactivated that has no Deactivation Date of its own.
	DeactivateAfter time.Duration
}

// Step is one change that [Server.Maintain] makes.
type Step struct {
	Kind   StepKind
	Object string // its identifier
	// Replacement is what a re-key made; "" before and for other steps.
	Replacement string
	Date        time.Time // the date that has come, or that is set
}

// StepKind is the kind of a [Step].
type StepKind string

// The kinds. None destroys anything.
const (
	StepActivate   StepKind = "Activate"        // its Activation Date has come
	StepDeactivate StepKind = "Deactivate"      // its Deactivation Date has come
	StepRekey      StepKind = "ReKey"           // it has reached its age
	StepSchedule   StepKind = "SetDeactivation" // it was replaced and gets a Deactivation Date
)

// ErrNotDue says of a step that somebody has taken it, or that it has ceased to
// be due, since it was looked for.
var ErrNotDue = errors.New("not due any more")

const (
	// maintainRounds bounds how often Maintain looks for steps: one may lead to
	// another.
	maintainRounds = 4
	// maintainFailures is how many steps may fail before Maintain gives up.
	maintainFailures = 10
)

// Maintain does what is due to the objects of an account: it stores the states
// that their dates have brought, which clients see from the date on, stored or
// not, and rotates keys. Each step is one transaction that finds out anew
// whether it is due, so Maintain may be broken off anywhere, repeated, and run
// by several nodes at once. before is told of a step that is about to be tried,
// and prevents it by an error; after is told what came of it. A step that fails
// does not keep others from being tried; the errors are returned together.
func (s *Server) Maintain(ctx context.Context, account string, rot Rotation, before func(Step) error, after func(Step, error) error) error {
	r := &request{ctx: ctx, server: s, client: Client{Account: account}, version: kmip.V1_4, now: s.now().Truncate(time.Second).UTC()}
	for range maintainRounds {
		due, err := r.due(rot)
		if err != nil || len(due) == 0 {
			return err
		}
		var failed []error
		for _, step := range due {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := before(step); err != nil {
				return err
			}
			err := r.take(&step, rot)
			if err := after(step, err); err != nil {
				return err
			}
			if err != nil && !errors.Is(err, ErrNotDue) {
				failed = append(failed, fmt.Errorf("%s of object %s: %w", step.Kind, step.Object, err))
			}
			if len(failed) == maintainFailures {
				break
			}
		}
		if len(failed) > 0 {
			return errors.Join(failed...)
		}
	}
	return nil
}

// due returns the steps that are due, at most one an object. Without rotation those
// are of objects whose dates have come; else every object is looked at.
func (r *request) due(rot Rotation) ([]Step, error) {
	var steps []Step
	query := Query{}
	if rot == (Rotation{}) {
		query.Due = r.now
	}
	err := r.server.store.View(r.ctx, r.client.Account, func(v Reader) error {
		steps = nil
		made := map[string]time.Time{} // when each key came to be, for what it replaced
		var superseded []int           // steps that need that of another
		for o, err := range v.Find(query) {
			if err != nil {
				return err
			}
			if err := r.ctx.Err(); err != nil {
				return err
			}
			if _, ok := linkTo(o, kmip.LinkTypeReplacedObjectLink); ok && rot.DeactivateAfter > 0 {
				made[o.ID], _ = o.date(kmip.AttributeNameInitialDate)
			}
			step, ok := r.dueTo(o, rot)
			if !ok {
				continue
			}
			if step.Kind == StepSchedule {
				superseded = append(superseded, len(steps))
			}
			steps = append(steps, step)
		}
		for _, i := range superseded {
			since, ok := made[steps[i].Replacement]
			if !ok { // not a key of this account
				since = r.now
			}
			if steps[i].Date = since.Add(rot.DeactivateAfter); steps[i].Date.Before(r.now) { // the policy is younger
				steps[i].Date = r.now
			}
		}
		return nil
	})
	return steps, err
}

// dueTo returns the step that is due to o, as it is stored. That of StepSchedule
// has no date yet.
func (r *request) dueTo(o *Object, rot Rotation) (Step, bool) {
	if o.Archived || !hasState(o.Type) {
		return Step{}, false
	}
	was := o.state()
	o.advance(r.now)
	activated, hasActivation := o.date(kmip.AttributeNameActivationDate)
	deactivation, hasDeactivation := o.date(kmip.AttributeNameDeactivationDate)
	replacement, replaced := linkTo(o, kmip.LinkTypeReplacementObjectLink)
	switch now := o.state(); {
	case was == kmip.StatePreActive && now != was:
		return Step{Kind: StepActivate, Object: o.ID, Date: activated}, true
	case was != now:
		return Step{Kind: StepDeactivate, Object: o.ID, Date: deactivation}, true
	case now != kmip.StateActive:
	case replaced && !hasDeactivation && rot.DeactivateAfter > 0:
		return Step{Kind: StepSchedule, Object: o.ID, Replacement: replacement}, true
	case !replaced && hasActivation && rot.Every > 0 && !activated.Add(rot.Every).After(r.now) && o.replaceable():
		return Step{Kind: StepRekey, Object: o.ID, Date: activated.Add(rot.Every)}, true
	}
	return Step{}, false
}

// replaceable reports whether a key like o can be made here.
func (o *Object) replaceable() bool {
	_, err := keySize(o.Layout.Algorithm, o.Layout.Length)
	return err == nil && o.Type == kmip.ObjectTypeSymmetricKey && o.Layout.Wrapping == nil && !o.elsewhere()
}

// take takes a step, if it still is due, and completes it.
func (r *request) take(step *Step, rot Rotation) error {
	stillDue := func(o *Object) error {
		if now, ok := r.dueTo(o, rot); !ok || now.Kind != step.Kind {
			return ErrNotDue
		}
		return nil
	}
	if step.Kind == StepRekey {
		id, err := r.replace(&payloads.RekeyRequestPayload{UniqueIdentifier: step.Object}, stillDue)
		step.Replacement = id
		return err
	}
	return r.server.store.Update(r.ctx, r.client.Account, func(tx Tx) error {
		o, err := tx.Get(step.Object) // its state as it is stored
		if errors.Is(err, ErrNoObject) {
			return ErrNotDue
		}
		if err != nil {
			return err
		}
		if err := stillDue(o); err != nil {
			return err
		}
		if step.Kind == StepSchedule {
			o.set(kmip.AttributeNameDeactivationDate, step.Date)
		}
		return r.put(tx, o)
	})
}
