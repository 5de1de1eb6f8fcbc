package localvolume

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/errs"
)

// TestEncryptDetachedUndone: stopped before anything is encrypted, the disk is as it
// was and there is no header.
func TestEncryptDetachedUndone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk, header, key := filepath.Join(dir, "disk"), filepath.Join(dir, "header"), filepath.Join(dir, "key")
	want := make([]byte, 1<<20)
	rand.Read(want)
	dek := make([]byte, 64)
	rand.Read(dek)
	for name, b := range map[string][]byte{disk: want, key: dek} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	opts := EncryptOptions{Storage: Storage{File: disk, Header: header}, KeyFile: key}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if _, err := EncryptInPlace(stopped, opts); errs.KindOf(err) != errs.Canceled {
		t.Errorf("error %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the folder holds %v, error %v", entries, err)
	}
	if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk is not as it was, error %v", err)
	}
	info, err := EncryptInPlace(t.Context(), opts)
	if err != nil || info.Size != int64(len(want)) || !info.Detached {
		t.Fatalf("info %+v, error %v", info, err)
	}
	// What is encrypted is not undone.
	if _, err := EncryptInPlace(stopped, opts); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(header); err != nil || st.Mode() != 0o600 {
		t.Errorf("header %v, error %v", st, err)
	}
}
