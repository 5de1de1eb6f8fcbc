package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"strongroom/test/guest/plan"
)

const patternChunk = 1 << 20 // bytes of one request

// fill is plan.Fill: the same bytes inside and outside of the guest.
func fill(p []byte, off int64, seed uint64) { plan.Fill(p, off, seed) }

// writePattern fills LENGTH bytes at OFFSET and flushes them.
func writePattern(ctx context.Context, args []string) error {
	return eachChunk(ctx, args, os.O_RDWR, "written", func(f *os.File, chunk []byte, off int64, seed uint64) error {
		fill(chunk, off, seed)
		_, err := f.WriteAt(chunk, off)
		return err
	})
}

// verifyPattern reads LENGTH bytes at OFFSET from the disk and compares.
func verifyPattern(ctx context.Context, args []string) error {
	if err := dropCaches(); err != nil {
		return err
	}
	want := make([]byte, patternChunk)
	return eachChunk(ctx, args, os.O_RDONLY, "verified", func(f *os.File, chunk []byte, off int64, seed uint64) error {
		if _, err := f.ReadAt(chunk, off); err != nil {
			return err
		}
		fill(want[:len(chunk)], off, seed)
		for i := 0; i < len(chunk); i += 512 {
			end := min(i+512, len(chunk))
			if !bytes.Equal(chunk[i:end], want[i:end]) {
				return fmt.Errorf("the sector at offset %d differs", off+int64(i))
			}
		}
		return nil
	})
}

func eachChunk(ctx context.Context, args []string, flag int, done string, do func(f *os.File, chunk []byte, off int64, seed uint64) error) error {
	var numbers [3]int64
	for i := range numbers {
		n, err := strconv.ParseInt(args[i+1], 10, 64)
		if err != nil {
			return err
		}
		numbers[i] = n
	}
	off, length, seed := numbers[0], numbers[1], uint64(numbers[2])
	f, err := os.OpenFile(args[0], flag, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	chunk := make([]byte, patternChunk)
	for end := off + length; off < end; {
		if ctx.Err() != nil {
			return errors.New("stopped")
		}
		n := min(end-off, patternChunk)
		if err := do(f, chunk[:n], off, seed); err != nil {
			return err
		}
		off += n
	}
	if err := f.Sync(); err != nil {
		return err
	}
	note("%s %d bytes of %s", done, length, args[0])
	return nil
}

// churn rewrites blocks of a file, one after the other in a random order, as
// a busy database would, and checks in the end that each of them reads as it
// was written last. It leaves a checksum for verify-files.
func churn(ctx context.Context, args []string) error {
	const blockSize = 4096
	size, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	name, sums := args[0]+"/churn", args[0]+"/"+sumsName
	if err := os.MkdirAll(args[0], 0o755); err != nil {
		return err
	}
	// A checksum of last time must not stand while the file changes.
	if err := os.Remove(sums); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()

	versions := make([]uint64, size/blockSize)
	block, want := make([]byte, blockSize), make([]byte, blockSize)
	writes, random, shown := uint64(0), uint64(time.Now().UnixNano()), time.Now()
	write := func(i int) error {
		writes++
		versions[i] = writes
		fill(block, int64(i)*blockSize, versions[i])
		_, err := f.WriteAt(block, int64(i)*blockSize)
		return err
	}
	for i := range versions {
		if err := write(i); err != nil {
			return err
		}
	}
	for round := 0; (rounds == 0 || round < rounds) && ctx.Err() == nil; round++ {
		for range 32 {
			random = random*6364136223846793005 + 1442695040888963407
			if err := write(int(random>>33) % len(versions)); err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil { // so that all of it reaches the disk
			return err
		}
		if time.Since(shown) > 500*time.Millisecond {
			shown = time.Now()
			note("churned %d writes", writes)
		}
	}

	if err := dropCaches(); err != nil {
		return err
	}
	for i, version := range versions {
		if _, err := f.ReadAt(block, int64(i)*blockSize); err != nil {
			return err
		}
		if fill(want, int64(i)*blockSize, version); !bytes.Equal(block, want) {
			return fmt.Errorf("block %d is not as it was written last", i)
		}
	}
	sum, _, err := hashFile(name)
	if err != nil {
		return err
	}
	if err := writeFile(sums, []byte(sum+"  churn\n")); err != nil {
		return err
	}
	note("churned %d writes, all %d blocks read as written last", writes, len(versions))
	return nil
}
