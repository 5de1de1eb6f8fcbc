package volume

import "sync"

const (
	// bufferSize is how much of a request is encrypted, or decrypted, at once:
	// small enough to stay in a processor's own cache, large enough that the
	// calls do not count. A multiple of every sector size.
	bufferSize = 128 << 10
	// bufferCount is how many requests are encrypted at once; more wait.
	bufferCount = 8
	// shortSize and shortCount are the same of requests that are short, of which
	// more must be under way to keep a device busy. With the others they bound the
	// memory of a volume: 2 MiB, of which only what was ever needed together is
	// allocated.
	shortSize  = 16 << 10
	shortCount = 64
)

// buffers are those of a volume.
type buffers struct{ short, long bufferStack }

func newBuffers() *buffers {
	b := new(buffers)
	b.short.init(shortSize, shortCount)
	b.long.init(bufferSize, bufferCount)
	return b
}

// get returns a buffer for a request of n bytes: shortSize or bufferSize bytes with
// any contents, aligned to a page (as the allocator aligns objects of these sizes).
// It waits while all are in use.
func (b *buffers) get(n int64) []byte { return b.of(n <= shortSize).get() }

// put gives a buffer back.
func (b *buffers) put(buf []byte) { b.of(len(buf) == shortSize).put(buf) }

func (b *buffers) of(short bool) *bufferStack {
	if short {
		return &b.short
	}
	return &b.long
}

// bufferStack is a bounded stack of buffers: the last one used, which the caches
// know best, is taken next.
type bufferStack struct {
	size int // of each, in bytes

	mu   sync.Mutex // guards the fields below
	back sync.Cond  // signalled when a buffer is put back
	free [][]byte
	left int // how many may still be made
}

func (b *bufferStack) init(size, count int) {
	b.size, b.left = size, count
	b.free = make([][]byte, 0, count)
	b.back.L = &b.mu
}

func (b *bufferStack) get() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.free) == 0 {
		if b.left > 0 {
			b.left--
			return make([]byte, b.size)
		}
		b.back.Wait()
	}
	last := len(b.free) - 1
	buf := b.free[last]
	b.free = b.free[:last]
	return buf
}

func (b *bufferStack) put(buf []byte) {
	b.mu.Lock()
	b.free = append(b.free, buf)
	b.mu.Unlock()
	b.back.Signal()
}
