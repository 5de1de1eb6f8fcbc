package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/test/reflink"
)

func snapshotRequest(vm, name string) *strongroomv1.AgentCreateSnapshotRequest {
	return &strongroomv1.AgentCreateSnapshotRequest{Id: vm, SnapshotId: uuid.NewString(), Snapshot: name, Description: "of a test"}
}

// snapshot makes a snapshot and returns its id.
func (b *bench) snapshot(t testing.TB, vm, name string) string {
	t.Helper()
	req := snapshotRequest(vm, name)
	check(t, b.createSnapshot(t.Context(), req, quiet))
	return req.GetSnapshotId()
}

func (b *bench) revertTo(t testing.TB, vm, snapshot string) {
	t.Helper()
	check(t, b.revertToSnapshot(t.Context(), vm, snapshot, uuid.NewString(), quiet))
}

// described returns what the host says of a VM.
func (b *bench) described(t testing.TB, id string) *strongroomv1.VM {
	t.Helper()
	m, err := b.machine(id)
	check(t, err)
	vm, err := b.describe(t.Context(), m)
	check(t, err)
	return vm
}

// fillDisks writes text to the plain and the encrypted disk of a VM.
func (b *bench) fillBoth(t testing.TB, id, text string) {
	t.Helper()
	vm := b.folderOf(t, id)
	content := bytes.Repeat([]byte(text), 1<<10)
	b.write(t, vm.Name, vm.Disks[0].File, content)
	b.writeVolume(t, id, vm.Disks[1].File, content)
}

// hold checks what the disks of a VM hold.
func (b *bench) hold(t testing.TB, step, id, text string) {
	t.Helper()
	want := bytes.Repeat([]byte(text), 1<<10)
	for _, disk := range []string{"disk-0", "disk-1"} {
		if got := b.content(t, id, disk, len(want)); !bytes.Equal(got, want) {
			t.Errorf("%s: %s begins with %q, want %q", step, disk, got[:16], want[:16])
		}
	}
}

func (b *bench) folderOf(t testing.TB, id string) *bundle.VM {
	t.Helper()
	m, err := b.machine(id)
	check(t, err)
	reg, _ := m.state()
	vm, err := bundle.Read(filepath.Join(b.root, reg.Folder))
	check(t, err)
	return vm
}

// kills runs do to its end and returns copies of a VM's folder as they would be
// if it had been killed when it told of its progress: at the beginning and in the
// midst of each step.
func (b *bench) kills(t testing.TB, vm string, do func(report) error) []string {
	t.Helper()
	var states []string
	calls := map[string]int{}
	check(t, do(func(step string, _, _ int64, _ string) {
		if calls[step]++; calls[step] > 2 {
			return
		}
		state := filepath.Join(t.TempDir(), vm)
		if err := os.CopyFS(state, os.DirFS(filepath.Join(b.root, vm))); err != nil {
			t.Error(err)
		}
		states = append(states, state)
	}))
	if len(states) == 0 {
		t.Fatal("it told of no progress")
	}
	return states
}

// restore makes a VM's folder what [bench.kills] returned.
func (b *bench) restore(t testing.TB, vm, state string) {
	t.Helper()
	dir := filepath.Join(b.root, vm)
	check(t, os.RemoveAll(dir))
	check(t, os.CopyFS(dir, os.DirFS(state)))
}

// TestSnapshots goes there and back on file systems with and without reflinks.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"copied", "reflinked"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			if where == "reflinked" {
				b.root = reflink.Dir(t)
				check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}}))
			}
			ctx := t.Context()
			id := b.create(t, "web-1", b.newRef(t))
			b.fillBoth(t, id, "as it was first ")
			before := b.folderOf(t, id)
			dek, owner := b.dek(t, filepath.Join(b.root, "web-1", before.Disks[1].File))

			req := snapshotRequest(id, "first")
			steps := map[string]bool{}
			check(t, b.createSnapshot(ctx, req, func(step string, done, total int64, unit string) {
				steps[step] = true
				if done < 0 || done > total || unit != unitBytes {
					t.Errorf("%s: %d of %d %s", step, done, total, unit)
				}
			}))
			if !steps["copying disk-0"] || !steps["copying disk-1"] {
				t.Errorf("progress of %v", steps)
			}
			first := req.GetSnapshotId()
			check(t, b.createSnapshot(ctx, req, quiet)) // repeated
			if got := b.folderOf(t, id); len(got.Snapshots) != 1 || !slices.Equal(got.Disks, before.Disks) || got.Snapshot != first {
				t.Errorf("with a snapshot the VM is %+v", got)
			}
			kept, keptOwner := b.dek(t, filepath.Join(b.root, "web-1", bundle.SnapshotFile(first, "disk-1", bundle.FormatLUKS)))
			if !bytes.Equal(kept, dek) || keptOwner != owner {
				t.Error("the snapshot of a disk is another disk")
			}

			b.fillBoth(t, id, "later, and grown ")
			check(t, b.resizeDisk(ctx, id, "disk-0", 2<<20))
			check(t, b.resizeDisk(ctx, id, "disk-1", 2<<20))
			grown := b.folderOf(t, id)
			grown.Settings.CPUs = 3
			check(t, bundle.Write(filepath.Join(b.root, "web-1"), grown))
			second := b.snapshot(t, id, "second")

			revert := uuid.NewString()
			for range 2 { // repeated, it does nothing
				check(t, b.revertToSnapshot(ctx, id, first, revert, quiet))
				b.hold(t, "first", id, "as it was first ")
				b.fillBoth(t, id, "as it was first ")
			}
			now := b.folderOf(t, id)
			if now.Settings != before.Settings || now.Disks[0].SizeBytes != 1<<20 || now.Disks[1].SizeBytes != 1<<20 || now.Snapshot != first || *now.Key != *before.Key {
				t.Errorf("reverted, the VM is %+v", now)
			}
			b.fillBoth(t, id, "a second branch ")
			third := b.snapshot(t, id, "third")

			vm := b.described(t, id)
			var tree []string
			for _, s := range vm.GetSnapshots() {
				tree = append(tree, s.GetName()+" of "+s.GetParent())
				if s.GetLockReason() != "" || s.GetDescription() != "of a test" || len(s.GetDisks()) != 2 || s.GetDisks()[1].GetKey().GetKeyId() != before.Key.KeyID {
					t.Errorf("snapshot %v", s)
				}
			}
			if !slices.Equal(tree, []string{"first of ", "second of " + first, "third of " + first}) || vm.GetCurrentSnapshot() != third || vm.GetConsolidationNeeded() {
				t.Errorf("the tree is %q, current %s", tree, vm.GetCurrentSnapshot())
			}
			b.revertTo(t, id, second)
			b.hold(t, "second", id, "later, and grown ")
			if vm := b.described(t, id); vm.GetDisks()[0].GetSizeBytes() != 2<<20 || vm.GetDisks()[1].GetSizeBytes() != 2<<20 || vm.GetSettings().GetCpus() != 3 || vm.GetCryptoState() != "unlocked" {
				t.Errorf("reverted to the second: %v", vm)
			}

			// Without the root: neither the disks nor other snapshots need it.
			for range 2 {
				check(t, b.deleteSnapshot(ctx, id, first))
			}
			if vm := b.described(t, id); len(vm.GetSnapshots()) != 2 || vm.GetSnapshots()[0].GetParent() != "" || vm.GetSnapshots()[1].GetParent() != "" {
				t.Errorf("without the root: %v", vm.GetSnapshots())
			}
			b.hold(t, "second, without the first", id, "later, and grown ")
			b.revertTo(t, id, third)
			b.hold(t, "third", id, "a second branch ")
			check(t, b.deleteSnapshot(ctx, id, third))
			check(t, b.deleteSnapshot(ctx, id, second))
			now = b.folderOf(t, id)
			if got := b.files(t, "web-1"); len(got) != 2 || !slices.Equal(got, []string{now.Disks[0].File, now.Disks[1].File}) || now.Snapshot != "" || len(now.Retired) > 0 {
				t.Errorf("without snapshots the folder holds %v, and the VM is %+v", got, now)
			}
			b.hold(t, "without snapshots", id, "a second branch ")

			// From here on it is any VM again.
			check(t, b.rekeyVM(ctx, id, nil, b.newRef(t), depth{deep: true}, quiet))
			check(t, b.decryptVM(ctx, id, nil, 0, quiet))
			b.hold(t, "decrypted", id, "a second branch ")
			b.snapshot(t, id, "last")
			check(t, b.unregisterVM(ctx, id, true))
			if got := list(t, b.root); len(got) > 0 {
				t.Errorf("after the deletion there is %v", got)
			}
		})
	}
}

// TestSnapshotsRekey: a shallow rekey leaves nothing under the old KEK, and what
// would need other DEKs is refused.
func TestSnapshotsRekey(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	old := b.newRef(t)
	id := b.create(t, "web-1", old)
	b.fillBoth(t, id, "in the snapshot ")
	first := b.snapshot(t, id, "first")
	second := b.snapshot(t, id, "second")
	b.fillBoth(t, id, "after that all. ")
	safes := func() []keysafe.Ref {
		var refs []keysafe.Ref
		vm := b.folderOf(t, id)
		for _, file := range []string{vm.Disks[1].File, vm.Snapshots[0].Disks[1].File, vm.Snapshots[1].Disks[1].File} {
			safes, _, err := peek(filepath.Join(b.root, "web-1", file))
			check(t, err)
			refs = append(refs, safes.Current.KEK)
		}
		return refs
	}

	// Killed between two of them: each opens with its own KEK, and the same call
	// ends it.
	next := b.newRef(t)
	kills := b.kills(t, "web-1", func(r report) error {
		return b.rekeyVM(ctx, id, nil, next, depth{}, func(step string, done, total int64, unit string) {
			if total != 3 || unit != unitItems {
				t.Errorf("progress %d of %d %s", done, total, unit)
			}
			r(step, done, total, unit)
		})
	})
	if len(kills) != 3 {
		t.Fatalf("there are %d steps", len(kills))
	}
	b.restore(t, "web-1", kills[1])
	if got := safes(); !slices.Equal(got, []keysafe.Ref{old, next, old}) {
		t.Errorf("killed, the key safes are under %v", got)
	}
	var keys []string
	vm := b.described(t, id)
	for _, s := range vm.GetSnapshots() {
		keys = append(keys, s.GetDisks()[1].GetKey().GetKeyId())
	}
	if !slices.Equal(keys, []string{next.KeyID, old.KeyID}) || vm.GetKey().GetKeyId() != old.KeyID {
		t.Errorf("the host tells of %v and %v", keys, vm.GetKey())
	}
	check(t, b.rekeyVM(ctx, id, nil, next, depth{}, quiet))
	if got := safes(); !slices.Equal(got, []keysafe.Ref{next, next, next}) {
		t.Errorf("rekeyed, the key safes are under %v", got)
	}
	for _, snapshot := range []string{first, second} {
		b.revertTo(t, id, snapshot)
		b.hold(t, "rekeyed and reverted", id, "in the snapshot ")
		if vm := b.folderOf(t, id); vm.Key.Ref() != next {
			t.Errorf("reverted, the VM's key is %v", vm.Key)
		}
	}
	other := b.newRef(t)
	check(t, b.rekeyVM(ctx, id, []string{"disk-1"}, other, depth{}, quiet))
	if got := safes(); !slices.Equal(got, []keysafe.Ref{other, other, other}) {
		t.Errorf("after the rekey of one disk the key safes are under %v", got)
	}

	before := b.folderOf(t, id)
	for name, do := range map[string]func() error{
		"deep rekey": func() error { return b.rekeyVM(ctx, id, nil, b.newRef(t), depth{deep: true}, quiet) },
		"encrypt":    func() error { return b.encryptVM(ctx, id, nil, b.newRef(t), 0, quiet) },
		"decrypt":    func() error { return b.decryptVM(ctx, id, nil, 0, quiet) },
	} {
		err := do()
		wantKind(t, name, err, errs.InvalidState)
		if errs.ReasonOf(err) != strongroomv1.ReasonHasSnapshots || errs.HintOf(err) == "" {
			t.Errorf("%s: reason %q, hint %q", name, errs.ReasonOf(err), errs.HintOf(err))
		}
	}
	if diff := cmp.Diff(before, b.folderOf(t, id)); diff != "" {
		t.Error(diff)
	}

	// A clone is the VM as it is now.
	req := cloneRequest("web-2", id, b.newRef(t))
	check(t, b.cloneVM(ctx, req, quiet))
	b.hold(t, "clone", req.GetId(), "in the snapshot ")
	if clone := b.described(t, req.GetId()); len(clone.GetSnapshots()) > 0 || clone.GetCurrentSnapshot() != "" {
		t.Errorf("the clone has snapshots: %v", clone)
	}
}

// TestSnapshotsElsewhere: a folder with snapshots is registered on a host without
// its keys, and tells what each needs.
func TestSnapshotsElsewhere(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", b.newRef(t))
	first := b.snapshot(t, id, "first")
	check(t, b.unregisterVM(t.Context(), id, false))
	other := newBench(t)
	check(t, other.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}}))
	check(t, other.syncProviders(nil)) // without kp-1
	_, err := other.registerVM("ds-1", "web-1", "")
	check(t, err)
	vm := other.described(t, id)
	if vm.GetCryptoState() != "locked" || len(vm.GetSnapshots()) != 1 || vm.GetSnapshots()[0].GetLockReason() == "" || vm.GetSnapshots()[0].GetDisks()[1].GetKey() == nil {
		t.Errorf("without its provider: %v", vm)
	}
	wantKind(t, "a revert without the key", other.revertToSnapshot(t.Context(), id, first, uuid.NewString(), quiet), errs.Locked)
	wantKind(t, "a snapshot without the key", other.createSnapshot(t.Context(), snapshotRequest(id, "second"), quiet), errs.Locked)
	check(t, other.deleteSnapshot(t.Context(), id, first)) // needs none
	if got := list(t, filepath.Join(b.root, "web-1")); !slices.Equal(got, []string{".lock", "disk-0.raw", "disk-1.luks", bundle.FileName}) {
		t.Errorf("the folder holds %v", got)
	}
}

// TestSnapshotsInterrupted cuts creation, revert and deletion off at each of their
// steps, as the files tell: the VM is usable at once, and the same call ends it.
func TestSnapshotsInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	id := b.create(t, "web-1", b.newRef(t))
	dir := filepath.Join(b.root, "web-1")
	b.fillBoth(t, id, "in the snapshot ")

	// Stopped, it leaves nothing.
	before := b.files(t, "web-1")
	reason := errors.New("no longer wanted")
	for _, at := range []string{"copying disk-0", "copying disk-1"} {
		ctx, cancel := context.WithCancelCause(ctx)
		err := b.createSnapshot(ctx, snapshotRequest(id, "first"), func(step string, _, _ int64, _ string) {
			if step == at {
				cancel(reason)
			}
		})
		if !errors.Is(err, reason) {
			t.Errorf("canceled %s: %v", at, err)
		}
		if got := b.files(t, "web-1"); !slices.Equal(got, before) {
			t.Errorf("canceled %s, it left %v", at, got)
		}
	}

	// Killed at each step that it tells of, and repeated.
	req := snapshotRequest(id, "first")
	first := req.GetSnapshotId()
	for n, kill := range b.kills(t, "web-1", func(r report) error { return b.createSnapshot(ctx, req, r) }) {
		b.restore(t, "web-1", kill)
		b.hold(t, fmt.Sprintf("killed at step %d", n), id, "in the snapshot ")
		check(t, b.createSnapshot(ctx, req, quiet))
		if vm := b.folderOf(t, id); len(vm.Snapshots) != 1 || hasStrays(dir, vm) || len(b.files(t, "web-1")) != 4 {
			t.Errorf("killed at step %d and repeated, there is %v", n, b.files(t, "web-1"))
		}
		// Undone instead: nothing is left.
		b.restore(t, "web-1", kill)
		check(t, b.deleteSnapshot(ctx, id, first))
		if got := b.files(t, "web-1"); !slices.Equal(got, before) {
			t.Errorf("killed at step %d and undone, it left %v", n, got)
		}
	}
	check(t, b.createSnapshot(ctx, req, quiet))
	b.fillBoth(t, id, "after that all. ")
	revert := uuid.NewString()
	for n, kill := range b.kills(t, "web-1", func(r report) error { return b.revertToSnapshot(ctx, id, first, revert, r) }) {
		b.restore(t, "web-1", kill)
		b.hold(t, fmt.Sprintf("killed at step %d", n), id, "after that all. ")
		check(t, b.revertToSnapshot(ctx, id, first, revert, quiet))
		b.hold(t, "reverted", id, "in the snapshot ")
		if vm := b.folderOf(t, id); len(vm.Retired) > 0 || hasStrays(dir, vm) || len(b.files(t, "web-1")) != 4 {
			t.Errorf("killed at step %d and repeated, it left %v", n, b.files(t, "web-1"))
		}
	}

	// Killed when vm.json had been written: the former files go with what comes
	// next, and the call that is repeated does nothing more.
	vm := b.folderOf(t, id)
	stale := filepath.Join(dir, "disk-1.luks")
	content, err := os.ReadFile(filepath.Join(dir, vm.Disks[1].File))
	check(t, err)
	check(t, os.WriteFile(stale, content, 0o600))
	vm.Retired = []string{"disk-1.luks"}
	check(t, bundle.Write(dir, vm))
	b.hold(t, "retired", id, "in the snapshot ")
	if _, err := os.Stat(stale); err == nil {
		t.Error("the former file is still there")
	}
	// The same for a deletion.
	vm = b.folderOf(t, id)
	dropped := vm.Clone()
	dropped.DropSnapshot(first)
	check(t, bundle.Write(dir, dropped))
	check(t, b.deleteSnapshot(ctx, id, first))
	if got := b.files(t, "web-1"); len(got) != 2 {
		t.Errorf("after the deletion the folder holds %v", got)
	}
}

// TestConsolidate: what no operation comes back for is told, and deleted when that
// is asked for, and nothing else.
func TestConsolidate(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", b.newRef(t))
	b.fillBoth(t, id, "in the snapshot ")
	first := b.snapshot(t, id, "first")
	want := append(b.files(t, "web-1"), "notes.txt")
	slices.Sort(want)
	stranded := uuid.NewString()
	for _, file := range []string{
		bundle.SnapshotFile(stranded, "disk-0", bundle.FormatRaw), bundle.SnapshotFile(uuid.NewString(), "disk-1", bundle.FormatLUKS),
		bundle.RevertedFile(uuid.NewString(), "disk-0", bundle.FormatRaw), "notes.txt",
	} {
		check(t, os.WriteFile(filepath.Join(b.root, "web-1", file), nil, 0o600))
	}
	if !b.described(t, id).GetConsolidationNeeded() {
		t.Error("it is not told")
	}
	check(t, b.deleteSnapshot(t.Context(), id, stranded)) // undone: its own only
	if got := b.files(t, "web-1"); len(got) != len(want)+2 {
		t.Errorf("the folder holds %v", got)
	}
	o, err := b.takeOffline(t.Context(), id, "a test")
	check(t, err)
	if b.described(t, id).GetConsolidationNeeded() {
		t.Error("it is told while an operation is under way")
	}
	o.release()
	for range 2 {
		check(t, b.consolidateSnapshots(t.Context(), id))
	}
	if got := b.files(t, "web-1"); !slices.Equal(got, want) {
		t.Errorf("the folder holds %v, want %v", got, want)
	}
	if b.described(t, id).GetConsolidationNeeded() {
		t.Error("it is still told")
	}
	b.revertTo(t, id, first)
	b.hold(t, "reverted", id, "in the snapshot ")
}

// TestSnapshotsRefused: what cannot be done leaves all as it was.
func TestSnapshotsRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	id := b.create(t, "web-1", b.newRef(t))
	first := b.snapshot(t, id, "first")
	on := b.create(t, "on", keysafe.Ref{})
	onSnapshot := b.snapshot(t, on, "first")
	m, err := b.machine(on)
	check(t, err)
	check(t, bundle.Write(filepath.Join(b.root, "on"), b.folderOf(t, on)))
	m.setRunning(&running{})
	defer m.setRunning(nil)
	before, files := b.folderOf(t, id), b.files(t, "web-1")
	create := func(change func(*strongroomv1.AgentCreateSnapshotRequest)) error {
		req := snapshotRequest(id, "second")
		change(req)
		return b.createSnapshot(ctx, req, quiet)
	}
	for name, c := range map[string]struct {
		err  error
		kind errs.Kind
	}{
		"one without its disks": {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.Id = on }), errs.Unavailable},
		"an unknown VM":         {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.Id = uuid.NewString() }), errs.NotFound},
		"a name that is taken":  {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.Snapshot = "first" }), errs.Exists},
		"no name":               {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.Snapshot = "" }), errs.Invalid},
		"an id that leads out":  {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.SnapshotId = "../x" }), errs.Invalid},
		"a hidden description":  {create(func(r *strongroomv1.AgentCreateSnapshotRequest) { r.Description = "\x1b[2J" }), errs.Invalid},
		"a revert that runs":    {b.revertToSnapshot(ctx, on, onSnapshot, uuid.NewString(), quiet), errs.InvalidState},
		"an unknown snapshot":   {b.revertToSnapshot(ctx, id, uuid.NewString(), uuid.NewString(), quiet), errs.NotFound},
		"a revert that leads":   {b.revertToSnapshot(ctx, id, first, "../x", quiet), errs.Invalid},
		"a deletion that leads": {b.deleteSnapshot(ctx, id, "*"), errs.Invalid},
	} {
		wantKind(t, name, c.err, c.kind)
	}
	if diff := cmp.Diff(before, b.folderOf(t, id)); diff != "" || !slices.Equal(b.files(t, "web-1"), files) {
		t.Errorf("the folder holds %v, and vm.json has changed:\n%s", b.files(t, "web-1"), diff)
	}

	// A VM that runs gets rid of snapshots.
	check(t, b.deleteSnapshot(ctx, on, onSnapshot))
	if got := b.files(t, "on"); !slices.Equal(got, []string{"disk-0.raw"}) {
		t.Errorf("the folder of the VM that runs holds %v", got)
	}
	// No revert to a snapshot that is damaged, nor is it in the way of anything else.
	file := filepath.Join(b.root, "web-1", bundle.SnapshotFile(first, "disk-1", bundle.FormatLUKS))
	check(t, os.WriteFile(file, []byte("damaged"), 0o600))
	if err := b.revertToSnapshot(ctx, id, first, uuid.NewString(), quiet); err == nil {
		t.Error("the VM was reverted to a damaged snapshot")
	}
	if diff := cmp.Diff(before, b.folderOf(t, id)); diff != "" || !slices.Equal(b.files(t, "web-1"), files) {
		t.Errorf("the folder holds %v, and vm.json has changed:\n%s", b.files(t, "web-1"), diff)
	}
	if vm := b.described(t, id); vm.GetCryptoState() != "unlocked" || vm.GetSnapshots()[0].GetLockReason() == "" {
		t.Errorf("with a damaged snapshot: %v", vm)
	}
	check(t, b.deleteSnapshot(ctx, id, first))
}
