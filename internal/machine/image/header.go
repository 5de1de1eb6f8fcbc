package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"strongroom/internal/errs"
)

// The header of qcow2 as QEMU's docs/interop/qcow2.txt has it; big endian.
const (
	magic        = "QFI\xfb"
	headerSizeV2 = 72  // bytes
	headerSizeV3 = 104 // bytes

	offVersion     = 4
	offBacking     = 8  // 64 bits: where the name of the backing file is; 0: none
	offClusterBits = 20 // 32 bits
	offSize        = 24 // 64 bits: of the disk, in bytes
	offCrypt       = 32 // 32 bits: 0, or the encryption
	offFeatures    = 72 // 64 bits: incompatible features, from version 3 on

	featureDirty    = 1 << 0 // not closed well; QEMU repairs what is needed to read it
	featureCorrupt  = 1 << 1
	featureDataFile = 1 << 2
	featureZstd     = 1 << 3 // another compression
	featureExtended = 1 << 4 // extended L2 entries
	featuresKnown   = featureDirty | featureCorrupt | featureDataFile | featureZstd | featureExtended

	clusterBitsMin, clusterBitsMax = 9, 21
)

// SectorSize is what the size of a disk is rounded up to, in bytes, as QEMU
// does.
const SectorSize = 512

// opened is an image whose header has been looked at.
type opened struct {
	file  *os.File
	path  string
	size  int64  // of its disk, in bytes
	start []byte // the header and all that belongs to it, as it was looked at
}

// open opens the image at path.
func open(path string) (*opened, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is refused, not waited for
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "there is no image %s", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open image: %w", err)
	}
	start, size, err := inspect(f)
	if err != nil {
		return nil, errors.Join(errs.Wrap(err, "cannot use image %s", path), f.Close())
	}
	return &opened{file: f, path: path, size: size, start: start}, nil
}

// inspect returns the start of the image in f, and the size in bytes of its disk.
func inspect(f *os.File) (start []byte, size int64, err error) {
	if info, err := f.Stat(); err != nil {
		return nil, 0, err
	} else if !info.Mode().IsRegular() {
		return nil, 0, errs.New(errs.Invalid, "it is not a regular file")
	}
	start = make([]byte, 1<<clusterBitsMax)
	n, err := f.ReadAt(start, 0)
	if err != nil && err != io.EOF {
		return nil, 0, err
	}
	start = start[:n]
	size, err = parse(start[:min(n, headerSizeV3)])
	return start, size, err
}

// parse returns the size in bytes of the disk in an image with that header, of
// which the first [headerSizeV3] bytes are looked at.
func parse(header []byte) (int64, error) {
	invalid := func(format string, args ...any) (int64, error) { return 0, errs.New(errs.Invalid, format, args...) }
	if !bytes.HasPrefix(header, []byte(magic)) || len(header) < headerSizeV2 {
		return invalid("it is no qcow2 image")
	}
	version := binary.BigEndian.Uint32(header[offVersion:])
	var features uint64
	switch {
	case version == 3 && len(header) >= headerSizeV3:
		features = binary.BigEndian.Uint64(header[offFeatures:])
	case version == 3:
		return invalid("its header is cut short")
	case version != 2:
		return invalid("it is of version %d of qcow2, neither 2 nor 3", version)
	}
	clusterBits := binary.BigEndian.Uint32(header[offClusterBits:])
	size := binary.BigEndian.Uint64(header[offSize:])
	switch {
	case binary.BigEndian.Uint64(header[offBacking:]) != 0:
		return 0, errs.New(errs.Invalid, "it is not whole: it refers to a backing file").
			WithHint("qemu-img convert -O qcow2 IMAGE WHOLE.qcow2")
	case features&featureDataFile != 0:
		return 0, errs.New(errs.Invalid, "it is not whole: its data are in another file").
			WithHint("qemu-img convert -O qcow2 IMAGE WHOLE.qcow2")
	case binary.BigEndian.Uint32(header[offCrypt:]) != 0:
		return 0, errs.New(errs.Invalid, "it is encrypted by another program").
			WithHint("qemu-img convert --object secret,... -O qcow2 IMAGE PLAIN.qcow2")
	case features&featureCorrupt != 0:
		return 0, errs.New(errs.Invalid, "it is marked as damaged").WithHint("qemu-img check -r all IMAGE")
	case features&^featuresKnown != 0:
		return invalid("it has features of a newer qcow2: %#x", features&^featuresKnown)
	case clusterBits < clusterBitsMin || clusterBits > clusterBitsMax:
		return invalid("its clusters have 2^%d bytes", clusterBits)
	case size == 0 || size > 1<<62:
		return invalid("it holds a disk of %d bytes", size)
	}
	return int64(size+SectorSize-1) &^ (SectorSize - 1), nil
}
