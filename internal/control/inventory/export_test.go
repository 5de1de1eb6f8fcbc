package inventory

import "time"

// SetClock sets what time it is.
func (inv *Inventory) SetClock(now func() time.Time) { inv.now = now }
