package inventory

import (
	"testing"
	"time"

	"strongroom/internal/errs"
)

// TestRotationTimes: when a wrapping key is due, and when it is late, whatever
// the clock says.
func TestRotationTimes(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	made := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	key := &WrappingKey{KeyID: "k", Made: made}
	for _, tt := range []struct {
		name string
		w    *Wrapping
		at   time.Duration // after made
		due  bool
		late string
	}{
		{"a key for each VM", nil, 0, false, ""},
		{"a key for each VM again", &Wrapping{Off: true, RotateDays: 30, Problem: "x"}, 0, false, ""},
		{"none made yet", &Wrapping{}, 0, true, ""},
		{"none could be made", &Wrapping{Problem: "no answer"}, 0, true, "no answer"},
		{"on request only", &Wrapping{Current: key}, 10000 * day, false, ""},
		{"a moment early", &Wrapping{Current: key, RotateDays: 30}, 30*day - 1, false, ""},
		{"in time", &Wrapping{Current: key, RotateDays: 30}, 30 * day, true, ""},
		{"within the grace", &Wrapping{Current: key, RotateDays: 30}, 30*day + rotationGrace, true, ""},
		{"late", &Wrapping{Current: key, RotateDays: 30}, 30*day + rotationGrace + 1, true, "it was due on 2026-01-31"},
		{"a clock a little behind", &Wrapping{Current: key, RotateDays: 30}, -clockSlack, false, ""},
		{"a key from the future", &Wrapping{Current: key, RotateDays: 30}, -clockSlack - 1, true, ""},
	} {
		if due, late := tt.w.Due(made.Add(tt.at)), tt.w.Overdue(made.Add(tt.at)); due != tt.due || late != tt.late {
			t.Errorf("%s: due %v, late %q; want %v, %q", tt.name, due, late, tt.due, tt.late)
		}
	}
}

// TestTurn: keys are replaced in order, one that is current already is not, and
// there is a limit.
func TestTurn(t *testing.T) {
	t.Parallel()
	var w Wrapping
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	turn := func(id string) error { return w.Turn(&WrappingKey{KeyID: id, Made: now}, now) }
	for _, id := range []string{"a", "a", "b"} {
		if err := turn(id); err != nil {
			t.Fatal(err)
		}
	}
	if w.Current.KeyID != "b" || len(w.Replaced) != 1 || w.Replaced[0].KeyID != "a" || !w.Replaced[0].Replaced.Equal(now) || !w.Holds("a") || !w.Holds("b") || w.WasReplaced("b") {
		t.Errorf("turned to %+v", w)
	}
	old := w.clone()
	if err := w.Turn(nil, now); err != nil || w.Current != nil || len(w.Replaced) != 2 {
		t.Errorf("turned off: %+v, %v", w, err)
	}
	if old.Current.KeyID != "b" || len(old.Replaced) != 1 {
		t.Errorf("the copy changed: %+v", old)
	}
	w = Wrapping{Current: &WrappingKey{KeyID: "last"}, Replaced: make([]WrappingKey, ReplacedMax)}
	if err := turn("one more"); errs.KindOf(err) != errs.InvalidState || w.Current.KeyID != "last" {
		t.Errorf("beyond the limit: %v, current %s", err, w.Current.KeyID)
	}
}
