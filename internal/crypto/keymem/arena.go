package keymem

import (
	"fmt"
	"math/bits"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Small secrets share regions, because a page for each of 40,000 KEKs would
// exhaust RLIMIT_MEMLOCK. A region is cut into slots of one size, a power of
// two; larger secrets have a region of their own.
const (
	slotMin    = 64        // bytes; also the alignment promised by New
	slotMax    = 8 << 10   // bytes; larger secrets get their own region
	regionSize = 256 << 10 // bytes
)

// block is one allocation. bytes has the length that was asked for; slot is
// the whole of what is wiped and given back.
type block struct {
	bytes []byte
	slot  []byte
	class int // index into arena.free, or -1 for a region of its own
}

// arena is the process's secret memory. Regions of slots are never unmapped:
// they are reused.
var arena struct {
	mu   sync.Mutex // guards free
	free [16][][]byte
}

func allocate(n int) (*block, error) {
	if n > slotMax {
		page := os.Getpagesize()
		region, err := mapSecret((n + page - 1) / page * page)
		if err != nil {
			return nil, err
		}
		return &block{bytes: region[:n:n], slot: region, class: -1}, nil
	}
	size := max(slotMin, 1<<bits.Len(uint(n-1)))
	class := bits.TrailingZeros(uint(size))

	arena.mu.Lock()
	defer arena.mu.Unlock()
	if len(arena.free[class]) == 0 {
		region, err := mapSecret(regionSize)
		if err != nil {
			return nil, err
		}
		for off := 0; off < regionSize; off += size {
			arena.free[class] = append(arena.free[class], region[off:off+size:off+size])
		}
	}
	last := len(arena.free[class]) - 1
	slot := arena.free[class][last]
	arena.free[class] = arena.free[class][:last]
	return &block{bytes: slot[:n:n], slot: slot, class: class}, nil
}

func (b *block) release() {
	Wipe(b.slot)
	if b.class < 0 {
		// Nothing can be done about a failure, and the memory is zero already.
		_ = unix.Munmap(b.slot)
		return
	}
	arena.mu.Lock()
	defer arena.mu.Unlock()
	arena.free[b.class] = append(arena.free[b.class], b.slot)
}

// mapSecret maps size bytes that are neither swapped nor dumped.
func mapSecret(size int) ([]byte, error) {
	if region, err := mapSecretFD(size); err == nil {
		return region, nil
	}
	region, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("keymem: cannot map %d bytes: %w", size, err)
	}
	if err := unix.Mlock(region); err != nil {
		_ = unix.Munmap(region)
		return nil, fmt.Errorf("keymem: cannot lock %d bytes in memory (is the limit on locked memory, ulimit -l, too low?): %w", size, err)
	}
	if err := unix.Madvise(region, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(region)
		return nil, fmt.Errorf("keymem: cannot keep %d bytes out of core dumps: %w", size, err)
	}
	// A child made by fork must not inherit the secrets, not even until exec.
	if err := unix.Madvise(region, unix.MADV_DONTFORK); err != nil {
		_ = unix.Munmap(region)
		return nil, fmt.Errorf("keymem: cannot keep %d bytes from child processes: %w", size, err)
	}
	return region, nil
}

// mapSecretFD uses memfd_secret(2), Linux 5.14 and newer.
func mapSecretFD(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.FD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	region, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	if err := unix.Madvise(region, unix.MADV_DONTFORK); err != nil {
		_ = unix.Munmap(region)
		return nil, err
	}
	return region, nil
}

// address is where b starts; tests look for it in /proc/self/smaps.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
