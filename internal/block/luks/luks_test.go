package luks_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
)

const testUUID = "6f9c5a52-1d3c-4f52-9a3e-0d6a3c1b7e11"

// image is a file that a header is written to.
type image struct{ *os.File }

func (f image) Flush() error { return f.Sync() }

// newImage makes an empty sparse file of size bytes.
func newImage(t *testing.T, size int64) image {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return image{f}
}

// openImage opens a file that another program made, and returns its size.
func openImage(t *testing.T, name string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, info.Size()
}

func (f image) read() (*luks.Header, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return luks.Read(f, info.Size())
}

func newKey(t testing.TB, secret string) *keymem.Key {
	t.Helper()
	k, err := keymem.Take([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newSafe(t *testing.T, dek *keymem.Key, generation uint64) *keysafe.Safe {
	t.Helper()
	ref := keysafe.Ref{Provider: "native-1", KeyID: "0b0c2a7e/7a1f"}
	s, err := keysafe.Wrap(keymemtest.Random(t, keysafe.KEKSize), dek, ref, "disk:"+testUUID, generation)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keyFile writes a key to a file for cryptsetup.
func keyFile(t *testing.T, k *keymem.Key) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(name, k.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// cryptsetup runs the real one and returns its exit code and output.
func cryptsetup(t *testing.T, args ...string) (int, string) {
	t.Helper()
	cmd := exec.Command("cryptsetup", args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), string(out)
	}
	if err != nil {
		t.Fatalf("cannot run cryptsetup (package cryptsetup-bin): %v", err)
	}
	return 0, string(out)
}

// mustCryptsetup also fails the test if cryptsetup does.
func mustCryptsetup(t *testing.T, args ...string) string {
	t.Helper()
	code, out := cryptsetup(t, args...)
	if code != 0 {
		t.Fatalf("cryptsetup %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

func newHeader(t *testing.T, opts luks.Options) *luks.Header {
	t.Helper()
	h, err := luks.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func commit(t *testing.T, h *luks.Header, w luks.Storage) {
	t.Helper()
	if err := h.Commit(w); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		opts luks.Options
		want luks.Segment
		size int64
	}{
		{"defaults", luks.Options{}, luks.Segment{Offset: 16 << 20, SectorSize: 512}, 20 << 20},
		{"smallest", luks.Options{DataOffset: luks.DataOffsetMin}, luks.Segment{Offset: 32768, SectorSize: 512}, 32768 + 4096},
		{"4096", luks.Options{SectorSize: 4096, DataOffset: 1 << 20, Label: "Büro/web-1"}, luks.Segment{Offset: 1 << 20, SectorSize: 4096}, 2 << 20},
		{"discards", luks.Options{AllowDiscards: true, DataOffset: 256 << 20}, luks.Segment{Offset: 256 << 20, SectorSize: 512}, 257 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dek := keymemtest.Random(t, luks.KeySize)
			safe := newSafe(t, dek, 7)
			test.opts.UUID, test.opts.DEK, test.opts.Safe = testUUID, dek, safe
			f := newImage(t, test.size)
			commit(t, newHeader(t, test.opts), f)

			h, err := f.read()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := h.Segment(); err != nil || got != test.want {
				t.Errorf("Segment() = %+v, %v; want %+v", got, err, test.want)
			}
			if h.UUID() != testUUID || h.Label() != test.opts.Label || h.Seqid() != 1 || len(h.Damaged()) != 0 || h.AllowDiscards() != test.opts.AllowDiscards {
				t.Errorf("header reads as %q %q seqid %d damaged %v discards %v", h.UUID(), h.Label(), h.Seqid(), h.Damaged(), h.AllowDiscards())
			}
			if err := h.VerifyKey(dek); err != nil {
				t.Errorf("VerifyKey with the right key: %v", err)
			}
			if err := h.VerifyKey(keymemtest.Random(t, luks.KeySize)); !errors.Is(err, luks.ErrWrongKey) {
				t.Errorf("VerifyKey with a wrong key: %v", err)
			}
			safes, err := h.Safes()
			if err != nil || len(safes) != 1 || string(safes[0].Encode()) != string(safe.Encode()) {
				t.Errorf("Safes() = %v, %v", safes, err)
			}

			mustCryptsetup(t, "isLuks", "--type", "luks2", f.Name())
			if out := mustCryptsetup(t, "luksDump", f.Name()); !strings.Contains(out, testUUID) || !strings.Contains(out, "0: strongroom") {
				t.Errorf("luksDump shows another volume:\n%s", out)
			}
			open := []string{"open", "--test-passphrase", "--type", "luks2", "--key-size", "512", "--volume-key-file"}
			mustCryptsetup(t, append(open, keyFile(t, dek), f.Name())...)
			if code, out := cryptsetup(t, append(open, keyFile(t, keymemtest.Random(t, luks.KeySize)), f.Name())...); code != 2 {
				t.Errorf("cryptsetup opens with a wrong key: exit code %d\n%s", code, out)
			}
			if out := mustCryptsetup(t, "--verbose", "repair", f.Name()); !strings.Contains(out, "No known problems") {
				t.Errorf("cryptsetup repair: %s", out)
			}
		})
	}
}
