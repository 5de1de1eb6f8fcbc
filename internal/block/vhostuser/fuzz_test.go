package vhostuser

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

func memfd(t testing.TB, size int64) int {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err == nil {
		err = unix.Ftruncate(fd, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func eventfd(t testing.TB) int {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func fuzzConfig() *Config {
	return &Config{
		Device: blockdev.NewMemory(1<<20, 512), Queues: 2, Workers: 2,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// FuzzVirtqueue: a guest's memory with rings in it. The back end must stop or
// serve, and touch nothing around the guest's two regions.
func FuzzVirtqueue(f *testing.F) {
	const (
		size   = 16 << 10 // of each region
		num    = 8
		guest  = 1 << 20
		user   = 1 << 40
		canary = 0xA5
	)
	good := func(op byte) []byte {
		b := make([]byte, 3072)
		desc := func(at int, addr uint64, n uint32, flags, next uint16) {
			le.PutUint64(b[at:], addr)
			le.PutUint32(b[at+8:], n)
			le.PutUint16(b[at+12:], flags)
			le.PutUint16(b[at+14:], next)
		}
		desc(0, guest+2048, 16, descNext, 1)
		desc(16, guest+size-512, 1024, descNext|descWrite, 2)
		desc(32, guest+2064, 1, descWrite, 0)
		desc(48, guest+1024, 48, descIndirect, 0)
		desc(1024, guest+2048, 16, descNext, 1)
		desc(1040, guest+4096, 512, descNext|descWrite*uint16(1-op&1), 2)
		desc(1056, guest+2065, 1, descWrite, 0)
		le.PutUint16(b[130:], 2)
		le.PutUint16(b[134:], 3)
		b[2048] = op
		return b
	}
	for _, op := range []byte{opRead, opWrite, opFlush, opGetID, opDiscard, opWriteZeroes} {
		f.Add(good(op), true)
	}
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, b []byte, events bool) {
		fd := memfd(t, 4*size)
		defer unix.Close(fd)
		all, err := unix.Mmap(fd, 0, 4*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(all)
		for _, around := range [][]byte{all[:size], all[3*size:]} {
			copy(around, bytes.Repeat([]byte{canary}, size))
		}
		copy(all[size:3*size], b)

		s := newSession(fuzzConfig(), nil)
		defer s.close()
		for i := range uint64(2) {
			if err := s.memory.add(regionSpec{guest + i*size, size, user + i*size, (1 + i) * size}, fd); err != nil {
				t.Fatal(err)
			}
		}
		s.features = featureIndirect | featureFlush
		if events {
			s.features |= featureEventIdx
		}
		q := s.queues[0]
		// A pipe without a writer: the queue is out of service as soon as it has
		// served all and would wait for a kick.
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		unix.Close(pipe[1])
		kick, err := eventFile(pipe[0])
		if err != nil {
			t.Fatal(err)
		}
		q.setKick(kick)
		q.size, q.enabled, q.placed = num, true, true
		q.addr = vringAddr{desc: user, avail: user + 16*num, used: user + 512}
		inflight, ifd, err := newInflight(1, num)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(ifd)
		s.inflight = inflight
		// A second time with the same in-flight memory, as after a restart.
		for range 2 {
			q.broken.Store(false)
			s.startReady()
			q.workers.Wait()
			q.stop()
		}
		for _, around := range [][]byte{all[:size], all[3*size:]} {
			if !bytes.Equal(around, bytes.Repeat([]byte{canary}, size)) {
				t.Error("memory outside of the guest's was written")
			}
		}
	})
}

// FuzzMessage: a stream of messages from a front end. Every message carries up
// to two descriptors: the first byte of the input before it chooses them.
func FuzzMessage(f *testing.F) {
	const size = 64 << 10
	msg := func(fds byte, request uint32, payload ...byte) []byte {
		return append(header{request, flagVersion | flagNeedReply, uint32(len(payload))}.append([]byte{fds}), payload...)
	}
	u64 := func(v ...uint64) (b []byte) {
		for _, x := range v {
			b = ne.AppendUint64(b, x)
		}
		return b
	}
	var setup []byte
	for _, m := range [][]byte{
		msg(0, reqGetFeatures), msg(0, reqSetProtocolFeatures, u64(protoAll)...),
		msg(0, reqSetFeatures, u64(featureVersion1|featureEventIdx|featureProtocol)...),
		msg(1, reqSetMemTable, u64(1, 1<<20, size, 1<<30, 0)...),
		msg(0, reqGetConfig, append(append(ne.AppendUint32(nil, 0), ne.AppendUint32(nil, 60)...), make([]byte, 64)...)...),
		msg(0, reqGetInflightFD, append(u64(0, 0), 1, 0, 8, 0)...),
		msg(0, reqSetVringNum, u64(8<<32)...), msg(0, reqSetVringBase, u64(0)...),
		msg(0, reqSetVringAddr, u64(0, 1<<30, 1<<30+4096, 1<<30+8192, 0)...),
		msg(2, reqSetVringKick, u64(0)...), msg(2, reqSetVringCall, u64(0)...),
		msg(0, reqSetVringEnable, u64(1<<32)...), msg(0, reqGetVringBase, u64(0)...),
		msg(1, reqAddMemReg, u64(0, 1<<22, 4096, 1<<32, 0)...), msg(0, reqRemMemReg, u64(0, 1<<22, 4096, 1<<32, 0)...),
		msg(1, reqSetInflightFD, append(u64(4096, 0), 1, 0, 8, 0)...),
	} {
		f.Add(m)
		setup = append(setup, m...)
	}
	f.Add(setup)
	f.Fuzz(func(t *testing.T, b []byte) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		ends := make([]*net.UnixConn, 2)
		for i, fd := range pair {
			file := os.NewFile(uintptr(fd), "socket")
			conn, err := net.FileConn(file)
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
			ends[i] = conn.(*net.UnixConn)
		}
		s := newSession(fuzzConfig(), ends[1])
		served, drained := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(served)
			defer ends[1].Close()
			_ = s.serve() // an error is fine
		}()
		go func() {
			defer close(drained)
			_, _ = io.Copy(io.Discard, ends[0]) // ends with the connection
		}()
		mem, event := memfd(t, size), eventfd(t)
		defer unix.Close(mem)
		defer unix.Close(event)
		for len(b) > sizeHeader {
			var fds []int
			if b[0]&1 != 0 {
				fds = append(fds, mem)
			}
			if b[0]&2 != 0 {
				fds = append(fds, event)
			}
			b = b[1:]
			n := min(len(b), sizeHeader+int(ne.Uint32(b[8:])&0x3ff))
			var oob []byte
			if len(fds) > 0 {
				oob = unix.UnixRights(fds...)
			}
			if _, _, err := ends[0].WriteMsgUnix(b[:n], oob, nil); err != nil {
				break // the session has ended
			}
			b = b[n:]
		}
		_ = ends[0].CloseWrite()
		<-served
		<-drained
		ends[0].Close()
	})
}

// FuzzHeader: what parses, encodes to the same bytes.
func FuzzHeader(f *testing.F) {
	f.Add(header{reqGetFeatures, flagVersion | flagNeedReply, 8}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < sizeHeader {
			return
		}
		h, err := parseHeader(b)
		if err != nil {
			if h != (header{}) {
				t.Errorf("a header that does not parse gives %+v", h)
			}
			return
		}
		if got := h.append(nil); !bytes.Equal(got, b[:sizeHeader]) {
			t.Errorf("%x parses and encodes to %x", b[:sizeHeader], got)
		}
	})
}
