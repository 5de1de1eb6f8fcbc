package nbd

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// pieceSize is the most bytes of one request that are worked on at a time, and
// so the size of a worker's buffer. Longer requests are served as a sequence of
// pieces: memory stays bounded, the bytes stay in the processor's cache between
// the socket, the cipher and the file, and the pieces run in parallel.
const pieceSize = 256 << 10

// pool hands out buffers of pieceSize bytes, aligned to the page size as direct
// I/O wants it, up to a number. Their memory is left out of core dumps, for
// what passes through is the guest's plain data.
type pool struct {
	limit int

	mu   sync.Mutex // guards used
	used int
}

// get returns a buffer. Beyond the limit it returns nil, unless force is set.
func (p *pool) get(force bool) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.used >= p.limit && !force {
		return nil, nil
	}
	b, err := unix.Mmap(-1, 0, pieceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("cannot map a buffer of %d bytes: %w", pieceSize, err)
	}
	// Best effort: a kernel without it only dumps more.
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	p.used++
	return b, nil
}

// put takes a buffer back and returns its memory to the system, so that no
// plain data stays behind a client that left.
func (p *pool) put(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used--
	_ = unix.Munmap(b) // fails only for what Mmap did not return
}
