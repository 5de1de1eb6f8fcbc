package luks

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
)

// Storage is what a header is written to. It keeps what was written before a
// Flush that returned without an error; every blockdev.Device is one.
type Storage interface {
	io.WriterAt
	// Flush makes all completed writes durable.
	Flush() error
}

// Commit writes both copies of the header: one, a flush, the other, a flush.
// The seqid grows by one. The primary comes first, unless the secondary is
// damaged or out of date: a good copy is only touched while the other is good
// too. A damaged copy gets a new salt. The first commit of a header that was read
// begins with the other copy as it is, and a flush: whoever wrote it may have been
// told that its flush failed, or was killed before, so that it is good in the
// kernel's memory only.
//
// Cut short at any instant, it leaves the header of before or the header of
// after. If it returns an error, which of them is not known: it may be called
// again, or the header read again. A key that only the header of before needs
// must be kept until Commit has returned without error.
//
// It returns an error wrapping [ErrUnsupported], and writes nothing, if the
// header has requirements that this package does not know.
func (h *Header) Commit(w Storage) error {
	err := h.commit(w)
	if err == nil {
		if err = h.Flush(w); err != nil {
			err = fmt.Errorf("cannot flush: %w", err)
		}
	}
	return commitError(err)
}

// CommitEarly is Commit without the last flush: one copy is durable when it
// returns, and the other one after the next [Header.Flush], which may make other
// writes durable as well. A commit before that would have to begin with the
// other copy, as after an error.
func (h *Header) CommitEarly(w Storage) error { return commitError(h.commit(w)) }

// Settle flushes w if there is a copy that [Header.CommitEarly] has left.
func (h *Header) Settle(w Storage) error {
	if h.late == nil {
		return nil
	}
	return h.Flush(w)
}

// Flush flushes w, and with it the copy that [Header.CommitEarly] has left.
func (h *Header) Flush(w Storage) error {
	late := h.late
	h.late = nil // if the flush fails, another one tells nothing of this copy
	if err := w.Flush(); err != nil {
		return err
	}
	if late != nil {
		*late = nil
	}
	return nil
}

func commitError(err error) error {
	if err != nil {
		return fmt.Errorf("cannot write LUKS2 header: %w", err)
	}
	return nil
}

// errHalfWritten is the damage of a copy that is being written.
var errHalfWritten = errors.New("it was not written to the end")

func (h *Header) commit(w Storage) error {
	if err := h.checkWritable(); err != nil {
		return err
	}
	order := [...]Copy{Primary, Secondary}
	if h.damage[Secondary] != nil {
		order = [...]Copy{Secondary, Primary}
	}
	if h.unsure != nil {
		if err := write(w, h.unsure, order[1], h.bin.size); err != nil {
			return err
		}
		h.unsure = nil
	}
	// Also after a failed attempt, which may be on the storage in part: two
	// different headers must never have the same seqid.
	h.bin.seqid++
	for i, c := range order {
		if i > 0 {
			if err := h.Flush(w); err != nil {
				return fmt.Errorf("%s copy: cannot flush: %w", order[0], err)
			}
		}
		if h.damage[c] != nil {
			rand.Read(h.salts[c][:])
		}
		h.damage[c], h.late = errHalfWritten, nil
		if _, err := w.WriteAt(encodeCopy(h.bin, h.salts[c], h.doc, c), c.offset(h.bin.size)); err != nil {
			return fmt.Errorf("%s copy: %w", c, err)
		}
		h.late = &h.damage[c]
	}
	return nil
}

// write makes b, of size bytes, the durable header copy c.
func write(w Storage, b []byte, c Copy, size int64) error {
	if _, err := w.WriteAt(b, c.offset(size)); err != nil {
		return fmt.Errorf("%s copy: %w", c, err)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("%s copy: cannot flush: %w", c, err)
	}
	return nil
}
