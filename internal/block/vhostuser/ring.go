package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// maxQueueSize is QEMU's limit; it bounds all work on one chain of descriptors.
const maxQueueSize = 1024

// Descriptor and ring flags (virtio 1.2, section 2.7).
const (
	sizeDesc     = 16
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1
	usedNoNotify     = 1
)

// What breaks a ring. The driver must reset the device before the queue is
// served again.
var (
	errAvailIndex = errors.New("the driver offers more buffers than the queue has")
	errHead       = errors.New("the driver offers a descriptor that does not exist")
	errTwice      = errors.New("the driver offers a buffer that is in use")
	errLoop       = errors.New("a chain of descriptors is longer than its table")
	errDescIndex  = errors.New("a chain leads to a descriptor that does not exist")
	errEmptyDesc  = errors.New("a descriptor has no bytes")
	errOrder      = errors.New("a descriptor to read follows one to write")
	errOutside    = errors.New("a descriptor points outside the guest's memory")
	errIndirect   = errors.New("an indirect descriptor is not allowed, nested, continued, or of a wrong length")
	errContended  = errors.New("the driver keeps writing where only the device may")
)

// ring is a split virtqueue in guest memory. The guest may write all of it at
// any time: each value is read once, checked, and then used from where it was
// read into.
//
// Values that both sides poll are 16 bits wide, for which Go has no atomic
// operations: they are accessed as halves of aligned 32-bit words. Those never
// cross the end of a region, because regions consist of whole pages.
type ring struct {
	size     uint16
	desc     []byte
	avail    unsafe.Pointer // flags, idx, ring[size], used_event
	used     unsafe.Pointer // flags, idx, ring[size]{id, len}, avail_event
	events   bool           // VIRTIO_F_EVENT_IDX
	indirect bool           // VIRTIO_F_INDIRECT_DESC

	// Of the side that takes buffers.
	taken   uint16 // index of the next buffer to take
	offered uint16 // avail's idx as it was last read

	// Of the side that gives them back.
	usedFlags uint16
	usedIndex uint16 // as it is in the ring
	told      uint16 // usedIndex when the driver was last told, or need not be
}

// newRing finds a ring in guest memory and touches nothing of it.
func newRing(m *guestMemory, size uint16, addr vringAddr, features uint64) (ring, error) {
	n := uint64(size)
	desc, avail, used := m.user(addr.desc, sizeDesc*n), m.user(addr.avail, 6+2*n), m.user(addr.used, 6+8*n)
	if desc == nil || avail == nil || used == nil {
		return ring{}, fmt.Errorf("a ring of %d at %#x, %#x and %#x is outside the guest's memory", size, addr.desc, addr.avail, addr.used)
	}
	if addr.desc%16 != 0 || addr.avail%2 != 0 || addr.used%4 != 0 {
		return ring{}, fmt.Errorf("a ring at %#x, %#x and %#x is not aligned", addr.desc, addr.avail, addr.used)
	}
	return ring{
		size:     size,
		desc:     desc,
		avail:    unsafe.Pointer(unsafe.SliceData(avail)),
		used:     unsafe.Pointer(unsafe.SliceData(used)),
		events:   features&featureEventIdx != 0,
		indirect: features&featureIndirect != 0,
	}, nil
}

// load16 reads a 16-bit value that the guest may be writing.
func load16(p unsafe.Pointer) uint16 {
	odd := uintptr(p) & 2
	word := atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(odd))))
	return uint16(word >> (8 * odd))
}

// store16 writes a 16-bit value and leaves its neighbour as it is. It reports
// false if a neighbour that never stops changing keeps it from that.
func store16(p unsafe.Pointer, v uint16) bool {
	odd := uintptr(p) & 2
	word := (*uint32)(unsafe.Add(p, -int(odd)))
	for range 10_000 {
		old := atomic.LoadUint32(word)
		if atomic.CompareAndSwapUint32(word, old, old&^(0xffff<<(8*odd))|uint32(v)<<(8*odd)) {
			return true
		}
	}
	return false
}

// take returns the head of the next chain that the driver offers; ok is false
// if there is none.
func (r *ring) take() (head uint16, ok bool, err error) {
	if r.taken == r.offered {
		r.offered = load16(unsafe.Add(r.avail, 2))
		if r.offered-r.taken > r.size {
			return 0, false, errAvailIndex
		}
		if r.taken == r.offered {
			return 0, false, nil
		}
	}
	head = load16(unsafe.Add(r.avail, 4+2*int(r.taken%r.size)))
	if head >= r.size {
		return 0, false, errHead
	}
	r.taken++
	return head, true, nil
}

// more reports whether there may be another chain to take.
func (r *ring) more() bool {
	return r.taken != r.offered || r.taken != load16(unsafe.Add(r.avail, 2))
}

// listen asks the driver for a kick with the next buffer. It reports whether one
// has come before the driver could know.
func (r *ring) listen() (more bool, err error) {
	if r.events {
		if !store16(unsafe.Add(r.used, 4+8*int(r.size)), r.taken) {
			return false, errContended
		}
	} else {
		r.setFlags(0)
	}
	return r.more(), nil
}

// ignore tells the driver that kicks are not needed. With event indexes that is
// so without telling until the next listen.
func (r *ring) ignore() {
	if !r.events {
		r.setFlags(usedNoNotify)
	}
}

// setFlags is called by the side that takes buffers: without event indexes that
// needs a word of the other one.
func (r *ring) setFlags(flags uint16) {
	atomic.StoreUint32((*uint32)(r.used), uint32(r.usedIndex)<<16|uint32(flags))
	r.usedFlags = flags
}

// readUsedIndex returns the used index that is in the ring.
func (r *ring) readUsedIndex() uint16 { return load16(unsafe.Add(r.used, 2)) }

// put writes a used element, without publishing it.
func (r *ring) put(head uint16, written uint32) {
	elem := unsafe.Add(r.used, 4+8*int(r.usedIndex%r.size))
	atomic.StoreUint32((*uint32)(elem), uint32(head))
	atomic.StoreUint32((*uint32)(unsafe.Add(elem, 4)), written)
}

// publish gives the element that was put to the driver.
func (r *ring) publish() {
	r.usedIndex++
	atomic.StoreUint32((*uint32)(r.used), uint32(r.usedIndex)<<16|uint32(r.usedFlags))
}

// wantsCall reports whether the driver wants to be told of what was published
// since this was last asked.
func (r *ring) wantsCall() bool {
	if r.told == r.usedIndex {
		return false
	}
	since := r.usedIndex - r.told
	r.told = r.usedIndex
	if !r.events {
		return load16(r.avail)&availNoInterrupt == 0
	}
	event := load16(unsafe.Add(r.avail, 4+2*int(r.size)))
	return r.usedIndex-event-1 < since
}

// descriptor is one entry of a descriptor table.
type descriptor struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

// readDescriptor reads a descriptor once.
func readDescriptor(table []byte, i int) descriptor {
	var b [sizeDesc]byte
	copy(b[:], table[i*sizeDesc:])
	return descriptor{
		addr: binary.LittleEndian.Uint64(b[:]), len: binary.LittleEndian.Uint32(b[8:]),
		flags: binary.LittleEndian.Uint16(b[12:]), next: binary.LittleEndian.Uint16(b[14:]),
	}
}

// chain is the buffers of one request: what the device reads, then what it
// writes, as segments of guest memory.
type chain struct {
	out, in           [][]byte
	outSpace, inSpace [][]byte // what out and in were made in, for the next chain
}

// collect follows the chain that starts at head.
func (c *chain) collect(r *ring, m *guestMemory, head uint16) error {
	c.out, c.in = c.outSpace[:0], c.inSpace[:0]
	defer func() { c.outSpace, c.inSpace = c.out, c.in }()
	table, left := r.desc, int(r.size)
	nested := false
	for i := int(head); ; {
		if i >= len(table)/sizeDesc {
			return errDescIndex
		}
		if left--; left < 0 {
			return errLoop
		}
		d := readDescriptor(table, i)
		if d.flags&descIndirect != 0 {
			n := int(d.len / sizeDesc)
			if !r.indirect || nested || d.flags&descNext != 0 || d.len%sizeDesc != 0 || n == 0 || n > maxQueueSize {
				return errIndirect
			}
			if table = m.guest(d.addr, uint64(d.len)); table == nil {
				return errOutside
			}
			nested, left, i = true, n, 0
			continue
		}
		if d.len == 0 {
			return errEmptyDesc
		}
		var ok bool
		if d.flags&descWrite != 0 {
			c.in, ok = m.appendGuest(c.in, d.addr, uint64(d.len))
		} else if len(c.in) > 0 {
			return errOrder
		} else {
			c.out, ok = m.appendGuest(c.out, d.addr, uint64(d.len))
		}
		if !ok {
			return errOutside
		}
		if d.flags&descNext == 0 {
			return nil
		}
		i = int(d.next)
	}
}
