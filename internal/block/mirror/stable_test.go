package mirror_test

import (
	"bytes"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/mirror"
)

// guest is the old device of a guest that goes on writing to the memory of a request
// that is under way, as one may over vhost-user.
type guest struct {
	*blockdev.Memory
	memory []byte
}

func (g *guest) WriteAt(p []byte, off int64) (int, error) {
	n, err := g.Memory.WriteAt(p, off)
	for i := range g.memory {
		g.memory[i]++
	}
	return n, err
}

// TestBufferChanges: both devices get the same, also if what is written changes
// meanwhile. Else the copy would differ by no fault of its own.
func TestBufferChanges(t *testing.T) {
	t.Parallel()
	const size = 2 << 20
	from := &guest{Memory: blockdev.NewMemory(size, 512)}
	to := blockdev.NewMemory(size, 512)
	m := newMirror(t, from, to)
	from.memory = make([]byte, 1<<20+700)
	write := func() {
		_, err := m.WriteAt(from.memory, 100)
		check(t, err)
	}
	check(t, m.Copy(t.Context(), mirror.CopyOptions{Progress: func(int64, int64) { write() }}))
	check(t, m.Hold())
	write()
	if !bytes.Equal(contents(t, from), contents(t, to)) {
		t.Error("the devices differ")
	}
}
