package host

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/nbd"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
	"strongroom/internal/machine/volumeproc"
	"strongroom/test/reflink"
)

// live is a VM of a bench whose volume process runs, with a guest that counts: each
// number is written to disk-0 and, when that is done, to disk-1.
type live struct {
	*bench
	m       *machine
	run     *running
	written atomic.Uint64 // the last number that both disks have
	stop    chan struct{}
	done    chan error
	ended   bool
}

// datastore makes root the bench's datastore.
func (b *bench) datastore(t testing.TB, root string) {
	t.Helper()
	b.root = root
	check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: root}}))
}

// start starts the volume process of a VM with two disks, and its guest.
func (b *bench) startLive(t *testing.T, id string) *live {
	t.Helper()
	m, err := b.machine(id)
	check(t, err)
	reg, _ := m.state()
	_, process, err := b.startVolumes(t.Context(), reg, filepath.Join(b.root, reg.Folder))
	check(t, err)
	l := &live{bench: b, m: m, run: &running{volumes: process}, stop: make(chan struct{}), done: make(chan error, 1)}
	m.setRunning(l.run)
	var disks [2]*nbd.Client
	for i, name := range []string{"disk-0", "disk-1"} {
		disks[i], err = nbd.Dial(t.Context(), "unix", volumeproc.NBDSocket(b.runDir(reg)), name)
		check(t, err)
	}
	go func() {
		l.done <- l.count(disks)
		for _, d := range disks {
			d.Close()
		}
	}()
	t.Cleanup(func() { l.powerOff(t) })
	return l
}

func (l *live) count(disks [2]*nbd.Client) error {
	for n := uint64(1); ; n++ {
		select {
		case <-l.stop:
			return nil
		default:
		}
		var sector [512]byte
		binary.BigEndian.PutUint64(sector[:], n)
		for _, d := range disks {
			if _, err := d.WriteAt(sector[:], 4096); err != nil {
				return err
			}
		}
		l.written.Store(n)
	}
}

// goesOn waits until the guest has written some more.
func (l *live) goesOn(t *testing.T) {
	t.Helper()
	from := l.written.Load()
	for deadline := time.Now().Add(time.Minute); l.written.Load() < from+10; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not go on from %d", from)
		}
	}
}

// powerOff ends the guest, which must have had no errors.
func (l *live) powerOff(t *testing.T) {
	t.Helper()
	if l.ended {
		return
	}
	l.ended = true
	close(l.stop)
	check(t, <-l.done)
	check(t, errors.Join(l.run.volumes.Stop(context.Background()), l.run.volumes.Close()))
	l.m.setRunning(nil)
}

// counted checks that two disks of a VM are of one moment, not before a number was
// written.
func (b *bench) counted(t *testing.T, id string, before uint64) {
	t.Helper()
	var n [2]uint64
	for i, disk := range []string{"disk-0", "disk-1"} {
		n[i] = binary.BigEndian.Uint64(b.content(t, id, disk, 4096+512)[4096:])
	}
	if n[1] < before || n[0] != n[1] && n[0] != n[1]+1 {
		t.Errorf("the disks have come to %d and %d, and both had %d before: that was at no one moment", n[0], n[1], before)
	}
}

// TestSnapshotsRunning: of a VM that runs, a snapshot is of one moment, and its
// guest only waits.
func TestSnapshotsRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.datastore(t, reflink.Dir(t))
	ctx := t.Context()
	id := b.create(t, "web-1", b.newRef(t))
	l := b.startLive(t, id)
	dir := filepath.Join(b.root, "web-1")
	before := map[string]uint64{}
	snapshot := func(name string) string {
		t.Helper()
		l.goesOn(t)
		before[name] = l.written.Load()
		return b.snapshot(t, id, name)
	}
	first := snapshot("first")

	// What an agent that was killed has left, at any step: unfinished copies, and
	// whole ones that vm.json does not name.
	req := snapshotRequest(id, "second")
	left := func() {
		t.Helper()
		for _, file := range []string{bundle.SnapshotFile(req.GetSnapshotId(), "disk-0", bundle.FormatRaw), bundle.SnapshotFile(req.GetSnapshotId(), "disk-1", bundle.FormatLUKS)} {
			check(t, os.WriteFile(filepath.Join(dir, file), []byte("of another moment"), 0o600))
			check(t, os.WriteFile(filepath.Join(dir, file+recrypt.Unfinished), []byte("a part"), 0o600))
		}
	}
	left()
	reg, _ := l.m.state()
	check(t, b.settle(ctx, reg, l.run.process()))            // by the next agent
	check(t, b.deleteSnapshot(ctx, id, req.GetSnapshotId())) // undone
	if got := b.files(t, "web-1"); len(got) != 4 {
		t.Errorf("undone, it left %v", got)
	}
	left()
	l.goesOn(t)
	before["second"] = l.written.Load()
	check(t, b.createSnapshot(ctx, req, quiet))
	check(t, b.createSnapshot(ctx, req, quiet)) // repeated
	l.goesOn(t)
	vm := b.folderOf(t, id)
	if len(vm.Snapshots) != 2 || vm.Snapshots[1].Parent != first || vm.Snapshot != req.GetSnapshotId() || hasStrays(dir, vm) || len(b.files(t, "web-1")) != 6 {
		t.Errorf("with two snapshots there is %v, and the VM is %+v", b.files(t, "web-1"), vm)
	}

	rename := &strongroomv1.AgentRenameSnapshotRequest{Id: id, SnapshotId: first, Snapshot: "earliest", Description: "renamed"}
	for range 2 { // repeated, it does nothing
		check(t, b.renameSnapshot(ctx, rename))
	}
	rename.SnapshotId = req.GetSnapshotId()
	wantKind(t, "a name that is taken", b.renameSnapshot(ctx, rename), errs.Exists)
	rename.Snapshot = "../x"
	wantKind(t, "a name that leads out", b.renameSnapshot(ctx, rename), errs.Invalid)
	rename.SnapshotId = uuid.NewString()
	wantKind(t, "an unknown snapshot", b.renameSnapshot(ctx, rename), errs.NotFound)
	if s := b.folderOf(t, id).Snapshots; s[0].Name != "earliest" || s[0].Description != "renamed" || s[1].Name != "second" {
		t.Errorf("renamed, the snapshots are %+v", s)
	}

	// Stopped, it leaves nothing.
	canceled, cancel := context.WithCancelCause(ctx)
	reason := errors.New("no longer wanted")
	err := b.createSnapshot(canceled, snapshotRequest(id, "third"), func(string, int64, int64, string) { cancel(reason) })
	if !errors.Is(err, reason) && !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if got := b.files(t, "web-1"); len(got) != 6 {
		t.Errorf("canceled, it left %v", got)
	}

	// A shallow rekey leaves nothing under the old KEK; what would change DEKs is
	// refused, and so is a revert.
	next := b.newRef(t)
	check(t, b.rekeyVM(ctx, id, nil, next, depth{}, quiet))
	for _, file := range []string{vm.Disks[1].File, vm.Snapshots[0].Disks[1].File, vm.Snapshots[1].Disks[1].File} {
		safes, _, err := peek(filepath.Join(dir, file))
		check(t, err)
		if safes.Current.KEK != next {
			t.Errorf("%s is under %v", file, safes.Current.KEK)
		}
	}
	for name, err := range map[string]error{
		"a revert":     b.revertToSnapshot(ctx, id, first, uuid.NewString(), quiet),
		"a deep rekey": b.rekeyVM(ctx, id, nil, next, depth{deep: true}, quiet),
		"a decryption": b.decryptVM(ctx, id, nil, 0, quiet),
	} {
		wantKind(t, name, err, errs.InvalidState)
	}
	// Also when it was made after the operation looked for one.
	_, err = (&liveRekey{h: b.Host, m: l.m, running: l.run, disk: "disk-1", path: filepath.Join(dir, vm.Disks[1].File), ref: b.newRef(t)}).begin(ctx, false)
	wantKind(t, "a deep rekey that comes to its next disk", err, errs.InvalidState)
	_, err = b.beginConversion(ctx, l.m, l.run, dir, vm.Disks[0], conversion{format: bundle.FormatLUKS, ref: next})
	wantKind(t, "an encryption that comes to its next disk", err, errs.InvalidState)

	l.goesOn(t)
	l.powerOff(t)
	b.revertTo(t, id, first)
	b.counted(t, id, before["first"])
	b.revertTo(t, id, req.GetSnapshotId())
	b.counted(t, id, before["second"])
}

// TestSnapshotsRunningRefused: the VM runs on, and its folder is as it was.
func TestSnapshotsRunningRefused(t *testing.T) {
	t.Parallel()
	// No reflinks on a tmpfs.
	root, err := os.MkdirTemp("/dev/shm", "strongroom-test-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(root) })
	b := newBench(t)
	b.datastore(t, root)
	ctx := t.Context()
	create := request("web-1", b.newRef(t))
	create.Disks[1].SizeBytes = 32 << 20 // some zones
	check(t, b.createVM(ctx, create, quiet))
	id := create.GetId()
	l := b.startLive(t, id)
	before := b.files(t, "web-1")
	err = b.createSnapshot(ctx, snapshotRequest(id, "first"), quiet)
	wantKind(t, "without reflinks", err, errs.InvalidState)
	if errs.HintOf(err) == "" {
		t.Error("without reflinks there is no hint")
	}
	clone := cloneRequest("web-2", id, b.newRef(t))
	wantKind(t, "a clone without reflinks", b.cloneVM(ctx, clone, quiet), errs.InvalidState)
	l.goesOn(t)

	process := l.run.process()
	next := b.newRef(t)
	safes, info, err := peek(filepath.Join(root, "web-1", "disk-1.luks"))
	check(t, err)
	dek, safe, err := recrypt.NextDEK(ctx, info.UUID, safes, next, b.kek)
	check(t, err)
	defer dek.Close()
	check(t, process.Rekey(ctx, "disk-1", dek, safe, 1)) // for ever
	for deadline := time.Now().Add(time.Minute); safes.Next == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the rekey does not begin")
		}
		if now, _, err := peek(filepath.Join(root, "web-1", "disk-1.luks")); err == nil { // it is being written
			safes = now
		}
	}
	for what, err := range map[string]error{
		"a snapshot": b.createSnapshot(ctx, snapshotRequest(id, "first"), quiet),
		"a clone":    b.cloneVM(ctx, clone, quiet),
	} {
		if errs.ReasonOf(err) != strongroomv1.ReasonRekeyInProgress {
			t.Errorf("%s while a deep rekey is under way: %v", what, err)
		}
	}
	check(t, process.StopRekey(ctx, "disk-1"))

	l.powerOff(t)
	l.m.setRunning(l.run)
	if err := b.createSnapshot(ctx, snapshotRequest(id, "first"), quiet); err == nil {
		t.Error("a snapshot was made without a volume process")
	}
	l.m.setRunning(nil)
	if got := b.files(t, "web-1"); !slices.Equal(got, before) || len(b.folderOf(t, id).Snapshots) > 0 {
		t.Errorf("the folder holds %v, want %v", got, before)
	}
	if got := list(t, root); !slices.Equal(got, []string{"web-1"}) {
		t.Errorf("the datastore has %v", got)
	}
}

// TestCloneRunning: a clone of a VM that runs is of one moment, on any datastore,
// with the keys of the original or its own, and leaves nothing else.
func TestCloneRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.root = reflink.Dir(t)
	elsewhere := t.TempDir()
	check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}, {Name: "ds-2", Type: "dir", Path: elsewhere}}))
	ctx := t.Context()
	id := b.create(t, "web-1", b.newRef(t))
	l := b.startLive(t, id)
	for _, c := range []struct {
		name, datastore string
		recrypt         bool
	}{{"web-2", "ds-1", false}, {"web-3", "ds-1", true}, {"web-4", "ds-2", false}} {
		l.goesOn(t)
		before := l.written.Load()
		req := cloneRequest(c.name, id, b.newRef(t))
		req.Datastore, req.Recrypt = c.datastore, c.recrypt
		left := filepath.Join(b.root, cloning(req.GetId())) // of a call that was killed
		check(t, os.Mkdir(left, 0o700))
		check(t, os.WriteFile(filepath.Join(left, "disk-0.raw"), []byte("of another moment"), 0o600))
		check(t, b.cloneVM(ctx, req, quiet))
		l.goesOn(t)
		b.counted(t, req.GetId(), before)
	}

	// Canceled, and deleted after the agent was killed, it leaves nothing.
	want := list(t, b.root)
	req := cloneRequest("web-5", id, b.newRef(t))
	canceled, cancel := context.WithCancel(ctx)
	if err := b.cloneVM(canceled, req, func(string, int64, int64, string) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if got := list(t, b.root); !slices.Equal(got, want) {
		t.Errorf("canceled, it left %v", got)
	}
	check(t, os.Mkdir(filepath.Join(b.root, cloning(req.GetId())), 0o700))
	check(t, b.unregisterVM(ctx, req.GetId(), true))
	if got := list(t, b.root); !slices.Equal(got, want) {
		t.Errorf("deleted, it left %v", got)
	}
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw", "disk-1.luks"}) {
		t.Errorf("the original has %v", got)
	}
	l.goesOn(t)
}
