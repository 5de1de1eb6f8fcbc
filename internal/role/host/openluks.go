package host

import (
	"context"
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// openLUKS opens a LUKS image of another program, at path, which the user calls
// name, by its passphrase. Nothing is written.
func (h *Host) openLUKS(ctx context.Context, path, name string, passphrase *keymem.Key) (*source, error) {
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, imageError(name, err)
	}
	src, err := h.unlockLUKS(ctx, dev, passphrase)
	if err != nil {
		return nil, errors.Join(explainLUKS(name, err), dev.Close())
	}
	return src, nil
}

func (h *Host) unlockLUKS(ctx context.Context, dev blockdev.Device, passphrase *keymem.Key) (*source, error) {
	foreign, err := luks.ReadForeign(dev, dev.Size())
	if err != nil {
		return nil, err
	}
	size, err := foreign.Segment.Length(dev.Size())
	if err != nil {
		return nil, err
	}
	// One at a time: a header may ask for a GiB.
	select {
	case h.unlocking <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-h.unlocking }()
	dek, err := foreign.Unlock(ctx, dev, passphrase)
	if err != nil {
		return nil, err
	}
	return &source{size: size, raw: dev, luks: foreign, dek: dek}, nil
}

// explainLUKS tells what is wrong with an image: other words than for a disk of
// ours.
func explainLUKS(name string, err error) error {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case is(luks.ErrWrongKey, luks.ErrNoPassphrase):
		return errs.New(errs.Denied, "the passphrase opens no keyslot of image %s", name).
			WithHint("try it on the image: cryptsetup open --test-passphrase IMAGE")
	case is(luks.ErrDetached):
		return errs.New(errs.Invalid, "image %s: %w", name, err).
			WithHint("strongroom volume adopt DEVICE --header %s --out FILE --key-file KEY --passphrase-file PASSPHRASE", name)
	case is(luks.ErrReencrypting, luks.ErrEncrypting):
		return errs.New(errs.Invalid, "image %s: %w", name, err).WithHint("cryptsetup reencrypt --resume-only IMAGE")
	case is(luks.ErrUnsupported):
		return errs.New(errs.Invalid, "image %s: %w", name, err).
			WithHint("cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512 IMAGE; or import what cryptsetup open shows, as format=raw")
	case is(luks.ErrNotLUKS, luks.ErrVersion, luks.ErrCorrupt, luks.ErrTruncated, blockdev.ErrBadSize):
		return errs.New(errs.Invalid, "image %s: %w", name, err)
	}
	return fmt.Errorf("image %s: %w", name, err)
}
