package vhostusertest

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and their status.
const (
	Read        = 0
	Write       = 1
	Flush       = 4
	GetID       = 8
	Discard     = 11
	WriteZeroes = 13

	OK          = 0
	Failed      = 1
	Unsupported = 2
)

// Descriptor flags.
const (
	Next     = 1
	Writable = 2
	Indirect = 4
)

const (
	page = 4096
	// A slot is a page with header and status, a table of descriptors, and data.
	tableSize = 2 * page
	slotHead  = page + tableSize
)

// Queue is the driver's side of a virtqueue. Its slots are requests that may be
// under way.
type Queue struct {
	Index              int
	Size               int // entries
	Desc, Avail, Used  int // offsets of the ring's parts in memory
	slots              int // offset of the first slot
	slotSize           int
	f                  *Frontend
	kick, call, broken *os.File
	free               []int
	added              uint16 // avail's index
	seen               uint16 // used's index, as far as it was looked at
	kicked             uint16 // added at the last kick
}

// layout places the queues in memory, and returns its size.
func (f *Frontend) layout() int64 {
	at := 0
	place := func(n int) int {
		start := at
		at = (at + n + page - 1) &^ (page - 1)
		return start
	}
	for i := range f.opts.Queues {
		n := f.opts.QueueSize
		q := &Queue{Index: i, Size: n, f: f, Desc: place(16 * n), Avail: place(6 + 2*n), Used: place(6 + 8*n)}
		q.slotSize = (slotHead + f.opts.DataSize + page - 1) &^ (page - 1)
		q.slots = place(q.slotSize * f.opts.Slots)
		for s := range f.opts.Slots {
			q.free = append(q.free, s)
		}
		f.Queues = append(f.Queues, q)
	}
	return int64(at)
}

func (q *Queue) open() error {
	for _, f := range []**os.File{&q.kick, &q.call, &q.broken} {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			return err
		}
		*f = os.NewFile(uintptr(fd), "eventfd")
	}
	return nil
}

func (q *Queue) close() {
	for _, f := range []*os.File{q.kick, q.call, q.broken} {
		if f != nil {
			f.Close()
		}
	}
}

// rawFD returns a descriptor without making it blocking, as Fd does.
func rawFD(f *os.File) int {
	fd := -1
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(v uintptr) { fd = int(v) })
	}
	return fd
}

// Start tells the back end of the queue, and enables it.
func (q *Queue) Start() error {
	f, i := q.f, uint32(q.Index)
	if err := f.SendState(SetVringNum, i, uint32(q.Size)); err != nil {
		return err
	}
	// What QEMU does when it does not know better.
	if err := f.SendState(SetVringBase, i, uint32(q.load16(q.Used+2))); err != nil {
		return err
	}
	addr := ne.AppendUint32(nil, i)
	addr = ne.AppendUint32(addr, 0)
	for _, v := range []int{q.Desc, q.Used, q.Avail} {
		addr = ne.AppendUint64(addr, UserBase+uint64(v))
	}
	if err := f.Send(SetVringAddr, ne.AppendUint64(addr, 0)); err != nil {
		return err
	}
	for _, m := range []struct {
		request uint32
		file    *os.File
	}{{SetVringErr, q.broken}, {SetVringKick, q.kick}, {SetVringCall, q.call}} {
		if err := f.Send(m.request, ne.AppendUint64(nil, uint64(i)), rawFD(m.file)); err != nil {
			return err
		}
	}
	return f.SendState(SetVringEnable, i, 1)
}

// Stop stops the queue and returns its base.
func (q *Queue) Stop() (uint32, error) {
	b, _, err := q.f.Call(GetVringBase, ne.AppendUint64(nil, uint64(q.Index)))
	if err != nil {
		return 0, err
	}
	return ne.Uint32(b[4:]), nil
}

func (q *Queue) word(off int) *uint32 {
	return (*uint32)(unsafe.Pointer(&q.f.Mem[off&^3]))
}

func (q *Queue) load16(off int) uint16 {
	return uint16(atomic.LoadUint32(q.word(off)) >> (8 * (off & 2)))
}

func (q *Queue) store16(off int, v uint16) {
	for {
		old := atomic.LoadUint32(q.word(off))
		shift := 8 * (off & 2)
		if atomic.CompareAndSwapUint32(q.word(off), old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

// PutDesc writes a descriptor at an offset of memory.
func (q *Queue) PutDesc(off int, addr uint64, length uint32, flags, next uint16) {
	b := q.f.Mem[off:]
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], length)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// Idle returns how many more requests may be put under way.
func (q *Queue) Idle() int { return len(q.free) }

// Slot takes a free slot.
func (q *Queue) Slot() int {
	s := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	return s
}

func (q *Queue) header(slot int) int { return q.slots + slot*q.slotSize }
func (q *Queue) table(slot int) int  { return q.header(slot) + page }

// DataAt returns the offset in memory of a slot's data.
func (q *Queue) DataAt(slot int) int {
	return q.header(slot) + q.slotSize - q.f.opts.DataSize&^(page-1)
}

// piece returns where n bytes of data begin that are at off of a request's, and
// how many of them are there. all is the length of the data.
func (q *Queue) piece(slot, off, all int) (at, n int) {
	if !q.f.opts.Scatter {
		return q.DataAt(slot) + off, all - off
	}
	pages := (all + page - 1) / page
	return q.DataAt(slot) + (pages-1-off/page)*page + off%page, min(page-off%page, all-off)
}

// Fill copies p to a slot's data, of which it is all.
func (q *Queue) Fill(slot int, p []byte) {
	for off := 0; off < len(p); {
		at, n := q.piece(slot, off, len(p))
		copy(q.f.Mem[at:at+n], p[off:])
		off += n
	}
}

// Fetch copies a slot's data to p.
func (q *Queue) Fetch(slot int, p []byte) {
	for off := 0; off < len(p); {
		at, n := q.piece(slot, off, len(p))
		copy(p[off:], q.f.Mem[at:at+n])
		off += n
	}
}

// Submit puts the request of a slot under way, with n bytes of its data. The
// device may not know of it before Kick.
func (q *Queue) Submit(slot int, op uint32, sector uint64, n int) {
	head := q.header(slot)
	b := q.f.Mem[head:]
	binary.LittleEndian.PutUint32(b, op)
	binary.LittleEndian.PutUint32(b[4:], 0)
	binary.LittleEndian.PutUint64(b[8:], sector)
	b[16] = 0xff // status

	indirect := q.f.Features&FeatureIndirect != 0
	table, first := q.table(slot), 0
	if !indirect {
		// The slots share the ring's descriptors evenly.
		table, first = q.Desc, slot*(q.Size/q.f.opts.Slots)
	}
	i := first
	put := func(at, n int, flags uint16) {
		q.PutDesc(table+16*i, GuestBase+uint64(at), uint32(n), flags, uint16(i+1))
		i++
	}
	put(head, 16, Next)
	flags := uint16(Next)
	if op == Read || op == GetID {
		flags |= Writable
	}
	for off := 0; off < n; {
		at, k := q.piece(slot, off, n)
		put(at, k, flags)
		off += k
	}
	put(head+16, 1, Writable)
	ring := first
	if indirect {
		ring = slot
		q.PutDesc(q.Desc+16*slot, GuestBase+uint64(table), uint32(16*i), Indirect, 0)
	}
	q.Offer(uint16(ring))
}

// Offer puts the head of a chain into the available ring.
func (q *Queue) Offer(head uint16) {
	q.store16(q.Avail+4+2*(int(q.added)%q.Size), head)
	q.added++
	q.store16(q.Avail+2, q.added)
}

// Kick tells the device of what was offered, if it wants to know.
func (q *Queue) Kick() error {
	old := q.kicked
	q.kicked = q.added
	if q.f.Features&FeatureEventIdx != 0 {
		event := q.load16(q.Used + 4 + 8*q.Size)
		if q.added-event-1 >= q.added-old {
			return nil
		}
	} else if q.load16(q.Used)&1 != 0 {
		return nil
	}
	return q.ForceKick()
}

// ForceKick tells the device.
func (q *Queue) ForceKick() error {
	one := [8]byte{1}
	_, err := q.kick.Write(one[:])
	return err
}

// Pop takes a request that is done out of the used ring, if there is one.
func (q *Queue) Pop() (head uint32, written uint32, ok bool) {
	if q.seen == q.load16(q.Used+2) {
		return 0, 0, false
	}
	b := q.f.Mem[q.Used+4+8*(int(q.seen)%q.Size):]
	q.seen++
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), true
}

// Next waits for a request that is done, frees its slot, and returns it with its
// status. The data stay until the slot is taken again.
func (q *Queue) Next() (slot int, status byte, err error) {
	head, err := q.Wait()
	if err != nil {
		return -1, 0, err
	}
	slot = int(head)
	if q.f.Features&FeatureIndirect == 0 {
		slot /= q.Size / q.f.opts.Slots
	}
	q.free = append(q.free, slot)
	return slot, q.f.Mem[q.header(slot)+16], nil
}

// Wait waits for a request that is done.
func (q *Queue) Wait() (head uint32, err error) {
	for {
		if head, _, ok := q.Pop(); ok {
			return head, nil
		}
		// Ask for a call with the next one.
		q.store16(q.Avail+4+2*q.Size, q.seen)
		if head, _, ok := q.Pop(); ok {
			return head, nil
		}
		if err := await(q.call, q.f.opts.Timeout); err != nil {
			return 0, fmt.Errorf("no call from the device: %w", err)
		}
	}
}

// AwaitBroken waits until the device says that the ring is broken.
func (q *Queue) AwaitBroken() error { return await(q.broken, q.f.opts.Timeout) }

func await(f *os.File, d time.Duration) error {
	if err := f.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	var b [8]byte
	_, err := f.Read(b[:])
	return err
}

// Do does one request alone, with p as its data: from it for a write, a discard
// and zeroing, to it for all others.
func (q *Queue) Do(op uint32, sector uint64, p []byte) (status byte, err error) {
	slot := q.Slot()
	in := op == Read || op == GetID
	if !in {
		q.Fill(slot, p)
	}
	q.Submit(slot, op, sector, len(p))
	if err := q.Kick(); err != nil {
		return 0, err
	}
	got, status, err := q.Next()
	if err != nil {
		return 0, err
	}
	if got != slot {
		return 0, fmt.Errorf("the device gives back slot %d instead of %d", got, slot)
	}
	if in {
		q.Fetch(slot, p)
	}
	return status, nil
}

// Reset empties the ring, as a driver does that starts anew. The queue must be
// stopped.
func (q *Queue) Reset() {
	clear(q.f.Mem[q.Avail : q.Avail+6+2*q.Size])
	clear(q.f.Mem[q.Used : q.Used+6+8*q.Size])
	q.added, q.seen, q.kicked = 0, 0, 0
	q.free = q.free[:0]
	for s := range q.f.opts.Slots {
		q.free = append(q.free, s)
	}
}
