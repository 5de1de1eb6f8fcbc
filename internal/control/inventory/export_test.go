package inventory

import (
	"context"
	"time"

	"strongroom/internal/control/store"
)

// SetClock sets what time it is.
func (inv *Inventory) SetClock(now func() time.Time) { inv.now = now }

// WatchPresence calls f with each change of who is alive; see
// [store.Table.Watch]. The keys are host ids.
func (inv *Inventory) WatchPresence(ctx context.Context, f func(op store.Op, hostID string) error) error {
	return inv.alive.Watch(ctx, "", 0, func(c store.Change[presence]) error { return f(c.Op, c.Key) })
}
