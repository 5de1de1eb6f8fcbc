package volumed_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"strongroom/internal/block/vhostuser/vhostusertest"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/errs"
	"strongroom/internal/machine/volumeproc"
)

func dialVhost(t *testing.T, dir, disk string, opts vhostusertest.Options) *vhostusertest.Frontend {
	t.Helper()
	opts.Timeout = time.Minute
	f, err := vhostusertest.Dial(volumeproc.VhostSocket(dir, disk), opts)
	check(t, err)
	t.Cleanup(f.Close)
	return f
}

// do does one request on the first queue and checks its status.
func do(t *testing.T, f *vhostusertest.Frontend, op uint32, sector uint64, p []byte, want byte) {
	t.Helper()
	status, err := f.Queues[0].Do(op, sector, p)
	check(t, err)
	if status != want {
		t.Errorf("request %d at sector %d has status %d, want %d", op, sector, status, want)
	}
}

// TestVhostUser serves disks over vhost-user beside NBD: both see the same data,
// the guest sees the disk grow, and the process may die at any time.
func TestVhostUser(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	path, dek, _, _ := newVolume(t)
	raw := filepath.Join(t.TempDir(), "disk-1.raw")
	check(t, os.WriteFile(raw, bytes.Repeat([]byte{0x77}, 1<<20), 0o600))
	serve := func() *volumeproc.Process {
		p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
		check(t, add(ctx, p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, path, dek))
		check(t, add(ctx, p, volumectl.Disk{Name: "disk-1", Format: volumectl.Raw, ReadOnly: true}, raw, nil))
		check(t, p.ServeVhostUser(ctx, "disk-0"))
		check(t, p.ServeVhostUser(ctx, "disk-1"))
		return p
	}
	p := serve()
	f := dialVhost(t, dir, "disk-0", vhostusertest.Options{Queues: 2})
	serial := make([]byte, 20)
	do(t, f, vhostusertest.GetID, 0, serial, vhostusertest.OK)
	if got := string(bytes.TrimRight(serial, "\x00")); got != "disk-0" {
		t.Errorf("serial number %q", got)
	}
	written := bytes.Repeat([]byte{0x5a}, 64<<10)
	do(t, f, vhostusertest.Write, 16, written, vhostusertest.OK)
	qemuIO(t, uri(dir, "disk-0"), "read -P 0x5a 8192 65536", "write -P 0xa5 1M 4096")
	read := make([]byte, 4096)
	do(t, f, vhostusertest.Read, 2048, read, vhostusertest.OK)
	if !bytes.Equal(read, bytes.Repeat([]byte{0xa5}, 4096)) {
		t.Error("what NBD wrote is not what vhost-user reads")
	}
	ro := dialVhost(t, dir, "disk-1", vhostusertest.Options{})
	do(t, ro, vhostusertest.Write, 0, read, vhostusertest.Failed)
	do(t, ro, vhostusertest.Read, 0, read, vhostusertest.OK)
	if read[0] != 0x77 {
		t.Error("disk-1 reads as another disk")
	}

	check(t, p.Resize(ctx, "disk-0", 2*diskSize))
	check(t, f.AwaitConfigChange())
	if size, err := f.Size(); err != nil || size != 2*diskSize {
		t.Errorf("after growing the guest is told of %d bytes, %v", size, err)
	}
	status, err := p.Status(ctx)
	check(t, err)
	if !status.Disks[0].VhostUser || !status.Disks[1].VhostUser || status.Disks[0].WrittenBytes < 64<<10 {
		t.Errorf("status %+v", status)
	}
	wantKind(t, p.ServeVhostUser(ctx, "none"), errs.NotFound)
	wantKind(t, p.ServeVhostUser(ctx, "a-name-longer-than-20-bytes"), errs.NotFound)

	check(t, p.Kill(ctx))
	p = serve()
	check(t, f.Connect(volumeproc.VhostSocket(dir, "disk-0")))
	check(t, f.Start())
	got := make([]byte, len(written))
	do(t, f, vhostusertest.Read, 16, got, vhostusertest.OK)
	if !bytes.Equal(got, written) {
		t.Error("the next process reads something else")
	}

	// Another socket takes the place of the first, and a disk that goes takes
	// its service with it.
	check(t, p.ServeVhostUser(ctx, "disk-0"))
	check(t, f.AwaitEnd())
	check(t, f.Connect(volumeproc.VhostSocket(dir, "disk-0")))
	check(t, f.Start())
	do(t, f, vhostusertest.Flush, 0, nil, vhostusertest.OK)
	check(t, p.RemoveDisk(ctx, "disk-0"))
	check(t, f.AwaitEnd())
	if status, err := p.Status(ctx); err != nil || len(status.Disks) != 1 {
		t.Errorf("status %+v, %v", status, err)
	}
	check(t, p.Stop(ctx))
}
