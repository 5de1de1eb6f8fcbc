package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/control/access"
)

const (
	reference = "../../docs/reference"
	protos    = "../../api/strongroom/v1"
)

// TestCurrent fails if the reference is not what the code gives.
func TestCurrent(t *testing.T) {
	t.Parallel()
	pages, err := generate(protos)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range pages {
		got, err := os.ReadFile(filepath.Join(reference, name))
		if err != nil {
			t.Errorf("%v (to make it: go generate ./cmd/refdoc)", err)
			continue
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s is not current (go generate ./cmd/refdoc):\n%s", name, diff)
		}
	}
	for _, dir := range generatedDirs {
		entries, err := os.ReadDir(filepath.Join(reference, dir))
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			if _, ok := pages[dir+"/"+e.Name()]; !ok {
				t.Errorf("%s/%s belongs to no command (go generate ./cmd/refdoc)", dir, e.Name())
			}
		}
	}
}

// TestEverythingIsExplained: no service or method without a comment that a user can
// read, and no privilege that is not in the table.
func TestEverythingIsExplained(t *testing.T) {
	t.Parallel()
	c, err := readComments(protos)
	if err != nil {
		t.Fatal(err)
	}
	known, _ := access.Privileges()
	for _, f := range apiFiles() {
		for s := range each(f.Services()) {
			if c[string(s.Name())] == "" {
				t.Errorf("%s has no comment", s.Name())
			}
			for m := range each(s.Methods()) {
				name := string(s.Name()) + "." + string(m.Name())
				if _, ok := c[name]; !ok {
					t.Errorf("%s was not found in the proto files", name)
				}
				if p := privilege(m); p != "" && !slices.Contains(known, access.Privilege(p)) {
					t.Errorf("%s needs %q, which is no privilege", name, p)
				}
				if needs(m) == "[](privileges.md)" {
					t.Errorf("%s declares nobody who may call it", name)
				}
			}
		}
		for m := range each(f.Messages()) {
			for field := range each(m.Fields()) {
				if _, ok := c[string(m.Name())+"."+string(field.Name())]; !ok {
					t.Errorf("%s.%s was not found in the proto files", m.Name(), field.Name())
				}
			}
		}
	}
}

// TestHelpNamesPrivileges: what the help says that a command needs exists.
func TestHelpNamesPrivileges(t *testing.T) {
	t.Parallel()
	pages := make(map[string][]byte)
	if err := commands(pages); err != nil {
		t.Fatal(err)
	}
	known, _ := access.Privileges()
	for name, text := range pages {
		_, rest, ok := strings.Cut(strings.Join(strings.Fields(string(text)), " "), "Needs the privilege ")
		if !ok || !strings.HasSuffix(name, ".md") {
			continue
		}
		p, _, _ := strings.Cut(rest, " ")
		p = strings.TrimRight(p, ".,;")
		if !slices.Contains(known, access.Privilege(p)) {
			t.Errorf("%s: %q is no privilege", name, p)
		}
	}
}
