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

// arena cuts regions into slots. Regions of slots are never unmapped: they are
// reused.
type arena struct {
	mapRegion func(size int) ([]byte, error)

	mu   sync.Mutex   // guards free
	free [16][][]byte // free slots, all zero, by the binary logarithm of their size
}

// process is the arena of all Keys.
var process = arena{mapRegion: mapSecret}

// block is one allocation. It has a pointer and no slice, because fmt prints
// what slices hold, even that of unexported fields.
type block struct {
	arena *arena
	start unsafe.Pointer
	len   int // bytes that were asked for
	size  int // bytes that are wiped and given back
	class int // index into arena.free, or -1 for a region of its own
}

func (a *arena) block(slot []byte, n, class int) *block {
	return &block{arena: a, start: unsafe.Pointer(unsafe.SliceData(slot)), len: n, size: len(slot), class: class}
}

// bytes is the secret.
func (b *block) bytes() []byte { return unsafe.Slice((*byte)(b.start), b.len) }

// slot is the whole memory of the block.
func (b *block) slot() []byte { return unsafe.Slice((*byte)(b.start), b.size) }

func (a *arena) allocate(n int) (*block, error) {
	if n > slotMax {
		page := os.Getpagesize()
		region, err := a.mapRegion((n + page - 1) / page * page)
		if err != nil {
			return nil, err
		}
		return a.block(region, n, -1), nil
	}
	size := max(slotMin, 1<<bits.Len(uint(n-1)))
	class := bits.TrailingZeros(uint(size))

	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free[class]) == 0 {
		region, err := a.mapRegion(regionSize)
		if err != nil {
			return nil, err
		}
		for off := 0; off < regionSize; off += size {
			a.free[class] = append(a.free[class], region[off:off+size:off+size])
		}
	}
	last := len(a.free[class]) - 1
	slot := a.free[class][last]
	a.free[class] = a.free[class][:last]
	return a.block(slot, n, class), nil
}

func (b *block) release() {
	Wipe(b.slot())
	if b.class < 0 {
		// Nothing can be done about a failure, and the memory is zero already.
		_ = unix.Munmap(b.slot())
		return
	}
	b.arena.mu.Lock()
	defer b.arena.mu.Unlock()
	b.arena.free[b.class] = append(b.arena.free[b.class], b.slot())
}

// mapSecret maps size bytes that are neither swapped nor dumped.
func mapSecret(size int) ([]byte, error) {
	if region, err := mapSecretFD(size); err == nil {
		return region, nil
	}
	return mapLocked(size)
}

// mapLocked is the way of kernels without memfd_secret(2).
func mapLocked(size int) ([]byte, error) {
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

// mapSecretFD uses memfd_secret(2): Linux 5.14 and newer, before 6.5 only if
// enabled at boot (secretmem.enable). Its memory is never swapped or dumped.
func mapSecretFD(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
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
