package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/xts"
)

const (
	// zoneBusy is how much of a volume is rewritten at once while it is in use, in
	// bytes, and zoneIdle what that grows to while nobody waits for it.
	zoneBusy = 4 << 20
	zoneIdle = 15 << 20
)

// pieceSize is how much of a zone is read, encrypted and written at once, in bytes:
// it stays in the processor's cache, and is not little for the storage.
const pieceSize = 512 << 10

// zoneMax bounds the memory that a rekey takes, and how long requests wait.
const zoneMax = 64 << 20

// RekeyOptions say how a volume is rekeyed deeply.
type RekeyOptions struct {
	// NewDEK is the next key, [luks.KeySize] bytes. It stays the caller's. When a
	// rekey goes on it may be nil.
	NewDEK *keymem.Key
	// NewSafe holds NewDEK; its owner is the volume's. It is in the header beside
	// the old one from the first to the last commit, and alone afterwards. When a
	// rekey goes on it replaces the next key safe that is there. Nil: that stays,
	// or the key is kept elsewhere.
	NewSafe *keysafe.Safe
	// NewPassphrase, if not nil, gets a keyslot for NewDEK when a rekey begins.
	// Recovery passphrases of the old key end with it.
	NewPassphrase *keymem.Key
	// PassphraseCost is the cost of that keyslot; zero: the default.
	PassphraseCost luks.Argon2id
	// Rate bounds how fast data are rewritten; nil: it is not bounded.
	Rate *Rate
	// Zone is how much is rewritten at once, in bytes; 0: 4 MiB while the volume is
	// in use or the rate is bounded, else up to 15 MiB. It is rounded to whole
	// blocks and bounded by the space for the journal, which is decided when a rekey
	// begins: under 16 MiB with the default data offset. A larger zone is faster and
	// lets requests wait longer.
	Zone int64
	// Progress, if not nil, is called after each zone with the bytes done and the
	// bytes to do, holes included; the latter grow with the volume. It may use the
	// volume, but not call Rekey.
	Progress func(done, total int64)
}

// RekeyInfo is how far a deep rekey has come.
type RekeyInfo struct {
	Done, Total int64 // bytes
	InZone      bool  // it was interrupted inside a zone, which the next opening makes good
}

// Rekey replaces the DEK and rewrites all data under the new one, as
// docs/spec/online-rekey.md describes, while the volume is in use: a request
// waits only while its own zone is rewritten, and while there are requests the
// rekey rests as long as it works. It goes on where an earlier one has stopped,
// also one of an earlier process if the volume was opened with
// [Options.NextDEK]. Without a new DEK and without one to go on with, it makes
// good what the end of an earlier rekey may have left undone: a header copy that
// is out of date, and traces of the old key in front of the data.
//
// If it returns nil, the old DEK opens nothing, and header and keyslot area hold
// nothing of it. If it returns an error, ctx's included, the volume works on
// and needs both DEKs from now on, unless nothing was written yet; Rekey may be
// called again. So the new key has to be kept safe elsewhere before the first
// call, or be in NewSafe under a KEK that is.
//
// Errors: [ErrRekeying] if another call runs, [ErrWrongKey] if NewDEK is not
// that of the rekey which is under way, [ErrWrongSafe], [luks.ErrNoSpace] if
// there is no room for a journal, [ErrChanged], [blockdev.ErrReadOnly], those of
// the Device below.
func (v *Volume) Rekey(ctx context.Context, opts RekeyOptions) error {
	if err := v.rekey(ctx, opts); err != nil {
		return fmt.Errorf("cannot rekey volume %s: %w", v.uuid, err)
	}
	return nil
}

func (v *Volume) rekey(ctx context.Context, opts RekeyOptions) error {
	if v.readOnly {
		return blockdev.ErrReadOnly
	}
	if !v.rekeying.TryLock() {
		return fmt.Errorf("%w: by another call", ErrRekeying)
	}
	defer v.rekeying.Unlock()
	if lost := v.lost.Load(); lost != nil {
		return lost.err
	}
	r := &rekey{v: v, storage: watchedStorage{v}}
	finished, err := r.begin(opts)
	if err != nil || finished {
		return err
	}
	if err := r.run(ctx, opts); err != nil {
		// The header's second copy is not left to who opens the volume next.
		if late := r.header.Settle(r.storage); late != nil && !errors.Is(err, late) {
			err = errors.Join(err, late)
		}
		return err
	}
	return r.finish()
}

// run moves the boundary to the end of the data.
func (r *rekey) run(ctx context.Context, opts RekeyOptions) error {
	v := r.v
	pace := newPace(v, opts.Rate)
	for v.boundary.Load() != allNew {
		if err := pace.wait(ctx); err != nil {
			return err
		}
		n, err := r.step()
		if errors.Is(err, blockdev.ErrNoSpace) && r.zone > r.zoneMin && v.lost.Load() == nil {
			r.zone, r.zoneMax = r.zoneMin, r.zoneMin // the journal does not fit the storage
			continue
		}
		if err != nil {
			return err
		}
		pace.zone(n)
		r.resize(n, pace)
		if opts.Progress != nil {
			size := v.Size()
			opts.Progress(min(v.boundary.Load(), size), size)
		}
	}
	return nil
}

// allNew is the boundary when all data are under the next key, also those that
// the volume may yet grow by.
const allNew = math.MaxInt64

// rekey is one call of Rekey.
type rekey struct {
	v       *Volume
	storage watchedStorage
	header  *luks.Header // as it is on the storage
	every   bool         // empty sectors are data too: the zeros of a plain disk
	journal luks.Area
	zone    int64 // bytes that are rewritten at once, from zoneMin to zoneMax
	zoneMin int64
	zoneMax int64
	dataEnd int64  // where the storage below is not known to be a hole up to; looking is slow on tmpfs
	old     []byte // ciphertext of a zone under the old key
	buf     []byte // what is encrypted at once
}

// watchedStorage is the Device below, for writes and flushes of the header and of a
// rekey. A flush that fails may have lost what the guest wrote, and is reported but
// once.
type watchedStorage struct{ v *Volume }

func (s watchedStorage) WriteAt(p []byte, off int64) (int, error) { return s.v.dev.WriteAt(p, off) }

func (s watchedStorage) Flush() error {
	err := s.v.dev.Flush()
	if err != nil {
		s.v.flushFailed.CompareAndSwap(nil, &err)
	}
	return err
}

// begin brings the header into a state of the rekey, and the volume's keys into
// the same one. It reports whether there is nothing left to do.
func (r *rekey) begin(opts RekeyOptions) (finished bool, err error) {
	v := r.v
	if err := checkSafe(opts.NewSafe, v.uuid); err != nil {
		return false, err
	}
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return false, err
	}
	defer v.guard.Leave(pass)
	if r.header, err = r.readHeader(); err != nil {
		return false, err
	}
	state, underWay, err := r.header.Reencryption()
	if err != nil {
		return false, err
	}
	if segment, err := dataSegment(v.dev, r.header); err != nil || segment != v.segment || r.header.UUID() != v.uuid {
		return false, fmt.Errorf("%w: it was %s", ErrChanged, v.uuid)
	}
	if v.next != nil && !underWay && v.boundary.Load() == 0 && r.header.VerifyKey(v.dek) == nil {
		// The commit that undid it was reported as failed, and was there all the same.
		if err := v.forgetNext(); err != nil {
			return false, err
		}
	}
	switch {
	case v.next == nil && opts.NewDEK == nil && !underWay:
		return true, r.tidy()
	case v.next == nil && opts.NewDEK == nil:
		return false, errors.New("there is no new DEK")
	case v.next != nil && opts.NewDEK != nil && !opts.NewDEK.Equal(v.nextDEK):
		return false, fmt.Errorf("%w as its next one", ErrWrongKey)
	case v.next == nil:
		if err := r.initialise(opts, state, underWay); err != nil {
			return false, err
		}
		if state, _, err = r.header.Reencryption(); err != nil {
			return false, err
		}
	case !underWay:
		// The last commit was reported as failed, and was there all the same.
		if err := r.header.VerifyKey(v.nextDEK); err != nil || v.boundary.Load() != allNew {
			return false, fmt.Errorf("%w: its rekey was finished", ErrChanged)
		}
		if err := r.locked(func() error { return r.header.Commit(r.storage) }); err != nil {
			return false, err
		}
		return true, r.finish()
	default:
		if state.Hot != 0 || state.Boundary != v.boundary.Load() {
			return false, fmt.Errorf("%w: its rekey has gone on", ErrChanged)
		}
		if err := r.header.VerifyReencryption(v.dek, v.nextDEK); err != nil {
			return false, err
		}
		if err := r.replaceNext(opts.NewSafe); err != nil {
			return false, err
		}
	}

	return false, r.setUp(state.Journal, opts.Zone)
}

// setUp makes ready for zones of that many bytes, or of what is usual if it is 0.
func (r *rekey) setUp(journal luks.Area, zone int64) error {
	r.journal = journal
	unit := r.v.rekeyUnit()
	if unit > journal.Size {
		return fmt.Errorf("%w: the journal of %d bytes holds no block of %d", luks.ErrNoSpace, journal.Size, unit)
	}
	bound := func(zone int64) int64 { return max(min(zone, journal.Size)/unit*unit, unit) }
	r.zoneMin, r.zoneMax = bound(zone), bound(zone)
	if zone <= 0 {
		r.zoneMin, r.zoneMax = bound(zoneBusy), bound(zoneIdle)
	}
	r.zone = r.zoneMin
	r.buf = make([]byte, pieceSize)
	return nil
}

// rekeyUnit is what zone and journal are a multiple of, in bytes.
func (v *Volume) rekeyUnit() int64 { return int64(max(v.blockSize, 4096)) }

// journalMax is how long a journal should be, in bytes.
func (v *Volume) journalMax(opts RekeyOptions) int64 {
	zone := min(opts.Zone, zoneMax)
	if zone <= 0 && opts.NewPassphrase == nil { // else there must be room for its keyslot
		zone = zoneIdle
	}
	return max(zone, zoneBusy, v.rekeyUnit())
}

// resize chooses how much is rewritten at once, after a zone of which n bytes
// were.
func (r *rekey) resize(n int64, p *pace) {
	switch {
	case p.rest > 0 || p.rate.PerSecond() > 0:
		r.zone = r.zoneMin
	case n > 0:
		r.zone = min(2*r.zone, r.zoneMax)
	}
}

// initialise writes the state INIT with NewDEK, and takes that into use. A header
// that is there already is from a call whose commit failed.
func (r *rekey) initialise(opts RekeyOptions, state luks.Reencryption, underWay bool) error {
	v := r.v
	if underWay && (state.Boundary != 0 || state.Hot != 0) {
		return fmt.Errorf("%w: somebody else has begun to rekey it", ErrChanged)
	}
	err := r.locked(func() error {
		if underWay {
			if err := r.header.CancelReencryption(); err != nil {
				return err
			}
		}
		if err := r.header.BeginReencryption(luks.ReencryptionOptions{
			OldDEK: v.dek, NewDEK: opts.NewDEK, Safe: opts.NewSafe, JournalMin: v.rekeyUnit(), JournalMax: v.journalMax(opts),
		}); err != nil {
			return err
		}
		if opts.NewPassphrase != nil {
			return r.header.AddPassphrase(r.storage, opts.NewDEK, opts.NewPassphrase, opts.PassphraseCost)
		}
		return r.header.Commit(r.storage)
	})
	if err != nil {
		return err
	}
	nextDEK, err := opts.NewDEK.Clone()
	if err != nil {
		return err
	}
	next, err := xts.New(nextDEK)
	if err != nil {
		nextDEK.Close()
		return err
	}
	all, err := v.guard.EnterAll()
	if err != nil {
		nextDEK.Close()
		next.Close()
		return err
	}
	defer v.guard.Leave(all)
	v.nextDEK, v.next = nextDEK, next
	v.boundary.Store(0)
	return nil
}

// readHeader reads the header anew: a failed commit leaves what only the storage
// knows.
func (r *rekey) readHeader() (*luks.Header, error) {
	r.v.header.Lock()
	defer r.v.header.Unlock()
	return readHeader(r.v.dev)
}

// commit changes the header by change and writes it, inside locked. The second
// copy is durable after the next flush only, which the next step has anyway.
func (r *rekey) commit(change func() error) error {
	if err := change(); err != nil {
		return err
	}
	return r.header.CommitEarly(r.storage)
}

// flush makes all writes durable, the header's second copy included.
func (r *rekey) flush() error { return r.header.Flush(r.storage) }

// write writes to the storage, which begins with it at once: it works while the
// next piece is read and encrypted, and the flush has less to wait for.
func (r *rekey) write(p []byte, off int64) error {
	_, err := r.storage.WriteAt(p, off)
	if dev, ok := r.v.dev.(blockdev.EarlyFlusher); ok && err == nil {
		dev.FlushEarly(off, int64(len(p)))
	}
	return err
}

// locked runs f while nobody else reads or writes the header, unless another
// program has written it since it was read.
func (r *rekey) locked(f func() error) error {
	r.v.header.Lock()
	defer r.v.header.Unlock()
	return withHeaderLock(r.v.dev, blockdev.Exclusive, func() error {
		superseded, err := r.header.Superseded(r.v.dev)
		if err != nil {
			return err
		}
		if superseded {
			return ErrChanged
		}
		return f()
	})
}

// replaceNext makes safe, unless it is nil, the key safe of the next key.
func (r *rekey) replaceNext(safe *keysafe.Safe) error {
	if safe == nil {
		return nil
	}
	safes, err := r.header.Safes()
	if err != nil {
		return err
	}
	if n := len(safes); n > 0 && bytes.Equal(safes[n-1].Encode(), safe.Encode()) && len(r.header.Damaged()) == 0 {
		return nil
	}
	return r.locked(func() error {
		if err := r.header.SetNextSafe(safe); err != nil {
			return err
		}
		return r.header.Commit(r.storage)
	})
}

// tidy makes good what a rekey that came to its end has left undone.
func (r *rekey) tidy() error {
	return r.locked(func() error {
		if err := r.header.VerifyKey(r.v.dek); err != nil {
			return fmt.Errorf("%w: its key is another one", ErrChanged)
		}
		if len(r.header.Damaged()) > 0 {
			if err := r.header.Commit(r.storage); err != nil {
				return err
			}
		}
		return wipeFree(r.v.dev, r.storage, r.header)
	})
}

// finish wipes what is left of the old key, after the last commit, and forgets
// the key.
func (r *rekey) finish() error {
	v := r.v
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return err
	}
	defer v.guard.Leave(pass)
	if err := r.locked(func() error { return wipeFree(v.dev, r.storage, r.header) }); err != nil {
		return err
	}
	return v.retireKey()
}

// wipeFree overwrites what no keyslot uses of the space in front of the data, as
// far as it is allocated, and then gives it back.
func wipeFree(dev blockdev.Device, storage luks.Storage, h *luks.Header) error {
	var wiped []luks.Area
	for _, area := range h.FreeAreas() {
		areas, err := wipe(dev, storage, area)
		if err != nil {
			return err
		}
		wiped = append(wiped, areas...)
	}
	if len(wiped) == 0 {
		return nil
	}
	if err := storage.Flush(); err != nil {
		return err
	}
	for _, area := range wiped {
		if err := dev.WriteZeroes(area.Offset, area.Size, true); err != nil {
			return err
		}
	}
	return storage.Flush()
}

// wipe overwrites what dev has allocated of an area, and returns where that is.
func wipe(dev blockdev.Device, storage luks.Storage, area luks.Area) (wiped []luks.Area, err error) {
	zeros := make([]byte, min(area.Size, bufferSize))
	extenter, _ := dev.(blockdev.Extenter)
	for off, end := area.Offset, area.Offset+area.Size; off < end; {
		e := blockdev.Extent{Length: end - off}
		if extenter != nil {
			if e, err = extenter.NextExtent(off); err != nil {
				return nil, err
			}
		}
		n := min(e.Length, end-off)
		if !e.Hole {
			n = min(n, int64(len(zeros)))
			if _, err := storage.WriteAt(zeros[:n], off); err != nil {
				return nil, err
			}
			if last := len(wiped) - 1; last >= 0 && wiped[last].Offset+wiped[last].Size == off {
				wiped[last].Size += n
			} else {
				wiped = append(wiped, luks.Area{Offset: off, Size: n})
			}
		}
		off += n
	}
	return wiped, nil
}

// retireKey makes the next key the only one.
func (v *Volume) retireKey() error {
	all, err := v.guard.EnterAll()
	if err != nil {
		return err
	}
	defer v.guard.Leave(all)
	if v.cipher != nil { // else the disk was plain
		v.cipher.Close()
	}
	v.dek.Close()
	v.dek, v.cipher, v.nextDEK, v.next = v.nextDEK, v.next, nil, nil
	v.boundary.Store(0)
	return nil
}
