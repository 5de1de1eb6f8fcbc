package objectstore

import (
	"container/list"
	"sync"
	"sync/atomic"

	"strongroom/internal/keys/kmip/kmipserver"
)

// entry is an opened record. Its material is wiped when nobody holds it.
type entry struct {
	key      string
	revision int64 // of the record that it was opened from
	epoch    uint64
	object   *kmipserver.Object // not to be changed
	holders  atomic.Int64       // who may use the material; the cache is one of them
}

func (e *entry) release() {
	if e.holders.Add(-1) == 0 {
		e.object.Material.Close()
	}
}

// cache keeps the records that were used last, opened. What it returns is never
// stale: it is asked for a revision, which the database tells at every use. What was
// opened with a KEK that was erased since it does not keep: it may be a key that another
// node has destroyed.
type cache struct {
	limit int
	lives func(epoch uint64) bool // its KEK is not erased

	mu      sync.Mutex
	entries map[string]*list.Element // of *entry
	recent  list.List                // most recent first
}

func newCache(limit int, lives func(epoch uint64) bool) *cache {
	return &cache{limit: limit, lives: lives, entries: map[string]*list.Element{}}
}

// get returns the entry of key if it is of that revision; the caller releases
// it.
func (c *cache) get(key string, revision int64) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.entries[key]
	if at == nil {
		return nil
	}
	e := at.Value.(*entry)
	if e.revision != revision {
		return nil
	}
	c.recent.MoveToFront(at)
	e.holders.Add(1)
	return e
}

// put adds e, which its caller goes on to hold, unless there is a newer one, or its KEK
// has been erased.
func (c *cache) put(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.lives(e.epoch) {
		return
	}
	if at := c.entries[e.key]; at != nil {
		if at.Value.(*entry).revision >= e.revision {
			return
		}
		c.drop(at)
	}
	e.holders.Add(1)
	c.entries[e.key] = c.recent.PushFront(e)
	for c.recent.Len() > c.limit {
		c.drop(c.recent.Back())
	}
}

// forget drops what is known of key.
func (c *cache) forget(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at := c.entries[key]; at != nil {
		c.drop(at)
	}
}

func (c *cache) drop(at *list.Element) {
	e := c.recent.Remove(at).(*entry)
	delete(c.entries, e.key)
	e.release()
}

// erase drops what was opened with KEKs that are erased.
func (c *cache) erase() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for at := c.recent.Front(); at != nil; {
		next := at.Next()
		if !c.lives(at.Value.(*entry).epoch) {
			c.drop(at)
		}
		at = next
	}
}

// clear drops everything.
func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.recent.Len() > 0 {
		c.drop(c.recent.Back())
	}
}
