package blockfuse

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"strongroom/internal/block/blockdev"
)

// TestAllocations counts what our side of a request allocates. BenchmarkRead
// and BenchmarkWrite tell what go-fuse does for it.
func TestAllocations(t *testing.T) {
	f := newFile(blockdev.NewMemory(1<<20, 512), Options{})
	p := make([]byte, 64<<10)
	var (
		readIn  = fuse.ReadIn{Offset: 4096, Size: uint32(len(p))}
		writeIn = fuse.WriteIn{Offset: 700}
		punchIn = fuse.FallocateIn{Offset: 100, Length: 9000, Mode: 3}
		attr    fuse.AttrOut
	)
	for _, r := range []struct {
		name string
		run  func() fuse.Status
	}{
		{"read", func() fuse.Status {
			r, status := f.Read(nil, &readIn, p)
			_, _ = r.Bytes(nil)
			r.Done()
			return status
		}},
		{"write", func() fuse.Status { _, status := f.Write(nil, &writeIn, p); return status }},
		{"fsync", func() fuse.Status { return f.Fsync(nil, nil) }},
		{"punch", func() fuse.Status { return f.Fallocate(nil, &punchIn) }},
		{"getattr", func() fuse.Status { return f.GetAttr(nil, nil, &attr) }},
	} {
		n := testing.AllocsPerRun(50, func() {
			if status := r.run(); status != fuse.OK {
				t.Fatal(r.name, status)
			}
		})
		if n > 0 {
			t.Errorf("%s: %v allocations per request, want none", r.name, n)
		}
	}
}
