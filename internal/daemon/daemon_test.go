package daemon_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/daemon"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLoadConfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		size int
		ok   bool
	}{{"empty", 0, true}, {"largest", 64 << 10, true}, {"too-large", 64<<10 + 1, false}} {
		path := filepath.Join(dir, c.name)
		if err := os.WriteFile(path, []byte(strings.Repeat("#", c.size)), 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := daemon.LoadConfig(path, "host", func(text []byte) (int, error) { return len(text), nil })
		if (err == nil) != c.ok || c.ok && n != c.size {
			t.Errorf("%s: %d bytes, %v", c.name, n, err)
		}
	}
	missing := filepath.Join(dir, "missing")
	if _, err := daemon.LoadConfig(missing, "host", func([]byte) (int, error) { return 0, nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	empty := filepath.Join(dir, "empty")
	n, err := daemon.LoadConfig(empty, "host", func([]byte) (int, error) { return 1, errors.New("line 1: no") })
	if want := "cannot read host configuration " + empty + ": line 1: no"; err == nil || err.Error() != want || n != 0 {
		t.Errorf("what cannot be parsed: %d, %v, want %s", n, err, want)
	}
}

func TestDecodeConfig(t *testing.T) {
	t.Parallel()
	var c struct {
		Listen string `toml:"listen"`
	}
	if err := daemon.DecodeConfig([]byte(`listen = "a:1"`), &c); err != nil || c.Listen != "a:1" {
		t.Errorf("%+v, %v", c, err)
	}
	if err := daemon.DecodeConfig([]byte(`lisen = "a:1"`), &c); err == nil {
		t.Error("a misspelt field was accepted")
	}
}

func TestCheckAddresses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ listen, advertise, want string }{
		{"10.0.0.1:1", "", "10.0.0.1:1"},
		{":1", "host:2", "host:2"},
		{"[::1]:1", "", "[::1]:1"},
		{":1", "", ""},
		{"0.0.0.0:1", "", ""},
		{"[::]:1", "", ""},
		{"host", "host:1", ""},
		{"10.0.0.1:0", "", ""},
		{"10.0.0.1:1", "host", ""},
	} {
		got, err := daemon.CheckAddresses(c.listen, c.advertise)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("CheckAddresses(%q, %q) = %q, %v; want %q", c.listen, c.advertise, got, err, c.want)
		}
	}
}

// TestHarden changes this very process, for the better.
func TestHarden(t *testing.T) {
	if err := daemon.Harden(); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); n != 0 || err != nil {
		t.Errorf("dumpable = %d, %v", n, err)
	}
}

// TestServe ends the server while a request runs: its context ends, and Serve
// waits for it.
func TestServe(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	finished := make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stop()
		<-r.Context().Done()
		io.WriteString(w, "ended well")
		close(finished)
	})
	served := make(chan error)
	go func() { served <- daemon.Serve(ctx, &http.Server{Handler: handler}, l) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	res.Body.Close()
	if string(body) != "ended well" || err != nil {
		t.Errorf("answer %q, %v", body, err)
	}
	<-finished
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
}
