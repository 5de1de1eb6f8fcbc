// Package volume is the encrypted disk: a [blockdev.Device] whose contents lie
// encrypted on another Device. The format is LUKS2 in the profile of
// docs/spec/volume.md, so that cryptsetup and dm-crypt open it with the DEK and
// nothing of ours.
//
// Invariants:
//
//   - No plaintext reaches the Device below, and nothing at all is written to it
//     before the DEK was checked against the header's digest.
//   - A crypto sector whose ciphertext is all zeros was never written, or was
//     discarded; it reads as zeros. Zeros that are written are encrypted like all
//     other data (docs/spec/volume.md, "Zeros").
//   - A request changes no byte outside its range, whatever its alignment and
//     whatever runs beside it.
//   - At every instant at least one header copy is whole, and its key safe opens
//     with the KEK of before or of after a shallow rekey.
//   - During a deep rekey every sector is under the old or the new DEK, the header
//     or the journal that it names tells which, and both key safes are in it
//     (docs/spec/online-rekey.md).
//
// Requests allocate nothing: reads decrypt in the caller's buffer, writes
// encrypt into buffers of the volume, of which there is a fixed number.
//
// Everything here is safe for concurrent use.
package volume

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

// Sentinels that callers branch on, besides those of packages blockdev and
// luks. Those of luks are repeated for the callers of this package, who need
// not know it.
var (
	// ErrWrongKey: the DEK is not this volume's. Nothing was read but the header.
	ErrWrongKey = luks.ErrWrongKey
	// ErrNotVolume: there is no LUKS header.
	ErrNotVolume = luks.ErrNotLUKS
	// ErrCorrupt: both copies of the header are damaged.
	ErrCorrupt = luks.ErrCorrupt
	// ErrTruncated: the storage ends before the header or the data do.
	ErrTruncated = luks.ErrTruncated
	// ErrUnsupported: it is a LUKS volume, and not one that is encrypted like ours.
	ErrUnsupported = luks.ErrUnsupported
	// ErrRekeying: a deep rekey of the volume is under way. It opens with both DEKs
	// only, and some operations have to wait for the end of it.
	ErrRekeying = luks.ErrReencrypting
	// ErrEncrypting: it was a plain disk whose encryption in place is not finished;
	// see [EncryptInPlace].
	ErrEncrypting = luks.ErrEncrypting
	// ErrNotEmpty: there is something where a new volume was to be made.
	ErrNotEmpty = errors.New("storage is not empty")
	// ErrChanged: another program has changed the volume's layout while it was open.
	ErrChanged = errors.New("volume was changed by another program")
	// ErrWrongSafe: the key safe belongs to another disk.
	ErrWrongSafe = errors.New("key safe belongs to another disk")
)

// Options say how a volume is opened.
type Options struct {
	// ReadOnly refuses writes; the Device below may be read-only too.
	ReadOnly bool
	// SizeMin is the least size in bytes that the volume must have, as it was
	// recorded elsewhere; a smaller one is [ErrTruncated]. LUKS2 records no size
	// itself: the data simply end with the storage.
	SizeMin int64
	// NextDEK is the DEK that a deep rekey leads to; see [Volume.Rekey]. It is
	// needed if one is under way, and may be given whenever one may be: the
	// volume is then opened with whichever of the two keys are its. It stays the
	// caller's.
	NextDEK *keymem.Key
}

// Volume is an open encrypted disk. Its BlockSize is the crypto sector's, or
// that of the Device below if it is larger.
type Volume struct {
	dev       blockdev.Device
	uuid      string
	segment   luks.Segment // its offset is that on dev
	blockSize int
	readOnly  bool
	discards  bool // discards may reach dev

	guard   blockdev.Guard
	size    atomic.Int64 // bytes; changes only while guard excludes all requests
	buffers *buffers
	header  sync.Mutex // held while the header is rewritten

	// The keys. They change only while guard excludes all requests.
	dek     *keymem.Key
	cipher  *xts.Cipher // dek's; of the sectors from boundary on
	nextDEK *keymem.Key // nil but during a deep rekey
	next    *xts.Cipher // nextDEK's; of the sectors below boundary
	// boundary is in bytes; it moves over a range that is held exclusively.
	boundary atomic.Int64

	rekeying    sync.Mutex               // held by Rekey
	lost        atomic.Pointer[lostZone] // what a failed rekey left, until the volume is opened again
	flushFailed atomic.Pointer[error]    // of a flush that was not the guest's
}

var (
	_ blockdev.Resizer  = (*Volume)(nil)
	_ blockdev.Extenter = (*Volume)(nil)
)

// Open opens the volume on dev with its DEK, which stays the caller's and is
// not needed after Open. On success dev belongs to the Volume, on error to the
// caller. Of two sound header copies of different commits, which an interrupted
// change has left, the earlier one is written again, durably, unless the volume is
// opened read-only; with a NextDEK, what an interrupted [Volume.Rekey] left is made
// good. Otherwise Open writes nothing: a damaged header copy is repaired by the next
// [Volume.ReplaceSafe]; [Inspect] tells of it.
//
// Errors: [ErrWrongKey], [ErrRekeying], [ErrNotVolume], [ErrCorrupt], [ErrTruncated],
// [ErrUnsupported], or those of dev.
func Open(dev blockdev.Device, dek *keymem.Key, opts Options) (*Volume, error) {
	v, err := open(dev, dek, opts)
	if err != nil {
		return nil, fmt.Errorf("cannot open volume: %w", err)
	}
	return v, nil
}

func open(dev blockdev.Device, dek *keymem.Key, opts Options) (*Volume, error) {
	h, err := readHeader(dev)
	if err != nil {
		return nil, err
	}
	if h, err = afterRekey(dev, h, dek, opts); err != nil {
		return nil, err
	}
	segment, size, err := layout(dev, h)
	if err != nil {
		return nil, err
	}
	if size < opts.SizeMin {
		return nil, fmt.Errorf("%w: it has %d bytes of data instead of %d", ErrTruncated, size, opts.SizeMin)
	}
	v := &Volume{
		dev:       dev,
		uuid:      h.UUID(),
		segment:   segment,
		blockSize: max(segment.SectorSize, dev.BlockSize()),
		readOnly:  opts.ReadOnly,
		discards:  h.AllowDiscards(),
		buffers:   newBuffers(),
	}
	v.size.Store(size)
	if err := v.takeKeys(h, dek, opts.NextDEK); err != nil {
		v.dropKeys()
		return nil, err
	}
	if err := v.settle(h); err != nil {
		v.dropKeys()
		return nil, err
	}
	return v, nil
}

// settle makes the header h, whose keys were verified, the only one that is found from
// now on. Else a power loss could bring one back that knows nothing of what is written
// under this one: a zone would be recovered again, or be taken for one under another key.
func (v *Volume) settle(h *luks.Header) error {
	if v.readOnly || !h.Behind() {
		return nil
	}
	err := withHeaderLock(v.dev, blockdev.Exclusive, func() error {
		superseded, err := h.Superseded(v.dev)
		if err == nil && superseded {
			err = ErrChanged
		}
		if err != nil {
			return err
		}
		return h.Commit(v.dev)
	})
	if err != nil {
		return fmt.Errorf("cannot write the header copy that is behind: %w", err)
	}
	return nil
}

// layout returns where on dev the data of the volume lie, and their length.
func layout(dev blockdev.Device, h *luks.Header) (luks.Segment, int64, error) {
	segment, err := dataSegment(dev, h)
	if err != nil {
		return luks.Segment{}, 0, err
	}
	length, err := segment.Length(dev.Size())
	if err != nil {
		return luks.Segment{}, 0, err
	}
	if length == 0 {
		return luks.Segment{}, 0, fmt.Errorf("%w: it ends where its data should start", ErrTruncated)
	}
	return segment, length, nil
}

// UUID returns the volume's UUID.
func (v *Volume) UUID() string { return v.uuid }

// SectorSize returns the size of a crypto sector in bytes.
func (v *Volume) SectorSize() int { return v.segment.SectorSize }

// Size implements [blockdev.Device].
func (v *Volume) Size() int64 { return v.size.Load() }

// BlockSize implements [blockdev.Device].
func (v *Volume) BlockSize() int { return v.blockSize }

// enter admits a request on n bytes at off. Whole blocks are taken, so that the
// read-modify-write of a part of one is alone on it.
func (v *Volume) enter(op string, off, n int64, access blockdev.Access) (*blockdev.Pass, error) {
	if access == blockdev.Exclusive && v.readOnly {
		return nil, v.fail(op, off, n, blockdev.ErrReadOnly)
	}
	wideOff, wideLen := blockdev.Widen(off, n, int64(v.blockSize))
	pass, err := v.guard.Enter(wideOff, wideLen, access)
	if err != nil {
		return nil, v.fail(op, off, n, err)
	}
	err = blockdev.CheckRange(v.size.Load(), off, n)
	if lost := v.lost.Load(); err == nil && lost != nil && n > 0 && off < lost.end && lost.start < off+n {
		err = lost.err
	}
	if err != nil {
		v.guard.Leave(pass)
		return nil, v.fail(op, off, n, err)
	}
	return pass, nil
}

func (v *Volume) fail(op string, off, n int64, err error) error {
	return fmt.Errorf("cannot %s %d bytes at %d of volume %s: %w", op, n, off, v.uuid, err)
}

// ReadAt implements [blockdev.Device]. It decrypts in p, which on an error may
// hold anything.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	pass, err := v.enter("read", off, int64(len(p)), blockdev.Shared)
	if err != nil {
		return 0, err
	}
	defer v.guard.Leave(pass)
	if err := v.read(p, off); err != nil {
		return 0, v.fail("read", off, int64(len(p)), err)
	}
	return len(p), nil
}

// WriteAt implements [blockdev.Device].
func (v *Volume) WriteAt(p []byte, off int64) (int, error) {
	pass, err := v.enter("write", off, int64(len(p)), blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer v.guard.Leave(pass)
	if err := v.write(p, off, int64(len(p))); err != nil {
		return 0, v.fail("write", off, int64(len(p)), err)
	}
	return len(p), nil
}

// WriteZeroes implements [blockdev.Device]. It writes encrypted zeros also if
// mayPunch is true: zeros that the guest asked for must be zeros for dm-crypt
// too, which reads a hole as noise.
func (v *Volume) WriteZeroes(off, n int64, _ bool) error {
	pass, err := v.enter("zero", off, n, blockdev.Exclusive)
	if err != nil {
		return err
	}
	defer v.guard.Leave(pass)
	if err := v.write(nil, off, n); err != nil {
		return v.fail("zero", off, n, err)
	}
	return nil
}

// Discard implements [blockdev.Device]. It gives back the crypto sectors that
// lie wholly inside the range, if the volume allows discards, and does nothing
// otherwise.
func (v *Volume) Discard(off, n int64) error {
	pass, err := v.enter("discard", off, n, blockdev.Exclusive)
	if err != nil {
		return err
	}
	defer v.guard.Leave(pass)
	if !v.discards {
		return nil
	}
	sector := int64(v.segment.SectorSize)
	start, end := (off+sector-1)&^(sector-1), (off+n)&^(sector-1)
	if start >= end {
		return nil
	}
	if err := v.dev.Discard(v.segment.Offset+start, end-start); err != nil {
		return v.fail("discard", off, n, err)
	}
	return nil
}

// Flush implements [blockdev.Device].
func (v *Volume) Flush() error {
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return fmt.Errorf("cannot flush volume %s: %w", v.uuid, err)
	}
	defer v.guard.Leave(pass)
	err = v.dev.Flush()
	if failed := v.flushFailed.Load(); failed != nil {
		err = *failed
	}
	if err != nil {
		return fmt.Errorf("cannot flush volume %s: %w", v.uuid, err)
	}
	return nil
}

// Resize implements [blockdev.Resizer], if the Device below is one. What is
// added was never written and reads as zeros. The size is at most [SizeMax].
// During a deep rekey the volume does not shrink ([ErrRekeying]).
func (v *Volume) Resize(size int64) error {
	fail := func(err error) error {
		return fmt.Errorf("cannot resize volume %s to %d bytes: %w", v.uuid, size, err)
	}
	if v.readOnly {
		return fail(blockdev.ErrReadOnly)
	}
	dev, ok := v.dev.(blockdev.Resizer)
	if !ok || v.segment.Size != 0 || size <= 0 || size%int64(v.blockSize) != 0 || size > SizeMax {
		return fail(blockdev.ErrBadSize)
	}
	pass, err := v.guard.EnterAll()
	if err != nil {
		return fail(err)
	}
	defer v.guard.Leave(pass)
	if lost := v.lost.Load(); lost != nil { // or it were not known which key what is added is under
		return fail(lost.err)
	}
	if v.next != nil && size < v.size.Load() {
		return fail(ErrRekeying)
	}
	if err := dev.Resize(v.segment.Offset + size); err != nil {
		return fail(err)
	}
	v.size.Store(size)
	return nil
}

// NextExtent implements [blockdev.Extenter]. A hole is what is one in the
// Device below; sectors of zeros that it has allocated are reported as data.
func (v *Volume) NextExtent(off int64) (blockdev.Extent, error) {
	fail := func(err error) (blockdev.Extent, error) {
		return blockdev.Extent{}, fmt.Errorf("cannot find extent at %d of volume %s: %w", off, v.uuid, err)
	}
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return fail(err)
	}
	defer v.guard.Leave(pass)
	size := v.size.Load()
	if off < 0 || off >= size {
		return fail(blockdev.ErrOutOfRange)
	}
	dev, ok := v.dev.(blockdev.Extenter)
	if !ok {
		return blockdev.Extent{Offset: off, Length: size - off}, nil
	}
	base, sector := v.segment.Offset, int64(v.segment.SectorSize)
	e, err := dev.NextExtent(base + off&^(sector-1))
	if err != nil {
		return fail(err)
	}
	end := e.Offset + e.Length - base
	if e.Hole && end < size {
		end &^= sector - 1 // a sector that is a hole in part is data
		if end <= off {
			e.Hole = false
		}
	}
	if !e.Hole {
		end = max((end+sector-1)&^(sector-1), (off/sector+1)*sector)
	}
	return blockdev.Extent{Offset: off, Length: min(end, size) - off, Hole: e.Hole}, nil
}

// Close implements [blockdev.Device]. It wipes the keys and closes the Device
// below.
func (v *Volume) Close() error {
	if !v.guard.Close() {
		return nil
	}
	v.dropKeys()
	if err := v.dev.Close(); err != nil {
		return fmt.Errorf("cannot close volume %s: %w", v.uuid, err)
	}
	return nil
}
