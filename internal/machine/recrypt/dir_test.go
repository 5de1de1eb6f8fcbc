package recrypt_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
	"strongroom/internal/machine/recrypt"
)

// newDir makes a folder with a plain disk.
func newDir(t *testing.T, disk []byte) recrypt.Dir {
	t.Helper()
	dir := recrypt.Dir{Path: t.TempDir()}
	check(t, os.WriteFile(filepath.Join(dir.Path, plainName), disk, 0o600))
	return dir
}

func names(t *testing.T, dir recrypt.Dir) []string {
	t.Helper()
	entries, err := os.ReadDir(dir.Path)
	check(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func wantNames(t *testing.T, dir recrypt.Dir, want ...string) {
	t.Helper()
	if got := names(t, dir); !slices.Equal(got, want) {
		t.Errorf("the folder holds %v, want %v", got, want)
	}
}

func readFile(t *testing.T, dir recrypt.Dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir.Path, name))
	check(t, err)
	return b
}

// TestAll runs every operation on real files, one after the other.
func TestAll(t *testing.T) {
	t.Parallel()
	ctx, keys := t.Context(), newKeyring(t, "1", "2", "3")
	want := bytes.Repeat([]byte("what the guest wrote, 32 bytes. "), 3<<20/32)
	clear(want[1<<20 : 2<<20])
	dir := newDir(t, want)
	var last, total int64
	progress := func(done, all int64) {
		if done < last || done > all {
			t.Errorf("progress went from %d to %d of %d", last, done, all)
		}
		last, total = done, all
	}
	finished := func(what string) {
		t.Helper()
		if last != total || total != int64(2*len(want)) {
			t.Errorf("%s: progress ended at %d of %d", what, last, total)
		}
		last = 0
	}

	check(t, recrypt.Encrypt(ctx, dir, plainName, luksName, reference("1"), keys.get, progress))
	finished("encrypt")
	wantNames(t, dir, luksName, plainName)
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("encryption changed the plain disk")
	}
	if bytes.Contains(readFile(t, dir, luksName), want[:64]) {
		t.Error("the encrypted disk holds plaintext")
	}
	check(t, dir.Remove(plainName))
	info, safes, err := recrypt.Inspect(dir, luksName)
	check(t, err)
	if safes.Current.KEK != reference("1") || safes.Next != nil || info.Size != int64(len(want)) || info.SectorSize != 512 || !info.AllowDiscards {
		t.Errorf("the volume is %+v, its safe %v", info, safes.Current.KEK)
	}

	check(t, recrypt.ShallowRekey(ctx, dir, luksName, reference("2"), keys.get))
	check(t, recrypt.DeepRekey(ctx, dir, luksName, reference("3"), keys.get, nil, progress))
	if last != int64(len(want)) || total != last {
		t.Errorf("deep rekey: progress ended at %d of %d", last, total)
	}
	last = 0
	again, safes, err := recrypt.Inspect(dir, luksName)
	check(t, err)
	if safe := safes.Current; safe.KEK != reference("3") || safe.Generation != 3 || safes.Next != nil || again.UUID != info.UUID || again.Size != info.Size {
		t.Errorf("after the rekeys the volume is %+v, its safe %+v", again, safes.Current)
	}
	check(t, recrypt.Decrypt(ctx, dir, luksName, plainName, keys.get, progress))
	finished("decrypt")
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("decryption gave something else")
	}
	wantNames(t, dir, luksName, plainName)
	if mode, err := os.Stat(filepath.Join(dir.Path, plainName)); err != nil || mode.Mode() != 0o600 {
		t.Errorf("the plain disk has mode %v, error %v", mode.Mode(), err)
	}
}

// TestInTheWay: what somebody put under the name of a result stays.
func TestInTheWay(t *testing.T) {
	t.Parallel()
	ctx, keys := t.Context(), newKeyring(t, "1", "2")
	dir := newDir(t, content())
	theirs := []byte("notes about disk 0")
	check(t, os.WriteFile(filepath.Join(dir.Path, luksName), theirs, 0o600))
	encrypt := func(key string) error {
		return recrypt.Encrypt(ctx, dir, plainName, luksName, reference(key), keys.get, nil)
	}
	if err := encrypt("1"); errs.KindOf(err) != errs.Exists || errs.HintOf(err) == "" || !strings.Contains(err.Error(), luksName) {
		t.Errorf("encrypt over a file: %v", err)
	}
	if !bytes.Equal(readFile(t, dir, luksName), theirs) {
		t.Error("somebody's file was changed")
	}
	check(t, dir.Remove(luksName))
	check(t, encrypt("1"))
	before := readFile(t, dir, luksName)
	if err := encrypt("2"); errs.KindOf(err) != errs.Exists {
		t.Errorf("encrypt over a volume with another KEK: %v", err)
	}
	if !bytes.Equal(readFile(t, dir, luksName), before) {
		t.Error("somebody's volume was changed")
	}

	check(t, os.WriteFile(filepath.Join(dir.Path, plainName), theirs, 0o600))
	if err := recrypt.Decrypt(ctx, dir, luksName, plainName, keys.get, nil); errs.KindOf(err) != errs.Exists {
		t.Errorf("decrypt over a file: %v", err)
	}
	if !bytes.Equal(readFile(t, dir, plainName), theirs) {
		t.Error("somebody's file was changed")
	}
	wantNames(t, dir, luksName, plainName)
}

func TestInUse(t *testing.T) {
	t.Parallel()
	ctx, keys := t.Context(), newKeyring(t, "1", "2")
	dir := newDir(t, content())
	check(t, recrypt.Encrypt(ctx, dir, plainName, luksName, reference("1"), keys.get, nil))
	for _, name := range []string{plainName, luksName} {
		file, err := dir.Open(name)
		check(t, err)
		defer file.Close()
	}
	for what, err := range map[string]error{
		"encrypt":       recrypt.Encrypt(ctx, dir, plainName, "disk-1.luks", reference("1"), keys.get, nil),
		"decrypt":       recrypt.Decrypt(ctx, dir, luksName, "disk-1.raw", keys.get, nil),
		"shallow rekey": recrypt.ShallowRekey(ctx, dir, luksName, reference("2"), keys.get),
		"deep rekey":    recrypt.DeepRekey(ctx, dir, luksName, reference("2"), keys.get, nil, nil),
	} {
		if !errors.Is(err, blockdev.ErrInUse) {
			t.Errorf("%s of a disk in use: %v", what, err)
		}
	}
	wantNames(t, dir, luksName, plainName)
}

// TestLinks: a disk that is a link, or a FIFO, is refused, whatever it leads to.
func TestLinks(t *testing.T) {
	t.Parallel()
	ctx, keys := t.Context(), newKeyring(t, "1")
	elsewhere, dir := newDir(t, content()), recrypt.Dir{Path: t.TempDir()}
	check(t, recrypt.Encrypt(ctx, elsewhere, plainName, luksName, reference("1"), keys.get, nil))
	for _, name := range []string{plainName, luksName} {
		check(t, os.Symlink(filepath.Join(elsewhere.Path, name), filepath.Join(dir.Path, name)))
	}
	check(t, os.Symlink(filepath.Join(elsewhere.Path, "new"), filepath.Join(dir.Path, "disk-1.luks.new")))
	check(t, unix.Mkfifo(filepath.Join(dir.Path, "fifo"), 0o600))
	for _, name := range []string{plainName, luksName, "fifo"} {
		if file, err := dir.Open(name); err == nil {
			file.Close()
			t.Errorf("Open followed link %s", name)
		}
	}
	if file, err := dir.Create("disk-1.luks.new"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create through a link = %v, %v", file, err)
	}
	if err := recrypt.Decrypt(ctx, dir, luksName, "disk-1.raw", keys.get, nil); err == nil {
		t.Error("a link was decrypted")
	}
	// A link in the way of an unfinished file is removed, not what it leads to.
	check(t, dir.Remove("disk-1.luks.new"))
	wantNames(t, elsewhere, luksName, plainName)
}

func TestNames(t *testing.T) {
	t.Parallel()
	dir := newDir(t, nil)
	for _, name := range []string{"", ".", "..", "../x", "a/b", "/etc/passwd", "a/", "./a"} {
		for what, err := range map[string]error{
			"Exists":      second(dir.Exists(name)),
			"Open":        second(dir.Open(name)),
			"Create":      second(dir.Create(name)),
			"Remove":      dir.Remove(name),
			"Rename from": dir.Rename(name, "x"),
			"Rename to":   dir.Rename(plainName, name),
		} {
			if errs.KindOf(err) != errs.Invalid {
				t.Errorf("%s of %q: %v", what, name, err)
			}
		}
	}
	wantNames(t, dir, plainName)
}

func second[T any](_ T, err error) error { return err }

// TestOddSizes: a disk that is not one of whole sectors is refused as such.
func TestOddSizes(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1")
	for _, size := range []int{0, 1, 511, 513} {
		dir := newDir(t, make([]byte, size))
		if err := recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil); errs.KindOf(err) != errs.Invalid {
			t.Errorf("encrypt of %d bytes: %v", size, err)
		}
		wantNames(t, dir, plainName)
	}
}

// TestDamaged: what is no volume, or not a whole one, is told apart and left
// alone.
func TestDamaged(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1", "2")
	dir := newDir(t, content())
	check(t, recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil))
	whole := readFile(t, dir, luksName)
	damaged := bytes.Clone(whole)
	damaged[5000], damaged[5000+16<<10] = '?', '?'
	for name, c := range map[string]struct {
		content []byte
		want    error
	}{
		"plain":     {content(), volume.ErrNotVolume},
		"empty":     {nil, volume.ErrNotVolume},
		"truncated": {whole[:1<<20], volume.ErrTruncated},
		"damaged":   {damaged, volume.ErrCorrupt},
	} {
		check(t, os.WriteFile(filepath.Join(dir.Path, luksName), c.content, 0o600))
		for what, err := range map[string]error{
			"decrypt":       recrypt.Decrypt(t.Context(), dir, luksName, "disk-1.raw", keys.get, nil),
			"shallow rekey": recrypt.ShallowRekey(t.Context(), dir, luksName, reference("2"), keys.get),
			"deep rekey":    recrypt.DeepRekey(t.Context(), dir, luksName, reference("2"), keys.get, nil, nil),
		} {
			if !errors.Is(err, c.want) {
				t.Errorf("%s of a disk that is %s: %v, want %v", what, name, err, c.want)
			}
		}
		if !bytes.Equal(readFile(t, dir, luksName), c.content) {
			t.Errorf("a disk that is %s was written to", name)
		}
	}
	wantNames(t, dir, luksName, plainName)
}

// TestCancel: an operation that is cancelled in the middle leaves the disk and
// nothing else.
func TestCancel(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1", "2")
	disk := bytes.Repeat([]byte("data"), 8<<20/4)
	reason := errors.New("the operator has changed his mind")
	cancelled := func(t *testing.T, run func(context.Context, recrypt.Progress) error) {
		t.Helper()
		ctx, cancel := context.WithCancelCause(t.Context())
		if err := run(ctx, func(int64, int64) { cancel(reason) }); !errors.Is(err, reason) {
			t.Errorf("error %v", err)
		}
	}
	dir := newDir(t, disk)
	cancelled(t, func(ctx context.Context, p recrypt.Progress) error {
		return recrypt.Encrypt(ctx, dir, plainName, luksName, reference("1"), keys.get, p)
	})
	wantNames(t, dir, plainName)
	check(t, recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil))
	check(t, dir.Remove(plainName))
	before := readFile(t, dir, luksName)
	cancelled(t, func(ctx context.Context, p recrypt.Progress) error {
		return recrypt.Decrypt(ctx, dir, luksName, plainName, keys.get, p)
	})
	wantNames(t, dir, luksName)
	if !bytes.Equal(readFile(t, dir, luksName), before) {
		t.Error("the disk was changed")
	}
}

// TestFull: on a full datastore an operation fails as that, the original is as
// it was, and with more space the same call succeeds. It runs itself in a name
// space of its own, where it may mount small file systems.
func TestFull(t *testing.T) {
	t.Parallel()
	const variable = "STRONGROOM_TEST_FULL"
	if os.Getenv(variable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFull$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestFull/deep_rekey")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	keys := newKeyring(t, "1", "2")
	disk := bytes.Repeat([]byte("data"), 4<<20/4)
	mount := func(t *testing.T, options string) recrypt.Dir {
		t.Helper()
		dir := recrypt.Dir{Path: t.TempDir()}
		check(t, unix.Mount("tmpfs", dir.Path, "tmpfs", 0, options))
		t.Cleanup(func() { check(t, unix.Unmount(dir.Path, unix.MNT_DETACH)) })
		return dir
	}
	grow := func(t *testing.T, dir recrypt.Dir) {
		t.Helper()
		check(t, unix.Mount("tmpfs", dir.Path, "tmpfs", unix.MS_REMOUNT, "size=64m"))
	}
	t.Run("encrypt", func(t *testing.T) {
		dir := mount(t, "size=6m")
		check(t, os.WriteFile(filepath.Join(dir.Path, plainName), disk, 0o600))
		encrypt := func() error {
			return recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil)
		}
		if err := encrypt(); !errors.Is(err, blockdev.ErrNoSpace) {
			t.Errorf("error %v", err)
		}
		wantNames(t, dir, plainName)
		if !bytes.Equal(readFile(t, dir, plainName), disk) {
			t.Error("the disk was changed")
		}
		grow(t, dir)
		check(t, encrypt())
	})
	t.Run("deep rekey and decrypt", func(t *testing.T) {
		dir := mount(t, "size=64m")
		check(t, os.WriteFile(filepath.Join(dir.Path, plainName), disk, 0o600))
		check(t, recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil))
		check(t, dir.Remove(plainName))
		check(t, unix.Mount("tmpfs", dir.Path, "tmpfs", unix.MS_REMOUNT, "size=6m"))
		for what, err := range map[string]error{
			"deep rekey": recrypt.DeepRekey(t.Context(), dir, luksName, reference("2"), keys.get, nil, nil),
			"decrypt":    recrypt.Decrypt(t.Context(), dir, luksName, plainName, keys.get, nil),
		} {
			if !errors.Is(err, blockdev.ErrNoSpace) {
				t.Errorf("%s: error %v", what, err)
			}
		}
		wantNames(t, dir, luksName)
		check(t, recrypt.ShallowRekey(t.Context(), dir, luksName, reference("2"), keys.get)) // needs none
		grow(t, dir)
		check(t, recrypt.Decrypt(t.Context(), dir, luksName, plainName, keys.get, nil))
		if !bytes.Equal(readFile(t, dir, plainName), disk) {
			t.Error("the disk was changed")
		}
	})
}
