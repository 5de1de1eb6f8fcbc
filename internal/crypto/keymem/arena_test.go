package keymem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mappings are the ways of getting memory that this kernel has. The locked one
// is everywhere.
func mappings(t *testing.T) map[string]func(int) ([]byte, error) {
	m := map[string]func(int) ([]byte, error){"locked": mapLocked}
	if secretMemory(t) {
		m["memfd_secret"] = mapSecretFD
	}
	return m
}

// secretMemory asks the kernel itself, so that a mistake in mapSecretFD does
// not look like an old kernel.
func secretMemory(t *testing.T) bool {
	fd, err := unix.MemfdSecret(0)
	if errors.Is(err, unix.ENOSYS) {
		t.Log("this kernel has no memfd_secret")
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return true
}

func TestMappings(t *testing.T) {
	for name, mapRegion := range mappings(t) {
		region, err := mapRegion(regionSize)
		if err != nil {
			t.Fatal(name, err)
		}
		region[0], region[len(region)-1] = 1, 1
		file, flags := mapping(t, address(region))
		// lo: locked; dd: not in core dumps; dc: not in children.
		for _, flag := range []string{"lo", "dd", "dc"} {
			if !slices.Contains(flags, flag) {
				t.Errorf("%s: flags %v lack %s", name, flags, flag)
			}
		}
		if isSecret := strings.Contains(file, "secretmem"); isSecret != (name == "memfd_secret") {
			t.Errorf("%s: the mapping is of %q", name, file)
		}
		if err := unix.Munmap(region); err != nil {
			t.Error(name, err)
		}
	}
}

func TestKeysAreInSecretMemory(t *testing.T) {
	for _, n := range []int{32, slotMax, slotMax + 1, SizeMax} {
		k, err := New(n)
		if err != nil {
			t.Fatal(err)
		}
		file, flags := mapping(t, address(k.Bytes()))
		if secretMemory(t) && !strings.Contains(file, "secretmem") {
			t.Errorf("%d bytes are in a mapping of %q, not of memfd_secret", n, file)
		}
		if !slices.Contains(flags, "dd") || !slices.Contains(flags, "lo") {
			t.Errorf("%d bytes are in a mapping with flags %v", n, flags)
		}
		at := address(k.Bytes())
		k.Close()
		if _, flags := mapping(t, at); (flags == nil) != (n > slotMax) {
			t.Errorf("%d bytes, after Close: flags %v", n, flags)
		}
	}
}

func TestNoLockedMemory(t *testing.T) {
	failed := errors.New("no memory")
	a := &arena{mapRegion: func(int) ([]byte, error) { return nil, failed }}
	for _, n := range []int{1, slotMax, slotMax + 1} {
		if b, err := a.allocate(n); !errors.Is(err, failed) || b != nil {
			t.Errorf("allocate(%d) = %v, %v", n, b, err)
		}
	}
}

// mapping returns the file and the flags of the mapping that holds address at,
// from /proc/self/smaps, or nothing if there is none.
func mapping(t *testing.T, at uintptr) (file string, flags []string) {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	inside := false
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		var from, to uintptr
		if n, _ := fmt.Sscanf(fields[0], "%x-%x", &from, &to); n == 2 {
			inside = from <= at && at < to
			file = strings.Join(fields[min(5, len(fields)):], " ")
		}
		if inside && fields[0] == "VmFlags:" {
			return file, fields[1:]
		}
	}
	return "", nil
}
