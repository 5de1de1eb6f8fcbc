package image

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestImageChanges: who writes to an image after it was looked at does not get what is
// in other files of the host into the disk.
func TestImageChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	secret := bytes.Repeat([]byte("a secret of the host"), 4096)
	check(t, os.WriteFile(filepath.Join(dir, "secret"), secret, 0o600))
	for name, args := range map[string][]string{
		"backing":   {"-b", filepath.Join(dir, "secret"), "-F", "raw", "other", "64K"},
		"data file": {"-o", "data_file=" + filepath.Join(dir, "data") + ",data_file_raw=on", "other", "64K"},
	} {
		for _, args := range [][]string{{"image", "64K"}, args} {
			cmd := exec.Command("qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, args...)...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, out)
			}
		}
		check(t, os.Rename(filepath.Join(dir, "secret"), filepath.Join(dir, "data")))
		check(t, os.WriteFile(filepath.Join(dir, "secret"), secret, 0o600))
		path := filepath.Join(dir, "image")
		o, err := open(path)
		check(t, err)
		other, err := os.ReadFile(filepath.Join(dir, "other"))
		check(t, err)
		check(t, os.WriteFile(path, other, 0o600)) // the same file with other contents

		disk := blockdev.NewMemory(64<<10, 512)
		socket := filepath.Join(dir, "nbd.sock")
		listener, err := net.Listen("unix", socket)
		check(t, err)
		server := nbd.NewServer(nbd.Config{})
		check(t, server.AddExport(nbd.Export{Name: "disk", Device: disk}))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- server.Serve(ctx, listener) }()
		t.Log(name, o.convert(t.Context(), socket, "disk", false, nil)) // either it fails, or the disk is what it was
		stop()
		check(t, <-ended)
		got := make([]byte, disk.Size())
		_, err = disk.ReadAt(got, 0)
		check(t, err)
		if bytes.Contains(got, []byte("a secret")) {
			t.Errorf("%s: the disk holds what another file of the host holds", name)
		}
	}
}
