package volume

import (
	"testing"
	"unsafe"
)

// TestBuffersBounded takes all buffers of a kind: who asks for one more gets the one
// that is put back, and those who ask for the other kind do not wait.
func TestBuffersBounded(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		n, other    int64
		size, count int
	}{
		{shortSize, shortSize + 1, shortSize, shortCount},
		{shortSize + 1, 512, bufferSize, bufferCount},
		{4 * bufferSize, shortSize, bufferSize, bufferCount},
	} {
		b := newBuffers()
		taken := map[*byte][]byte{}
		for range c.count {
			buf := b.get(c.n)
			if len(buf) != c.size {
				t.Fatalf("a buffer of %d bytes for a request of %d", len(buf), c.n)
			}
			if uintptr(unsafe.Pointer(unsafe.SliceData(buf)))%4096 != 0 {
				t.Errorf("a buffer of %d bytes is not aligned to a page", len(buf))
			}
			taken[unsafe.SliceData(buf)] = buf
		}
		if len(taken) != c.count {
			t.Fatalf("%d buffers of %d are different ones", len(taken), c.count)
		}
		more := make(chan []byte)
		go func() { more <- b.get(c.n) }()
		b.put(b.get(c.other))
		for at, buf := range taken {
			b.put(buf)
			if got := <-more; unsafe.SliceData(got) != at {
				t.Errorf("more than %d buffers for requests of %d bytes", c.count, c.n)
			}
			break
		}
	}
}
