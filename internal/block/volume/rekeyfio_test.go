package volume_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
)

// TestRekeyUnderFio has fio write through NBD and verify what it wrote, with
// checksums, while the volume is rekeyed again and again.
func TestRekeyUnderFio(t *testing.T) {
	t.Parallel()
	dek, next := newKey(t, 64), newKey(t, 64)
	dir := t.TempDir()
	f, err := blockdev.OpenFile(filepath.Join(dir, "disk.luks"), blockdev.FileOptions{Create: true})
	check(t, err)
	check(t, volume.Format(f, volume.FormatOptions{Size: 16 << 20, DEK: dek, UUID: testUUID}))
	v := openVolume(t, f, dek)

	server := nbd.NewServer(nbd.Config{})
	check(t, server.AddExport(nbd.Export{Name: "disk", Device: v}))
	socket := filepath.Join(dir, "nbd")
	listener, err := net.Listen("unix", socket)
	check(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	defer func() {
		check(t, server.Shutdown(context.Background()))
		check(t, <-served)
	}()

	written := make(chan error, 1)
	go func() {
		cmd := exec.Command("fio", "--name=verify", "--ioengine=nbd", fmt.Sprintf("--uri=nbd+unix:///disk?socket=%s", socket), "--rw=randwrite",
			"--bsrange=4k-64k", "--size=16m", "--loops=3", "--iodepth=16", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--do_verify=1")
		cmd.Dir = dir // fio leaves files behind
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("fio: %w\n%s", err, out)
		}
		written <- err
	}()
	rekeys := 0
	for running := true; running; rekeys++ {
		check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next, Zone: 1 << 20}))
		dek, next = next, dek
		select {
		case err := <-written:
			check(t, err)
			running = false
		default:
		}
	}
	if rekeys < 2 {
		t.Errorf("%d rekeys while fio ran", rekeys)
	}
	check(t, v.Close())
	again, err := blockdev.OpenFile(filepath.Join(dir, "disk.luks"), blockdev.FileOptions{})
	check(t, err)
	check(t, openVolume(t, again, dek).Close())
}
