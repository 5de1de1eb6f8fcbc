package keyfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

func TestCreateRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "k")
	made, err := keyfile.Create(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	got, err := keyfile.Read(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(made) {
		t.Error("the key read is not the one made")
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v; want 0600", info.Mode(), err)
	}
	if _, err := keyfile.Create(path, 32); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create over a file: error %v, want ErrExist", err)
	}
	if again, err := keyfile.Read(path, 32); err != nil || !again.Equal(made) {
		t.Errorf("Create over a file changed it: %v", err)
	}
}

// TestWrite makes a file of a key that there is, and overwrites none.
func TestWrite(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "k")
	key, err := keymem.Random(64)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	if err := keyfile.Write(path, key); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v; want 0600", info.Mode(), err)
	}
	if err := keyfile.Write(path, key); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Write over a file: error %v, want ErrExist", err)
	}
	read, err := keyfile.Read(path, 64)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if !read.Equal(key) {
		t.Error("the file holds another key")
	}
}

// TestNameNotDurable: a key file whose name may not outlast a power loss is no
// key file, and making it can be tried again.
func TestNameNotDurable(t *testing.T) { // not parallel: it changes what all use
	dir := t.TempDir()
	path := filepath.Join(dir, "k")
	failure := errors.New("the disk is gone")
	restore := keyfile.SetSyncDir(func(string) error { return failure })
	_, err := keyfile.Create(path, 32)
	restore()
	if !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("the folder holds %v, %v", entries, err)
	}
	key, err := keyfile.Create(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
}

// TestCreateLeavesWhatIsThere: also a link that leads nowhere is something.
func TestCreateLeavesWhatIsThere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "nowhere"), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, link} {
		if key, err := keyfile.Create(path, 32); !errors.Is(err, fs.ErrExist) || key != nil {
			t.Errorf("Create(%s) = %v, %v; want ErrExist", path, key, err)
		}
	}
	if key, err := keyfile.Create(filepath.Join(dir, "none", "k"), 32); !errors.Is(err, fs.ErrNotExist) || key != nil {
		t.Errorf("Create in no folder = %v, %v", key, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v; want the link only", entries, err)
	}
}

// TestCreateRace: of many that make the same file one wins, with the key that is
// in it, and a reader never sees a part of a key.
func TestCreateRace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "k")
	var group sync.WaitGroup
	var winners atomic.Int32
	won := make(chan *keymem.Key, 16)
	for range 16 {
		group.Go(func() {
			if early, err := keyfile.Read(path, 32); err == nil {
				early.Close()
			} else if errs.KindOf(err) != errs.NotFound {
				t.Errorf("a part of a key file was seen: %v", err)
			}
			key, err := keyfile.Create(path, 32)
			switch {
			case err == nil:
				winners.Add(1)
				won <- key
			case !errors.Is(err, fs.ErrExist):
				t.Errorf("error %v", err)
			}
		})
	}
	group.Wait()
	if winners.Load() != 1 {
		t.Fatalf("%d calls made the file", winners.Load())
	}
	made := <-won
	defer made.Close()
	got, err := keyfile.Read(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(made) {
		t.Error("the file holds the key of a call that lost")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v", entries, err)
	}
}

// TestCreateFull: on a full file system there is no file, not an empty one.
func TestCreateFull(t *testing.T) {
	t.Parallel()
	const variable = "STRONGROOM_TEST_KEYFILE_DIR"
	dir := os.Getenv(variable)
	if dir == "" { // again, in a name space where it may mount
		cmd := exec.Command(os.Args[0], "-test.run=^TestCreateFull$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("the file system was full")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "k")
	if key, err := keyfile.Create(path, 32); !errors.Is(err, unix.ENOSPC) || key != nil {
		t.Errorf("Create = %v, %v", key, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v", entries, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	key, err := keyfile.Create(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
	fmt.Println("the file system was full")
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name string, size int, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		kind       errs.Kind
	}{
		{"short", write("short", 31, 0o600), errs.Invalid},
		{"long", write("long", 33, 0o600), errs.Invalid},
		{"empty", write("empty", 0, 0o600), errs.Invalid},
		{"readable by others", write("open", 32, 0o644), errs.Denied},
		{"a folder", dir, errs.Invalid},
		{"a FIFO", fifo, errs.Invalid},
		{"missing", filepath.Join(dir, "missing"), errs.NotFound},
	} {
		if key, err := keyfile.Read(c.path, 32); errs.KindOf(err) != c.kind || key != nil {
			t.Errorf("%s: Read = %v, %v; want kind %v", c.name, key, err, c.kind)
		}
	}
}
