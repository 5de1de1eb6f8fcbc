package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/xts"
)

// Sentinels of the encryption in place.
var (
	// ErrEncrypted: the disk begins with a LUKS header, which is not that of an
	// encryption in place.
	ErrEncrypted = errors.New("disk is a LUKS volume already")
	// ErrUsed: somebody has written to a disk since its encryption in place was begun
	// and interrupted; the header that it would get would undo that.
	ErrUsed = errors.New("disk has been used since its encryption in place began")
	// ErrTooSmall: a disk has no room for the header that its encryption in place
	// would need.
	ErrTooSmall = errors.New("disk is too small to be encrypted in place")
)

// shifts are how far an encryption in place moves the data, in bytes: the first
// that is no more than the disk has.
var shifts = [...]int64{luks.DataOffsetDefault, 1 << 20, 64 << 10}

const (
	// diskSector is the crypto sector of a disk that was plain, in bytes.
	diskSector = 512
	// headersSize is the length of both header copies of a volume made here.
	headersSize = luks.DataOffsetMin
	// moveChunk is how much is read, encrypted and written at once, in bytes.
	moveChunk = 1 << 20
)

// EncryptOptions say how a plain disk is encrypted in place.
type EncryptOptions struct {
	// Size is that of the plain disk in bytes, if it is known: a multiple of 512.
	// Together with the size of the storage it tells what an interrupted call has
	// left. 0: all of the storage is the disk, or what a header says.
	Size int64
	// DEK is the volume key, [luks.KeySize] bytes. It stays the caller's. To go on,
	// the same one is needed.
	DEK *keymem.Key
	// Safe holds the DEK; its owner is the volume's. When an encryption goes on it
	// replaces the one that is there. Nil: that stays, or the key is kept elsewhere.
	Safe *keysafe.Safe
	// UUID, Label and AllowDiscards as in [FormatOptions], when an encryption begins.
	UUID          string
	Label         string
	AllowDiscards bool
	// Rate bounds how fast data are encrypted; nil: it is not bounded.
	Rate *Rate
	// Zone is how much is encrypted at once under a detached header, as in
	// [RekeyOptions].
	Zone int64
	// Progress, if not nil, is called after each zone with the bytes done and the
	// bytes to do, holes included.
	Progress func(done, total int64)
}

// EncryptInPlace makes the plain disk on dev a volume where it is, as
// docs/spec/in-place-encryption.md describes; dev, which nobody else uses, grows
// by the length of a header. Holes stay holes, and the volume is then thin. It
// goes on where an earlier call has stopped, also if that was killed; if the
// earlier one was finished, it only sees to the header.
//
// If it returns nil, dev is a volume that the DEK opens, and holds no plain data.
// If it returns an error, ctx's included, the data are all there, part of them
// encrypted: nothing opens the volume ([ErrEncrypting]) until a later call has
// succeeded, or [CancelEncryption]. The key has to be kept safe from before the
// first call on, in Safe or elsewhere.
//
// Errors: [ErrEncrypted], [ErrTooSmall], [ErrUsed], [ErrWrongKey], [ErrWrongSafe],
// [ErrChanged] if the storage is not as long as the disk, or its header changes,
// [blockdev.ErrBadSize] for storage that cannot grow, [blockdev.ErrNoSpace],
// others of dev.
func EncryptInPlace(ctx context.Context, dev blockdev.Resizer, opts EncryptOptions) error {
	if err := encryptInPlace(ctx, dev, opts); err != nil {
		return fmt.Errorf("cannot encrypt disk in place: %w", err)
	}
	return nil
}

func encryptInPlace(ctx context.Context, dev blockdev.Resizer, opts EncryptOptions) error {
	e := &encryption{dev: dev, buf: make([]byte, moveChunk)}
	found, err := findEncryption(dev, opts.Size)
	switch {
	case err != nil:
		return err
	case found == nil:
		err = e.begin(opts)
	case found.finished:
		return finishedBefore(dev, found.header, opts)
	default:
		err = e.resume(found, opts)
	}
	if err != nil {
		return err
	}
	if e.cipher, err = xts.New(opts.DEK); err != nil {
		return err
	}
	defer e.cipher.Close()
	pace := &pace{rate: opts.Rate, perSecond: opts.Rate.PerSecond(), start: time.Now()}
	for e.state.Boundary > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := pace.keepRate(ctx); err != nil {
			return err
		}
		n, err := e.step()
		if err != nil {
			return err
		}
		pace.done += n
		if opts.Progress != nil {
			opts.Progress(e.state.Size-e.state.Boundary, e.state.Size)
		}
	}
	return e.finish()
}

// finishedBefore sees to the header of a disk that is a volume.
func finishedBefore(dev blockdev.Device, h *luks.Header, opts EncryptOptions) error {
	if err := h.VerifyKey(opts.DEK); err != nil {
		return errors.Join(ErrEncrypted, err)
	}
	if opts.Safe != nil {
		return ReplaceSafe(dev, opts.Safe)
	}
	if len(h.Damaged()) == 0 {
		return nil
	}
	return withHeaderLock(dev, blockdev.Exclusive, func() error { return h.Commit(dev) })
}

// encryption is one call of EncryptInPlace.
type encryption struct {
	dev    blockdev.Resizer
	header *luks.Header    // as it is on the storage
	state  luks.Encryption // the header's
	cipher *xts.Cipher
	buf    []byte
}

// begin takes the disk from plain to a header that says that nothing is
// encrypted. After an error without a record the disk is as it was.
func (e *encryption) begin(opts EncryptOptions) (err error) {
	size := opts.Size
	if size == 0 {
		size = e.dev.Size()
	}
	shift := shiftOf(size)
	block := int64(max(e.dev.BlockSize(), diskSector))
	switch {
	case size < shift:
		return fmt.Errorf("%w: it has %d bytes, at least %d are needed", ErrTooSmall, size, shift)
	case size > SizeMax || size%block != 0:
		return fmt.Errorf("%w: %d is not a multiple of %d up to %d", blockdev.ErrBadSize, size, block, int64(SizeMax))
	}
	full := size + 2*shift
	if n := e.dev.Size(); n != size && n != full {
		return fmt.Errorf("%w: it has %d bytes instead of %d", ErrChanged, n, size)
	}
	if err := e.dev.Resize(full); err != nil {
		return errors.Join(err, e.shrink(size))
	}
	recorded := false
	defer func() {
		if err != nil && !recorded {
			err = errors.Join(err, e.shrink(size))
		}
	}()
	thin, err := hasHole(e.dev, size)
	if err != nil {
		return err
	}
	e.header, err = luks.NewEncryption(luks.Options{
		UUID: opts.UUID, Label: opts.Label, DataOffset: shift, DEK: opts.DEK, Safe: opts.Safe, AllowDiscards: opts.AllowDiscards, Thin: thin,
	}, size)
	if err != nil {
		return err
	}
	if err := checkSafe(opts.Safe, e.header.UUID()); err != nil {
		return err
	}
	if e.state, _, err = e.header.Encryption(); err != nil {
		return err
	}
	if err := e.move(size+shift, 0, shift, nil); err != nil {
		return err
	}
	if err := e.dev.Flush(); err != nil {
		return err
	}
	recorded = true
	if err := e.header.Commit(offsetStorage{e.dev, e.recordOffset()}); err != nil {
		return err
	}
	return e.writeImage()
}

// shiftOf returns how far the data of a disk of size bytes are moved.
func shiftOf(size int64) int64 {
	for _, shift := range shifts {
		if shift <= size {
			return shift
		}
	}
	return shifts[len(shifts)-1]
}

// shrink gives the storage of a disk of which nothing was overwritten its size
// back.
func (e *encryption) shrink(size int64) error {
	if e.dev.Size() == size {
		return nil
	}
	return errors.Join(e.dev.Resize(size), e.dev.Flush())
}

// hasHole reports whether the file system knows of a hole in the first size bytes.
func hasHole(dev blockdev.Device, size int64) (bool, error) {
	extenter, ok := dev.(blockdev.Extenter)
	for off := int64(0); ok && off < size; {
		x, err := extenter.NextExtent(off)
		if err != nil || x.Hole {
			return x.Hole, err
		}
		off += x.Length
	}
	return false, nil
}

// offsetStorage is the storage from an offset on.
type offsetStorage struct {
	blockdev.Device
	off int64
}

func (s offsetStorage) WriteAt(p []byte, off int64) (int, error) {
	return s.Device.WriteAt(p, s.off+off)
}

func (e *encryption) recordOffset() int64 { return e.state.StorageMin() - headersSize }

// writeRecord writes the record again, durably: where it was found it may be in the
// kernel's memory only.
func (e *encryption) writeRecord() error {
	if _, err := e.dev.WriteAt(e.header.Image(), e.recordOffset()); err != nil {
		return err
	}
	return e.dev.Flush()
}

// writeImage writes the header that the record holds to its place.
func (e *encryption) writeImage() error {
	return withHeaderLock(e.dev, blockdev.Exclusive, func() error {
		image := e.header.Image()
		for off := int64(0); off < headersSize; off += e.header.Size() {
			if _, err := e.dev.WriteAt(image[off:off+e.header.Size()], off); err != nil {
				return err
			}
			if err := e.dev.Flush(); err != nil {
				return err
			}
		}
		return nil
	})
}

// resume goes on with what was found.
func (e *encryption) resume(found *foundEncryption, opts EncryptOptions) error {
	e.header, e.state = found.header, found.state
	if err := e.header.VerifyEncryption(opts.DEK); err != nil {
		return err
	}
	if found.fromRecord {
		if err := e.unused(); err != nil {
			return err
		}
		if err := e.writeRecord(); err != nil {
			return err
		}
		if err := e.writeImage(); err != nil {
			return err
		}
	}
	if err := checkSafe(opts.Safe, e.header.UUID()); err != nil {
		return err
	}
	safes, err := e.header.Safes()
	if err != nil {
		return err
	}
	same := opts.Safe == nil || len(safes) == 1 && bytes.Equal(safes[0].Encode(), opts.Safe.Encode())
	if same && len(e.header.Damaged()) == 0 {
		return nil
	}
	// A copy that is behind says that data are plain which are about to be
	// overwritten.
	return e.commit(func() error {
		if same {
			return nil
		}
		return e.header.SetSafe(opts.Safe)
	})
}

// unused returns [ErrUsed] unless the start of the disk is what its copy is, or
// what of the header was written over it.
func (e *encryption) unused() error {
	image := e.header.Image()
	n := min(e.state.Shift, bufferSize) // which divides it
	now, before := make([]byte, n), make([]byte, n)
	for off := int64(0); off < e.state.Shift; off += n {
		if _, err := e.dev.ReadAt(now, off); err != nil {
			return err
		}
		if _, err := e.dev.ReadAt(before, e.state.StorageMin()+off); err != nil {
			return err
		}
		for i := int64(0); i < n; i += diskSector {
			block, at := now[i:i+diskSector], off+i
			if !bytes.Equal(block, before[i:i+diskSector]) && (at >= headersSize || !bytes.Equal(block, image[at:at+diskSector])) {
				return fmt.Errorf("%w: it is plain, and ends at %d bytes; its first %d bytes of then are behind byte %d", ErrUsed, e.state.Size, e.state.Shift, e.state.StorageMin())
			}
		}
	}
	return nil
}

// commit changes the header by change and writes it, unless another program has
// written it since it was read.
func (e *encryption) commit(change func() error) error {
	return withHeaderLock(e.dev, blockdev.Exclusive, func() error {
		superseded, err := e.header.Superseded(e.dev)
		if err == nil && superseded {
			err = ErrChanged
		}
		if err == nil {
			err = change()
		}
		if err != nil {
			return err
		}
		return e.header.Commit(e.dev)
	})
}

// step encrypts the next zone, or passes zones that are holes, and returns how
// many bytes it has written.
func (e *encryption) step() (written int64, err error) {
	start, hole, err := e.nextZone(e.state.Boundary)
	if err != nil {
		return 0, err
	}
	end := e.state.Boundary
	switch {
	case hole:
		for start > 0 && hole {
			var next int64
			if next, hole, err = e.nextZone(start); err != nil {
				return 0, err
			}
			if hole {
				start = next
			}
		}
		err = e.dev.WriteZeroes(e.state.Shift+start, end-start, true)
	case start == 0:
		written = end
		err = e.move(e.state.Shift, e.state.StorageMin(), end, e.cipher)
	default:
		written = end - start
		err = e.move(e.state.Shift+start, start, end-start, e.cipher)
	}
	if err != nil {
		return 0, err
	}
	if err := e.dev.Flush(); err != nil {
		return 0, err
	}
	if err := e.commit(func() error { return e.header.MarkEncrypted(start) }); err != nil {
		return 0, err
	}
	e.state, _, err = e.header.Encryption()
	return written, err
}

// nextZone returns where the zone below boundary begins, and whether it is known
// to be a hole.
func (e *encryption) nextZone(boundary int64) (start int64, hole bool, err error) {
	shift := e.state.Shift
	at := boundary - shift // where it is read
	switch {
	case boundary == shift:
		at = e.state.StorageMin()
	case boundary < 2*shift:
		at = shift
	}
	start = at
	if boundary == shift {
		start = 0
	}
	extenter, ok := e.dev.(blockdev.Extenter)
	if !ok || !e.header.Thin() {
		return start, false, nil
	}
	x, err := extenter.NextExtent(at)
	return start, err == nil && x.Hole && x.Length >= boundary-start, err
}

// move writes n bytes at from to where they belong, encrypted unless cipher is
// nil. Holes stay holes if the volume is thin. The ranges do not overlap.
func (e *encryption) move(to, from, n int64, cipher *xts.Cipher) error {
	extenter, _ := e.dev.(blockdev.Extenter)
	if cipher != nil && !e.header.Thin() {
		extenter = nil
	}
	for done := int64(0); done < n; {
		x := blockdev.Extent{Length: n - done}
		if extenter != nil {
			var err error
			if x, err = extenter.NextExtent(from + done); err != nil {
				return err
			}
		}
		k := min(x.Length, n-done)
		if x.Hole && k >= diskSector {
			k &^= diskSector - 1 // a sector that is a hole in part is data
			if err := e.dev.WriteZeroes(to+done, k, true); err != nil {
				return err
			}
			done += k
			continue
		}
		k = min((k+diskSector-1)&^(diskSector-1), n-done, int64(len(e.buf)))
		buf := e.buf[:k]
		if _, err := e.dev.ReadAt(buf, from+done); err != nil {
			return err
		}
		if cipher != nil {
			cipher.Encrypt(buf, buf, tweak(to+done-e.state.Shift), diskSector)
		}
		if _, err := e.dev.WriteAt(buf, to+done); err != nil {
			return err
		}
		done += k
	}
	return nil
}

// finish takes away what is left of the plain disk, and makes it a volume like any
// other.
func (e *encryption) finish() error {
	if err := e.header.FinishEncryption(); err != nil {
		return err
	}
	if err := wipeFree(e.dev, e.dev, e.header); err != nil {
		return err
	}
	end := e.state.StorageMin()
	if left := e.dev.Size() - end; left > 0 {
		if _, err := wipe(e.dev, e.dev, luks.Area{Offset: end, Size: left}); err != nil {
			return err
		}
		if err := e.dev.Flush(); err != nil { // or the medium would keep them
			return err
		}
		if err := e.dev.Resize(end); err != nil {
			return err
		}
		if err := e.dev.Flush(); err != nil {
			return err
		}
	}
	return e.commit(func() error { return nil })
}
