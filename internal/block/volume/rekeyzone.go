package volume

import (
	"errors"
	"fmt"
	"math"

	"strongroom/internal/block/blockdev"
)

// lostZone is a range of the data that an error has left neither under the old
// key nor under the new one, until the volume is opened anew.
type lostZone struct {
	start, end int64
	err        error
}

// step rewrites the zone at the boundary, or passes over the hole there, and
// returns how many bytes it has rewritten.
func (r *rekey) step() (int64, error) {
	v := r.v
	start := v.boundary.Load()
	n := r.next(start)
	wideOff, wideLen := blockdev.Widen(start, n, int64(v.blockSize))
	pass, err := v.guard.Enter(wideOff, wideLen, blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer v.guard.Leave(pass)
	// The lock is had before anything is done: without it, what has been begun
	// could neither go on nor be undone.
	var rewritten int64
	err = r.locked(func() (err error) {
		rewritten, err = r.move(start, n)
		return err
	})
	return rewritten, err
}

// move moves the boundary from start over the next n bytes, or less.
func (r *rekey) move(start, n int64) (rewritten int64, err error) {
	if n > r.zone {
		if e := r.extentAt(start); e.Hole && e.Length >= n {
			return 0, r.pass(start + n)
		}
		n = r.zone // it was written to
	}
	if n > int64(cap(r.old)) {
		r.old = make([]byte, n)
	}
	old := r.old[:n]
	if filled, err := r.save(start, old); err != nil {
		return 0, err
	} else if !filled {
		return 0, r.pass(start + n)
	}
	return n, r.rewrite(start, old)
}

// save reads the zone at start into old and writes it to the journal, unless it
// is empty.
func (r *rekey) save(start int64, old []byte) (filled bool, err error) {
	saved := 0
	for at := 0; at < len(old); {
		end := min(at+pieceSize, len(old))
		if _, err := r.v.dev.ReadAt(old[at:end], r.v.segment.Offset+start+int64(at)); err != nil {
			return false, err
		}
		if saved > 0 || r.every || !isZero(old[at:end]) {
			if err := r.write(old[saved:end], r.journal.Offset+int64(saved)); err != nil {
				return false, err
			}
			saved = end
		}
		at = end
	}
	return saved > 0, nil
}

// next returns how much may be done at start: a zone, or a hole that is longer.
func (r *rekey) next(start int64) int64 {
	left, zone := r.v.Size()-start, r.zone
	if r.every || start < r.dataEnd {
		return min(zone, left)
	}
	e := r.extentAt(start)
	if !e.Hole {
		r.dataEnd = start + e.Length
		return min(zone, left)
	}
	if e.Length >= left {
		return left
	}
	return max(e.Length-e.Length%r.v.rekeyUnit(), min(zone, left))
}

// extentAt returns the extent of the storage at start, as far as it is known; it
// is only a short cut.
func (r *rekey) extentAt(start int64) blockdev.Extent {
	if dev, ok := r.v.dev.(blockdev.Extenter); ok {
		if e, err := dev.NextExtent(r.v.segment.Offset + start); err == nil {
			return e
		}
	}
	return blockdev.Extent{Length: math.MaxInt64 - start}
}

// pass moves the boundary to end over empty sectors. They may be empty since a
// discard that is not durable yet, and what was there before is no data under
// the next key.
func (r *rekey) pass(end int64) error {
	if err := r.flush(); err != nil {
		return err
	}
	return r.advance(end)
}

// advance moves the boundary to end, in the header and then for requests; at
// the end of the data the header becomes that of a volume with the next key only.
// The range is held and its data are under the next key, or empty, and durable.
//
// If the header cannot be written, it is not known where it says the boundary
// is, so that the data must not be put back: all that can be done is to write it
// again.
func (r *rekey) advance(end int64) error {
	v := r.v
	start, boundary := v.boundary.Load(), end
	if end == v.size.Load() {
		boundary = allNew
	}
	finished := false
	write := func() error {
		if boundary != allNew {
			return r.commit(func() error { return r.header.MarkClean(end) })
		}
		if !finished {
			if err := r.header.FinishReencryption(); err != nil {
				return err
			}
			finished = true
		}
		return r.header.Commit(r.storage)
	}
	err := write()
	if err != nil {
		if again := write(); again != nil {
			return r.lose(start, end, errors.Join(err, again))
		}
	}
	v.boundary.Store(boundary)
	return err
}

// lose gives a zone up.
func (r *rekey) lose(start, end int64, cause error) error {
	err := fmt.Errorf("its zone at %d has to be recovered, by opening the volume anew: %w", start, cause)
	r.v.lost.Store(&lostZone{start, end, err})
	return err
}

// rewrite rewrites the zone at start, which is held and whose old ciphertext is
// old, and written to the journal.
func (r *rekey) rewrite(start int64, old []byte) error {
	v := r.v
	if err := r.flush(); err != nil {
		return err
	}
	n := int64(len(old))
	err := r.commit(func() error { return r.header.MarkHot(n, start+n == v.size.Load()) })
	if err == nil {
		if err = r.recrypt(start, old); err == nil {
			err = r.flush()
		}
	}
	if err == nil {
		return r.advance(start + n)
	}
	// The header may say that the zone is hot; requests must not be let go before
	// it says that it is not.
	undo := restore(r.storage, v.segment.Offset+start, old, v.segment.SectorSize, r.every)
	if undo == nil {
		if undo = r.flush(); undo == nil {
			undo = r.commit(func() error { return r.header.MarkClean(start) })
		}
	}
	if undo != nil {
		return r.lose(start, start+n, errors.Join(err, undo))
	}
	return err
}

// recrypt writes the sectors of old under the next key, but empty ones only if
// r.every.
func (r *rekey) recrypt(start int64, old []byte) error {
	v, sector := r.v, r.v.segment.SectorSize
	return runs(old, sector, len(r.buf), r.every, func(at int, run []byte) error {
		out, off := r.buf[:len(run)], start+int64(at)
		if v.cipher != nil { // else the disk was plain
			v.cipher.Decrypt(out, run, tweak(off), sector)
			run = out
		}
		v.next.Encrypt(out, run, tweak(off), sector)
		return r.write(out, v.segment.Offset+off)
	})
}

// restore writes the sectors of old, what a zone held, back to off of the storage,
// but empty ones only if every.
func restore(w interface {
	WriteAt(p []byte, off int64) (int, error)
}, off int64, old []byte, sector int, every bool,
) error {
	return runs(old, sector, len(old), every, func(at int, run []byte) error {
		_, err := w.WriteAt(run, off+int64(at))
		return err
	})
}

// runs calls f for each run of sectors of p that are not empty, or of all if every,
// cut into pieces of at most limit bytes, with its place in p.
func runs(p []byte, sector, limit int, every bool, f func(at int, run []byte) error) error {
	for start := 0; start < len(p); {
		end := start
		for end < len(p) && end-start < limit && (every || !isZero(p[end:end+sector])) {
			end += sector
		}
		if end == start {
			start += sector
			continue
		}
		if err := f(start, p[start:end]); err != nil {
			return err
		}
		start = end
	}
	return nil
}
