package xtsbench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/crypto/xts"
)

// fakeOpenSSL writes a program that answers as `openssl speed` does, so that
// the test does not take the many seconds of the real one.
func fakeOpenSSL(t *testing.T, script string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "openssl")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestRun(t *testing.T) {
	program := fakeOpenSSL(t, `echo "+H:$5"; case "$*" in *-decrypt) echo "+F:27:AES-256-XTS:2000000000.00";; *) echo "+F:27:AES-256-XTS:1000000000.00";; esac`)
	results, err := Run(t.Context(), Options{Duration: 2 * time.Millisecond, OpenSSL: program})
	if err != nil {
		t.Fatal(err)
	}
	type figure struct {
		Implementation string
		Bytes          int
		Op             string
	}
	var got, want []figure
	for _, r := range results {
		got = append(got, figure{r.Implementation, r.Bytes, r.Op})
		// Nothing that exists is slower or faster than this.
		if r.GBPerS < 0.0005 || r.GBPerS > 2000 {
			t.Errorf("%+v is no speed", r)
		}
		if r.Implementation == OpenSSL && r.GBPerS != map[string]float64{Encrypt: 1, Decrypt: 2}[r.Op] {
			t.Errorf("%+v is not what openssl said", r)
		}
	}
	for _, name := range append(xts.Implementations(), Memcpy, OpenSSL) {
		for _, n := range []int{512, 4096, 65536, 1 << 20} {
			want = append(want, figure{name, n, "encrypt"}, figure{name, n, "decrypt"})
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("figures (-want +got):\n%s", diff)
	}
}

func TestRunStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := Run(ctx, Options{}); !errors.Is(err, context.Canceled) || r != nil {
		t.Errorf("Run = %v, %v; want context.Canceled", r, err)
	}
	if r, err := Run(t.Context(), Options{Implementations: []string{"rot13"}}); !errors.Is(err, xts.ErrImplementation) || r != nil {
		t.Errorf("Run of an unknown implementation = %v, %v", r, err)
	}
	for _, script := range []string{"exit 1", "echo nothing", "echo +F:27:AES-256-XTS:fast"} {
		_, err := Run(t.Context(), Options{Duration: time.Millisecond, OpenSSL: fakeOpenSSL(t, script), Implementations: []string{}})
		if err == nil || !strings.HasPrefix(err.Error(), "cannot measure OpenSSL: ") {
			t.Errorf("with an openssl that does %q: %v", script, err)
		}
	}
}

// TestOpenSSL runs the real program once.
func TestOpenSSL(t *testing.T) {
	results, err := runOpenSSLSize(t.Context(), "openssl", 1, 4096, Decrypt)
	if err != nil {
		t.Fatal(err)
	}
	if results.GBPerS < 0.001 || results.Bytes != 4096 || results.Op != Decrypt {
		t.Errorf("openssl does %+v", results)
	}
}

func TestParseSpeed(t *testing.T) {
	for out, want := range map[string]float64{
		"+H:4096\n+F:25:AES-256-XTS:5210441678.05\n": 5210441678.05,
		"+F:27:AES-256-XTS:1.5":                      1.5,
		"":                                           0,
		"+F:":                                        0,
		"+F:27:AES-256-XTS:":                         0,
		"+F:27:AES-256-XTS:-1":                       0,
		"+F:27:AES-256-XTS:1:2":                      0,
		"+F:27:AES-256-XTS:NaN":                      0,
		"+F:27:AES-256-XTS:Inf":                      0,
	} {
		got, err := parseSpeed(out)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseSpeed(%q) = %v, %v; want %v", out, got, err, want)
		}
	}
}

func TestOutput(t *testing.T) {
	results := []Result{
		{"aesni", 4096, Encrypt, 6},
		{"aesni", 512, Encrypt, 3.256},
		{OpenSSL, 4096, Encrypt, 5},
	}
	var table bytes.Buffer
	if err := WriteTable(&table, results); err != nil {
		t.Fatal(err)
	}
	want := "  IMPLEMENTATION  BYTES       OP  GB/S  x OPENSSL\n" +
		"           aesni   4096  encrypt  6.00       1.20\n" +
		"           aesni    512  encrypt  3.26          -\n" +
		"         openssl   4096  encrypt  5.00       1.00\n"
	if diff := cmp.Diff(want, table.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
	if err := WriteTable(failingWriter{}, results); err == nil {
		t.Error("WriteTable hides an error")
	}
	out, err := json.Marshal(Report{Results: results[:1]})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(out), `{"results":[{"implementation":"aesni","bytes":4096,"op":"encrypt","gb_per_s":6}]}`; got != want {
		t.Errorf("JSON is %s, want %s", got, want)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }
