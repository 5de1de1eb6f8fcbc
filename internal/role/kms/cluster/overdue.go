package cluster

import (
	"context"
	"log/slog"
	"time"
)

const (
	// overdueAfter is how long a node may take to erase what it should before the
	// leader says so, and overdueEvery how often it says it again.
	overdueAfter = time.Minute
	overdueEvery = 10 * time.Minute
)

// overdue watches for nodes that do not erase what they should: those that are
// away, or sealed. Until they have, or are removed, keys that were destroyed can
// be had from their disks with an old copy of the database.
type overdue struct {
	since map[string]time.Time // by member id: with erasures due
	told  map[string]time.Time
}

// of returns the members that have to be told of at now.
func (o *overdue) of(members []Listed, now time.Time) (late []Listed) {
	since, told := map[string]time.Time{}, map[string]time.Time{}
	for _, m := range members {
		if m.ErasuresDue == 0 {
			continue
		}
		since[m.ID], told[m.ID] = o.since[m.ID], o.told[m.ID]
		if since[m.ID].IsZero() {
			since[m.ID] = now
		}
		if now.Sub(since[m.ID]) >= overdueAfter && now.Sub(told[m.ID]) >= overdueEvery {
			told[m.ID] = now
			late = append(late, m)
		}
	}
	o.since, o.told = since, told
	return late
}

// warn tells the log of members with erasures due for long.
func (c *Cluster) warn(ctx context.Context, o *overdue) {
	members, err := c.List(ctx)
	if err != nil {
		return // the next look tells
	}
	now := time.Now()
	for _, m := range o.of(members, now) {
		c.Log.LogAttrs(ctx, slog.LevelWarn, "a node has not erased KEKs of destroyed keys: start it, or remove it and erase its disk",
			slog.String("member", m.Name), slog.Int("epochs", m.ErasuresDue), slog.Duration("for", now.Sub(o.since[m.ID]).Truncate(time.Second)),
			slog.String("command", "strongroom kms member ls"))
	}
}
