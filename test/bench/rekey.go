package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
)

// rekeySpeed is how fast a whole disk gets another key, as a median.
type rekeySpeed struct {
	What         string  `json:"what"`
	MiBPerSecond float64 `json:"mib_per_second"`
	OfDisk       float64 `json:"of_disk"` // part of the speed of plain writes
	Rounds       int     `json:"rounds"`
}

const plainWrites = "plain writes to the same file system, flushed at the end"

// measureRekey rekeys full volumes of o.size bytes on a disk: by the engine of the
// on-line rekey, without requests beside it, and by cryptsetup; and writes as
// many plain bytes.
func measureRekey(ctx context.Context, o options) (_ []rekeySpeed, err error) {
	dir, err := os.MkdirTemp(o.disk, "strongroom-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	own, err := newOwnRekey(filepath.Join(dir, "ours.luks"), o.size)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, own.Close()) }()
	plain := filepath.Join(dir, "plain")
	if err := fillFile(plain, 0, o.size); err != nil {
		return nil, err
	}
	peer, err := newCryptsetup(ctx, dir, o.size)
	if err != nil {
		return nil, err
	}
	contenders := []struct {
		what string
		run  func() error
	}{
		{plainWrites, func() error { return fillFile(plain, 0, o.size) }},
		{"ours, on line, no requests", func() error { return own.rekey(ctx) }},
		{"cryptsetup reencrypt, off line, as it is by default (checksums)", func() error { return peer.reencrypt(ctx, "checksum") }},
		{"cryptsetup reencrypt, off line, with a journal as ours", func() error { return peer.reencrypt(ctx, "journal") }},
	}
	speeds := make([][]float64, len(contenders))
	for round := range o.rounds {
		for i := range contenders {
			at := (i + round) % len(contenders)
			began := time.Now()
			if err := contenders[at].run(); err != nil {
				return nil, fmt.Errorf("%s: %w", contenders[at].what, err)
			}
			speeds[at] = append(speeds[at], float64(o.size>>20)/time.Since(began).Seconds())
		}
	}
	var out []rekeySpeed
	for i, c := range contenders {
		speed := median(speeds[i])
		out = append(out, rekeySpeed{What: c.what, MiBPerSecond: speed, OfDisk: speed / median(speeds[0]), Rounds: o.rounds})
	}
	return out, nil
}

// fillFile writes n random bytes at off of a file and makes them durable.
func fillFile(path string, off, n int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	piece := make([]byte, 1<<20)
	rand.Read(piece)
	for at := int64(0); at < n && err == nil; at += int64(len(piece)) {
		_, err = f.WriteAt(piece, off+at)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// ownRekey is a volume of ours with its key and the next one.
type ownRekey struct {
	volume    *volume.Volume
	dek, next *keymem.Key
}

func newOwnRekey(path string, size int64) (_ *ownRekey, err error) {
	r := &ownRekey{}
	if r.dek, err = keymem.Random(64); err != nil {
		return nil, err
	}
	if r.next, err = keymem.Random(64); err != nil {
		return nil, err
	}
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	if err != nil {
		return nil, err
	}
	if err := volume.Format(file, volume.FormatOptions{Size: size, DEK: r.dek}); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if r.volume, err = volume.Open(file, r.dek, volume.Options{}); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	piece := make([]byte, 1<<20)
	rand.Read(piece)
	for off := int64(0); off < size; off += int64(len(piece)) {
		if _, err := r.volume.WriteAt(piece, off); err != nil {
			return nil, errors.Join(err, r.volume.Close())
		}
	}
	return r, r.volume.Flush()
}

func (r *ownRekey) rekey(ctx context.Context) error {
	err := r.volume.Rekey(ctx, volume.RekeyOptions{NewDEK: r.next})
	r.dek, r.next = r.next, r.dek
	return err
}

// Close removes the keys from memory.
func (r *ownRekey) Close() error {
	return errors.Join(r.volume.Close(), r.dek.Close(), r.next.Close())
}

// cryptsetup is a LUKS2 file made by cryptsetup, with a passphrase.
type cryptsetup struct{ file, passphrase string }

// quick makes the passphrase cost next to nothing.
var quick = []string{"--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}

func newCryptsetup(ctx context.Context, dir string, size int64) (*cryptsetup, error) {
	c := &cryptsetup{file: filepath.Join(dir, "cryptsetup.luks"), passphrase: filepath.Join(dir, "passphrase")}
	if err := os.WriteFile(c.passphrase, []byte("of the benchmark"), 0o600); err != nil {
		return nil, err
	}
	const header = 16 << 20 // cryptsetup's default
	if err := os.WriteFile(c.file, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(c.file, header+size); err != nil {
		return nil, err
	}
	if err := c.run(ctx, "luksFormat", "--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "512"); err != nil {
		return nil, err
	}
	return c, fillFile(c.file, header, size)
}

func (c *cryptsetup) reencrypt(ctx context.Context, resilience string) error {
	return c.run(ctx, "reencrypt", "--force-offline-reencrypt", "--resilience", resilience)
}

func (c *cryptsetup) run(ctx context.Context, args ...string) error {
	args = append(append(args, quick...), "--key-file", c.passphrase, c.file)
	out, err := exec.CommandContext(ctx, "cryptsetup", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cryptsetup %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
