package controller

import (
	"context"
	"sync"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// heard knows the last word of each host, of itself and of each of its VMs, so
// that one which was said before and arrives after it changes nothing. A new
// controller has heard nothing, and no word said to the one before comes to it. It
// is safe for concurrent use.
type heard struct {
	mu    sync.Mutex
	words map[string]*word // by who says it and of what
}

// word is the last word on one thing.
type word struct {
	turn chan struct{} // buffered by one: who has put something in has the word
	last *strongroomv1.Description
	gone string // the instance that spoke before that of last
}

// turn waits until nobody else notes what host says of the VM with that id, or of
// itself if that is empty. done must be called.
func (h *heard) turn(ctx context.Context, host, vm string) (w *word, done func(), err error) {
	key := host + "/" + vm
	h.mu.Lock()
	w, ok := h.words[key]
	if !ok {
		w = &word{turn: make(chan struct{}, 1)}
		h.words[key] = w
	}
	h.mu.Unlock()
	select {
	case w.turn <- struct{}{}:
		return w, func() { <-w.turn }, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// forget forgets what host said of a VM that it has no more.
func (h *heard) forget(host, vm string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.words, host+"/"+vm)
}

// stale reports whether d was said before the last word.
func (w *word) stale(d *strongroomv1.Description) bool {
	switch {
	case w.last == nil || d.GetSequence() == 0: // 0: it does not say
		return false
	case d.GetInstance() == w.last.GetInstance():
		return d.GetSequence() < w.last.GetSequence()
	}
	return d.GetInstance() == w.gone
}

// note notes that d is the last word.
func (w *word) note(d *strongroomv1.Description) {
	if d.GetSequence() == 0 || len(d.GetInstance()) > factMax {
		return
	}
	if w.last != nil && w.last.GetInstance() != d.GetInstance() {
		w.gone = w.last.GetInstance()
	}
	w.last = d
}
