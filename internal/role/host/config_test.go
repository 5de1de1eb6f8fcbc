package host

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// example has every field.
const example = `
data_dir     = "/var/lib/strongroom/host"
run_dir      = "/run/strongroom/host"
listen       = "0.0.0.0:8444"
advertise    = "esx-1.example.com:8444"
local_socket = "/run/strongroom/host.sock"
key_file     = "/media/key/host.key"
direct_io    = true
`

func TestConfigExample(t *testing.T) {
	t.Parallel()
	got, err := ParseConfig([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		DataDir: "/var/lib/strongroom/host", RunDir: "/run/strongroom/host", Listen: "0.0.0.0:8444",
		Advertise: "esx-1.example.com:8444", LocalSocket: "/run/strongroom/host.sock", KeyFile: "/media/key/host.key",
		DirectIO: true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for f := range reflect.TypeFor[Config]().Fields() {
		if tag := f.Tag.Get("toml"); tag == "" || !strings.Contains(example, "\n"+tag+" ") {
			t.Errorf("field %s (%q) is not in the example", f.Name, tag)
		}
		if reflect.ValueOf(got).FieldByIndex(f.Index).IsZero() {
			t.Errorf("the example does not set %s", f.Name)
		}
	}
}

// TestConfigDocumented checks that every field tells what it is.
func TestConfigDocumented(t *testing.T) {
	t.Parallel()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	fields := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "Config" {
			return true
		}
		for _, f := range spec.Type.(*ast.StructType).Fields.List {
			fields++
			if name := f.Names[0].Name; !strings.HasPrefix(f.Doc.Text(), name+" ") {
				t.Errorf("field %s has no comment that begins with its name", name)
			}
		}
		return false
	})
	if fields != reflect.TypeFor[Config]().NumField() {
		t.Errorf("%d fields were looked at", fields)
	}
}

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	got, err := ParseConfig([]byte("data_dir = \"/d\"\nlisten = \"10.0.0.1:8444\""))
	want := Config{DataDir: "/d", RunDir: "/d/run", Listen: "10.0.0.1:8444", Advertise: "10.0.0.1:8444", LocalSocket: "/d/run/host.sock", KeyFile: "/d/host.key"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestConfigRefuses(t *testing.T) {
	t.Parallel()
	good := "data_dir = \"/d\"\nlisten = \"10.0.0.1:8444\"\n"
	long := strings.Repeat("x", socketPathMax)
	for name, c := range map[string]struct{ text, want string }{
		"empty":                {"", "data_dir"},
		"no TOML":              {"[", ""},
		"unknown field":        {good + "colour = 1", "colour"},
		"wrong type":           {good + "run_dir = 1", ""},
		"relative data_dir":    {"data_dir = \"d\"\nlisten = \"10.0.0.1:1\"", "data_dir"},
		"relative run_dir":     {good + "run_dir = \"run\"", "run_dir"},
		"long run_dir":         {good + "run_dir = \"/" + long + "\"", "run_dir"},
		"long local_socket":    {good + "local_socket = \"/" + long + "\"", "local_socket"},
		"relative key_file":    {good + "key_file = \"k\"", "key_file"},
		"no port":              {"data_dir = \"/d\"\nlisten = \"10.0.0.1\"", "listen"},
		"nothing to advertise": {"data_dir = \"/d\"\nlisten = \":8444\"", "advertise"},
		"any address":          {"data_dir = \"/d\"\nlisten = \"0.0.0.0:8444\"", "advertise"},
		"any port":             {"data_dir = \"/d\"\nlisten = \"10.0.0.1:0\"", "advertise"},
	} {
		got, err := ParseConfig([]byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) || got != (Config{}) {
			t.Errorf("%s: ParseConfig = %+v, %v; want an error with %q", name, got, err, c.want)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "host.toml")
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadConfig(path); err != nil || c.DataDir == "" {
		t.Errorf("LoadConfig = %+v, %v", c, err)
	}
	if err := os.WriteFile(path, []byte(example+strings.Repeat("#\n", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadConfig(path); err == nil || c != (Config{}) {
		t.Errorf("a huge file: %+v, %v", c, err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("data_dir = \"/d\"\nlisten = \"[::1]:1\""))
	f.Add([]byte("data_dir = '/'\nlisten = \":1\"\nadvertise = \"a:b\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := ParseConfig(text)
		if err != nil {
			if c != (Config{}) {
				t.Errorf("%+v beside an error", c)
			}
			return
		}
		for _, path := range []string{c.DataDir, c.RunDir, c.LocalSocket, c.KeyFile} {
			if !filepath.IsAbs(path) {
				t.Errorf("path %q is not absolute", path)
			}
		}
		if c.Listen == "" || c.Advertise == "" {
			t.Errorf("no address in %+v", c)
		}
		if again, err := c.withDefaults(); err != nil || again != c {
			t.Errorf("defaults are not stable: %+v, %v", again, err)
		}
	})
}
