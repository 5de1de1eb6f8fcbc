package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/keys/hsm"
	"strongroom/internal/keys/hsm/token"
	"strongroom/test/port"
	"strongroom/test/softhsm"
)

// TestMain makes the test binary run as strongroom when a script asks for it, and
// as strongroom-pkcs11 when that does.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"strongroom": main, "strongroom-pkcs11": func() {
		if err := hsm.Serve(os.Stdin, os.Stdout, token.Wrap, token.Unwrap); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}})
}

// TestScripts runs testdata/script/*.txtar: the program as its users see it,
// with QEMU, libnbd and cryptsetup as its peers.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// A unix socket's path must be short, and $WORK is not.
			dir, err := os.MkdirTemp("", "sr")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("SOCKETS", dir)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("SOFTHSM", softhsm.Module(t))
			conf := filepath.Join(dir, "softhsm.conf")
			env.Setenv("SOFTHSM2_CONF", conf)
			if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s/tokens\nlog.level = ERROR\n", env.WorkDir), 0o600); err != nil {
				return err
			}
			env.Setenv("BIN", filepath.SplitList(env.Getenv("PATH"))[0]) // where strongroom is
			env.Setenv("PATH", env.Getenv("PATH")+string(filepath.ListSeparator)+"/usr/sbin")
			return nil
		},
		Condition: func(condition string) (bool, error) {
			switch condition {
			case "root":
				return os.Geteuid() == 0, nil
			case "fuse":
			default:
				return false, fmt.Errorf("unknown condition %q", condition)
			}
			f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
			if err == nil {
				f.Close()
			}
			return err == nil, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"device":   makeDevice,
			"keyfile":  makeKeyFile,
			"waitfor":  waitForSocket,
			"freeport": findPort,
			"mode":     checkMode,
			"truncate": truncate,
			"waitsize": waitForSize,
			"served":   waitForKMS,
		},
	})
}

// makeDevice is "device NAME FILE": NAME in the environment is a block device with
// the contents of FILE, or FILE itself for who is not root.
func makeDevice(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 || neg {
		ts.Fatalf("usage: device NAME FILE")
	}
	file := ts.MkAbs(args[1])
	if os.Geteuid() != 0 {
		ts.Setenv(args[0], file)
		return
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		ts.Fatalf("losetup: %v\n%s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	ts.Defer(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			ts.Logf("losetup: %v\n%s", err, out)
		}
	})
	ts.Setenv(args[0], loop)
}

// makeKeyFile is "keyfile NAME BYTES": a file for its owner only. The contents
// follow from the name, so that a script fails the same way again.
func makeKeyFile(ts *testscript.TestScript, neg bool, args []string) {
	var n int
	if len(args) != 2 || neg {
		ts.Fatalf("usage: keyfile NAME BYTES")
	}
	_, err := fmt.Sscan(args[1], &n)
	ts.Check(err)
	var key []byte
	for i := 0; len(key) < n; i++ {
		sum := sha256.Sum256(fmt.Append(nil, args[0], i))
		key = append(key, sum[:]...)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), key[:n], 0o600))
}

// waitForSocket is "waitfor SOCKET": until somebody listens on it.
func waitForSocket(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || neg {
		ts.Fatalf("usage: waitfor SOCKET")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", args[0])
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("nobody listens on %s: %v", args[0], err)
		case <-tick.C:
		}
	}
}

// waitForKMS is "served": until the KMS at $STRONGROOM_SERVER is not sealed.
func waitForKMS(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 0 || neg {
		ts.Fatalf("usage: served")
	}
	c, err := client.New(client.Config{Server: ts.Getenv("STRONGROOM_SERVER")})
	ts.Check(err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	for {
		_, err := client.Call(ctx, c.KMS().GetKMS, &strongroomv1.GetKMSRequest{})
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("the KMS does not serve: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// findPort is "freeport VARIABLE": sets it to a TCP port that nobody else gets.
func findPort(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || neg {
		ts.Fatalf("usage: freeport VARIABLE")
	}
	addr, err := port.Reserve()
	ts.Check(err)
	_, number, err := net.SplitHostPort(addr)
	ts.Check(err)
	ts.Setenv(args[0], number)
}

// waitForSize is "waitsize FILE BYTES": until the file has that size, because a
// volume is shown in its place.
func waitForSize(ts *testscript.TestScript, neg bool, args []string) {
	var want int64
	if len(args) != 2 || neg {
		ts.Fatalf("usage: waitsize FILE BYTES")
	}
	_, err := fmt.Sscan(args[1], &want)
	ts.Check(err)
	deadline := time.After(time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if info, err := os.Stat(ts.MkAbs(args[0])); err == nil && info.Size() == want {
			return
		}
		select {
		case <-deadline:
			ts.Fatalf("%s does not get %d bytes", args[0], want)
		case <-tick.C:
		}
	}
}

// checkMode is "mode OCTAL FILE".
func checkMode(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: mode OCTAL FILE")
	}
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); (got == args[0]) == neg {
		ts.Fatalf("%s has mode %s", args[1], got)
	}
}

// truncate is "truncate FILE BYTES".
func truncate(ts *testscript.TestScript, neg bool, args []string) {
	var n int64
	if len(args) != 2 || neg {
		ts.Fatalf("usage: truncate FILE BYTES")
	}
	_, err := fmt.Sscan(args[1], &n)
	ts.Check(errors.Join(err, os.Truncate(ts.MkAbs(args[0]), n)))
}

// TestEveryExampleParses holds the examples of the help to the flags that there
// are.
func TestEveryExampleParses(t *testing.T) {
	t.Parallel()
	for _, example := range examples() {
		if err := example.check(); err != nil {
			t.Errorf("%s: %v", strings.Join(example.args, " "), err)
		}
	}
}
