package blockfuse

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Sentinels of [New] and [Clear].
var (
	// ErrMountPoint: what is at the path is no empty regular file.
	ErrMountPoint = errors.New("it is not an empty file")
	// ErrMounted: something else is mounted at the path.
	ErrMounted = errors.New("something is mounted there")
	// ErrDead: at the path is a mount whose process has gone, and it could not be
	// cleared away.
	ErrDead = errors.New("the process that served the mount there is gone")
)

// Clear unmounts what a process of ours that was killed has left at path, and
// reports whether there was something. Those who still have the file open get
// errors, as before. Only root can, and only what root had mounted; others get
// [ErrDead], as does everybody for a dead mount of another kind. A mount that is
// served, or of another user, is left alone ([ErrMounted]).
func Clear(path string) (bool, error) {
	path, err := resolve(path)
	if err != nil {
		return false, err
	}
	kind, err := mounted(path)
	if err != nil || kind == "" {
		return false, err
	}
	if _, err := os.Lstat(path); !errors.Is(err, unix.ENOTCONN) {
		return false, fmt.Errorf("%w (%s)", ErrMounted, kind)
	}
	if kind != "fuse."+fileSystem {
		return false, fmt.Errorf("%w (%s)", ErrDead, kind)
	}
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return false, fmt.Errorf("%w (%s): %w", ErrDead, kind, err)
	}
	return true, nil
}

// prepare returns the absolute path of the mount point, and whether it made the
// file.
func prepare(path string) (absolute string, made bool, err error) {
	if path, err = resolve(path); err != nil {
		return "", false, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err == nil {
		return path, true, f.Close()
	}
	if !errors.Is(err, fs.ErrExist) {
		return "", false, err
	}
	st, err := os.Lstat(path)
	if err != nil {
		return "", false, err
	}
	if !isEmptyFile(st) {
		return "", false, ErrMountPoint
	}
	return path, false, nil
}

// resolve makes path absolute and follows the links of its folder, so that it is
// as the kernel has it. The last element is not looked at: it may be a dead mount.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(path)), nil
}

func isEmptyFile(st fs.FileInfo) bool { return st.Mode().IsRegular() && st.Size() == 0 }

// mounted returns the type of the file system that is mounted at path, "" for
// none. It asks only the kernel: a mount that hangs does not make it hang.
func mounted(path string) (string, error) {
	table, err := os.ReadFile("/proc/self/mountinfo") // proc_pid_mountinfo(5)
	if err != nil {
		return "", err
	}
	kind := "" // the last one is on top
	lines := bufio.NewScanner(bytes.NewReader(table))
	lines.Buffer(nil, len(table)+1)
	for lines.Scan() {
		// 36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) >= 5 && len(rest) > 0 && unescape(fields[4]) == path {
			kind = rest[0]
		}
	}
	return kind, lines.Err()
}

// unescape undoes the kernel's \ooo for blanks and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
