package host

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// TestFindVM: the folder of a VM is found wherever it is, and what cannot be told
// is said.
func TestFindVM(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	other := t.TempDir()
	check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}, {Name: "ds-2", Type: "dir", Path: other}}))
	id := b.create(t, "web-1", keysafe.Ref{})
	b.create(t, "web-2", keysafe.Ref{})
	check(t, b.unregisterVM(t.Context(), id, false))
	home := filepath.Join(b.root, "web-1")

	find := func() *strongroomv1.AgentFindVMResponse {
		t.Helper()
		res, err := b.findVM(t.Context(), id, "ds-1", "web-1")
		check(t, err)
		return res
	}
	want := func(what string, places ...string) {
		t.Helper()
		var got []string
		for _, f := range find().GetFolders() {
			problem := ""
			if f.GetProblem() != "" {
				problem = "?"
			}
			got = append(got, f.GetDatastore()+"/"+f.GetFolder()+problem)
		}
		slices.Sort(got)
		if !slices.Equal(got, places) {
			t.Errorf("%s: found %v, want %v", what, got, places)
		}
	}
	want("where it was", "ds-1/web-1")
	check(t, os.CopyFS(filepath.Join(other, "copy"), os.DirFS(home)))
	want("a copy beside it", "ds-1/web-1", "ds-2/copy")
	check(t, os.RemoveAll(home))
	want("the copy only", "ds-2/copy")
	check(t, os.WriteFile(filepath.Join(other, "copy", "vm.json"), []byte("{"), 0o600))
	want("a folder that cannot be read", "ds-2/copy?")
	check(t, os.RemoveAll(filepath.Join(other, "copy")))
	want("none")
	check(t, os.Mkdir(filepath.Join(other, "iso"), 0o700))
	want("a folder that is no VM's")
	for what, make := range map[string]func() error{
		"another VM": func() error { return os.CopyFS(home, os.DirFS(filepath.Join(b.root, "web-2"))) },
		"no VM":      func() error { return os.Mkdir(home, 0o700) },
		"no folder":  func() error { return os.WriteFile(home, nil, 0o600) },
		"a link":     func() error { return os.Symlink("web-2", home) },
	} {
		check(t, make())
		want("the old name, of "+what, "ds-1/web-1?")
		check(t, os.RemoveAll(home))
	}

	if res := find(); !res.GetHasDatastore() || res.GetDatastoreEmpty() {
		t.Errorf("the datastore: %v", res)
	}
	check(t, os.RemoveAll(filepath.Join(b.root, "web-2")))
	if res := find(); !res.GetHasDatastore() || !res.GetDatastoreEmpty() {
		t.Errorf("the empty datastore: %v", res)
	}
	if res, err := b.findVM(t.Context(), id, "ds-3", "web-1"); err != nil || res.GetHasDatastore() {
		t.Errorf("a datastore that is not here: %v, %v", res, err)
	}
	check(t, os.RemoveAll(other))
	if _, err := b.findVM(t.Context(), id, "ds-1", "web-1"); errs.KindOf(err) != errs.Unavailable || !strings.Contains(err.Error(), "ds-2") {
		t.Errorf("a datastore that is away: %v", err)
	}
}
