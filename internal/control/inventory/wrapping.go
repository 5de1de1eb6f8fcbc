package inventory

import (
	"context"
	"errors"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Limits of wrapping keys.
const (
	RotateDaysMin = 30 // as in vSphere
	RotateDaysMax = 3650
	ReplacedMax   = 1000 // keys replaced and not destroyed
)

const (
	// rotationGrace is how late a rotation may be before that is an alarm.
	rotationGrace = time.Hour
	// clockSlack is how far ahead of the clock a key may have been made: more
	// means that the clock was wrong then, or is now.
	clockSlack = 24 * time.Hour
)

// Wrapping is how one key of a standard provider wraps the keys of all VMs:
// docs/spec/standard-provider.md.
type Wrapping struct {
	// Off: each VM gets a key of its own, and those that have a wrapping key leave
	// it.
	Off        bool         `json:"off,omitempty"`
	RotateDays uint32       `json:"rotate_days,omitempty"` // 0: a key is replaced on request only
	Current    *WrappingKey `json:"current,omitempty"`     // nil if none was made yet, and if Off
	// Replaced are the keys that were current before, oldest first, until they are
	// destroyed.
	Replaced []WrappingKey `json:"replaced,omitempty"`
	// Problem is why the key that is to be made could not be; empty if it could.
	Problem string `json:"problem,omitempty"`
}

// WrappingKey is a key that wraps those of many VMs.
type WrappingKey struct {
	KeyID    string    `json:"key_id"`
	Object   string    `json:"object"` // UUID, from which its Name at the key server comes
	Made     time.Time `json:"made"`   // when it became the current one
	Replaced time.Time `json:"replaced,omitzero"`
	// Ended is when its use was ended: it opens what it wrapped, no more.
	Ended time.Time `json:"ended,omitzero"`
}

// On reports whether new keys are wrapped by one key; a nil w means no.
func (w *Wrapping) On() bool { return w != nil && !w.Off }

// Holds reports whether keyID is a wrapping key, current or replaced.
func (w *Wrapping) Holds(keyID string) bool {
	return w != nil && (w.Current != nil && w.Current.KeyID == keyID || w.replaced(keyID) >= 0)
}

// WasReplaced reports whether keyID is a wrapping key that was replaced.
func (w *Wrapping) WasReplaced(keyID string) bool { return w != nil && w.replaced(keyID) >= 0 }

func (w *Wrapping) replaced(keyID string) int {
	return slices.IndexFunc(w.Replaced, func(k WrappingKey) bool { return k.KeyID == keyID })
}

// Next returns when the next key is to be made; zero if no time is set.
func (w *Wrapping) Next() time.Time {
	if !w.On() || w.Current == nil || w.RotateDays == 0 {
		return time.Time{}
	}
	return w.Current.Made.Add(time.Duration(w.RotateDays) * 24 * time.Hour)
}

// Due reports whether a key is to be made now.
func (w *Wrapping) Due(now time.Time) bool {
	switch next := w.Next(); {
	case !w.On():
		return false
	case w.Current == nil:
		return true
	default:
		return !next.IsZero() && (!now.Before(next) || w.Current.Made.Sub(now) > clockSlack)
	}
}

// Overdue says why the key that is to be made is late; empty if it is not.
func (w *Wrapping) Overdue(now time.Time) string {
	switch next := w.Next(); {
	case !w.On():
		return ""
	case w.Problem != "":
		return w.Problem
	case !next.IsZero() && now.Sub(next) > rotationGrace:
		return "it was due on " + next.UTC().Format(time.DateOnly)
	}
	return ""
}

// Turn ends the use of the current key for what is new: at now it becomes a
// replaced one, and next, which may be nil, the current one. A key that is
// current already stays so.
func (w *Wrapping) Turn(next *WrappingKey, now time.Time) error {
	if next != nil && w.Current != nil && w.Current.KeyID == next.KeyID {
		return nil
	}
	if w.Current != nil {
		if len(w.Replaced) >= ReplacedMax {
			return errs.New(errs.InvalidState, "%d replaced keys are not destroyed yet, the limit", len(w.Replaced))
		}
		old := *w.Current
		old.Replaced = now
		w.Replaced = append(slices.Clone(w.Replaced), old)
	}
	w.Current, w.Problem = next, ""
	return nil
}

// clone is a copy that shares nothing with w.
func (w *Wrapping) clone() *Wrapping {
	if w == nil {
		return nil
	}
	out := *w
	out.Replaced = slices.Clone(w.Replaced)
	if w.Current != nil {
		current := *w.Current
		out.Current = &current
	}
	return &out
}

// Strays returns the keys of provider name that v has and is not to have: those
// that are not the current wrapping key, or if w is off, those that are any.
// While no key is current, none are.
func (w *Wrapping) Strays(name string, v VM) []KeyUser {
	if w == nil || w.On() && w.Current == nil {
		return nil
	}
	return slices.DeleteFunc(v.keyUsers(), func(u KeyUser) bool {
		if u.Key.Provider != name {
			return true
		}
		if w.Off {
			return !w.Holds(u.Key.KeyID)
		}
		return u.Key.KeyID == w.Current.KeyID
	})
}

// forgetReplaced forgets a wrapping key that is destroyed.
func (inv *Inventory) forgetReplaced(ctx context.Context, tx *store.Tx, k KeyRef) error {
	p, err := inv.providers.In(tx).Get(ctx, k.Provider)
	if errors.Is(err, store.ErrNotFound) || err == nil && (p.Standard == nil || !p.Standard.Wrapping.WasReplaced(k.KeyID)) {
		return nil
	}
	if err != nil {
		return err
	}
	w := p.Standard.Wrapping.clone()
	i := w.replaced(k.KeyID)
	w.Replaced = slices.Delete(w.Replaced, i, i+1)
	standard := *p.Standard
	standard.Wrapping = w
	p.Standard = &standard
	return inv.providers.In(tx).Put(ctx, p.Name, p)
}
