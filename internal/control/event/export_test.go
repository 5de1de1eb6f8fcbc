package event

import "time"

// SetClock sets what time it is.
func (l *Log) SetClock(now func() time.Time) { l.now = now }
