package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const sumsName = "SHA256SUMS" // in the format of sha256sum(1)

// writeFiles writes COUNT files of SIZE bytes into a new FOLDER, every one with
// the marker in plain text at its start, and their checksums.
func writeFiles(ctx context.Context, args []string) error {
	folder, marker := args[0], args[3]
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	size, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o755); err != nil {
		return err
	}
	var sums bytes.Buffer
	data := make([]byte, size)
	shown := time.Now()
	for i := range count {
		if ctx.Err() != nil {
			return errors.New("stopped")
		}
		name := fmt.Sprintf("file-%04d", i)
		fill(data, 0, uint64(time.Now().UnixNano()))
		copy(data, fmt.Sprintf("%s %s\n", marker, name))
		if err := writeFile(filepath.Join(folder, name), data); err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(data), name)
		if time.Since(shown) > 500*time.Millisecond {
			shown = time.Now()
			note("written %d of %d files", i+1, count)
		}
	}
	if err := writeFile(filepath.Join(folder, sumsName), sums.Bytes()); err != nil {
		return err
	}
	unix.Sync()
	note("written %d files of %d bytes to %s", count, size, folder)
	return nil
}

// writeFile writes and flushes a file.
func writeFile(name string, data []byte) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// verifyFiles checks every list of checksums below FOLDER against what is on
// the disk.
func verifyFiles(_ context.Context, args []string) error {
	if err := dropCaches(); err != nil {
		return err
	}
	files, bytes := 0, int64(0)
	err := filepath.WalkDir(args[0], func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != sumsName {
			return err
		}
		list, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(list)) {
			want, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
			if !ok {
				return fmt.Errorf("%s holds the line %q", path, line)
			}
			name = filepath.Join(filepath.Dir(path), name)
			got, n, err := hashFile(name)
			if err != nil {
				return err
			}
			if got != want {
				return fmt.Errorf("%s has the checksum %s, not %s", name, got, want)
			}
			files, bytes = files+1, bytes+n
		}
		return nil
	})
	if err != nil {
		return err
	}
	note("verified %d files, %d bytes", files, bytes)
	return nil
}

func hashFile(name string) (sum string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// dropCaches makes sure that what is read next comes from the disk.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}

// await waits until PATH exists: a disk may appear late.
func await(ctx context.Context, args []string) error {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(args[0]); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s does not appear", args[0])
}

// blank succeeds if the first MiB of DEVICE is zero: nothing was made on it.
func blank(_ context.Context, args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	start := make([]byte, 1<<20)
	if _, err := io.ReadFull(f, start); err != nil {
		return err
	}
	if len(bytes.Trim(start, "\x00")) != 0 {
		return fmt.Errorf("%s is not blank", args[0])
	}
	return nil
}
