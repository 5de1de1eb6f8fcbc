// Package image reads disk images that users bring, in the format qcow2, by
// qemu-img. The content goes from qemu-img straight into an NBD export, so that
// no plain copy of it is ever written to a datastore.
//
// An image is hostile input: its format is what the user says and never
// guessed; one that refers to other files is refused by its header, because
// qemu-img would open them, also only to tell about the image; qemu-img sees the
// header that was looked at, whatever becomes of the file meanwhile; and it runs
// with a limit on its memory and ends with the caller's context. All functions
// are safe for concurrent use.
package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/errs"
)

// messageMax is how much of qemu-img's complaint is passed on, in bytes.
const messageMax = 2 << 10

// VirtualSize returns the size in bytes of the disk in the qcow2 image at path,
// a multiple of [SectorSize]. It returns an error of kind [errs.Invalid] for
// what is no qcow2, refers to another file or is encrypted, and one of kind
// [errs.NotFound] if there is nothing.
func VirtualSize(path string) (int64, error) {
	o, err := open(path)
	if err != nil {
		return 0, err
	}
	return o.size, o.file.Close()
}

// Convert writes the disk in the qcow2 image at path to an NBD export on a unix
// socket. The export is at least as large as the disk; what it has beyond is
// left alone. With zeroed the export is known to read as zeros, and zeros of
// the disk are not written. The image's tables are checked first. progress,
// which may be nil, is called with the part done, 0 to 1. Errors are those of
// [VirtualSize], and of kind [errs.Invalid] for an image that qemu-img cannot
// read or an export that it cannot write, and of kind [errs.NoSpace] if there
// is no room below the export.
func Convert(ctx context.Context, path, socket, export string, zeroed bool, progress func(part float64)) error {
	o, err := open(path)
	if err != nil {
		return err
	}
	return o.convert(ctx, socket, export, zeroed, progress)
}

// convert is [Convert] of an open image, which it closes.
func (o *opened) convert(ctx context.Context, socket, export string, zeroed bool, progress func(part float64)) (err error) {
	source, stop, err := o.serve()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	from, err := json.Marshal(map[string]any{"driver": "qcow2", "backing": nil, "file": source})
	if err != nil {
		return err
	}
	to, err := json.Marshal(map[string]any{"driver": "raw", "file": over(socket, export)})
	if err != nil {
		return err
	}
	// qemu-img reads zeros where a damaged or truncated image has nothing.
	const leaks = 3 // exit status: space is wasted, nothing is wrong
	var exit *exec.ExitError
	if err := run(command(ctx, "check", "-q", "--", "json:"+string(from)), nil); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != leaks) {
		return explain(ctx, o.path, err)
	}
	args := []string{"convert", "-n", "-p", "-O", "raw"}
	if zeroed {
		args = append(args, "--target-is-zero")
	}
	cmd := command(ctx, append(args, "--", "json:"+string(from), "json:"+string(to))...)
	return explain(ctx, o.path, run(cmd, progress))
}

// over is an NBD export on a unix socket, for qemu-img.
func over(socket, export string) map[string]any {
	return map[string]any{"driver": "nbd", "export": export, "server": map[string]string{"type": "unix", "path": socket}}
}

// run runs cmd and adds to its error what it complained about.
func run(cmd *exec.Cmd, progress func(part float64)) error {
	var complaint bytes.Buffer
	cmd.Stderr = &limited{&complaint, messageMax}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start qemu-img: %w", err)
	}
	watch(out, progress)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

// explain gives an error of qemu-img its kind.
func explain(ctx context.Context, path string, err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !errors.As(err, &exit):
		return err
	case strings.Contains(strings.ToLower(err.Error()), unix.ENOSPC.Error()):
		return errs.New(errs.NoSpace, "cannot convert image %s: %w", path, err)
	}
	return errs.New(errs.Invalid, "cannot convert image %s: %w", path, err).WithHint("qemu-img check %s", path)
}

// command returns qemu-img with limits: 4 GiB of address space, so that a crafted
// image cannot eat the host's memory.
func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "prlimit", append([]string{"--as=4294967296", "--core=0", "qemu-img"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// watch reads "    (12.34/100%)\r" lines until the end of r.
func watch(r io.Reader, progress func(float64)) {
	lines := bufio.NewScanner(r)
	lines.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
			return i + 1, data[:i], nil
		}
		if atEOF && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	})
	for lines.Scan() {
		text, _, ok := strings.Cut(strings.TrimLeft(lines.Text(), " ("), "/")
		if percent, err := strconv.ParseFloat(text, 64); ok && err == nil && progress != nil {
			progress(min(1, max(0, percent/100)))
		}
	}
	_, _ = io.Copy(io.Discard, r) // so that the writer never blocks
}

// limited keeps the first bytes written to it and drops the rest.
type limited struct {
	w    *bytes.Buffer
	room int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.room-l.w.Len())
	l.w.Write(p[:max(0, n)])
	return len(p), nil
}
