package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/test/guest"
	"strongroom/test/guest/plan"
)

// The escape hatch: a disk of ours opens with cryptsetup, dm-crypt and the
// exported volume key, and a disk of theirs with our code. The guests have the
// exported volume key as /dev/vda, and the image files behind it.

// dmGuest builds a guest that has cryptsetup, and the volume key in /run/dek.
func dmGuest(t *testing.T, programs []string, steps ...guest.Step) guest.Image {
	t.Helper()
	image, err := guest.Build(t.Context(), guest.Options{
		Programs: append([]string{"cryptsetup"}, programs...),
		Modules:  guest.DMCrypt(),
		Steps:    append([]guest.Step{{Name: "key", Command: "mkdir /run/cryptsetup; head -c 64 /dev/vda > /run/dek"}}, steps...),
	})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// boot runs a guest to its end; it fails the test if a step did not succeed.
func boot(t *testing.T, image guest.Image, drives ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// Argon2 in the guest needs memory.
	console, err := guest.Run(ctx, guest.Machine{Image: image, Drives: drives, Memory: 256})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(console)
	return console
}

func rawDrive(file string) string {
	return "format=raw,file=" + strings.ReplaceAll(file, ",", ",,")
}

// exportKey writes a key to a file that a guest sees as a disk.
func exportKey(t *testing.T, key *keymem.Key) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "dek")
	if err := os.WriteFile(name, append(bytes.Clone(key.Bytes()), make([]byte, 512-key.Len())...), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func randomDEK(t *testing.T) *keymem.Key {
	t.Helper()
	dek, err := keymem.Random(luks.KeySize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dek.Close() })
	return dek
}

// newVolume makes an image file with an empty volume.
func newVolume(t *testing.T, opts volume.FormatOptions) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.luks")
	file, err := blockdev.OpenFile(name, blockdev.FileOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(volume.Format(file, opts), file.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// withVolume opens a volume for the time of a call.
func withVolume(t *testing.T, name string, dek *keymem.Key, use func(v *volume.Volume)) {
	t.Helper()
	file, err := blockdev.OpenFile(name, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v, err := volume.Open(file, dek, volume.Options{})
	if err != nil {
		file.Close()
		t.Fatal(err)
	}
	defer v.Close()
	use(v)
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
}

// area is a part of a disk with the pattern of a seed.
type area struct{ off, length, seed int64 }

// step reads or writes the area on /dev/mapper/NAME in a guest.
func (a area) step(verb, name string) guest.Step {
	return guest.Step{
		Name:    fmt.Sprintf("%s-%s-%d", verb, name, a.off),
		Command: fmt.Sprintf("agent %s-pattern /dev/mapper/%s %d %d %d", verb, name, a.off, a.length, a.seed),
	}
}

func (a area) pattern() []byte {
	b := make([]byte, a.length)
	plan.Fill(b, a.off, uint64(a.seed))
	return b
}

func (a area) write(t *testing.T, v *volume.Volume) {
	t.Helper()
	if _, err := v.WriteAt(a.pattern(), a.off); err != nil {
		t.Fatal(err)
	}
}

func (a area) verify(t *testing.T, v *volume.Volume) {
	t.Helper()
	got := make([]byte, a.length)
	if _, err := v.ReadAt(got, a.off); err != nil {
		t.Fatal(err)
	}
	if want := a.pattern(); !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("byte %d of the disk differs, in the area at %d of %d bytes", a.off+int64(i), a.off, a.length)
			}
		}
	}
}

// openLUKS is how a recovery sheet says to open a volume.
const openLUKS = "cryptsetup open --type luks2 --key-size 512 --volume-key-file"

func TestDMCryptOpensOurVolume(t *testing.T) {
	t.Parallel()
	const size = 64 << 20
	ours := []area{{0, 1 << 20, 1}, {7*1000*4096 + 4096, 12288, 2}, {size - 2<<20, 2 << 20, 3}}
	theirs := []area{{1 << 20, 1 << 20, 4}, {40 << 20, 65536, 5}, {size - 2<<20, 4096, 6}}
	after := append(slices.Clone(theirs), ours[0], ours[1], area{size - 2<<20 + 4096, 2<<20 - 4096, 3})
	volumes := []struct {
		name   string
		opts   volume.FormatOptions
		open   string // in the guest; it makes /dev/mapper/NAME of DEVICE
		device string
	}{
		{"plain512", volume.FormatOptions{}, openLUKS + " /run/dek /dev/vdb plain512", "/dev/vdb"},
		{"plain4096", volume.FormatOptions{SectorSize: 4096, DataOffset: 1 << 20}, openLUKS + " /run/dek /dev/vdc plain4096", "/dev/vdc"},
		// Without any header, when all else is lost.
		{"headerless", volume.FormatOptions{DataOffset: 32768}, "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file /run/dek --offset 64 --sector-size 512 /dev/vdd headerless", "/dev/vdd"},
	}

	dek := randomDEK(t)
	drives := []string{rawDrive(exportKey(t, dek))}
	disks := make([]string, len(volumes))
	var steps []guest.Step
	for i, vol := range volumes {
		vol.opts.Size, vol.opts.DEK = size, dek
		disks[i] = newVolume(t, vol.opts)
		withVolume(t, disks[i], dek, func(v *volume.Volume) {
			for _, a := range ours {
				a.write(t, v)
			}
		})
		drives = append(drives, rawDrive(disks[i]))
		steps = append(steps,
			guest.Step{Name: "wrong-key", Command: "head -c 64 /dev/urandom > /run/wrong; ! " + openLUKS + " /run/wrong " + vol.device + " wrong"},
			guest.Step{Name: "open-" + vol.name, Command: vol.open},
			guest.Step{Name: "size", Command: fmt.Sprintf("test $(blockdev --getsize64 /dev/mapper/%s) = %d", vol.name, size)})
		for _, a := range ours {
			steps = append(steps, a.step("verify", vol.name))
		}
		for _, a := range theirs {
			steps = append(steps, a.step("write", vol.name))
		}
		steps = append(steps, guest.Step{Name: "close", Command: "cryptsetup close " + vol.name})
	}
	boot(t, dmGuest(t, nil, steps...), drives...)
	for _, disk := range disks {
		withVolume(t, disk, dek, func(v *volume.Volume) {
			for _, a := range after {
				a.verify(t, v)
			}
		})
	}
}

func TestWeOpenVolumeOfDMCrypt(t *testing.T) {
	t.Parallel()
	dek := randomDEK(t)
	disk := filepath.Join(t.TempDir(), "disk.luks")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 48<<20); err != nil {
		t.Fatal(err)
	}
	areas := []area{{0, 1 << 20, 1}, {20 << 20, 4096, 2}, {31 << 20, 1 << 20, 3}}
	steps := []guest.Step{
		{Name: "format", Command: "echo -n recovery > /run/passphrase; cryptsetup luksFormat --batch-mode --type luks2 --key-size 512 --sector-size 512 --key-file /run/passphrase --volume-key-file /run/dek --pbkdf argon2id --pbkdf-memory 4096 --pbkdf-force-iterations 4 /dev/vdb"},
		{Name: "open", Command: "cryptsetup open --key-file /run/passphrase /dev/vdb plain"},
	}
	for _, a := range areas {
		steps = append(steps, a.step("write", "plain"))
	}
	steps = append(steps, guest.Step{Name: "close", Command: "cryptsetup close plain"})
	boot(t, dmGuest(t, nil, steps...), rawDrive(exportKey(t, dek)), rawDrive(disk))

	file, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	h, err := luks.Read(file, 48<<20)
	if err != nil {
		t.Fatal(err)
	}
	passphrase, err := keymem.Take([]byte("recovery"))
	if err != nil {
		t.Fatal(err)
	}
	defer passphrase.Close()
	unlocked, err := h.UnlockPassphrase(file, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer unlocked.Close()
	if !unlocked.Equal(dek) {
		t.Fatal("the passphrase unlocks another key")
	}
	withVolume(t, disk, unlocked, func(v *volume.Volume) {
		for _, a := range areas {
			a.verify(t, v)
		}
	})
}

// TestFileSystemCrossesOver moves an ext4 file system to and fro: made under
// dm-crypt, used through our NBD server, and read under dm-crypt again.
func TestFileSystemCrossesOver(t *testing.T) {
	t.Parallel()
	dek := randomDEK(t)
	disk := newVolume(t, volume.FormatOptions{Size: 64 << 20, DEK: dek})
	key := exportKey(t, dek)
	open := guest.Step{Name: "open", Command: openLUKS + " /run/dek /dev/vdb plain"}
	write := guest.Step{Name: "write", Command: "agent write-files /mnt/$(cat /proc/sys/kernel/random/uuid) 20 50000 MARKER"}
	verify := guest.Step{Name: "verify", Command: "agent verify-files /mnt"}
	end := guest.Step{Name: "end", Command: "umount /mnt; cryptsetup close plain"}

	boot(t, dmGuest(t, []string{"mke2fs"}, open,
		guest.Step{Name: "format", Command: "mke2fs -q -t ext4 /dev/mapper/plain"},
		guest.Step{Name: "mount", Command: "mount -t ext4 /dev/mapper/plain /mnt"}, write, verify, end),
		rawDrive(key), rawDrive(disk))

	through, err := guest.Build(t.Context(), guest.Options{Steps: []guest.Step{
		{Name: "mount", Command: "mount -t ext4 /dev/vda /mnt"},
		verify, write,
		{Name: "zeros", Command: "dd if=/dev/zero of=/mnt/zeros bs=1M count=4 && cd /mnt && sha256sum zeros > SHA256SUMS"},
		{Name: "unmount", Command: "umount /mnt"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	withVolume(t, disk, dek, func(v *volume.Volume) {
		socket := serve(t, v)
		boot(t, through, "format=raw,discard=unmap,detect-zeroes=unmap,file.driver=nbd,file.server.type=unix,file.server.path="+socket)
	})

	boot(t, dmGuest(t, []string{"mke2fs", "e2fsck"}, open,
		guest.Step{Name: "check", Command: "e2fsck -fn /dev/mapper/plain"},
		guest.Step{Name: "mount", Command: "mount -t ext4 -o ro /dev/mapper/plain /mnt"}, verify, end),
		rawDrive(key), rawDrive(disk))

	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte("MARKER")) {
		t.Error("the marker is in plain text on the disk")
	}
	if out, err := exec.Command("cryptsetup", "luksDump", disk).CombinedOutput(); err != nil {
		t.Errorf("cryptsetup luksDump: %v\n%s", err, out)
	}
}

// serve serves a device over NBD on a unix socket until the test ends.
func serve(t *testing.T, dev blockdev.Device) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Device: dev}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("NBD server: %v", err)
		}
	})
	return socket
}
