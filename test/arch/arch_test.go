// Package arch holds the tests over the source tree itself: which package may
// import which, what only a few may use, and how packages and files look. A
// failure prints the reason for the rule, not only the rule.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "strongroom/"

// pkg is what the tests need of a package, as `go list` tells it.
type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string // direct, without tests
	Deps       []string // transitive
}

// packages lists the module's packages, with paths relative to the module.
var packages = sync.OnceValues(func() ([]pkg, error) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, errors.New(stderr.String())
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		all = append(all, p)
	}
})

func list(t *testing.T) []pkg {
	t.Helper()
	all, err := packages()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return all
}

// within reports whether path is folder or lies below it.
func within(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, folder+"/")
}

// layers says what a folder must not need, not even through others.
var layers = []struct {
	of, not, why string
	except       []string // packages below `of` for which the rule does not hold
}{
	{of: "internal/crypto", not: "internal/block", why: "crypto is the lowest layer"},
	{of: "internal/crypto", not: "internal/keys", why: "crypto is the lowest layer"},
	{of: "internal/crypto", not: "internal/control", why: "crypto is the lowest layer"},
	{of: "internal/crypto", not: "internal/machine", why: "crypto is the lowest layer"},
	{of: "internal/block", not: "internal/control", why: "the data path knows nothing of the control plane"},
	{of: "internal/block", not: "internal/keys", why: "the data path gets DEKs, it does not fetch keys"},
	{of: "internal/block", not: "internal/machine", why: "a volume does not know who uses it"},
	{of: "internal/block", not: "internal/role", why: "roles are built on the data path, not under it"},
	{of: "internal/block", not: "api", why: "the data path knows nothing of the control plane"},
	{of: "internal/block", not: "connectrpc.com", why: "no RPC code in the data path"},
	{of: "internal/block", not: "net/http", why: "no network server in the data path but NBD"},
	{of: "internal/block", not: "go.etcd.io", why: "no database in the data path"},
	{of: "internal/block", not: "github.com/prometheus", why: "no metrics code in the data path"},
	{of: "internal/keys", not: "internal/control", why: "providers serve hosts and controllers alike"},
	{of: "internal/keys", not: "internal/block", why: "providers know keys, not disks"},
	{of: "internal/role/host", not: "internal/keys/kmip/kmipserver", why: "a host asks key servers, it is none"},
	{of: "internal/control", not: "internal/crypto/keymem", why: "the control plane never holds key material"},
	{of: "internal/control", not: "internal/keys", why: "the control plane never holds key material"},
	{of: "internal/control", not: "internal/block", why: "hosts have disks, the controller has an inventory"},
	{of: "internal/control", not: "internal/machine", why: "hosts have machines, the controller has an inventory"},
	{of: "internal/control", not: "internal/role", why: "imports run down only"},
	{of: "internal/machine", not: "internal/control", why: "a host works without its controller"},
	{of: "internal/machine", not: "internal/role", why: "imports run down only"},
	{of: "internal/face", not: "internal/role", why: "the faces use the API only, as users do"},
	{of: "internal/face", not: "internal/control", why: "the faces use the API only, as users do"},
	{of: "internal/face", not: "internal/block", why: "the faces use the API only, as users do"},
	{of: "internal/face", not: "internal/keys", why: "the faces use the API only, as users do"},
	{of: "client", not: "internal/control", why: "the client is what a user's program imports"},
	{of: "client", not: "internal/role", why: "the client is what a user's program imports"},
	{of: "api", not: "internal/role", why: "the contract depends on nobody who keeps it"},
	{of: "api", not: "internal/control", why: "the contract depends on nobody who keeps it"},
	{of: "internal/role/volumed", not: "internal/control", why: "a volume process knows nothing of the control plane"},
	{of: "internal/role/volumed", not: "net/http", why: "a volume process talks to its host and to QEMU only"},
	{of: "internal/role/volumed", not: "internal/block/blockfuse", why: "a volume process mounts nothing"},
	{of: "internal/role/volumed", not: "internal/keys", why: "a volume process has DEKs, never a KEK"},
}

func TestLayers(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		for _, rule := range layers {
			if !within(p.ImportPath, rule.of) || slices.Contains(rule.except, p.ImportPath) {
				continue
			}
			for _, dep := range p.Deps {
				if within(strings.TrimPrefix(dep, module), rule.not) {
					t.Errorf("%s needs %s: %s", p.ImportPath, strings.TrimPrefix(dep, module), rule.why)
				}
			}
		}
	}
}

func TestRolesDoNotImportEachOther(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		role, ok := roleOf(p.ImportPath)
		if !ok {
			continue
		}
		for _, dep := range p.Deps {
			if other, ok := roleOf(strings.TrimPrefix(dep, module)); ok && other != role {
				t.Errorf("%s needs %s: roles are separate processes that talk only through api/", p.ImportPath, dep)
			}
		}
	}
}

func roleOf(importPath string) (string, bool) {
	rest, ok := strings.CutPrefix(importPath, "internal/role/")
	role, _, _ := strings.Cut(rest, "/")
	return role, ok
}

// reserved says which packages alone may import something directly.
var reserved = []struct {
	imported string
	by       []string
	why      string
}{
	{"os/exec", []string{"internal/keys/hsm", "internal/machine/qemu", "internal/machine/vtpm", "internal/machine/volumeproc", "internal/machine/image", "internal/crypto/xts/xtsbench", "test"}, "whoever starts processes can be made to start the wrong one"},
	{"unsafe", []string{"api/strongroom", "internal/crypto/xts", "internal/crypto/keymem", "internal/block/blockdev", "internal/block/vhostuser", "internal/role/volumed/sandbox", "test/bench/ioengine"}, "memory safety is reviewed in few places"},
	{"math/rand", []string{"test"}, "randomness comes from crypto/rand"},
	{"math/rand/v2", []string{"test", "internal/block/blockdev/faultdev", "internal/block/blockdev/blockdevtest", "internal/control/store"}, "randomness comes from crypto/rand; only tests, which replay a seed, and the jitter of a retry may use another source"},
	{"github.com/hanwen/go-fuse/v2/fuse", []string{"internal/block/blockfuse"}, "FUSE is spoken in one place"},
	{"os/user", []string{"internal/face/cli"}, "it may call into the C library"},
	{"log", nil, "logs are written with log/slog"},
}

func TestReservedImports(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		for _, rule := range reserved {
			allowed := slices.ContainsFunc(rule.by, func(by string) bool { return within(p.ImportPath, by) })
			if slices.Contains(p.Imports, rule.imported) && !allowed {
				t.Errorf("%s imports %s: %s", p.ImportPath, rule.imported, rule.why)
			}
		}
	}
}

func TestPackageNames(t *testing.T) {
	t.Parallel()
	banned := []string{"util", "utils", "common", "helpers", "helper", "misc", "base", "types", "models", "shared", "lib"}
	for _, p := range list(t) {
		if slices.Contains(banned, path.Base(p.ImportPath)) {
			t.Errorf("%s: a name must say what the package is about", p.ImportPath)
		}
	}
}

const linesMax = 600

// TestFiles checks that each package has exactly one comment and that no
// hand-written file has grown past one concept.
func TestFiles(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	for _, p := range list(t) {
		comments := 0
		for _, name := range p.GoFiles {
			file := filepath.Join(p.Dir, name)
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := parser.ParseFile(fset, file, src, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if parsed.Doc != nil {
				comments++
			}
			if lines := bytes.Count(src, []byte("\n")); lines > linesMax && !ast.IsGenerated(parsed) {
				t.Errorf("%s/%s has %d lines: one concept a file, at most %d lines", p.ImportPath, name, lines, linesMax)
			}
			for _, group := range parsed.Comments {
				for _, word := range []string{"TODO", "FIXME", "XXX", "HACK"} {
					if strings.Contains(group.Text(), word) {
						t.Errorf("%s: %s in a comment: finish it or file an issue", fset.Position(group.Pos()), word)
					}
				}
			}
		}
		generated := within(p.ImportPath, "api/strongroom")
		if comments != 1 && len(p.GoFiles) > 0 && !generated {
			t.Errorf("%s has %d package comments: it must have exactly one", p.ImportPath, comments)
		}
	}
}

// TestModule checks that what is built is what go.mod names.
func TestModule(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(src)) {
		if strings.HasPrefix(strings.TrimSpace(line), "replace") {
			t.Errorf("go.mod has a replace directive: what is tested must be what is built")
		}
	}
}
