package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// content returns what the first n bytes of a disk hold.
func (b *bench) content(t testing.TB, id, disk string, n int) []byte {
	t.Helper()
	o, err := b.takeOffline(t.Context(), id, "a test")
	check(t, err)
	defer o.release()
	i := slices.IndexFunc(o.vm.Disks, func(d bundle.Disk) bool { return d.Name == disk })
	buf := make([]byte, n)
	if d := o.vm.Disks[i]; d.Format == bundle.FormatLUKS {
		vol, _, err := recrypt.OpenVolume(t.Context(), o.folder(), d.File, b.kek)
		check(t, err)
		defer vol.Close()
		_, err = vol.ReadAt(buf, 0)
		check(t, err)
	} else {
		file, err := o.folder().Open(d.File)
		check(t, err)
		defer file.Close()
		_, err = file.ReadAt(buf, 0)
		check(t, err)
	}
	return buf
}

// TestCreate makes disks from images in every combination.
func TestCreate(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	want := bytes.Repeat([]byte("a guest's image "), 1<<20/16)
	want = append(want, "and some more"...) // not a whole sector
	check(t, os.Mkdir(filepath.Join(b.root, "iso"), 0o700))
	check(t, os.WriteFile(filepath.Join(b.root, "iso", "a.raw"), want, 0o600))
	cmd := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")
	cmd.Dir = filepath.Join(b.root, "iso")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ref := b.newRef(t)
	req := request("web-1", ref)
	req.Disks = nil
	for _, format := range []string{"raw", "qcow2"} {
		for _, plain := range []bool{true, false} {
			req.Disks = append(req.Disks, &strongroomv1.NewDisk{Image: "iso/a." + format, ImageFormat: format, Plain: plain, SizeBytes: 2 << 20})
		}
	}
	req.Disks = append(req.Disks, &strongroomv1.NewDisk{Image: "iso/a.raw", ImageFormat: "raw"}) // as large as its image
	steps := map[string]bool{}
	check(t, b.createVM(t.Context(), req, func(step string, done, total int64, unit string) {
		steps[step] = true
		if done < 0 || done > total || unit != unitBytes {
			t.Errorf("%s: %d of %d %s", step, done, total, unit)
		}
	}))
	for i, d := range req.Disks {
		name := "disk-" + string(rune('0'+i))
		if !steps["copying "+name] {
			t.Errorf("no progress of %s", name)
		}
		if got := b.content(t, req.GetId(), name, len(want)); !bytes.Equal(got, want) {
			t.Errorf("%s (%v) does not hold its image", name, d)
		}
	}
	m, err := b.machine(req.GetId())
	check(t, err)
	vm, err := b.describe(t.Context(), m)
	check(t, err)
	if vm.GetCryptoState() != "unlocked" || !vm.GetEncrypted() || vm.GetKey().GetKeyId() != ref.KeyID || len(vm.GetDisks()) != 5 ||
		vm.GetDisks()[1].GetKey().GetKeyId() != ref.KeyID || vm.GetDisks()[4].GetSizeBytes() != 1<<20+512 {
		t.Errorf("the VM is %v", vm)
	}
	for _, name := range []string{"disk-1.luks", "disk-3.luks", "disk-4.luks"} {
		text, err := os.ReadFile(filepath.Join(b.root, "web-1", name))
		check(t, err)
		if bytes.Contains(text, want[:64]) {
			t.Errorf("%s holds plaintext", name)
		}
	}
}

// TestCreateRefuses: what cannot be made leaves nothing behind.
func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	outside := filepath.Join(t.TempDir(), "secret")
	check(t, os.WriteFile(outside, make([]byte, 4096), 0o600))
	check(t, os.Symlink(outside, filepath.Join(b.root, "link")))
	check(t, os.WriteFile(filepath.Join(b.root, "file"), nil, 0o600))
	check(t, os.Mkdir(filepath.Join(b.root, "empty"), 0o700))
	b.create(t, "taken", keysafe.Ref{})
	before := list(t, b.root)
	image := func(name, format string) func(*strongroomv1.AgentCreateVMRequest) {
		return func(r *strongroomv1.AgentCreateVMRequest) {
			r.Disks[0].Image, r.Disks[0].ImageFormat = name, format
		}
	}
	for name, c := range map[string]struct {
		change func(*strongroomv1.AgentCreateVMRequest)
		kind   errs.Kind
	}{
		"unknown datastore":       {func(r *strongroomv1.AgentCreateVMRequest) { r.Datastore = "ds-9" }, errs.NotFound},
		"a name with a separator": {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = "a/b" }, errs.Invalid},
		"a name that leads out":   {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = ".." }, errs.Invalid},
		"an id that leads out":    {func(r *strongroomv1.AgentCreateVMRequest) { r.Id = "../../x" }, errs.Invalid},
		"a folder that is a VM":   {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = "taken" }, errs.Exists},
		"a folder that is empty":  {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = "empty" }, errs.Exists},
		"a folder that is a file": {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = "file" }, errs.Exists},
		"a folder that is a link": {func(r *strongroomv1.AgentCreateVMRequest) { r.Name = "link" }, errs.Exists},
		"a size that is odd":      {func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].SizeBytes = 1000 }, errs.Invalid},
		"a size of an exabyte":    {func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].SizeBytes = 1 << 60 }, errs.Invalid},
		"a negative size":         {func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].SizeBytes = -512 }, errs.Invalid},
		"no image":                {image("none.raw", "raw"), errs.NotFound},
		"no qcow2 image":          {image("none.qcow2", "qcow2"), errs.NotFound},
		"an image that is none":   {image("file", "qcow2"), errs.Invalid},
		"an image that leads out": {image("../x", "raw"), errs.Invalid},
		"an absolute image":       {image(outside, "raw"), errs.Invalid},
		"a link that leads out":   {image("link", "raw"), errs.Invalid},
		"the same as qcow2":       {image("link", "qcow2"), errs.Invalid},
		"a format to be guessed":  {image("file", ""), errs.Invalid},
		"a key that is not here": {func(r *strongroomv1.AgentCreateVMRequest) {
			r.Key = &strongroomv1.KeyRef{Provider: "kp-9", KeyId: "k"}
			r.Disks[0].Plain = false
		}, errs.Locked},
	} {
		req := request("web-1", keysafe.Ref{})
		c.change(req)
		wantKind(t, name, b.createVM(t.Context(), req, quiet), c.kind)
		if got := list(t, b.root); !slices.Equal(got, before) {
			t.Fatalf("%s left %v", name, got)
		}
		if len(b.secrets.snapshot().VMs) != 1 {
			t.Fatalf("%s was registered", name)
		}
	}
}

// TestCreateInterrupted cuts a creation short at each of its steps; the same
// call ends it, and a deletion leaves nothing.
func TestCreateInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	check(t, os.WriteFile(filepath.Join(b.root, "a.raw"), bytes.Repeat([]byte("image"), 4<<20/5), 0o600))
	cmd := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")
	cmd.Dir = b.root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	images := []string{"a.qcow2", "a.raw"}
	ref := b.newRef(t)

	// Cancelled.
	for _, image := range images {
		req := request("web-1", ref)
		req.Disks[1].Image, req.Disks[1].ImageFormat, req.Disks[1].SizeBytes = image, filepath.Ext(image)[1:], 0
		ctx, cancel := context.WithCancelCause(t.Context())
		reason := errors.New("no longer wanted")
		if err := b.createVM(ctx, req, func(string, int64, int64, string) { cancel(reason) }); !errors.Is(err, reason) {
			t.Errorf("%s: a cancelled creation: %v", image, err)
		}
		if got := list(t, b.root); !slices.Equal(got, images) {
			t.Errorf("%s: a cancelled creation left %v", image, got)
		}
	}

	// Killed in the middle of the disks.
	req := request("web-1", ref)
	left := filepath.Join(b.root, creating(req.GetId()))
	check(t, os.Mkdir(left, 0o700))
	check(t, os.WriteFile(filepath.Join(left, "disk-0.raw"), []byte("a part"), 0o600))
	check(t, os.WriteFile(filepath.Join(left, "disk-1.luks.new"), []byte("a part"), 0o600))
	_, err := b.registerVM("ds-1", creating(req.GetId()), "")
	wantKind(t, "registering what is half made", err, errs.Invalid)
	check(t, b.createVM(t.Context(), req, quiet))
	if got := list(t, b.root); !slices.Equal(got, append(slices.Clone(images), "web-1")) {
		t.Errorf("there is %v", got)
	}

	// Killed before it was registered; and called again when all was done.
	file := filepath.Join(b.root, "web-1", "disk-1.luks")
	before, err := os.ReadFile(file)
	check(t, err)
	check(t, b.unregister(req.GetId()))
	for range 2 {
		check(t, b.createVM(t.Context(), req, quiet))
		if m, err := b.machine("web-1"); err != nil || m.id != req.GetId() {
			t.Errorf("machine = %v, %v", m, err)
		}
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, before) {
		t.Errorf("a repeated creation made the disk again (error %v)", err)
	}

	// Deleted instead.
	id := uuid.NewString()
	check(t, os.MkdirAll(filepath.Join(b.root, creating(id), "x"), 0o700))
	for _, id := range []string{id, id, "../web-1", req.GetId(), req.GetId()} {
		check(t, b.unregisterVM(t.Context(), id, true))
	}
	if got := list(t, b.root); !slices.Equal(got, images) {
		t.Errorf("after the deletions there is %v", got)
	}
}

// TestCreateTwice: a call that is repeated before the first has ended.
func TestCreateTwice(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	req := request("web-1", b.newRef(t))
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			if err := b.createVM(t.Context(), req, quiet); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if got := list(t, b.root); !slices.Equal(got, []string{"web-1"}) || len(b.secrets.snapshot().VMs) != 1 {
		t.Errorf("there is %v, registered %v", got, b.secrets.snapshot().VMs)
	}
}

func TestRegister(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", b.newRef(t))
	dir := filepath.Join(b.root, "web-1")
	check(t, os.CopyFS(filepath.Join(b.root, "copy"), os.DirFS(dir)))
	check(t, os.Symlink(dir, filepath.Join(b.root, "link")))
	check(t, os.Mkdir(filepath.Join(b.root, "linked"), 0o700))
	check(t, os.Symlink(filepath.Join(dir, bundle.FileName), filepath.Join(b.root, "linked", bundle.FileName)))
	check(t, os.Mkdir(filepath.Join(b.root, "none"), 0o700))
	check(t, os.Mkdir(filepath.Join(b.root, "bad"), 0o700))
	check(t, os.WriteFile(filepath.Join(b.root, "bad", bundle.FileName), []byte("{}"), 0o600))
	before := b.secrets.snapshot()
	for name, c := range map[string]struct {
		datastore, folder, name string
		kind                    errs.Kind
	}{
		"a copy":              {"ds-1", "copy", "", errs.Exists},
		"no datastore":        {"ds-9", "web-1", "", errs.NotFound},
		"no folder":           {"ds-1", "nothing", "", errs.NotFound},
		"no vm.json":          {"ds-1", "none", "", errs.NotFound},
		"a bad vm.json":       {"ds-1", "bad", "", errs.InvalidState},
		"a link to a folder":  {"ds-1", "link", "", errs.NotFound},
		"the parent":          {"ds-1", "..", "", errs.Invalid},
		"a path":              {"ds-1", "web-1/../web-1", "", errs.Invalid},
		"the datastore":       {"ds-1", ".", "", errs.Invalid},
		"nothing":             {"ds-1", "", "", errs.Invalid},
		"a name that is none": {"ds-1", "web-1", "a b", errs.Invalid},
	} {
		id, err := b.registerVM(c.datastore, c.folder, c.name)
		wantKind(t, name, err, c.kind)
		if id != "" {
			t.Errorf("%s: id %q", name, id)
		}
	}
	if _, err := b.registerVM("ds-1", "linked", ""); err == nil {
		t.Error("a vm.json that is a link was read")
	}
	if got := b.secrets.snapshot(); !slices.Equal(got.VMs, before.VMs) {
		t.Errorf("registered are %v", got.VMs)
	}

	check(t, b.unregisterVM(t.Context(), id, false))
	check(t, b.unregisterVM(t.Context(), id, false)) // is done
	for range 2 {
		got, err := b.registerVM("ds-1", "copy", "web-2")
		check(t, err)
		if m, err := b.machine("web-2"); err != nil || got != id || m.id != id {
			t.Errorf("registered %s, machine %v, %v", got, m, err)
		}
	}

	// The folder is put in place of another VM's.
	other := b.create(t, "other", keysafe.Ref{})
	check(t, os.RemoveAll(filepath.Join(b.root, "copy")))
	check(t, os.Rename(filepath.Join(b.root, "other"), filepath.Join(b.root, "copy")))
	_, err := b.takeOffline(t.Context(), id, "a test")
	wantKind(t, "a folder with another VM", err, errs.InvalidState)
	for _, vm := range b.describeAll(t.Context()) {
		if vm.GetCryptoState() != "locked" || vm.GetLockReason() == "" || vm.GetId() != id && vm.GetId() != other {
			t.Errorf("it is told as %v", vm)
		}
	}
	check(t, b.unregisterVM(t.Context(), other, true)) // its folder is gone: forgotten
	check(t, b.unregisterVM(t.Context(), id, true))    // it is another's: left alone
	if got := list(t, b.root); !slices.Contains(got, "copy") {
		t.Errorf("there is %v", got)
	}
}
