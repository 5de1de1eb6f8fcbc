package host

import (
	"bytes"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
)

// TestResizeOffline makes disks of a VM that is off larger: what they held stays,
// and the rest reads as zeros. A call that was interrupted is made again.
func TestResizeOffline(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	req := request("web-1", b.newRef(t))
	req.Disks = []*strongroomv1.NewDisk{{SizeBytes: 1 << 20}, {SizeBytes: 1 << 20, Plain: true}}
	check(t, b.createVM(ctx, req, quiet))
	id := req.GetId()
	want := bytes.Repeat([]byte{0x5a}, 1<<20)
	for _, disk := range []string{"disk-0", "disk-1"} {
		o, err := b.takeOffline(ctx, id, "a test")
		check(t, err)
		i, err := chosen(o.vm, []string{disk})
		check(t, err)
		dev, err := b.openDisk(ctx, o, o.vm.Disks[i[0]])
		check(t, err)
		_, err = dev.WriteAt(want, 0)
		check(t, err)
		check(t, dev.Close())
		o.release()

		for range 2 { // the second finds it done
			check(t, b.resizeDisk(ctx, id, disk, 3<<20))
		}
		got := b.content(t, id, disk, 3<<20)
		if !bytes.Equal(got[:1<<20], want) || !bytes.Equal(got[1<<20:], make([]byte, 2<<20)) {
			t.Errorf("%s does not hold what it did, or no zeros after it", disk)
		}
		for _, size := range []int64{1 << 20, 0, -512, 3<<20 + 1, bundle.DiskMax + 512} {
			if err := b.resizeDisk(ctx, id, disk, size); errs.KindOf(err) != errs.Invalid {
				t.Errorf("%s resized to %d: %v, want kind Invalid", disk, size, err)
			}
		}
	}
	if err := b.resizeDisk(ctx, id, "disk-2", 3<<20); errs.KindOf(err) != errs.NotFound {
		t.Errorf("a disk that is not there: %v", err)
	}
	m, err := b.machine(id)
	check(t, err)
	vm, err := b.describe(ctx, m)
	check(t, err)
	for _, d := range vm.GetDisks() {
		if d.GetSizeBytes() != 3<<20 {
			t.Errorf("%s is said to have %d bytes", d.GetName(), d.GetSizeBytes())
		}
	}

	// vm.json is written last: a crash before that leaves a file that is larger.
	o, err := b.takeOffline(ctx, id, "a test")
	check(t, err)
	before := o.vm.Clone()
	before.Disks[0].SizeBytes = 1 << 20
	check(t, bundle.Write(o.dir, before))
	o.release()
	if err := b.resizeDisk(ctx, id, "disk-0", 2<<20); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a disk would shrink: %v", err)
	}
	check(t, b.resizeDisk(ctx, id, "disk-0", 3<<20))
}
