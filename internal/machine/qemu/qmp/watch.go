package qmp

import "slices"

// watchDepth is how many events wait for a slow watcher; beyond it the oldest
// are dropped. Watchers look for events that come once per operation.
const watchDepth = 64

// Watch receives events. It must be closed.
type Watch struct {
	client *Client
	names  []string
	events chan Event
}

// Watch begins to collect the events of the given names, or all if none are
// given. To see the event that a command causes, watch before running it.
func (c *Client) Watch(names ...string) *Watch {
	w := &Watch{client: c, names: names, events: make(chan Event, watchDepth)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		close(w.events)
	} else {
		c.watches[w] = struct{}{}
	}
	return w
}

// Events returns the channel of events. It is closed when the session ends or
// the Watch is closed.
func (w *Watch) Events() <-chan Event { return w.events }

// Close ends the watch. It is idempotent.
func (w *Watch) Close() {
	w.client.mu.Lock()
	defer w.client.mu.Unlock()
	if _, ok := w.client.watches[w]; ok {
		delete(w.client.watches, w)
		close(w.events)
	}
}

// offer queues e without ever waiting. The client's mutex is held, so that no
// one else sends or closes.
func (w *Watch) offer(e Event) {
	if len(w.names) > 0 && !slices.Contains(w.names, e.Name) {
		return
	}
	for {
		select {
		case w.events <- e:
			return
		default:
		}
		select {
		case <-w.events:
		default:
		}
	}
}
