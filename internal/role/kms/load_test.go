package kms

import (
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go/payloads"
)

// load is clients that create keys at whatever node answers, as a client with
// three servers does.
type load struct {
	mu     sync.Mutex
	keys   map[string][]byte // acknowledged: what Get gave
	pause  time.Duration     // longest time between two acknowledgements, since it was asked for
	last   time.Time
	failed int
	stop   atomic.Bool
	all    sync.WaitGroup
}

func (n *trio) load(clients int) *load {
	l := &load{keys: map[string][]byte{}, last: time.Now()}
	for c := range clients {
		l.all.Go(func() {
			const atFirst = 2 * time.Second
			for at, timeout := c, atFirst; !l.stop.Load(); {
				err := l.one(n.sites[at%len(n.sites)].cfg.Listen, n.tls, timeout)
				if err == nil {
					timeout = atFirst
					continue
				}
				var late net.Error
				if errors.As(err, &late) && late.Timeout() {
					timeout *= 2 // a busy machine may need it
				}
				at++
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	return l
}

// one makes a key and gets it.
func (l *load) one(addr string, cfg *tls.Config, timeout time.Duration) error {
	item, err := doOn(addr, cfg, timeout, newAES(""))
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.failed++
		return err
	}
	id := item.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	l.mu.Lock()
	now := time.Now()
	l.pause, l.last = max(l.pause, now.Sub(l.last)), now
	l.keys[id] = nil
	l.mu.Unlock()
	if item, err = doOn(addr, cfg, timeout, &payloads.GetRequestPayload{UniqueIdentifier: id}); err != nil {
		return err
	}
	secret, err := secretOf(item)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys[id] = secret
	return err
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.keys)
}

// paused returns for how long at most nothing was acknowledged since it was called
// last.
func (l *load) paused() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	pause := l.pause
	l.pause = 0
	return pause
}

// more waits until so many more keys were acknowledged.
func (l *load) more(t *testing.T, count int) {
	t.Helper()
	before := l.count()
	eventually(t, "clients get on", func() bool { return l.count() >= before+count })
}

func (l *load) keysGot() map[string][]byte {
	out := map[string][]byte{}
	for id, secret := range l.keys {
		if secret != nil {
			out[id] = secret
		}
	}
	return out
}
