package host

import (
	"os"
	"path/filepath"
	"syscall"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/bundle"
)

// settleTime is how long a file must look the same before what is read of it is
// remembered. Two changes within a tick of the file system's clock leave the same
// times; that clock may be another machine's, so it is not compared with ours.
const settleTime = 3 * time.Second

// snapshotDisks remembers what the headers of a VM's snapshots say, until their
// files change: a host may have tens of thousands of them, which hardly ever do, and
// looks at all with each heartbeat.
type snapshotDisks struct {
	now   func() time.Time
	known map[bundle.Disk]seenDisk
}

type seenDisk struct {
	stamp fileStamp
	since time.Time // when the stamp was seen first
	read  bool      // after it had settled; disk and keys are valid
	disk  *strongroomv1.Disk
	keys  []keysafe.Ref
}

// fileStamp is another one after each change of a file, but for changes within a
// tick of its file system's clock. Nobody can set the time changed.
type fileStamp struct {
	dev, inode        uint64
	size, blocks      int64
	modified, changed syscall.Timespec
}

// stampOf returns the stamp of the regular file at path; false if there is none.
// The times of a device say nothing of what is on it.
func stampOf(path string) (fileStamp, bool) {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return fileStamp{}, false
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fileStamp{}, false
	}
	return fileStamp{s.Dev, s.Ino, s.Size, s.Blocks, s.Mtim, s.Ctim}, true
}

// look begins a look at a VM in dir. Its result is [Host.describeDisk] for a disk of
// a snapshot; what it returns is shared with later looks and not to be changed. What
// a look does not ask for is forgotten.
func (s *snapshotDisks) look(h *Host, dir string, vm *bundle.VM) func(bundle.Disk) (*strongroomv1.Disk, []keysafe.Ref, error) {
	before := s.known
	s.known = map[bundle.Disk]seenDisk{}
	return func(d bundle.Disk) (*strongroomv1.Disk, []keysafe.Ref, error) {
		stamp, ok := stampOf(filepath.Join(dir, d.File)) // before the read, which then is not older
		if !ok || d.Format != bundle.FormatLUKS {
			return h.describeDisk(dir, vm, d)
		}
		now, seen := s.now(), before[d]
		if seen.stamp != stamp {
			seen = seenDisk{stamp: stamp, since: now}
		}
		if !seen.read {
			var err error
			if seen.disk, seen.keys, err = h.describeDisk(dir, vm, d); err != nil {
				return seen.disk, seen.keys, err
			}
			seen.read = now.Sub(seen.since) >= settleTime
		}
		s.known[d] = seen
		return seen.disk, seen.keys, nil
	}
}
