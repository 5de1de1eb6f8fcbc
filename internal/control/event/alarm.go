package event

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Alarm is a condition that should not be, and is.
type Alarm struct {
	ID       string    `json:"id"` // of the [AlarmType]
	Name     string    `json:"name"`
	Severity Severity  `json:"severity"`
	Target   string    `json:"target,omitempty"`
	Message  string    `json:"message"`
	Hint     string    `json:"hint,omitempty"`
	Runbook  string    `json:"runbook"` // below docs
	Since    time.Time `json:"since"`
	Told     time.Time `json:"told"` // when an event last told of it
	// AckedBy is who acknowledged it, if anybody has.
	AckedBy string    `json:"acked_by,omitempty"`
	Acked   time.Time `json:"acked,omitzero"`
}

// Condition says of what target an alarm is true now, with the arguments of its
// texts.
type Condition struct {
	Target string
	Args   map[string]string
}

// Sync makes the active alarms of one type those of conditions: new ones are
// raised, those that are not there any more are cleared, each with its event.
// What was and is stays, with its message brought up to date, and is told again
// if its type repeats and it was not acknowledged.
func (l *Log) Sync(ctx context.Context, alarmID string, conditions []Condition) error {
	i := slices.IndexFunc(l.alarms, func(a AlarmType) bool { return a.ID == alarmID })
	if i < 0 {
		return errs.New(errs.Invalid, "no alarm %q", alarmID)
	}
	a := l.alarms[i]
	wanted := make(map[string]Condition, len(conditions))
	for _, c := range conditions {
		wanted[a.ID+"/"+c.Target] = c
	}
	entries, err := l.active.Scan(ctx, store.Range{Prefix: a.ID + "/"})
	if err != nil {
		return errs.Wrap(err, "cannot update alarm %s", a.ID)
	}
	for _, e := range entries {
		if _, ok := wanted[e.Key]; !ok {
			if err := l.clear(ctx, a, e.Key); err != nil {
				return errs.Wrap(err, "cannot clear alarm %s", e.Key)
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(wanted)) {
		if err := l.raise(ctx, a, key, wanted[key]); err != nil {
			return errs.Wrap(err, "cannot raise alarm %s", key)
		}
	}
	return nil
}

func (l *Log) raise(ctx context.Context, a AlarmType, key string, c Condition) error {
	t := l.types[a.Raised]
	n := New{Type: a.Raised, Target: c.Target, Args: c.Args}
	message := fill(t.Text, withCommon(c.Args, n))
	return l.db.Txn(ctx, func(tx *store.Tx) error {
		now := l.now()
		al, err := l.active.In(tx).Get(ctx, key)
		isNew := errors.Is(err, store.ErrNotFound)
		if err != nil && !isNew {
			return err
		}
		again := a.RepeatHours > 0 && al.AckedBy == "" && now.Sub(al.Told) >= time.Duration(a.RepeatHours)*time.Hour
		if !isNew && !again && al.Message == message {
			return nil
		}
		if isNew {
			al.Since = now
		}
		al.ID, al.Name, al.Severity, al.Target, al.Message = a.ID, a.Name, t.Severity, c.Target, message
		al.Hint, al.Runbook = fill(a.Hint, c.Args), a.Runbook()
		if isNew || again {
			al.Told = now
			if _, err := l.post(ctx, tx, n); err != nil {
				return err
			}
		}
		return l.active.In(tx).Put(ctx, key, al)
	})
}

func (l *Log) clear(ctx context.Context, a AlarmType, key string) error {
	return l.db.Txn(ctx, func(tx *store.Tx) error {
		al, err := l.active.In(tx).Get(ctx, key)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := l.post(ctx, tx, New{Type: a.Cleared, Target: al.Target}); err != nil {
			return err
		}
		return l.active.In(tx).Delete(ctx, key)
	})
}

// Alarms returns the active alarms, the gravest and then the oldest first.
func (l *Log) Alarms(ctx context.Context) ([]Alarm, error) {
	all, err := l.active.List(ctx)
	if err != nil {
		return nil, errs.Wrap(err, "cannot list alarms")
	}
	slices.SortStableFunc(all, func(x, y Alarm) int {
		if x.Severity != y.Severity {
			if x.Severity == Error {
				return -1
			}
			return 1
		}
		return x.Since.Compare(y.Since)
	})
	return all, nil
}

// Acknowledge notes that somebody knows of an alarm: it stays, and is not told
// again.
func (l *Log) Acknowledge(ctx context.Context, alarmID, target, principal string) (Alarm, error) {
	al, err := l.active.Update(ctx, alarmID+"/"+target, func(al *Alarm) error {
		al.AckedBy, al.Acked = principal, l.now()
		return nil
	})
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) {
		err = errs.New(errs.NotFound, "no alarm %s of %s", alarmID, strings.TrimSpace(target)).WithHint("strongroom alarm ls")
	}
	return al, errs.Wrap(err, "cannot acknowledge alarm")
}
