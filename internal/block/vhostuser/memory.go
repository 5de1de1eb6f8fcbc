package vhostuser

import (
	"fmt"
	"math"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096
	// maxRegions is how many pieces guest memory may have.
	maxRegions = 64
)

// region is a piece of guest memory that is mapped here.
type region struct {
	regionSpec
	mem     []byte // size bytes
	mapping []byte // what mem is a part of, from Mmap
}

// guestMemory is all of a guest's memory. It changes only while no queue runs.
type guestMemory struct {
	regions []*region // by guest address, without overlap
}

// add maps a region. fd stays the caller's and is not needed after it.
func (m *guestMemory) add(spec regionSpec, fd int) error {
	if len(m.regions) == maxRegions {
		return fmt.Errorf("cannot map guest memory: it has more than %d regions", maxRegions)
	}
	r, err := mapRegion(spec, fd)
	if err != nil {
		return fmt.Errorf("cannot map guest memory at %#x: %w", spec.guest, err)
	}
	i, _ := slices.BinarySearchFunc(m.regions, spec.guest, func(r *region, guest uint64) int {
		if r.guest < guest {
			return -1
		}
		return 1
	})
	if i > 0 && m.regions[i-1].guest+m.regions[i-1].size > spec.guest ||
		i < len(m.regions) && spec.guest+spec.size > m.regions[i].guest {
		r.unmap()
		return fmt.Errorf("cannot map guest memory at %#x: regions overlap", spec.guest)
	}
	m.regions = slices.Insert(m.regions, i, r)
	return nil
}

// remove unmaps the region that was added as spec, whose offset is not looked at.
func (m *guestMemory) remove(spec regionSpec) error {
	i := slices.IndexFunc(m.regions, func(r *region) bool {
		return r.guest == spec.guest && r.size == spec.size && r.user == spec.user
	})
	if i < 0 {
		return badMessage("there is no region of memory at %#x", spec.guest)
	}
	m.regions[i].unmap()
	m.regions = slices.Delete(m.regions, i, i+1)
	return nil
}

// clear unmaps all.
func (m *guestMemory) clear() {
	for _, r := range m.regions {
		r.unmap()
	}
	m.regions = nil
}

func mapRegion(spec regionSpec, fd int) (*region, error) {
	const limit = math.MaxInt64 / 2
	if spec.size == 0 || (spec.guest|spec.size|spec.user|spec.offset)%pageSize != 0 ||
		spec.size > limit || spec.offset > limit || spec.guest+spec.size < spec.guest || spec.user+spec.size < spec.user {
		return nil, badMessage("a region of %d bytes from offset %d, for the guest at %#x, for the front end at %#x",
			spec.size, spec.offset, spec.guest, spec.user)
	}
	mapping, skip, err := mapFile(fd, spec.offset, spec.size)
	if err != nil {
		return nil, err
	}
	return &region{regionSpec: spec, mem: mapping[skip : skip+int(spec.size)], mapping: mapping}, nil
}

// mapFile maps size bytes at offset of a file that another process has passed;
// they are at mapping[skip:]. The file must have them all, and is kept from
// shrinking if its kind allows that: bytes that go away raise SIGBUS. Where it
// does not (a file on tmpfs or hugetlbfs), workers survive that as well.
func mapFile(fd int, offset, size uint64) (mapping []byte, skip int, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, 0, badMessage("memory that is no file")
	}
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil && seals&(unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL) == 0 {
		// Best effort, before the size is looked at.
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, 0, err
		}
	}
	if offset+size < offset || offset+size > uint64(st.Size) {
		return nil, 0, badMessage("%d bytes at %d of a file of %d", size, offset, st.Size)
	}
	// A file of huge pages is mapped in huge pages.
	unit := uint64(pageSize)
	if b := uint64(st.Blksize); b > unit && b&(b-1) == 0 && b <= 1<<30 {
		unit = b
	}
	start := offset &^ (unit - 1)
	length := (offset - start + size + unit - 1) &^ (unit - 1)
	mapping, err = unix.Mmap(fd, int64(start), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, 0, err
	}
	// Best effort: a kernel without it only dumps more.
	_ = unix.Madvise(mapping, unix.MADV_DONTDUMP)
	return mapping, int(offset - start), nil
}

func (r *region) unmap() {
	_ = unix.Munmap(r.mapping) // fails only for what Mmap did not return
	r.mem, r.mapping = nil, nil
}

// user returns n bytes at an address of the front end. They are in one region,
// or it returns nil.
func (m *guestMemory) user(addr, n uint64) []byte {
	for _, r := range m.regions {
		if addr >= r.user && addr-r.user < r.size {
			return part(r.mem, addr-r.user, n)
		}
	}
	return nil
}

// find returns the region with a guest address, or nil.
func (m *guestMemory) find(addr uint64) *region {
	for _, r := range m.regions {
		if addr-r.guest < r.size { // wraps for a smaller addr
			return r
		}
	}
	return nil
}

// guest returns n bytes at a guest address. They are in one region, or it
// returns nil.
func (m *guestMemory) guest(addr, n uint64) []byte {
	r := m.find(addr)
	if r == nil {
		return nil
	}
	return part(r.mem, addr-r.guest, n)
}

func part(mem []byte, off, n uint64) []byte {
	if off > uint64(len(mem)) || n > uint64(len(mem))-off {
		return nil
	}
	return mem[off : off+n : off+n]
}

// appendGuest appends n bytes at a guest address to a list of segments: as one
// segment, as a part of the last one if they follow it, or as several where
// regions meet. It reports false if not all of them are the guest's memory.
func (m *guestMemory) appendGuest(list [][]byte, addr, n uint64) ([][]byte, bool) {
	for n > 0 {
		r := m.find(addr)
		if r == nil {
			return list, false
		}
		k := min(n, r.guest+r.size-addr)
		list = appendSegment(list, part(r.mem, addr-r.guest, k))
		addr, n = addr+k, n-k
	}
	return list, true
}

func appendSegment(list [][]byte, seg []byte) [][]byte {
	if len(list) > 0 {
		last := list[len(list)-1]
		start := unsafe.SliceData(last)
		if unsafe.Add(unsafe.Pointer(start), len(last)) == unsafe.Pointer(unsafe.SliceData(seg)) {
			list[len(list)-1] = unsafe.Slice(start, len(last)+len(seg))
			return list
		}
	}
	return append(list, seg)
}
