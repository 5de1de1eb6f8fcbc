// Package image reads disk images that users bring, in the format qcow2, by
// qemu-img. The content goes from qemu-img straight into an NBD export, so that
// no plain copy of it is ever written to a datastore.
//
// An image is hostile input: its format is what the user says and never
// guessed, it may not refer to other files, and qemu-img runs with limits on
// memory and time. All functions are safe for concurrent use.
package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"strongroom/internal/errs"
)

const (
	// infoTimeout bounds reading an image's header.
	infoTimeout = 30 * time.Second
	// infoMax bounds what qemu-img tells of an image, in bytes.
	infoMax = 1 << 20
	// messageMax is how much of qemu-img's complaint is passed on, in bytes.
	messageMax = 2 << 10
)

// VirtualSize returns the size in bytes of the disk in the qcow2 image at path.
// It returns an error of kind [errs.Invalid] for an image that is no qcow2 or
// refers to another file.
func VirtualSize(ctx context.Context, path string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	cmd := command(ctx, "info", "--output=json", "-f", "qcow2", "--", path)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &limited{&out, infoMax}, &limited{&complaint, messageMax}
	if err := cmd.Run(); err != nil {
		return 0, errs.New(errs.Invalid, "cannot read image %s: %w: %s", path, err, strings.TrimSpace(complaint.String()))
	}
	var info struct {
		VirtualSize     int64  `json:"virtual-size"`
		Format          string `json:"format"`
		BackingFile     string `json:"backing-filename"`
		FullBackingFile string `json:"full-backing-filename"`
		Encrypted       bool   `json:"encrypted"`
		Specific        struct {
			Data struct {
				DataFile string `json:"data-file"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out.Bytes(), &info); err != nil {
		return 0, fmt.Errorf("cannot read what qemu-img tells of %s: %w", path, err)
	}
	switch {
	case info.Format != "qcow2":
		return 0, errs.New(errs.Invalid, "image %s is no qcow2", path)
	case info.BackingFile != "" || info.FullBackingFile != "" || info.Specific.Data.DataFile != "":
		return 0, errs.New(errs.Invalid, "image %s is not whole: it refers to another file", path).
			WithHint("qemu-img convert -O qcow2 %s WHOLE.qcow2", path)
	case info.Encrypted:
		return 0, errs.New(errs.Invalid, "image %s is encrypted by another program", path)
	case info.VirtualSize <= 0:
		return 0, errs.New(errs.Invalid, "image %s holds a disk of %d bytes", path, info.VirtualSize)
	}
	return info.VirtualSize, nil
}

// Convert writes the disk in the qcow2 image at path to an NBD export on a unix
// socket. The export is at least as large as the disk. progress, which may be
// nil, is called with the part done, 0 to 1.
func Convert(ctx context.Context, path, socket, export string, progress func(part float64)) error {
	target := fmt.Sprintf("nbd:unix:%s:exportname=%s", socket, export)
	cmd := command(ctx, "convert", "-n", "-p", "-f", "qcow2", "-O", "raw", "--", path, target)
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
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("cannot convert image %s: %w: %s", path, err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

// command returns qemu-img with limits: 4 GiB of address space, so that a
// crafted image cannot eat the host's memory.
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
