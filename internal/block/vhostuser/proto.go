package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ne is the byte order of messages: both ends run on one machine. Rings are
// little-endian, which is the same on all machines that this package is for.
var ne = binary.NativeEndian

// Requests of the front end (docs/interop/vhost-user.rst of QEMU).
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqResetOwner          = 4
	reqSetMemTable         = 5
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqSetBackendReqFD     = 21
	reqGetConfig           = 24
	reqSetConfig           = 25
	reqGetInflightFD       = 31
	reqSetInflightFD       = 32
	reqGetMaxMemSlots      = 36
	reqAddMemReg           = 37
	reqRemMemReg           = 38
)

// backendConfigChange is the request to the front end that says that the
// configuration space has changed.
const backendConfigChange = 2

// Protocol features.
const (
	protoMQ                = 1 << 0
	protoReplyAck          = 1 << 3
	protoBackendReq        = 1 << 5
	protoConfig            = 1 << 9
	protoInflightShmFD     = 1 << 12
	protoConfigureMemSlots = 1 << 15

	protoAll = protoMQ | protoReplyAck | protoBackendReq | protoConfig | protoInflightShmFD | protoConfigureMemSlots
)

const (
	sizeHeader = 12
	// maxPayload is more than any message has that we know.
	maxPayload = 512
	// maxFDs is how many descriptors a message may carry: one for each region
	// of a memory table.
	maxFDs = 8

	flagVersion   = 1
	flagVersions  = 3 // mask
	flagReply     = 1 << 2
	flagNeedReply = 1 << 3

	vringNoFD = 1 << 8 // of SET_VRING_KICK, CALL, ERR: no descriptor comes with it

	sizeRegion     = 32
	sizeConfigHead = 12
	sizeInflight   = 20
)

// errMessage marks what a front end must not send. The session ends.
var errMessage = errors.New("message breaks the vhost-user protocol")

func badMessage(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMessage, fmt.Sprintf(format, args...))
}

// header is the start of every message.
type header struct {
	request, flags, size uint32
}

// parseHeader parses the header of a message from the front end.
func parseHeader(b []byte) (header, error) {
	h := header{ne.Uint32(b), ne.Uint32(b[4:]), ne.Uint32(b[8:])}
	switch {
	case h.flags&flagVersions != flagVersion || h.flags&^(flagVersions|flagNeedReply) != 0:
		return header{}, badMessage("flags %#x of request %d", h.flags, h.request)
	case h.size > maxPayload:
		return header{}, badMessage("request %d has %d bytes", h.request, h.size)
	}
	return h, nil
}

func (h header) append(b []byte) []byte {
	b = ne.AppendUint32(b, h.request)
	b = ne.AppendUint32(b, h.flags)
	return ne.AppendUint32(b, h.size)
}

func parseU64(b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, badMessage("%d bytes where a number should be", len(b))
	}
	return ne.Uint64(b), nil
}

// vringState is a number that belongs to a queue.
type vringState struct{ index, num uint32 }

func parseVringState(b []byte) (vringState, error) {
	if len(b) != 8 {
		return vringState{}, badMessage("%d bytes where a queue's state should be", len(b))
	}
	return vringState{ne.Uint32(b), ne.Uint32(b[4:])}, nil
}

// vringAddr tells where the parts of a ring are, in the front end's addresses.
type vringAddr struct {
	index, flags                uint32
	desc, used, avail, logGuest uint64
}

func parseVringAddr(b []byte) (vringAddr, error) {
	if len(b) != 40 {
		return vringAddr{}, badMessage("%d bytes where a queue's addresses should be", len(b))
	}
	return vringAddr{
		index: ne.Uint32(b), flags: ne.Uint32(b[4:]),
		desc: ne.Uint64(b[8:]), used: ne.Uint64(b[16:]), avail: ne.Uint64(b[24:]), logGuest: ne.Uint64(b[32:]),
	}, nil
}

// regionSpec is a piece of guest memory, as messages describe it: bytes at an
// offset of a file, their address for the guest and for the front end.
type regionSpec struct{ guest, size, user, offset uint64 }

func parseRegion(b []byte) regionSpec {
	return regionSpec{ne.Uint64(b), ne.Uint64(b[8:]), ne.Uint64(b[16:]), ne.Uint64(b[24:])}
}

// parseMemTable parses SET_MEM_TABLE.
func parseMemTable(b []byte) ([]regionSpec, error) {
	if len(b) < 8 {
		return nil, badMessage("%d bytes where a memory table should be", len(b))
	}
	n := ne.Uint32(b)
	b = b[8:]
	// QEMU sends its table of 8 in full, whatever is used of it.
	if n > maxFDs || len(b) < int(n)*sizeRegion {
		return nil, badMessage("%d bytes for %d regions of memory", len(b), n)
	}
	specs := make([]regionSpec, n)
	for i := range specs {
		specs[i] = parseRegion(b[i*sizeRegion:])
	}
	return specs, nil
}

// parseSingleRegion parses ADD_MEM_REG and REM_MEM_REG.
func parseSingleRegion(b []byte) (regionSpec, error) {
	if len(b) != 8+sizeRegion {
		return regionSpec{}, badMessage("%d bytes where a region of memory should be", len(b))
	}
	return parseRegion(b[8:]), nil
}

// configAccess is the head of GET_CONFIG and SET_CONFIG.
type configAccess struct{ offset, size, flags uint32 }

// parseConfig returns the head and the bytes of the configuration space.
func parseConfig(b []byte) (configAccess, []byte, error) {
	if len(b) < sizeConfigHead {
		return configAccess{}, nil, badMessage("%d bytes where a part of the configuration should be", len(b))
	}
	a := configAccess{ne.Uint32(b), ne.Uint32(b[4:]), ne.Uint32(b[8:])}
	b = b[sizeConfigHead:]
	if a.size != uint32(len(b)) || a.offset > maxConfig || a.size > maxConfig-a.offset {
		return configAccess{}, nil, badMessage("%d bytes of configuration at %d, in %d bytes", a.size, a.offset, len(b))
	}
	return a, b, nil
}

// inflightSpec describes the memory in which requests in work are noted.
type inflightSpec struct {
	size, offset      uint64
	queues, queueSize uint16
}

func parseInflight(b []byte) (inflightSpec, error) {
	// QEMU pads the structure to 24 bytes.
	if len(b) != sizeInflight && len(b) != 24 {
		return inflightSpec{}, badMessage("%d bytes where in-flight memory should be described", len(b))
	}
	return inflightSpec{ne.Uint64(b), ne.Uint64(b[8:]), ne.Uint16(b[16:]), ne.Uint16(b[18:])}, nil
}

func (s inflightSpec) append(b []byte) []byte {
	b = ne.AppendUint64(b, s.size)
	b = ne.AppendUint64(b, s.offset)
	b = ne.AppendUint16(b, s.queues)
	return ne.AppendUint16(b, s.queueSize)
}
