package luks_test

import (
	"errors"
	"strings"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestThin: the mark survives a shallow rekey and what cryptsetup writes, and
// SetThin takes it away again.
func TestThin(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	h := newHeader(t, luks.Options{DEK: dek, Safe: newSafe(t, dek, 1), Thin: true})
	f := newImage(t, 32<<20)
	commit(t, h, f)
	h, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.SetThin(true), h.SetSafe(newSafe(t, dek, 2))); err != nil { // the first changes nothing
		t.Fatal(err)
	}
	commit(t, h, f)
	mustCryptsetup(t, "config", "--label", "changed", f.Name())
	if out := mustCryptsetup(t, "luksDump", f.Name()); strings.Count(out, "strongroom-thin") != 1 {
		t.Errorf("luksDump: %s", out)
	}
	if h, err = f.read(); err != nil || !h.Thin() {
		t.Fatalf("the mark is gone (%v)", err)
	}
	if err := h.SetThin(false); err != nil {
		t.Fatal(err)
	}
	commit(t, h, f)
	if h, err = f.read(); err != nil || h.Thin() {
		t.Fatalf("the mark is still there (%v)", err)
	}
	if safes, err := h.Safes(); err != nil || len(safes) != 1 || safes[0].Generation != 2 {
		t.Errorf("the key safes are %v, %v", safes, err)
	}
}
