package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/nbd"
)

func TestExports(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(1<<20, 4096)
	s := nbd.NewServer(config())
	check(t, s.AddExport(nbd.Export{Name: "a", Device: mem}))
	wantError(t, s.AddExport(nbd.Export{Name: "a", Device: mem}), nbd.ErrExists)
	wantError(t, s.RemoveExport(testContext(t), "b"), nbd.ErrNotFound)
	if s.AddExport(nbd.Export{Name: strings.Repeat("n", 4097), Device: mem}) == nil {
		t.Error("a name of 4097 bytes is accepted")
	}
	if s.AddExport(nbd.Export{Name: "none"}) == nil {
		t.Error("an export without a device is accepted")
	}
	check(t, s.RemoveExport(testContext(t), "a"))
	check(t, s.AddExport(nbd.Export{Name: "a", Device: mem}))
}

// gate lets flushes begin and holds them until it is opened.
type gate struct {
	*watched
	began chan struct{}
	open  chan struct{}
}

func newGate() gate {
	g := gate{&watched{Device: blockdev.NewMemory(1<<20, 4096)}, make(chan struct{}, 100), make(chan struct{})}
	g.hook = func(op string, _ int64) error {
		if op == "flush" {
			g.began <- struct{}{}
			<-g.open
		}
		return nil
	}
	return g
}

func TestRemoveExport(t *testing.T) {
	t.Parallel()
	t.Run("waits", func(t *testing.T) {
		t.Parallel()
		s, path := start(t, config(), nbd.Export{Name: "rw", Device: blockdev.NewMemory(1<<20, 4096)})
		c := dial(t, path, "rw")
		removed := make(chan error, 1)
		go func() { removed <- s.RemoveExport(testContext(t), "rw") }()
		blockdevtest.Eventually(t, "the export to vanish", func() bool {
			d, err := nbd.Dial(testContext(t), "unix", path, "rw")
			if err == nil {
				d.Close()
			}
			return err != nil
		})
		if _, err := c.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("the present client cannot go on: %v", err)
		}
		check(t, c.Close())
		check(t, <-removed)
	})
	t.Run("breaks", func(t *testing.T) {
		t.Parallel()
		g := newGate()
		s, path := start(t, config(), nbd.Export{Name: "rw", Device: g})
		c := dial(t, path, "rw")
		flushed := make(chan error, 1)
		go func() { flushed <- c.Flush() }()
		<-g.began
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		removed := make(chan error, 1)
		go func() { removed <- s.RemoveExport(ctx, "rw") }()
		if err := <-flushed; err == nil {
			t.Error("the request succeeded on a broken connection")
		}
		select {
		case <-removed:
			t.Error("RemoveExport returned while the device was in use")
		default:
		}
		close(g.open)
		check(t, <-removed)
	})
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	t.Run("finishes what is in work", func(t *testing.T) {
		t.Parallel()
		g := newGate()
		s, path := start(t, config(), nbd.Export{Name: "rw", Device: g})
		c := dial(t, path, "rw")
		flushed := make(chan error, 1)
		go func() { flushed <- c.Flush() }()
		<-g.began
		stopped := make(chan error, 1)
		go func() { stopped <- s.Shutdown(testContext(t)) }()
		blockdevtest.Eventually(t, "the server to refuse clients", func() bool {
			sock, err := net.Dial("unix", path)
			if err == nil {
				sock.Close()
			}
			return err != nil
		})
		close(g.open)
		check(t, <-flushed)
		check(t, <-stopped)
		if err := c.Flush(); err == nil {
			t.Error("a request succeeded after Shutdown")
		}
		l, err := net.Listen("unix", path)
		check(t, err)
		wantError(t, s.Serve(testContext(t), l), nbd.ErrStopped)
	})
	t.Run("breaks when time is up", func(t *testing.T) {
		t.Parallel()
		g := newGate()
		s, path := start(t, config(), nbd.Export{Name: "rw", Device: g})
		c := dial(t, path, "rw")
		flushed := make(chan error, 1)
		go func() { flushed <- c.Flush() }()
		<-g.began
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer cancel()
		wantError(t, s.Shutdown(ctx), context.DeadlineExceeded)
		if err := <-flushed; err == nil {
			t.Error("the request succeeded on a broken connection")
		}
		close(g.open)
	})
	t.Run("while idle and negotiating", func(t *testing.T) {
		t.Parallel()
		s, path := start(t, config(), nbd.Export{Name: "rw", Device: blockdev.NewMemory(1<<20, 4096)})
		idle := open(t, path, "rw", true)
		negotiating := connect(t, path)
		negotiating.hello(3)
		check(t, s.Shutdown(testContext(t)))
		idle.wantEnd()
		negotiating.wantEnd()
	})
}

func TestMaxConnections(t *testing.T) {
	t.Parallel()
	c := config()
	c.MaxConnections = 2
	path := pair(t, c)
	a, b := dial(t, path, "rw"), dial(t, path, "ro")
	r := connect(t, path)
	r.wantEnd()
	check(t, a.Close())
	blockdevtest.Eventually(t, "room for another client", func() bool {
		d, err := nbd.Dial(testContext(t), "unix", path, "rw")
		if err == nil {
			d.Close()
		}
		return err == nil
	})
	check(t, b.Flush())
}

// TestFlushAcrossConnections: what multi-conn promises.
func TestFlushAcrossConnections(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(1<<20, 4096)
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem})
	a, b := dial(t, path, "rw"), dial(t, path, "rw")
	want := pattern(4096)
	write(t, a, want, 8192)
	check(t, b.Flush())
	got := make([]byte, 4096)
	if _, err := b.ReadAt(got, 8192); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the other connection reads something else (%v)", err)
	}
}

// TestHostileClients: none of these harms the client beside it, and none is
// left when the server stops.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(16<<20, 4096)
	want := pattern(16 << 20)
	write(t, mem, want, 0)
	c := config()
	// Little memory, so that the hostile ones could take all there is.
	c.MaxBuffers = 1 << 20
	_, path := start(t, c, nbd.Export{Name: "rw", Device: mem})

	tests := []struct {
		name   string
		attack func(r raw)
		ends   bool // the server hangs up
	}{
		{"half a request", func(r raw) { r.send(request(0, 0, 1, 0, 512)[:20]) }, false},
		{"half a write", func(r raw) { r.send(append(request(0, 1, 1, 0, 1<<20), make([]byte, 300<<10)...)) }, false},
		{"garbage", func(r raw) { r.send(bytes.Repeat([]byte("x"), 28)) }, true},
		{"write over the limit", func(r raw) { r.send(request(0, 1, 1, 0, 32<<20+1)) }, true},
		{"write of 4 GiB", func(r raw) { r.send(request(0, 1, 1, 0, 1<<32-1)) }, true},
		{"never reads", func(r raw) {
			// The server stops reading when it cannot answer.
			check(t, r.SetWriteDeadline(time.Now().Add(200*time.Millisecond)))
			burst := bytes.Repeat(request(0, 0, 1, 0, 1<<20), 1000)
			for range 100 {
				if _, err := r.Write(burst); err != nil {
					return
				}
			}
			t.Error("the server took 100,000 requests without an answer read")
		}, false},
		{"mistakes, never reads", func(r raw) {
			check(t, r.SetWriteDeadline(time.Now().Add(200*time.Millisecond)))
			burst := bytes.Repeat(request(0xffff, 99, 1, 0, 1<<20), 1000)
			for range 1000 {
				if _, err := r.Write(burst); err != nil {
					return
				}
			}
			t.Error("the server took a million requests without an answer read")
		}, false},
		{"goes in the middle", func(r raw) { r.send(request(0, 0, 1, 0, 8<<20)); r.recv(1000); r.Close() }, false},
	}
	var attackers []raw
	for _, test := range tests {
		for range 3 {
			r := open(t, path, "rw", true)
			test.attack(r)
			if test.ends {
				r.wantEnd()
			}
			attackers = append(attackers, r)
		}
		good := dial(t, path, "rw")
		got := make([]byte, 4<<20)
		if _, err := good.ReadAt(got, 4<<20); err != nil || !bytes.Equal(got, want[4<<20:8<<20]) {
			t.Errorf("%s: the client beside it cannot read: %v", test.name, err)
		}
		check(t, good.Close())
	}
	_ = attackers // connected until the test ends: the server has to break them
}

// TestManyClients lets clients of several connections work on ranges of their
// own at every size around the limits.
func TestManyClients(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(32<<20, 4096)
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem})
	var group sync.WaitGroup
	for i := range 4 {
		c := dial(t, path, "rw")
		for j := range 4 {
			base := int64(i*4+j) * (2 << 20)
			group.Go(func() {
				for _, n := range []int{512, 4096, 65536, 65536 + 512, 256 << 10, 256<<10 + 512, 2 << 20} {
					want := bytes.Repeat([]byte{byte(i*4 + j + 1), byte(n >> 9)}, n/2)
					got := make([]byte, n)
					_, werr := c.WriteAt(want, base)
					_, rerr := c.ReadAt(got, base)
					if err := errors.Join(werr, rerr, c.Flush()); err != nil || !bytes.Equal(got, want) {
						t.Errorf("client %d.%d, %d bytes: differs, or %v", i, j, n, err)
					}
				}
			})
		}
	}
	group.Wait()
}
