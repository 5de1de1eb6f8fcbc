package vhostuser

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Memory in which requests in work are noted, so that they are done by the next
// back end if this one dies. The front end keeps it. Layout: "Inflight I/O
// tracking" in docs/interop/vhost-user.rst of QEMU, for split queues; after the
// queues come 64 bytes of our own (tail), which the front end only keeps.
const (
	inflightHead  = 16 // features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
	inflightEntry = 16 // inflight u8, padding, next u16 at 6, counter u64 at 8
	inflightAlign = 64

	inflightVersion = 8 // offsets in the head
	inflightDescNum = 10
	inflightBatch   = 12
	inflightUsed    = 14

	sizeTail  = 64
	unknown   = 1<<64 - 1
	tailMagic = 0x7375686d6f727473 // "strmohus"
)

// le is the byte order of this memory on all machines that this package is for.
var le = binary.LittleEndian

// inflight is that memory, of all queues.
type inflight struct {
	mapping   []byte
	mem       []byte
	queues    int
	queueSize int
}

func inflightRegion(queueSize int) int {
	return (inflightHead + inflightEntry*queueSize + inflightAlign - 1) &^ (inflightAlign - 1)
}

// newInflight makes such memory. The descriptor belongs to the caller.
func newInflight(queues, queueSize int) (*inflight, int, error) {
	if queues < 1 || queueSize < 1 || queueSize > maxQueueSize {
		return nil, -1, badMessage("in-flight memory for %d queues of %d", queues, queueSize)
	}
	size := queues*inflightRegion(queueSize) + sizeTail
	fd, err := unix.MemfdCreate("vhost-user-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, -1, fmt.Errorf("cannot make in-flight memory: %w", err)
	}
	if err = unix.Ftruncate(fd, int64(size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	var f *inflight
	if err == nil {
		f, err = mapInflight(inflightSpec{size: uint64(size), queues: uint16(queues), queueSize: uint16(queueSize)}, fd)
	}
	if err != nil {
		unix.Close(fd)
		return nil, -1, fmt.Errorf("cannot make in-flight memory: %w", err)
	}
	return f, fd, nil
}

// mapInflight maps what a front end has kept. fd stays the caller's.
func mapInflight(spec inflightSpec, fd int) (*inflight, error) {
	queues, queueSize := int(spec.queues), int(spec.queueSize)
	if queueSize < 1 || queueSize > maxQueueSize || spec.size < uint64(queues*inflightRegion(queueSize)) || spec.size > 1<<30 {
		return nil, badMessage("%d bytes of in-flight memory for %d queues of %d", spec.size, queues, queueSize)
	}
	mapping, skip, err := mapFile(fd, spec.offset, spec.size)
	if err != nil {
		return nil, fmt.Errorf("cannot map in-flight memory: %w", err)
	}
	return &inflight{mapping: mapping, mem: mapping[skip : skip+int(spec.size)], queues: queues, queueSize: queueSize}, nil
}

func (f *inflight) unmap() {
	_ = unix.Munmap(f.mapping) // fails only for what Mmap did not return
}

// tail is what we remember of a front end: which capacity it was told, and which
// cache mode its driver has chosen. It is nil in memory that is not ours.
func (f *inflight) tail() []byte {
	at := f.queues * inflightRegion(f.queueSize)
	if len(f.mem) < at+sizeTail {
		return nil
	}
	return f.mem[at : at+sizeTail]
}

// remember notes both; unknown stands for a capacity that was not told.
func (f *inflight) remember(capacity uint64, writeback bool) {
	t := f.tail()
	if t == nil {
		return
	}
	le.PutUint64(t[8:], capacity)
	t[16] = 0
	if writeback {
		t[16] = 1
	}
	le.PutUint64(t, tailMagic)
}

// recall returns what remember has noted, if anything.
func (f *inflight) recall() (capacity uint64, writeback, ok bool) {
	t := f.tail()
	if t == nil || le.Uint64(t) != tailMagic {
		return 0, false, false
	}
	return le.Uint64(t[8:]), t[16] != 0, true
}

// tracker is the part of the memory that belongs to one queue.
type tracker struct {
	mem     []byte
	counter uint64
}

// queue returns the tracker of a queue with size entries.
func (f *inflight) queue(index, size int) (*tracker, error) {
	if index >= f.queues || size > f.queueSize {
		return nil, fmt.Errorf("in-flight memory is for %d queues of %d, not for queue %d of %d", f.queues, f.queueSize, index, size)
	}
	n := inflightRegion(f.queueSize)
	return &tracker{mem: f.mem[index*n : (index+1)*n]}, nil
}

func (t *tracker) entry(head uint16) []byte {
	at := inflightHead + inflightEntry*int(head)
	return t.mem[at : at+inflightEntry]
}

// take notes that a chain is in work.
func (t *tracker) take(head uint16) {
	e := t.entry(head)
	le.PutUint64(e[8:], t.counter)
	t.counter++
	e[0] = 1
}

// put notes that a chain is about to be given back: if the driver then sees one
// more in the used ring, it was this one.
func (t *tracker) put(head uint16) {
	le.PutUint16(t.entry(head)[6:], le.Uint16(t.mem[inflightBatch:]))
	le.PutUint16(t.mem[inflightBatch:], head)
}

// published notes that it was given back.
func (t *tracker) published(head, usedIndex uint16) {
	t.entry(head)[0] = 0
	le.PutUint16(t.mem[inflightUsed:], usedIndex)
}

var errInflight = errors.New("in-flight memory is not in a form that we know")

// resume makes the memory ready for a ring of size entries whose used index is
// usedIndex, and returns the heads of the chains that an earlier back end has
// taken and not given back, the one that was taken first in front.
func (t *tracker) resume(size, usedIndex uint16) ([]uint16, error) {
	switch le.Uint16(t.mem[inflightVersion:]) {
	case 0:
		t.reset(size, usedIndex)
		return nil, nil
	case 1:
	default:
		return nil, errInflight
	}
	// The chains that were given back last may still be noted.
	given := usedIndex - le.Uint16(t.mem[inflightUsed:])
	if given > size {
		// It is of another life of the ring.
		t.reset(size, usedIndex)
		return nil, nil
	}
	for head := le.Uint16(t.mem[inflightBatch:]); given > 0; given-- {
		if head >= size {
			return nil, errInflight
		}
		e := t.entry(head)
		e[0] = 0
		head = le.Uint16(e[6:])
	}
	le.PutUint16(t.mem[inflightUsed:], usedIndex)

	type noted struct {
		head    uint16
		counter uint64
	}
	var found []noted
	for head := range size {
		if e := t.entry(head); e[0] == 1 {
			found = append(found, noted{head, le.Uint64(e[8:])})
			t.counter = max(t.counter, le.Uint64(e[8:])+1)
		}
	}
	slices.SortFunc(found, func(a, b noted) int { return cmp.Compare(a.counter, b.counter) })
	heads := make([]uint16, len(found))
	for i, n := range found {
		heads[i] = n.head
	}
	return heads, nil
}

func (t *tracker) reset(size, usedIndex uint16) {
	clear(t.mem)
	le.PutUint16(t.mem[inflightDescNum:], size)
	le.PutUint16(t.mem[inflightUsed:], usedIndex)
	le.PutUint16(t.mem[inflightVersion:], 1)
}
