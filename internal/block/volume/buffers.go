package volume

import "sync"

const (
	// bufferSize is how much of a request is encrypted, or decrypted, at once:
	// small enough to stay in a processor's own cache, large enough that the
	// calls do not count. A multiple of every sector size.
	bufferSize = 128 << 10
	// bufferCount is how many requests are encrypted at once; more wait. With
	// bufferSize it bounds the memory of a volume: 8 MiB, of which only what was
	// ever needed together is allocated.
	bufferCount = 64
)

// buffers is a bounded stack of buffers: the last one used, which the caches
// know best, is taken next.
type buffers struct {
	mu   sync.Mutex
	back sync.Cond // signalled when a buffer is put back
	free [][]byte
	made int
}

func newBuffers() *buffers {
	b := &buffers{free: make([][]byte, 0, bufferCount)}
	b.back.L = &b.mu
	return b
}

// get returns a buffer of bufferSize bytes with any contents, aligned to a page
// (the allocator aligns large objects so). It waits while all are in use.
func (b *buffers) get() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.free) == 0 {
		if b.made < bufferCount {
			b.made++
			return make([]byte, bufferSize)
		}
		b.back.Wait()
	}
	last := len(b.free) - 1
	buf := b.free[last]
	b.free = b.free[:last]
	return buf
}

// put gives a buffer back.
func (b *buffers) put(buf []byte) {
	b.mu.Lock()
	b.free = append(b.free, buf)
	b.mu.Unlock()
	b.back.Signal()
}
