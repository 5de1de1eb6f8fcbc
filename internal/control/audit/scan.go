package audit

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"strongroom/internal/errs"
)

// scanBlock is how much of a file is read at a time; a line fits into it.
const scanBlock = 4 * MaxLine

// Scan calls visit with the records of the log in dir before number before (0: with
// all), the newest first, until it returns false. Each is held against its own hash,
// and not against the others: that is [Verify]'s. The log may be written on
// meanwhile, and its oldest files removed.
func Scan(ctx context.Context, dir string, before uint64, visit func(Record) bool) error {
	names, err := files(dir)
	if err != nil {
		return errs.Wrap(err, "cannot read the audit log")
	}
	for _, name := range slices.Backward(names) {
		if first, _ := firstOf(name); before != 0 && first >= before {
			continue
		}
		more, err := scanFile(ctx, filepath.Join(dir, name), before, visit)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return errs.Wrap(err, "cannot read the audit log: %s", name)
		}
		if !more {
			return nil
		}
	}
	return nil
}

func scanFile(ctx context.Context, path string, before uint64, visit func(Record) bool) (more bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	// rest is what was read and not looked at: it begins in the middle of a line.
	var rest []byte
	last := true // nothing was looked at yet: the last line may be torn
	for at := info.Size(); at > 0 || len(rest) > 0; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n := min(at, scanBlock)
		at -= n
		block := make([]byte, int(n)+len(rest))
		if _, err := f.ReadAt(block[:n], at); err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		copy(block[n:], rest)
		rest = nil
		if last {
			block = block[:bytes.LastIndexByte(block, '\n')+1]
			last = false
		}
		for len(block) > 0 {
			start := bytes.LastIndexByte(block[:len(block)-1], '\n') + 1
			if start == 0 && at > 0 {
				if len(block) > MaxLine {
					return false, errs.New(errs.Corrupt, "a line is longer than %d bytes", MaxLine)
				}
				rest = block
				break
			}
			if more, err := scanLine(block[start:], before, visit); err != nil || !more {
				return more, err
			}
			block = block[:start]
		}
	}
	return true, nil
}

func scanLine(b []byte, before uint64, visit func(Record) bool) (more bool, err error) {
	seq, ok := seqOf(b)
	if !ok || before != 0 && seq >= before {
		return true, nil // a header, a checkpoint, or a record that is not wanted
	}
	l, err := parseLine(b)
	if err != nil {
		return false, errs.Wrap(err, "record %d", seq)
	}
	return visit(*l.record), nil
}

// seqOf returns the number of the record in a line, without a look at the rest.
func seqOf(b []byte) (uint64, bool) {
	digits, ok := bytes.CutPrefix(b, []byte(`{"seq":`))
	digits, _, found := bytes.Cut(digits, []byte{','})
	n, err := strconv.ParseUint(string(digits), 10, 64)
	return n, ok && found && err == nil
}
