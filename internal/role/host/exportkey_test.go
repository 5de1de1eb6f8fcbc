package host

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// TestThinImport: a thin disk takes the space of its image's data, is told as
// thin until it is filled, a rekey included, and always holds the image.
func TestThinImport(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	want := make([]byte, 8<<20)
	copy(want[3<<20:], bytes.Repeat([]byte("a guest's image "), 1<<16/16))
	check(t, os.WriteFile(filepath.Join(b.root, "a.raw"), nil, 0o600))
	check(t, os.Truncate(filepath.Join(b.root, "a.raw"), int64(len(want))))
	f, err := os.OpenFile(filepath.Join(b.root, "a.raw"), os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt(want[3<<20:3<<20+1<<16], 3<<20)
	check(t, err)
	check(t, f.Close())
	if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", filepath.Join(b.root, "a.raw"), filepath.Join(b.root, "a.qcow2")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	req := request("web-1", b.newRef(t))
	req.Disks = []*strongroomv1.NewDisk{
		{Image: "a.raw", ImageFormat: "raw", Thin: true},
		{Image: "a.qcow2", ImageFormat: "qcow2", Thin: true},
		{Image: "a.raw", ImageFormat: "raw"},
	}
	check(t, b.createVM(ctx, req, quiet))
	id := req.GetId()
	is := func(when string, thin ...bool) {
		t.Helper()
		m, err := b.machine(id)
		check(t, err)
		vm, err := b.describe(ctx, m)
		check(t, err)
		for i, d := range vm.GetDisks() {
			// Not exact: a file system allocates more for its own reasons.
			if d.GetThin() != thin[i] || thin[i] != (d.GetAllocatedBytes() < 4<<20) {
				t.Errorf("%s: %s is thin: %v, %d bytes are allocated", when, d.GetName(), d.GetThin(), d.GetAllocatedBytes())
			}
			if !bytes.Equal(b.content(t, id, d.GetName(), len(want)), want) {
				t.Errorf("%s: %s does not hold its image", when, d.GetName())
			}
		}
	}
	is("imported", true, true, false)
	check(t, b.rekeyVM(ctx, id, nil, b.newRef(t), depth{}, quiet))
	check(t, b.rekeyVM(ctx, id, nil, b.newRef(t), depth{deep: true}, quiet))
	is("rekeyed", true, true, false)
	check(t, b.fillDisks(ctx, id, []string{"disk-1"}, quiet))
	is("one filled", true, false, false)
	for range 2 { // the second call finds nothing to do
		check(t, b.fillDisks(ctx, id, nil, quiet))
	}
	is("filled", false, false, false)
}

// TestExportDiskKey: the key opens the disk, and only the one it was exported for
// can open the parcel.
func TestExportDiskKey(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	ref := b.newRef(t)
	id := b.create(t, "web-1", ref)
	recipient, err := parcel.NewRecipient()
	check(t, err)
	defer recipient.Close()
	res, err := b.exportDiskKey(ctx, id, "disk-1", recipient.PublicKey())
	check(t, err)
	l := res.GetLayout()
	if l.GetVm() != "web-1" || l.GetVmId() != id || l.GetKey().GetKeyId() != ref.KeyID || l.GetPowerState() != "poweredOff" || l.GetThin() || l.GetSectorSize() != 512 {
		t.Errorf("the layout is %v", l)
	}
	if _, err := recipient.Open(res.GetParcel(), parcel.DiskContext{VM: id, UUID: "another"}.String()); err == nil {
		t.Error("the parcel opens for another disk")
	}
	dek, err := recipient.Open(res.GetParcel(), parcel.DiskContext{VM: id, UUID: l.GetUuid()}.String())
	check(t, err)
	defer dek.Close()
	file, err := blockdev.OpenFile(l.GetPath(), blockdev.FileOptions{ReadOnly: true})
	check(t, err)
	v, err := volume.Open(file, dek, volume.Options{ReadOnly: true})
	check(t, err)
	check(t, v.Close())

	public := recipient.PublicKey()
	for name, c := range map[string]struct {
		vm, disk string
		public   []byte
		kind     errs.Kind
	}{
		"an unknown VM":           {"web-9", "disk-1", public, errs.NotFound},
		"an unknown disk":         {"web-1", "disk-9", public, errs.NotFound},
		"no disk":                 {"web-1", "", public, errs.Invalid},
		"a plain disk":            {"web-1", "disk-0", public, errs.InvalidState},
		"no public key":           {"web-1", "disk-1", nil, errs.Invalid},
		"a public key that isn't": {"web-1", "disk-1", bytes.Repeat([]byte{0xff}, parcel.PublicKeySize), errs.Invalid},
	} {
		_, err := b.exportDiskKey(ctx, c.vm, c.disk, c.public)
		wantKind(t, name, err, c.kind)
	}
}
