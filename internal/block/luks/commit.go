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
	if err := h.commit(w); err != nil {
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
	for _, c := range order {
		if h.damage[c] != nil {
			rand.Read(h.salts[c][:])
		}
		h.damage[c] = errHalfWritten
		if err := write(w, encodeCopy(h.bin, h.salts[c], h.doc, c), c, h.bin.size); err != nil {
			return err
		}
		h.damage[c] = nil
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
