package volume_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/vhostuser/vhostusertest"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestRekeyUnderFio has fio write through NBD and through vhost-user, and verify
// what it wrote, with checksums, while the volume is rekeyed, shallowly and
// deeply, again and again.
func TestRekeyUnderFio(t *testing.T) {
	t.Parallel()
	for name, reach := range map[string]func(testing.TB, string, *volume.Volume) blockdev.Device{
		"NBD":        func(_ testing.TB, _ string, v *volume.Volume) blockdev.Device { return v },
		"vhost-user": overVhostUser,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dek, next := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
			dir := t.TempDir()
			f, err := blockdev.OpenFile(filepath.Join(dir, "disk.luks"), blockdev.FileOptions{Create: true})
			check(t, err)
			check(t, volume.Format(f, volume.FormatOptions{Size: 16 << 20, DEK: dek, UUID: testUUID, Safe: newSafe(t, dek, "first", 1)}))
			v := openVolume(t, f, dek)
			socket := exportNBD(t, dir, reach(t, dir, v))

			ended := make(chan error, 1)
			start := func() { go func() { ended <- fioVerify(dir, socket) }() }
			start()
			rekeys := 0
			for running := true; running; rekeys++ {
				check(t, v.ReplaceSafe(newSafe(t, dek, "shallow", uint64(2*rekeys+2))))
				check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next, NewSafe: newSafe(t, next, "deep", uint64(2*rekeys+3)), Zone: 1 << 20}))
				dek, next = next, dek
				select {
				case err := <-ended:
					check(t, err)
					if running = rekeys < 2; running {
						start()
					}
				default:
				}
			}
			check(t, v.Close())
			again, err := blockdev.OpenFile(filepath.Join(dir, "disk.luks"), blockdev.FileOptions{})
			check(t, err)
			check(t, openVolume(t, again, dek).Close())
		})
	}
}

// fioVerify has fio write to an export and compare what it reads.
func fioVerify(dir, socket string) error {
	cmd := exec.Command("fio", "--name=verify", "--ioengine=nbd", fmt.Sprintf("--uri=nbd+unix:///disk?socket=%s", socket), "--rw=randwrite",
		"--bsrange=4k-64k", "--size=16m", "--loops=3", "--iodepth=16", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--do_verify=1")
	cmd.Dir = dir // fio leaves files behind
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("fio: %w\n%s", err, out)
	}
	return nil
}

// exportNBD serves dev until the test ends, and returns the socket.
func exportNBD(t testing.TB, dir string, dev blockdev.Device) string {
	t.Helper()
	server := nbd.NewServer(nbd.Config{})
	check(t, server.AddExport(nbd.Export{Name: "disk", Device: dev}))
	socket := filepath.Join(dir, "nbd")
	listener, err := net.Listen("unix", socket)
	check(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	t.Cleanup(func() {
		check(t, server.Shutdown(context.Background()))
		check(t, <-served)
	})
	return socket
}

// overVhostUser serves v over vhost-user until the test ends, and returns the
// disk that a guest has there: fio has no engine for vhost-user.
func overVhostUser(t testing.TB, dir string, v *volume.Volume) blockdev.Device {
	t.Helper()
	socket := filepath.Join(dir, "vhost")
	listener, err := net.Listen("unix", socket)
	check(t, err)
	server, err := vhostuser.NewServer(vhostuser.Config{Device: v, Queues: 2})
	check(t, err)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		check(t, <-served)
	})
	f, err := vhostusertest.Dial(socket, vhostusertest.Options{Queues: 2, Timeout: 2 * time.Minute})
	check(t, err)
	guest, err := vhostusertest.NewDevice(f)
	check(t, err)
	t.Cleanup(func() { guest.Close() })
	return guest
}
