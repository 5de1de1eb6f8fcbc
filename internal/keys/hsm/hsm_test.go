package hsm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/test/softhsm"
)

func TestMain(m *testing.M) { os.Exit(softhsm.Main(m)) }

func random(t testing.TB) *keymem.Key {
	t.Helper()
	k, err := keymem.Random(32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// tokens are made one after another: --free chooses a slot.
var tokens sync.Mutex

func newKey(t testing.TB) Key {
	t.Helper()
	tokens.Lock()
	defer tokens.Unlock()
	label, pinFile := softhsm.Token(t)
	return Key{Module: softhsm.Module(t), Token: label, Label: "kms", PINFile: pinFile}
}

func TestWrap(t *testing.T) {
	t.Parallel()
	k, secret := newKey(t), random(t)
	wrapped, err := k.Wrap(t.Context(), secret)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(wrapped, secret.Bytes()[:8]) {
		t.Error("what was wrapped shows the secret")
	}
	again, err := k.Wrap(t.Context(), secret) // by the same key
	if err != nil || bytes.Equal(again, wrapped) {
		t.Fatalf("wrapped twice it is the same, %v", err)
	}
	for _, w := range [][]byte{wrapped, again} {
		got, err := k.Unwrap(t.Context(), w)
		if err != nil || !got.Equal(secret) {
			t.Errorf("unwrapped: %v", err)
		}
		got.Close()
	}

	refused := func(what string, k Key, wrapped []byte, kind errs.Kind) {
		t.Helper()
		if got, err := k.Unwrap(t.Context(), wrapped); errs.KindOf(err) != kind || got != nil {
			t.Errorf("%s: %v, want kind %v", what, err, kind)
		} else if strings.Contains(err.Error(), softhsm.PIN) {
			t.Errorf("%s: the error shows the PIN", what)
		}
	}
	altered := bytes.Clone(wrapped)
	altered[len(altered)-1] ^= 1
	refused("altered", k, altered, errs.Denied)
	refused("too short", k, wrapped[:20], errs.Corrupt)
	other := k
	other.Label = "other"
	refused("no key of that label", other, wrapped, errs.NotFound)
	if _, err := other.Wrap(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	refused("another key", other, wrapped, errs.Denied)
	other = k
	other.Token = "there is none"
	refused("no token", other, wrapped, errs.NotFound)
	other = k
	other.Module = "/dev/null"
	refused("no library", other, wrapped, errs.NotFound)
	other = k
	other.PINFile = filepath.Join(t.TempDir(), "pin")
	refused("no PIN", other, wrapped, errs.NotFound)
	if err := os.WriteFile(other.PINFile, []byte("000000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	refused("a PIN for all to read", other, wrapped, errs.Denied)
	if err := os.Chmod(other.PINFile, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("a wrong PIN", other, wrapped, errs.Denied)
	if err := os.WriteFile(other.PINFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("an empty PIN", other, wrapped, errs.Invalid)
	refused("no module", Key{Token: "t", Label: "l", PINFile: k.PINFile}, wrapped, errs.Invalid)
	refused("no label", Key{Module: k.Module, Token: "t", PINFile: k.PINFile}, wrapped, errs.Invalid)
}

// TestBadLibrary: a library that crashes, ends the process, talks too much or
// hangs costs an error, and leaves no process.
func TestBadLibrary(t *testing.T) {
	t.Parallel()
	k, secret := newKey(t), random(t)
	for name, body := range map[string]string{
		"crashes": "abort();", "ends the process": "exit(0);", "writes over memory": "*(volatile int *)8 = 1;",
		"talks": `for (int i = 0; i < 100000; i++) { puts("a library's talk"); }; fflush(stdout); exit(1);`, "hangs": "for (;;) sleep(1000);",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			source, k := filepath.Join(dir, "bad.c"), k
			k.Module = filepath.Join(dir, "bad.so")
			text := "#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\nunsigned long C_GetFunctionList(void **list) { " + body + " return 5; }\n"
			if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("gcc", "-shared", "-fPIC", "-o", k.Module, source).CombinedOutput(); err != nil {
				t.Fatalf("gcc: %v\n%s", err, out)
			}
			ctx := t.Context()
			if name == "hangs" {
				var cancel func()
				ctx, cancel = context.WithTimeout(ctx, 2*time.Second)
				defer cancel()
			}
			if wrapped, err := k.Wrap(ctx, secret); errs.KindOf(err) != errs.Unavailable || wrapped != nil {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestServe(t *testing.T) {
	t.Parallel()
	failed := errors.New("failed")
	fails := func(Key, []byte, []byte) (*keymem.Key, error) { return nil, failed }
	var request, answer bytes.Buffer
	if err := writeFrame(&request, []byte(operationOpen), []byte("/m"), []byte("t"), []byte("k"), []byte("pin"), []byte("data")); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := Serve(bytes.NewReader(request.Bytes()), &answer, fails, func(k Key, pin, data []byte) (*keymem.Key, error) {
		got = []string{k.Module, k.Token, k.Label, string(pin), string(data)}
		return nil, failed
	})
	if err != nil || strings.Join(got, " ") != "/m t k pin data" {
		t.Errorf("%q, %v", got, err)
	}
	frame, fields, err := readFrame(&answer, answerFields)
	if err != nil {
		t.Fatal(err)
	}
	defer frame.Close()
	if string(fields[0]) != "Unavailable" || string(fields[1]) != "failed" {
		t.Errorf("answer %q", fields)
	}
	if err := writeFrame(io.Discard, make([]byte, frameMax)); errs.KindOf(err) != errs.Invalid {
		t.Errorf("too long: %v", err)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x09\x00\x01a\x00\x01b\x00\x01c"))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, fields, err := readFrame(bytes.NewReader(b), answerFields)
		if err != nil {
			if frame != nil {
				t.Error("a frame beside an error")
			}
			return
		}
		defer frame.Close()
		var again bytes.Buffer
		if err := writeFrame(&again, fields...); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Error("read and written again it is another frame")
		}
	})
}
