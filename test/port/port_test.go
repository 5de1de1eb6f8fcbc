package port

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// TestReserve listens twice at a reserved address, which neither other reservations
// nor listeners at any port are given meanwhile.
func TestReserve(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	var addr string
	for range 500 {
		addr = For(t)
		if seen[addr] {
			t.Fatalf("%s is reserved twice", addr)
		}
		seen[addr] = true
	}
	for range 2 {
		if _, err := net.Dial("tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a connection to where nobody listens: %v", err)
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		l.Close()
	}
	for range 2000 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if seen[l.Addr().String()] {
			t.Errorf("%v is reserved, and was given to a listener", l.Addr())
		}
		l.Close()
	}
}
