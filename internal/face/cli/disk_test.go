package cli_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestExportKey: the file holds the key, what is printed does not, and nothing
// that exists is overwritten.
func TestExportKey(t *testing.T) {
	t.Parallel()
	for _, thin := range []bool{false, true} {
		s := newSession(t)
		s.thin = thin
		if thin {
			s.sectorSize = 4096
		}
		var got strings.Builder
		for _, format := range []string{"table", "json"} {
			out := filepath.Join(s.dir, format+".key")
			stdout, stderr, code := s.run(t, "disk", "export-key", "web-1", "disk-0", "--out", out, "-o", format)
			if code != 0 || stderr != "" {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			fmt.Fprintf(&got, "%s:\n%s\n", format, strings.ReplaceAll(stdout, s.dir, "/dev/shm"))
			for _, form := range []string{string(exportedDEK[:8]), hex.EncodeToString(exportedDEK[:8]), base64.StdEncoding.EncodeToString(exportedDEK[:9])} {
				if strings.Contains(strings.ToLower(stdout), strings.ToLower(form)) {
					t.Errorf("the key is printed: %s", stdout)
				}
			}
			info, err := os.Stat(out)
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			if text, _ := os.ReadFile(out); !bytes.Equal(text, exportedDEK) {
				t.Errorf("the file holds %x", text)
			}
			if _, stderr, code := s.run(t, "disk", "export-key", "web-1", "disk-0", "--out", out); code != 1 || !strings.Contains(stderr, "exists") {
				t.Errorf("into a file that exists: %d, %s", code, stderr)
			}
		}
		golden(t, fmt.Sprintf("testdata/output/disk_export-key_thin_%v.txt", thin), got.String())
	}
}

// TestFillByHand runs what the sheet says of a thin disk, with a file in place of
// dm-crypt's device: where the volume is empty, and only there, zeros are written.
func TestFillByHand(t *testing.T) {
	t.Parallel()
	const sector, sectors, offset = 4096, 100, 16 << 20
	s := newSession(t)
	s.thin, s.sectorSize = true, sector
	stdout, stderr, code := s.run(t, "disk", "export-key", "web-1", "disk-0", "--out", filepath.Join(s.dir, "key"))
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	volume, mapped := make([]byte, offset+sectors*sector), bytes.Repeat([]byte{0xff}, sectors*sector)
	want := bytes.Clone(mapped)
	for i := range sectors {
		if i%3 == 0 {
			volume[offset+i*sector+sector-1] = 1 // its last byte only
		} else {
			clear(want[i*sector : (i+1)*sector])
		}
	}
	files := map[string][]byte{"volume": volume, "mapped": mapped}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(s.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, script, _ := strings.Cut(stdout, "python3 - ")
	script, _, _ = strings.Cut(script, "\nEND\n")
	for old, new := range map[string]string{
		"'/srv/ds 1/web-1/disk-0.luks'": filepath.Join(s.dir, "volume"),
		"/dev/mapper/web-1-disk-0":      filepath.Join(s.dir, "mapped"),
		fmt.Sprint(int64(10 << 30)):     fmt.Sprint(sectors * sector),
	} {
		if strings.Count(script, old) != 1 {
			t.Fatalf("the script names %s %d times:\n%s", old, strings.Count(script, old), script)
		}
		script = strings.ReplaceAll(script, old, new)
	}
	if out, err := exec.Command("sh", "-c", "python3 - "+script+"\nEND\n").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(s.dir, "mapped"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("other sectors than the empty ones were written")
	}
}
