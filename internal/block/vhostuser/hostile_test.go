package vhostuser_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/vhostuser/vhostusertest"
)

const (
	guestBase = vhostusertest.GuestBase
	next      = vhostusertest.Next
	writable  = vhostusertest.Writable
	indirect  = vhostusertest.Indirect
)

// TestHostileRing: what breaks a ring stops that queue, is logged, and hurts
// neither the other queue nor the memory around; and a driver that starts anew
// is served again.
func TestHostileRing(t *testing.T) {
	t.Parallel()
	const scratch = 3 << 20 // an offset in memory that nothing else uses
	at := func(off int) uint64 { return guestBase + scratch + uint64(off) }
	// header makes descriptor 0 a good header.
	header := func(q *vhostusertest.Queue, flags uint16) { q.PutDesc(q.Desc, at(0), 16, flags, 1) }
	put := func(q *vhostusertest.Queue, i int, addr uint64, n uint32, flags, nxt uint16) {
		q.PutDesc(q.Desc+16*i, addr, n, flags, nxt)
	}
	tests := []struct {
		name  string
		offer func(q *vhostusertest.Queue, size int)
		want  string
	}{
		{"head outside the table", func(q *vhostusertest.Queue, _ int) { q.Offer(uint16(q.Size)) }, "does not exist"},
		{"more buffers than entries", func(q *vhostusertest.Queue, _ int) {
			for range q.Size + 1 {
				q.Offer(0)
			}
		}, "more buffers"},
		{"next outside the table", func(q *vhostusertest.Queue, _ int) {
			q.PutDesc(q.Desc, at(0), 16, next, 60000)
			q.Offer(0)
		}, "does not exist"},
		{"loop", func(q *vhostusertest.Queue, _ int) {
			q.PutDesc(q.Desc, at(0), 16, next, 0)
			q.Offer(0)
		}, "longer than its table"},
		{"below memory", func(q *vhostusertest.Queue, _ int) {
			header(q, next)
			put(q, 1, guestBase-1, 512, writable, 0)
			q.Offer(0)
		}, "outside"},
		{"beyond memory", func(q *vhostusertest.Queue, size int) {
			header(q, next)
			put(q, 1, guestBase+uint64(size)-511, 512, writable, 0)
			q.Offer(0)
		}, "outside"},
		{"address wraps", func(q *vhostusertest.Queue, _ int) {
			header(q, next)
			put(q, 1, 1<<64-256, 512, writable, 0)
			q.Offer(0)
		}, "outside"},
		{"zero length", func(q *vhostusertest.Queue, _ int) {
			header(q, next)
			put(q, 1, at(512), 0, writable, 0)
			q.Offer(0)
		}, "no bytes"},
		{"readable after writable", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 16, writable|next, 1)
			put(q, 1, at(512), 16, 0, 0)
			q.Offer(0)
		}, "follows one to write"},
		{"short header", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 15, next, 1)
			put(q, 1, at(512), 1, writable, 0)
			q.Offer(0)
		}, "shorter than its header"},
		{"no status", func(q *vhostusertest.Queue, _ int) {
			header(q, 0)
			q.Offer(0)
		}, "no room for its status"},
		{"indirect with next", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 32, indirect|next, 1)
			q.Offer(0)
		}, "indirect"},
		{"indirect of no entries", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 0, indirect, 0)
			q.Offer(0)
		}, "indirect"},
		{"indirect of half an entry", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 24, indirect, 0)
			q.Offer(0)
		}, "indirect"},
		{"indirect of too many entries", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 16*1025, indirect, 0)
			q.Offer(0)
		}, "indirect"},
		{"indirect outside memory", func(q *vhostusertest.Queue, size int) {
			put(q, 0, guestBase+uint64(size)-16, 32, indirect, 0)
			q.Offer(0)
		}, "outside"},
		{"indirect in indirect", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 16, indirect, 0)
			q.PutDesc(scratch, at(64), 32, indirect, 0)
			q.Offer(0)
		}, "indirect"},
		{"loop in indirect", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 32, indirect, 0)
			q.PutDesc(scratch, at(64), 16, next, 1)
			q.PutDesc(scratch+16, at(64), 16, next, 0)
			q.Offer(0)
		}, "longer than its table"},
		{"next outside indirect", func(q *vhostusertest.Queue, _ int) {
			put(q, 0, at(0), 32, indirect, 0)
			q.PutDesc(scratch, at(64), 16, next, 2)
			q.Offer(0)
		}, "does not exist"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			s, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512), Log: slog.New(slog.NewTextHandler(&log, nil))})
			f := dial(t, path, vhostusertest.Options{Queues: 2, Slots: 4, DataSize: 512 << 10})
			bad, good := f.Queues[0], f.Queues[1]
			test.offer(bad, len(f.Mem))
			check(t, bad.ForceKick())
			check(t, bad.AwaitBroken())
			do(t, good, vhostusertest.Write, 0, make([]byte, 512), vhostusertest.OK)
			if _, _, ok := bad.Pop(); ok {
				t.Error("something is given back")
			}

			_, err := bad.Stop()
			check(t, err)
			bad.Reset()
			check(t, f.NewInflight())
			check(t, bad.Start())
			do(t, bad, vhostusertest.Read, 0, make([]byte, 512), vhostusertest.OK)
			check(t, s.Close())
			if !strings.Contains(log.String(), test.want) || strings.Count(log.String(), "\n") != 1 {
				t.Errorf("the log does not say %q once:\n%s", test.want, &log)
			}
		})
	}
}

// TestSameBufferTwice: a head that is offered again while it is in work.
func TestSameBufferTwice(t *testing.T) {
	t.Parallel()
	dev := &gate{Device: blockdev.NewMemory(1<<20, 512), pass: make(chan struct{})}
	_, path := start(t, vhostuser.Config{Device: dev})
	t.Cleanup(func() { close(dev.pass) })
	q := dial(t, path, vhostusertest.Options{}).Queues[0]
	slot := q.Slot()
	q.Submit(slot, vhostusertest.Flush, 0, 0)
	q.Offer(uint16(slot))
	check(t, q.ForceKick())
	check(t, q.AwaitBroken())
}

// gate lets flushes wait.
type gate struct {
	blockdev.Device
	pass chan struct{}
}

func (g *gate) Flush() error {
	<-g.pass
	return g.Device.Flush()
}

// TestIndirectNotAgreed: an indirect descriptor of a driver that has not
// accepted them.
func TestIndirectNotAgreed(t *testing.T) {
	t.Parallel()
	_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512)})
	q := dial(t, path, vhostusertest.Options{Without: vhostusertest.FeatureIndirect}).Queues[0]
	q.PutDesc(q.Desc, guestBase+4096*10, 32, indirect, 0)
	q.Offer(0)
	check(t, q.ForceKick())
	check(t, q.AwaitBroken())
}

// TestMemoryGoesAway makes the memory's file shorter under the back end: of the
// ring itself, and of the data of a request.
func TestMemoryGoesAway(t *testing.T) {
	t.Parallel()
	for _, keep := range []int64{0, 64 << 10} {
		var log bytes.Buffer
		s, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512), Log: slog.New(slog.NewTextHandler(&log, nil))})
		f := dial(t, path, vhostusertest.Options{Memory: tempFile(t), Slots: 4})
		q := f.Queues[0]
		do(t, q, vhostusertest.Write, 0, make([]byte, 4096), vhostusertest.OK)
		if keep > 0 {
			// Data beyond what is kept; header and ring within.
			q.PutDesc(q.Desc, guestBase+40<<10, 16, next, 1)
			clear(f.Mem[40<<10 : 40<<10+16])
			q.PutDesc(q.Desc+16, guestBase+uint64(len(f.Mem))-8192, 4097, writable, 0)
			q.Offer(0)
		}
		check(t, f.MemFile.Truncate(keep))
		check(t, q.ForceKick())
		check(t, q.AwaitBroken())
		check(t, s.Close())
		if !strings.Contains(log.String(), "guest memory is not there any more") {
			t.Errorf("the log does not say what happened:\n%s", &log)
		}
	}
}

// TestMemoryIsSealed: what can be kept from shrinking, is.
func TestMemoryIsSealed(t *testing.T) {
	t.Parallel()
	_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512)})
	f := dial(t, path, vhostusertest.Options{})
	seals, err := unix.FcntlInt(f.MemFile.Fd(), unix.F_GET_SEALS, 0)
	check(t, err)
	if seals&unix.F_SEAL_SHRINK == 0 {
		t.Errorf("the guest's memory has the seals %#x", seals)
	}
}

// TestHostileMessages: each ends the session, and the next one is served.
func TestHostileMessages(t *testing.T) {
	t.Parallel()
	u64 := func(v ...uint64) []byte {
		var b []byte
		for _, x := range v {
			b = append(b, le64(x)...)
		}
		return b
	}
	state := func(index, num uint32) []byte { return append(le32(index), le32(num)...) }
	region := func(guest, size, user, off uint64) []byte { return u64(1, guest, size, user, off) }
	tests := []struct {
		name    string
		request uint32
		flags   uint32
		payload []byte
		fds     int // copies of the memory's descriptor
	}{
		{"unknown request", 99, 1, nil, 0},
		{"wrong version", vhostusertest.GetFeatures, 2, nil, 0},
		{"reply", vhostusertest.GetFeatures, 5, nil, 0},
		{"too long", vhostusertest.GetFeatures, 1, make([]byte, 513), 0},
		{"features not offered", vhostusertest.SetFeatures, 1, u64(1 << 26), 0},
		{"short features", vhostusertest.SetFeatures, 1, make([]byte, 7), 0},
		{"protocol features not offered", vhostusertest.SetProtocolFeatures, 1, u64(1 << 60), 0},
		{"no such queue", vhostusertest.SetVringNum, 1, state(1000, 128), 0},
		{"queue of 0", vhostusertest.SetVringNum, 1, state(0, 0), 0},
		{"queue of 100", vhostusertest.SetVringNum, 1, state(0, 100), 0},
		{"queue of 2048", vhostusertest.SetVringNum, 1, state(0, 2048), 0},
		{"base too large", vhostusertest.SetVringBase, 1, state(0, 1<<16), 0},
		{"enabled twice as much", vhostusertest.SetVringEnable, 1, state(0, 2), 0},
		{"log of a ring", vhostusertest.SetVringAddr, 1, append(state(0, 1), make([]byte, 32)...), 0},
		{"base of no queue", vhostusertest.GetVringBase, 1, state(300, 0), 0},
		{"kick without descriptor", vhostusertest.SetVringKick, 1, u64(0), 0},
		{"kick by polling", vhostusertest.SetVringKick, 1, u64(1 << 8), 0},
		{"kick with two descriptors", vhostusertest.SetVringKick, 1, u64(0), 2},
		{"kick on a file", vhostusertest.SetVringKick, 1, u64(0), 1},
		{"call of unknown kind", vhostusertest.SetVringCall, 1, u64(1 << 9), 1},
		{"descriptors that nobody asked for", 98, 1, nil, 8},
		{"more descriptors than a message has", vhostusertest.GetFeatures, 1, nil, 30},
		{"memory table of 9", vhostusertest.SetMemTable, 1, append(u64(9), make([]byte, 288)...), 8},
		{"memory table cut short", vhostusertest.SetMemTable, 1, u64(2, 0, 4096, 0, 0), 2},
		{"memory without descriptor", vhostusertest.SetMemTable, 1, region(0, 4096, 0, 0), 0},
		{"memory of no bytes", vhostusertest.SetMemTable, 1, region(0, 0, 0, 0), 1},
		{"memory that wraps", vhostusertest.SetMemTable, 1, region(1<<64-4096, 8192, 0, 0), 1},
		{"memory beyond its file", vhostusertest.SetMemTable, 1, region(0, 1<<40, 0, 0), 1},
		{"memory far beyond its file", vhostusertest.SetMemTable, 1, region(0, 4096, 0, 1<<63), 1},
		{"half a page of memory", vhostusertest.SetMemTable, 1, region(0, 2048, 0, 0), 1},
		{"memory that overlaps", vhostusertest.SetMemTable, 1, u64(2, 0, 8192, 0, 0, 4096, 8192, 1<<20, 0), 2},
		{"memory that overlaps what there is", vhostusertest.AddMemReg, 1, u64(0, guestBase, 4096, 0, 0), 1},
		{"memory removed that was not there", vhostusertest.RemMemReg, 1, u64(0, 0, 4096, 0, 0), 0},
		{"configuration beyond its end", vhostusertest.GetConfig, 1, append(append(le32(250), le32(10)...), make([]byte, 14)...), 0},
		{"configuration of another length", vhostusertest.GetConfig, 1, append(append(le32(0), le32(60)...), make([]byte, 14)...), 0},
		{"size set by the driver", vhostusertest.SetConfig, 1, append(append(le32(0), le32(8)...), make([]byte, 12)...), 0},
		{"in-flight memory for too many queues", vhostusertest.GetInflightFD, 1, append(u64(0, 0), 200, 0, 128, 0), 0},
		{"in-flight memory of no entries", vhostusertest.GetInflightFD, 1, append(u64(0, 0), 1, 0, 0, 0), 0},
		{"in-flight memory too small", vhostusertest.SetInflightFD, 1, append(u64(64, 0), 1, 0, 128, 0), 1},
		{"in-flight memory beyond its file", vhostusertest.SetInflightFD, 1, append(u64(1<<29, 1<<62), 1, 0, 128, 0), 1},
		{"back channel without socket", vhostusertest.SetBackendReqFD, 1, nil, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512)})
			f := dial(t, path, vhostusertest.Options{Slots: 2})
			fds := make([]int, test.fds)
			for i := range fds {
				fds[i] = int(f.MemFile.Fd())
			}
			check(t, f.SendRaw(test.request, test.flags, test.payload, fds...))
			check(t, f.AwaitEnd())
			check(t, f.Connect(path))
			check(t, f.Start())
			do(t, f.Queues[0], vhostusertest.Read, 0, make([]byte, 512), vhostusertest.OK)
		})
	}
}

// TestStaleInflight: in-flight memory that says what cannot be.
func TestStaleInflight(t *testing.T) {
	t.Parallel()
	tests := map[string]func(b []byte){
		"unknown version":       func(b []byte) { b[8] = 2 },
		"last batch at no head": func(b []byte) { b[12], b[13], b[14] = 0xff, 0xff, b[14]-1 },
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512)})
			f := dial(t, path, vhostusertest.Options{})
			do(t, f.Queues[0], vhostusertest.Read, 0, make([]byte, 512), vhostusertest.OK)
			_, err := f.Queues[0].Stop()
			check(t, err)
			b, err := f.Inflight()
			check(t, err)
			spoil(b)
			check(t, f.Queues[0].Start())
			check(t, f.Queues[0].AwaitBroken())
			check(t, unix.Munmap(b))
		})
	}
}
