package kmipserver

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

const day = 24 * time.Hour

var monthly = Rotation{Every: 30 * day, DeactivateAfter: 10 * day}

// diary notes the steps that were taken, as "kind object".
type diary struct {
	mu    sync.Mutex
	began []Step
	ended []Step
	stop  error // for steps that begin
}

func (d *diary) before(s Step) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.began = append(d.began, s)
	return d.stop
}

func (d *diary) after(s Step, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		d.ended = append(d.ended, s)
	}
	return nil
}

// maintain runs Maintain of account "one" and returns what it did.
func (b *bench) maintain(t *testing.T, rot Rotation) []Step {
	t.Helper()
	d := &diary{}
	if err := b.server.Maintain(t.Context(), "one", rot, d.before, d.after); err != nil {
		t.Fatal(err)
	}
	if len(d.began) != len(d.ended) {
		t.Errorf("%d steps began, %d ended", len(d.began), len(d.ended))
	}
	return d.ended
}

func (b *bench) pass(d time.Duration) { b.clock.Add(int64(d / time.Second)) }

// stored returns a key's state as it is stored.
func (b *bench) stored(t *testing.T, id string) (state kmip.State) {
	t.Helper()
	if err := b.server.store.View(t.Context(), "one", func(v Reader) error {
		o, err := v.Get(id)
		if err == nil {
			state = o.state()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return state
}

// activeKey makes a key that is active since now.
func (b *bench) activeKey(t *testing.T, name string, more ...kmip.Attribute) string {
	t.Helper()
	s := b.dial(t, "one")
	id := do[payloads.CreateResponsePayload](s, newKey(append(more,
		kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}})...)).UniqueIdentifier
	do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
	return id
}

func kinds(steps []Step) (out []StepKind) {
	for _, s := range steps {
		out = append(out, s.Kind)
	}
	return out
}

// TestRotation is the life of a key under rotation: replaced when its time has
// come, deactivated later, never destroyed; and so its replacement.
func TestRotation(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	id := b.activeKey(t, "backup")
	if steps := b.maintain(t, monthly); len(steps) != 0 {
		t.Fatalf("of a new key: %+v", steps)
	}
	b.pass(30*day - time.Second)
	if steps := b.maintain(t, monthly); len(steps) != 0 {
		t.Fatalf("a second early: %+v", steps)
	}
	b.pass(time.Second)
	if steps := b.maintain(t, Rotation{}); len(steps) != 0 {
		t.Fatalf("without rotation: %+v", steps)
	}
	steps := b.maintain(t, monthly)
	if !slices.Equal(kinds(steps), []StepKind{StepRekey, StepSchedule}) || steps[0].Object != id || steps[0].Replacement == "" || steps[1].Object != id {
		t.Fatalf("when it is due: %+v", steps)
	}
	rotated := time.Unix(b.clock.Load(), 0)
	if !steps[1].Date.Equal(rotated.Add(10 * day)) {
		t.Errorf("deactivated on %v, want ten days after %v", steps[1].Date, rotated)
	}
	next := steps[0].Replacement
	s := b.dial(t, "one")
	found := do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "backup", NameType: kmip.NameTypeUninterpretedTextString}},
	}}).UniqueIdentifier
	if !slices.Equal(found, []string{next}) {
		t.Errorf("the name finds %v, want %s", found, next)
	}
	if b.stored(t, id) != kmip.StateActive || b.stored(t, next) != kmip.StateActive {
		t.Errorf("states %v and %v, want both active", b.stored(t, id), b.stored(t, next))
	}
	if steps := b.maintain(t, monthly); len(steps) != 0 {
		t.Fatalf("once more: %+v", steps)
	}
	b.pass(10 * day)
	state := do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}}).Attribute[0].AttributeValue
	if state != kmip.StateDeactivated {
		t.Errorf("a client sees %v on the date, before the scheduler came", state)
	}
	if steps := b.maintain(t, monthly); !slices.Equal(kinds(steps), []StepKind{StepDeactivate}) || steps[0].Object != id || b.stored(t, id) != kmip.StateDeactivated {
		t.Errorf("on the date: %+v, state %v", steps, b.stored(t, id))
	}
	do[payloads.GetResponsePayload](s, &payloads.GetRequestPayload{UniqueIdentifier: id}) // not destroyed
	b.pass(20 * day)
	if steps := b.maintain(t, monthly); len(steps) != 2 || steps[0].Kind != StepRekey || steps[0].Object != next {
		t.Errorf("a month later: %+v", steps)
	}
}

// TestScheduledDates has dates of a client's own come while nobody looked.
func TestScheduledDates(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	start := time.Unix(b.clock.Load(), 0)
	s := b.dial(t, "one")
	dates := func(activation, deactivation time.Duration) string {
		return do[payloads.CreateResponsePayload](s, newKey(
			kmip.Attribute{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: start.Add(activation)},
			kmip.Attribute{AttributeName: kmip.AttributeNameDeactivationDate, AttributeValue: start.Add(deactivation)},
		)).UniqueIdentifier
	}
	past, soon, never := dates(-2*day, -day), dates(day, 2*day), do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	if got := b.stored(t, past); got != kmip.StateDeactivated {
		t.Errorf("both dates past: state %v", got)
	}
	for _, c := range []struct {
		pass time.Duration
		want []StepKind
		step string
		soon kmip.State
	}{
		{0, nil, "", kmip.StatePreActive},
		{day, []StepKind{StepActivate}, soon, kmip.StateActive},
		{day - time.Second, nil, "", kmip.StateActive},
		{time.Second, []StepKind{StepDeactivate}, soon, kmip.StateDeactivated},
		{1000 * day, nil, "", kmip.StateDeactivated},
	} {
		b.pass(c.pass)
		steps := b.maintain(t, Rotation{Every: 400 * day})
		if !slices.Equal(kinds(steps), c.want) || c.step != "" && steps[0].Object != c.step || b.stored(t, soon) != c.soon {
			t.Errorf("after %v more: %+v, state %v", c.pass, steps, b.stored(t, soon))
		}
	}
	if got := b.stored(t, never); got != kmip.StatePreActive {
		t.Errorf("without dates: state %v", got)
	}
}

// TestRotationLeavesAlone has keys that are not for the scheduler to touch.
func TestRotationLeavesAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := b.dial(t, "one")
	revoked, archived, replaced, dated := b.activeKey(t, "r"), b.activeKey(t, "a"), b.activeKey(t, "c"),
		b.activeKey(t, "d", kmip.Attribute{AttributeName: kmip.AttributeNameDeactivationDate, AttributeValue: time.Unix(b.clock.Load(), 0).Add(300 * day)})
	do[payloads.RevokeResponsePayload](s, &payloads.RevokeRequestPayload{UniqueIdentifier: revoked, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeSuperseded}})
	do[payloads.ArchiveResponsePayload](s, &payloads.ArchiveRequestPayload{UniqueIdentifier: archived})
	do[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: replaced})
	do[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: dated})
	steps := b.maintain(t, monthly)
	if !slices.Equal(kinds(steps), []StepKind{StepSchedule}) || steps[0].Object != replaced {
		t.Errorf("at once: %+v", steps)
	}
	b.pass(20 * day)
	if steps := b.maintain(t, monthly); !slices.Equal(kinds(steps), []StepKind{StepDeactivate}) || steps[0].Object != replaced {
		t.Errorf("after 20 days: %+v", steps)
	}

	t.Log("a policy younger than the replacement deactivates at once")
	late := b.activeKey(t, "l")
	do[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: late})
	b.pass(15 * day)
	steps = b.maintain(t, Rotation{DeactivateAfter: 10 * day})
	if len(steps) != 1 || steps[0].Object != late || b.stored(t, late) != kmip.StateDeactivated {
		t.Errorf("late: %+v, state %v", steps, b.stored(t, late))
	}

	t.Log("what cannot be put on record is not done")
	due := b.activeKey(t, "due")
	b.pass(30 * day)
	d := &diary{stop: errors.New("disk full")}
	if err := b.server.Maintain(t.Context(), "one", monthly, d.before, d.after); !errors.Is(err, d.stop) || len(d.ended) != 0 {
		t.Errorf("error %v, done %+v", err, d.ended)
	}
	if _, ok := b.link(t, due); ok {
		t.Error("it was rotated")
	}
}

func (b *bench) link(t *testing.T, id string) (to string, ok bool) {
	t.Helper()
	if err := b.server.store.View(t.Context(), "one", func(v Reader) error {
		o, err := v.Get(id)
		if err == nil {
			to, ok = linkTo(o, kmip.LinkTypeReplacementObjectLink)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return to, ok
}

// TestRotationAtOnce has several nodes look at the same time: each key is
// replaced once.
func TestRotationAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	const keys = 20
	for i := range keys {
		b.activeKey(t, fmt.Sprint("k", i))
	}
	b.pass(30 * day)
	d := &diary{}
	var nodes sync.WaitGroup
	for range 4 {
		nodes.Go(func() {
			if err := b.server.Maintain(t.Context(), "one", monthly, d.before, d.after); err != nil {
				t.Error(err)
			}
		})
	}
	nodes.Wait()
	done := map[StepKind]int{}
	for _, s := range d.ended {
		done[s.Kind]++
	}
	if done[StepRekey] != keys || done[StepSchedule] != keys {
		t.Errorf("steps: %v", done)
	}
}

// TestRotationBrokenOff ends the process that rotates before and after each of
// its steps, in turn: the next one completes what is left, and nothing twice.
func TestRotationBrokenOff(t *testing.T) {
	t.Parallel()
	ended := errors.New("the process has ended")
	for end := range 8 { // 2 keys, 2 steps each, before and after
		b := newBench(t, Limits{})
		ids := []string{b.activeKey(t, "a"), b.activeKey(t, "b")}
		b.pass(30 * day)
		var took []Step
		left := end
		point := func() error {
			if left--; left == -1 {
				return ended
			}
			return nil
		}
		first := b.server.Maintain(t.Context(), "one", monthly,
			func(Step) error { return point() },
			func(s Step, err error) error {
				took = append(took, s)
				return errors.Join(err, point())
			})
		if !errors.Is(first, ended) {
			t.Fatalf("end %d: %v", end, first)
		}
		took = append(took, b.maintain(t, monthly)...)
		if len(took) != 4 {
			t.Errorf("end %d: steps %+v", end, took)
		}
		for _, id := range ids {
			next, ok := b.link(t, id)
			if !ok {
				t.Errorf("end %d: key %s was not replaced", end, id)
				continue
			}
			if again, ok := b.link(t, next); ok {
				t.Errorf("end %d: its replacement was replaced by %s", end, again)
			}
		}
		b.pass(10 * day)
		if steps := b.maintain(t, monthly); !slices.Equal(kinds(steps), []StepKind{StepDeactivate, StepDeactivate}) {
			t.Errorf("end %d: on the date %+v", end, steps)
		}
	}
}
