package nbd

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"

	"strongroom/internal/block/blockdev"
)

func TestMayConnect(t *testing.T) {
	t.Parallel()
	s := NewServer(Config{AllowedUIDs: []uint32{107}})
	self := uint32(os.Geteuid())
	for uid, want := range map[uint32]bool{0: true, self: true, 107: true, self + 1: false, 65534: false} {
		if got := s.mayConnect(uid); got != want {
			t.Errorf("user %d may connect: %v, want %v", uid, got, want)
		}
	}
}

func TestErrno(t *testing.T) {
	t.Parallel()
	tests := []struct {
		err  error
		want uint32
	}{
		{nil, 0},
		{blockdev.ErrReadOnly, 1},
		{syscall.EIO, 5},
		{fmt.Errorf("anything"), 5},
		{syscall.ENOMEM, 12},
		{blockdev.ErrOutOfRange, 22},
		{blockdev.ErrNoSpace, 28},
		{syscall.ENOSPC, 28},
		{syscall.EDQUOT, 28},
		{syscall.EOPNOTSUPP, 95},
		{blockdev.ErrClosed, 108},
	}
	for _, test := range tests {
		if got := errnoOf(test.err); got != test.want {
			t.Errorf("errno of %v is %d, want %d", test.err, got, test.want)
		}
		if test.err == nil {
			continue
		}
		if got := errnoOf(fmt.Errorf("cannot: %w", test.err)); got != test.want {
			t.Errorf("errno of %v, wrapped, is %d, want %d", test.err, got, test.want)
		}
	}
}

// FuzzRequestHeader: what parses, encodes to the same bytes.
func FuzzRequestHeader(f *testing.F) {
	f.Add(appendRequest(nil, request{flags: flagFUA, typ: cmdWrite, cookie: 1 << 40, offset: 1 << 50, length: 1 << 20}))
	f.Add(make([]byte, sizeRequest))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < sizeRequest {
			return
		}
		r, ok := parseRequest(b)
		if !ok {
			if r != (request{}) {
				t.Errorf("a request that does not parse gives %+v", r)
			}
			return
		}
		if got := appendRequest(nil, r); !bytes.Equal(got, b[:sizeRequest]) {
			t.Errorf("%x parses and encodes to %x", b[:sizeRequest], got)
		}
	})
}
