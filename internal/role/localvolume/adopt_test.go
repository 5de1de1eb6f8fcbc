package localvolume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// foreign makes a volume whose data begin at 64 KiB, writes to it and returns it
// with what it holds.
func foreign(t testing.TB, dek *keymem.Key) (*blockdev.Memory, luks.Segment, []byte) {
	t.Helper()
	const size = 32 << 10
	mem := blockdev.NewMemory(0, 512)
	check(t, volume.Format(mem, volume.FormatOptions{Size: size, DataOffset: 64 << 10, UUID: "5e7bb1d4-1111-4222-8333-444455556666", DEK: dek}))
	v, err := volume.Open(mem, dek, volume.Options{})
	check(t, err)
	want := make([]byte, size)
	copy(want[512:], bytes.Repeat([]byte("data"), 3000))
	_, err = v.WriteAt(want[512:16<<10], 512)
	check(t, errors.Join(err, v.Flush()))
	f, err := luks.ReadForeign(mem, mem.Size())
	check(t, err)
	return mem, f.Segment, want
}

// holds checks that dev is a volume that dek opens, and what it holds.
func holds(t testing.TB, dev *blockdev.Memory, dek *keymem.Key, want []byte) {
	t.Helper()
	v, err := volume.Open(dev, dek, volume.Options{})
	check(t, err)
	defer v.Close()
	got := make([]byte, v.Size())
	_, err = v.ReadAt(got, 0)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the data differ")
	}
}

// TestAdoptFaults fails every operation on the new volume, and on the old one, in
// turn, in every way: the old one is only read, and what adopt says is a volume is
// one after a power loss.
func TestAdoptFaults(t *testing.T) {
	t.Parallel()
	for _, inSource := range []bool{false, true} {
		for _, mode := range faultdev.Modes() {
			t.Run(fmt.Sprintf("source=%v/%s", inSource, mode), func(t *testing.T) {
				t.Parallel()
				rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
				dek := keymemtest.Random(t, luks.KeySize)
				mem, segment, want := foreign(t, dek)
				before := mem.Clone()
				n := 0
				for ; ; n += blockdevtest.FaultStep {
					out, src := faultdev.New(blockdev.NewMemory(0, 512), nil), faultdev.New(mem, nil)
					faulty := out
					if inSource {
						faulty = src
					}
					faulty.Inject(&faultdev.Fault{Op: n, Mode: mode})
					_, err := adopt(t.Context(), out, src, segment, dek, nil)
					if err == nil {
						holds(t, out.PowerLoss(rng), dek, want)
						break // no operation was left to fail
					}
					if !errors.Is(err, faultdev.ErrInjected) {
						t.Fatalf("operation %d: error %v hides its cause", n, err)
					}
					holds(t, src.PowerLoss(rng), dek, want)
				}
				if n < 2 { // of the source all is read at once, twice
					t.Errorf("only %d operations were there to fail", n)
				}
				holds(t, before, dek, want)
			})
		}
	}
}

// TestAdoptLeavesNothing: whatever fails, there is neither a volume nor a key
// afterwards, and what was in the way is as it was.
func TestAdoptLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name, pass := filepath.Join(dir, "old"), filepath.Join(dir, "pass")
	check(t, os.WriteFile(name, make([]byte, 17<<20), 0o600))
	check(t, os.WriteFile(pass, []byte("secret"), 0o600))
	out, err := exec.Command("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--key-file", pass, "--key-size", "512", name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	passphrase, err := keymem.Read(bytes.NewReader([]byte("secret")), 6)
	check(t, err)
	defer passphrase.Close()
	before, err := os.ReadFile(name)
	check(t, err)
	there := filepath.Join(dir, "there")
	check(t, os.WriteFile(there, []byte("somebody's"), 0o600))
	volumeFile, key := filepath.Join(dir, "new"), filepath.Join(dir, "key")
	stopped, stop := context.WithCancel(t.Context())
	for what, fails := range map[string]func() error{
		"no room for the key": func() error {
			_, err := Adopt(t.Context(), AdoptOptions{Storage: Storage{File: name}, Out: volumeFile, KeyFile: filepath.Join(dir, "none", "key"), Passphrase: passphrase})
			return err
		},
		"a key in the way": func() error {
			_, err := Adopt(t.Context(), AdoptOptions{Storage: Storage{File: name}, Out: volumeFile, KeyFile: there, Passphrase: passphrase})
			return err
		},
		"a file in the way": func() error {
			_, err := Adopt(t.Context(), AdoptOptions{Storage: Storage{File: name}, Out: there, KeyFile: key, Passphrase: passphrase})
			return err
		},
		"stopped": func() error {
			_, err := Adopt(stopped, AdoptOptions{Storage: Storage{File: name}, Out: volumeFile, KeyFile: key, Passphrase: passphrase, Progress: func(int64, int64) { stop() }})
			return err
		},
	} {
		if fails() == nil {
			t.Errorf("%s: no error", what)
		}
		if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 3 {
			t.Errorf("%s: there is %v, %v", what, left, err)
		}
	}
	if text, err := os.ReadFile(there); err != nil || string(text) != "somebody's" {
		t.Errorf("what was in the way is %q, %v", text, err)
	}
	if after, err := os.ReadFile(name); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the old volume was changed, %v", err)
	}
	info, err := Adopt(t.Context(), AdoptOptions{Storage: Storage{File: name}, Out: volumeFile, KeyFile: key, Passphrase: passphrase})
	if err != nil || info.Size != 1<<20 {
		t.Errorf("%+v, %v", info, err)
	}
}
