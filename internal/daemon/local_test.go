package daemon

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"strongroom/internal/errs"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestLocalSocketIsReplaced: one that a dead role left is no obstacle.
func TestLocalSocketIsReplaced(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	for range 2 {
		l, err := ListenLocal(path)
		check(t, err)
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket has mode %v, error %v", info.Mode(), err)
		}
		l.(*peerListener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
		check(t, l.Close())
	}
}

// TestLocalSocketTakesNoFile: a configuration mistake costs no file.
func TestLocalSocketTakesNoFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "vm.json")
	check(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err := ListenLocal(path)
	if errs.KindOf(err) != errs.Exists {
		t.Errorf("a file in place of the socket: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file is %q, %v", text, err)
	}
}

// TestLocalPeer: another user is turned away even where the socket's mode would
// let him in.
func TestLocalPeer(t *testing.T) {
	t.Parallel()
	const variable = "STRONGROOM_TEST_LOCAL_SOCKET"
	if path := os.Getenv(variable); path != "" { // as the other user
		conn, err := net.Dial("unix", path)
		check(t, err)
		defer conn.Close()
		_, _ = conn.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Fatal("another user was answered")
		}
		return
	}
	dir, err := os.MkdirTemp("", "strongroom-peer-")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	check(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "s")
	l, err := ListenLocal(path)
	check(t, err)
	check(t, os.Chmod(path, 0o777))
	served := make(chan struct{}, 8)
	root := os.Getuid() == 0
	if !root { // then we are the other user
		l.(*peerListener).uid = uint32(os.Getuid()) + 1
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	handler := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served <- struct{}{} })
	go func() { ended <- Serve(ctx, &http.Server{Handler: handler}, l) }()
	defer func() {
		stop()
		check(t, <-ended)
	}()

	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLocalPeer$")
	cmd.Env = []string{variable + "=" + path}
	cmd.Dir = "/"
	if root {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if len(served) > 0 {
		t.Error("another user's request was served")
	}
	if root {
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}}
		res, err := (&http.Client{Transport: transport}).Get("http://role/")
		check(t, err)
		check(t, res.Body.Close())
		<-served
	}
}
