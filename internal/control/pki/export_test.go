package pki

import "time"

// SetClock sets what time it is for the CA.
func (ca *CA) SetClock(now func() time.Time) { ca.now = now }

// SetClock sets what time it is for join tokens.
func (j *Joins) SetClock(now func() time.Time) { j.now = now }
