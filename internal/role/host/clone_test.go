package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
	"strongroom/test/reflink"
)

// cloneRequest returns one for a clone of the VM with that id.
func cloneRequest(name, source string, ref keysafe.Ref) *strongroomv1.AgentCloneVMRequest {
	req := &strongroomv1.AgentCloneVMRequest{Id: uuid.NewString(), Name: name, Datastore: "ds-1", SourceId: source}
	if !ref.IsZero() {
		req.Key = &strongroomv1.KeyRef{Provider: ref.Provider, KeyId: ref.KeyID}
	}
	return req
}

// dek returns the DEK of a VM's encrypted disk, and the volume's UUID.
func (b *bench) dek(t testing.TB, path string) ([]byte, string) {
	t.Helper()
	file, err := recrypt.Dir{Path: filepath.Dir(path)}.Open(filepath.Base(path))
	check(t, err)
	defer file.Close()
	dek, _, safes, err := recrypt.UnwrapDEKs(t.Context(), file, b.kek)
	check(t, err)
	defer dek.Close()
	return bytes.Clone(dek.Bytes()), safes.Current.Owner
}

// writeVolume writes to an encrypted disk of a VM.
func (b *bench) writeVolume(t testing.TB, id, file string, content []byte) {
	t.Helper()
	o, err := b.takeOffline(t.Context(), id, "a test")
	check(t, err)
	defer o.release()
	vol, _, err := recrypt.OpenVolume(t.Context(), o.folder(), file, b.kek)
	check(t, err)
	_, err = vol.WriteAt(content, 0)
	check(t, errors.Join(err, vol.Flush(), vol.Close()))
}

// TestClone clones a VM on file systems with and without reflinks, and to another
// datastore.
func TestClone(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"copied", "reflinked"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			roots := map[string]string{"ds-1": b.root, "ds-2": t.TempDir()}
			if where == "reflinked" {
				roots["ds-1"] = reflink.Dir(t)
			}
			b.root = roots["ds-1"]
			check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{
				{Name: "ds-1", Type: "dir", Path: roots["ds-1"]}, {Name: "ds-2", Type: "dir", Path: roots["ds-2"]},
			}))
			ref, next := b.newRef(t), b.newRef(t)
			source := b.create(t, "web-1", ref)
			want := bytes.Repeat([]byte("a guest's data. "), 1<<16)
			b.write(t, "web-1", "disk-0.raw", want)
			b.writeVolume(t, source, "disk-1.luks", want)
			original, owner := b.dek(t, filepath.Join(b.root, "web-1", "disk-1.luks"))
			check(t, os.WriteFile(filepath.Join(b.root, "web-1", bundle.LogName), []byte("booted"), 0o600))

			for _, c := range []struct {
				name, datastore string
				recrypt         bool
			}{{"web-2", "ds-1", false}, {"web-3", "ds-2", false}, {"web-4", "ds-1", true}} {
				req := cloneRequest(c.name, source, next)
				req.Datastore, req.Recrypt = c.datastore, c.recrypt
				steps := map[string]bool{}
				check(t, b.cloneVM(t.Context(), req, func(step string, done, total int64, unit string) {
					steps[step] = true
					if done < 0 || done > total || unit != unitBytes {
						t.Errorf("%s: %d of %d %s", step, done, total, unit)
					}
				}))
				if !steps["cloning disk-0"] || !steps["cloning disk-1"] {
					t.Errorf("%s: progress of %v", c.name, steps)
				}
				dir := filepath.Join(roots[c.datastore], c.name)
				if got := list(t, dir); !slices.Equal(got, []string{"disk-0.raw", "disk-1.luks", bundle.FileName}) {
					t.Errorf("%s has %v", c.name, got)
				}
				dek, cloneOwner := b.dek(t, filepath.Join(dir, "disk-1.luks"))
				if bytes.Equal(dek, original) == c.recrypt || cloneOwner == owner {
					t.Errorf("%s: a DEK of its own: %v, want %v; owner %s of %s", c.name, !bytes.Equal(dek, original), c.recrypt, cloneOwner, owner)
				}
				m, err := b.machine(req.GetId())
				check(t, err)
				vm, err := b.describe(t.Context(), m)
				check(t, err)
				if vm.GetName() != c.name || vm.GetCryptoState() != "unlocked" || vm.GetKey().GetKeyId() != next.KeyID || vm.GetDisks()[1].GetKey().GetKeyId() != next.KeyID ||
					vm.GetDisks()[1].GetGeneration() != 1 || vm.GetSettings().GetMemoryMib() != 1024 {
					t.Errorf("the clone is %v", vm)
				}
				for _, disk := range []string{"disk-0", "disk-1"} {
					if got := b.content(t, req.GetId(), disk, len(want)); !bytes.Equal(got, want) {
						t.Errorf("%s of %s does not hold what the original's holds", disk, c.name)
					}
				}
				// Each is its own from now on.
				b.writeVolume(t, req.GetId(), "disk-1.luks", []byte("of the clone"))
				if got := b.content(t, source, "disk-1", len(want)); !bytes.Equal(got, want) {
					t.Errorf("%s changed its original", c.name)
				}
			}
			check(t, b.unregisterVM(t.Context(), source, true))
			m, err := b.machine("web-2")
			check(t, err)
			if got := b.content(t, m.id, "disk-0", len(want)); !bytes.Equal(got, want) {
				t.Error("the clone's disk is gone with the original's")
			}
		})
	}
}

// TestCloneInterrupted cuts a clone short at each step; the same call ends it, and
// a deletion leaves nothing. The original is never changed.
func TestCloneInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	source := b.create(t, "web-1", b.newRef(t))
	next := b.newRef(t)
	before, err := os.ReadFile(filepath.Join(b.root, "web-1", "disk-1.luks"))
	check(t, err)
	for _, recrypt := range []bool{false, true} {
		for _, at := range []string{"cloning disk-0", "cloning disk-1"} {
			req := cloneRequest("web-2", source, next)
			req.Recrypt = recrypt
			ctx, cancel := context.WithCancelCause(t.Context())
			reason := errors.New("no longer wanted")
			err := b.cloneVM(ctx, req, func(step string, _, _ int64, _ string) {
				if step == at {
					cancel(reason)
				}
			})
			if !errors.Is(err, reason) && !errors.Is(err, context.Canceled) {
				t.Errorf("a clone that was canceled %s: %v", at, err)
			}
			if got := list(t, b.root); !slices.Equal(got, []string{"web-1"}) {
				t.Errorf("canceled %s, it left %v", at, got)
			}
		}
	}

	// Killed in the midst of the disks, and called again.
	req := cloneRequest("web-2", source, next)
	left := filepath.Join(b.root, creating(req.GetId()))
	check(t, os.Mkdir(left, 0o700))
	check(t, os.WriteFile(filepath.Join(left, "disk-0.raw"), []byte("a part"), 0o600))
	check(t, os.WriteFile(filepath.Join(left, "disk-1.luks.new"), []byte("a part"), 0o600))
	check(t, b.cloneVM(t.Context(), req, quiet))
	// Killed before it was registered, and called again when all was done: also
	// after the original was powered on or deleted.
	first, _ := b.dek(t, filepath.Join(b.root, "web-2", "disk-1.luks"))
	check(t, b.unregister(req.GetId()))
	if after, err := os.ReadFile(filepath.Join(b.root, "web-1", "disk-1.luks")); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the original has changed (error %v)", err)
	}
	check(t, b.unregisterVM(t.Context(), source, true))
	for range 2 {
		check(t, b.cloneVM(t.Context(), req, quiet))
		if m, err := b.machine("web-2"); err != nil || m.id != req.GetId() {
			t.Errorf("machine = %v, %v", m, err)
		}
	}
	if again, _ := b.dek(t, filepath.Join(b.root, "web-2", "disk-1.luks")); !bytes.Equal(again, first) {
		t.Error("a repeated call made the disk again")
	}

	// Undone, when there is all of it, a part, or nothing.
	id := uuid.NewString()
	check(t, os.MkdirAll(filepath.Join(b.root, creating(id)), 0o700))
	for _, id := range []string{req.GetId(), id, id} {
		check(t, b.unregisterVM(t.Context(), id, true))
	}
	if got := list(t, b.root); len(got) > 0 {
		t.Errorf("after the deletions there is %v", got)
	}
}

// TestCloneRefuses: what cannot be cloned leaves nothing, and the original as it
// was.
func TestCloneRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	check(t, os.WriteFile(filepath.Join(b.root, "vmlinuz"), nil, 0o600))
	check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}, {Name: "ds-2", Type: "dir", Path: t.TempDir()}}))
	create := request("web-1", b.newRef(t))
	create.Settings = &strongroomv1.VMSettings{Kernel: "vmlinuz"}
	check(t, b.createVM(t.Context(), create, quiet))
	source := create.GetId()
	on := b.create(t, "on", keysafe.Ref{})
	m, err := b.machine(on)
	check(t, err)
	m.setRunning(&running{})
	defer m.setRunning(nil)
	before := list(t, b.root)
	for name, c := range map[string]struct {
		change func(*strongroomv1.AgentCloneVMRequest)
		kind   errs.Kind
	}{
		"one without its disks":      {func(r *strongroomv1.AgentCloneVMRequest) { r.SourceId = on }, errs.Unavailable},
		"an unknown source":          {func(r *strongroomv1.AgentCloneVMRequest) { r.SourceId = uuid.NewString() }, errs.NotFound},
		"an unknown datastore":       {func(r *strongroomv1.AgentCloneVMRequest) { r.Datastore = "ds-9" }, errs.NotFound},
		"a name that leads out":      {func(r *strongroomv1.AgentCloneVMRequest) { r.Name = ".." }, errs.Invalid},
		"an id that leads out":       {func(r *strongroomv1.AgentCloneVMRequest) { r.Id = "../../x" }, errs.Invalid},
		"a name that is taken":       {func(r *strongroomv1.AgentCloneVMRequest) { r.Name = "on" }, errs.Exists},
		"a folder that is no VM's":   {func(r *strongroomv1.AgentCloneVMRequest) { r.Name = "vmlinuz" }, errs.Exists},
		"itself":                     {func(r *strongroomv1.AgentCloneVMRequest) { r.Name = "web-1" }, errs.Exists},
		"no key":                     {func(r *strongroomv1.AgentCloneVMRequest) { r.Key = nil }, errs.Locked},
		"a key that is not here":     {func(r *strongroomv1.AgentCloneVMRequest) { r.Key.Provider = "kp-9" }, errs.Locked},
		"a kernel that is not there": {func(r *strongroomv1.AgentCloneVMRequest) { r.Datastore = "ds-2" }, errs.NotFound},
	} {
		req := cloneRequest("web-2", source, b.newRef(t))
		c.change(req)
		wantKind(t, name, b.cloneVM(t.Context(), req, quiet), c.kind)
		if got := list(t, b.root); !slices.Equal(got, before) {
			t.Fatalf("%s left %v", name, got)
		}
		if len(b.secrets.snapshot().VMs) != 2 {
			t.Fatalf("%s was registered", name)
		}
	}
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw", "disk-1.luks"}) {
		t.Errorf("the original has %v", got)
	}
}
