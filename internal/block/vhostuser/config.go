package vhostuser

import (
	"encoding/binary"
	"math/bits"
)

// Features (virtio 1.2, sections 5.2.3 and 6; bit 30 is vhost-user's own).
const (
	featureSizeMax     = 1 << 1
	featureSegMax      = 1 << 2
	featureReadOnly    = 1 << 5
	featureBlockSize   = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureConfigWCE   = 1 << 11
	featureMQ          = 1 << 12
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
	featureIndirect    = 1 << 28
	featureEventIdx    = 1 << 29
	featureProtocol    = 1 << 30
	featureVersion1    = 1 << 32
)

const (
	sectorSize = 512

	// sizeMax and segMax are what the driver is told of a request's limits.
	// With a header and a status, segMax fills QEMU's default queue of 128.
	sizeMax = 4 << 20
	segMax  = 126
	// maxTransfer is the most data of one request, in bytes; more is an error.
	maxTransfer = 64 << 20

	// Discarding is quick. Zeros are written, encrypted: a request must not
	// keep its worker for long.
	maxDiscardSectors = 1 << 30 / sectorSize
	maxZeroSectors    = 16 << 20 / sectorSize
	maxRanges         = 16 // in one request
)

// Configuration space of a block device (virtio 1.2, section 5.2.4).
const (
	maxConfig = 256 // of vhost-user

	configWriteback = 32
)

// offered returns the features that a device has.
func (c *Config) offered() uint64 {
	f := uint64(featureSizeMax | featureSegMax | featureBlockSize | featureFlush | featureTopology |
		featureConfigWCE | featureMQ | featureIndirect | featureEventIdx | featureProtocol | featureVersion1)
	if c.ReadOnly {
		return f | featureReadOnly
	}
	return f | featureDiscard | featureWriteZeroes
}

// space returns the configuration space. capacity is in sectors.
func (c *Config) space(capacity uint64, writeback bool) [maxConfig]byte {
	var b [maxConfig]byte
	le := binary.LittleEndian
	le.PutUint64(b[0:], capacity)
	le.PutUint32(b[8:], sizeMax)
	le.PutUint32(b[12:], segMax)
	// Whatever the device's own blocks, the guest's disk keeps its logical
	// block size when it moves between servers.
	le.PutUint32(b[20:], sectorSize)
	physical := uint(max(4096, c.Device.BlockSize()))
	b[24] = byte(bits.TrailingZeros(physical / sectorSize)) // log2 of logical blocks in a physical one
	le.PutUint16(b[26:], uint16(physical/sectorSize))       // least good I/O, in blocks
	if writeback {
		b[configWriteback] = 1
	}
	le.PutUint16(b[34:], uint16(c.Queues))
	if !c.ReadOnly {
		le.PutUint32(b[36:], maxDiscardSectors)
		le.PutUint32(b[40:], maxRanges)
		le.PutUint32(b[44:], uint32(physical/sectorSize))
		le.PutUint32(b[48:], maxZeroSectors)
		le.PutUint32(b[52:], maxRanges)
		b[56] = 1 // zeroing may give storage back
	}
	return b
}

// durable reports whether a write must be on the storage before it is answered:
// if the driver has chosen so, or cannot ask for a flush.
func durable(features uint64, writeback bool) bool {
	if features&featureConfigWCE != 0 {
		return !writeback
	}
	return features&featureFlush == 0
}
