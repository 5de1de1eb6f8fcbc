package admission_test

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/admission"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAddresses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ peer, address, network string }{
		{"192.0.2.1:5", "192.0.2.1", "192.0.2.1"},
		{"[2001:db8::1]:5", "2001:db8::1", "2001:db8::/64"},
		{"[2001:db8:0:0:ffff::1]:5", "2001:db8::ffff:0:0:1", "2001:db8::/64"},
		{"[::ffff:192.0.2.1]:5", "192.0.2.1", "192.0.2.1"},
		{"[fe80::1%eth0]:5", "fe80::1", "fe80::/64"},
		{"192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"@", "@", "@"},
		{"", "", ""},
	} {
		if a, n := admission.AddressOf(c.peer), admission.NetworkOf(c.peer); a != c.address || n != c.network {
			t.Errorf("%s: %s, %s; want %s, %s", c.peer, a, n, c.address, c.network)
		}
	}
}

func TestSlots(t *testing.T) {
	t.Parallel()
	s := admission.NewSlots(8, 2)
	var leaves []func()
	enter := func(peer string, want bool) {
		t.Helper()
		leave, ok := s.Enter(peer)
		if ok != want {
			t.Errorf("%s: %v", peer, ok)
		}
		if ok {
			leaves = append(leaves, leave)
		}
	}
	enter("192.0.2.1:1", true)
	enter("192.0.2.1:2", true)
	enter("192.0.2.1:3", false)
	for i := range 6 { // an IPv6 network has one address a connection
		enter(fmt.Sprintf("[2001:db8::%d]:1", i+1), true)
	}
	enter("192.0.2.2:1", false) // all are taken
	leaves[0]()
	enter("[2001:db8::99]:1", false) // three quarters are the network's
	enter("[2001:db8:1::1]:1", true)
	leaves[1]()
	enter("192.0.2.1:4", true)
	for _, leave := range leaves[2:] {
		leave()
	}
	leaves = nil
	for i := range 8 {
		enter(fmt.Sprintf("192.0.2.%d:1", i), true)
	}
	enter("192.0.2.9:1", false)
}

func TestRates(t *testing.T) {
	t.Parallel()
	r := admission.NewRates(10)
	now := time.Unix(1000, 0)
	allowed := func(format string) (n int) {
		for i := range 50 {
			peer := format
			if format != "192.0.2.2:1" {
				peer = fmt.Sprintf(format, i)
			}
			if r.Allow(peer, now) {
				n++
			}
		}
		return n
	}
	if n := allowed("192.0.2.1:%d"); n != 20 {
		t.Errorf("%d at once, want 20", n)
	}
	if n := allowed("[2001:db8::%d]:1"); n != 20 {
		t.Errorf("%d at once of a network, want 20", n)
	}
	if n := allowed("192.0.2.2:1"); n != 20 {
		t.Errorf("%d at once of another, want 20", n)
	}
	now = now.Add(time.Second)
	if n := allowed("192.0.2.1:%d"); n != 10 {
		t.Errorf("%d a second later, want 10", n)
	}
	for i := range 3 * admission.ClientsMax {
		r.Allow(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255), now)
		if n := r.Clients(); n > admission.ClientsMax {
			t.Fatalf("%d clients are remembered", n)
		}
	}
}

// TestListen: connections beyond the limit are closed, and a slot is free again
// once, however often a connection is closed.
func TestListen(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := admission.Listen(inner, admission.NewSlots(2, 1), slog.New(slog.DiscardHandler))
	accepted := make(chan net.Conn)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	defer func() {
		l.Close()
		<-ended
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(time.Minute))
		return c
	}
	dial()
	first := <-accepted
	if _, err := io.ReadAll(dial()); err != nil {
		t.Errorf("one too many was not closed: %v", err)
	}
	first.Close()
	first.Close()
	dial()
	second := <-accepted
	if _, err := io.ReadAll(dial()); err != nil {
		t.Errorf("closed twice, it gave back two slots: %v", err)
	}
	second.Close()
}
