package access

import "time"

// SetClock sets what time it is.
func (c *Control) SetClock(now func() time.Time) {
	c.now = now
	c.throttle.now = now
}

// CanonicalHash parses a stored hash and writes it again.
func CanonicalHash(s string) (string, error) {
	p, err := parseHash(s)
	if err != nil {
		return "", err
	}
	return p.String(), nil
}

// SplitToken parses a token's text.
func SplitToken(text string) (id string, secret []byte, ok bool) { return parseToken(text) }

// Throttled returns how many counters are kept.
func (c *Control) Throttled() int { return len(c.throttle.counters) }

// BeginAttempt is what Login does before it looks at a password.
func (c *Control) BeginAttempt(name, peer string) error { return c.throttle.begin(name, peer) }

// MaxThrottled is the bound of Throttled.
const MaxThrottled = maxThrottled
