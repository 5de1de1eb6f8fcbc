package nbd

import "encoding/binary"

// Numbers of the NBD protocol (doc/proto.md of the NetworkBlockDevice/nbd
// project). All integers on the wire are big-endian.
const (
	magicInit        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicStructured  = 0x668e33ef
)

// Handshake flags, the same bits from server and client.
const (
	handshakeFixedNewstyle = 1 << 0
	handshakeNoZeroes      = 1 << 1
)

// Options of the negotiation.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options. Errors have the top bit set.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repError      = 1 << 31
	repErrUnsup   = repError | 1
	repErrInvalid = repError | 3
	repErrTLSReqd = repError | 5
	repErrUnknown = repError | 6
	repErrTooBig  = repError | 9
)

// Information items of INFO and GO.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags of an export.
const (
	exportHasFlags    = 1 << 0
	exportReadOnly    = 1 << 1
	exportFlush       = 1 << 2
	exportFUA         = 1 << 3
	exportTrim        = 1 << 5
	exportWriteZeroes = 1 << 6
	exportDF          = 1 << 7
	exportMultiConn   = 1 << 8
	exportCache       = 1 << 10
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	flagFUA    = 1 << 0
	flagNoHole = 1 << 1
	flagDF     = 1 << 2
	flagReqOne = 1 << 3
)

// Structured reply chunks.
const (
	chunkDone = 1 << 0 // the flag of the last chunk of a reply

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1
	chunkErrorOffset = 1<<15 | 2
)

// States of an extent in base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const (
	contextAllocation   = "base:allocation"
	contextAllocationID = 1
)

// Sizes on the wire, in bytes.
const (
	sizeRequest    = 28 // magic, flags, type, cookie, offset, length
	sizeSimple     = 16 // magic, error, cookie
	sizeChunk      = 20 // magic, flags, type, cookie, length
	sizeExtent     = 8  // length, state
	sizeOption     = 16 // magic, option, length
	sizeOptReply   = 20 // magic, option, type, length
	sizeExportInfo = 10 // size, flags
)

// Limits. Those of names and payload are the protocol's own.
const (
	// MaxPayload is the largest READ or WRITE, in bytes.
	MaxPayload = 32 << 20
	// MaxName is the longest name or description of an export, in bytes.
	MaxName = 4096

	maxOptions      = 256      // options of one negotiation
	maxOptionLength = 16 << 10 // bytes of one option's data: two names and their queries
	maxQueries      = 64       // queries of one META_CONTEXT option
	maxMessage      = 512      // bytes of an error's text on the wire
)

var be = binary.BigEndian

// request is one command as it arrives.
type request struct {
	flags  uint16
	typ    uint16
	cookie uint64
	offset uint64
	length uint32
}

// appendRequest appends r as it goes over the wire.
func appendRequest(b []byte, r request) []byte {
	b = be.AppendUint32(b, magicRequest)
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, r.typ)
	b = be.AppendUint64(b, r.cookie)
	b = be.AppendUint64(b, r.offset)
	return be.AppendUint32(b, r.length)
}

// parseRequest decodes the first sizeRequest bytes of b. It reports false if
// they do not begin with the magic: the stream is then out of step for good.
func parseRequest(b []byte) (request, bool) {
	_ = b[sizeRequest-1]
	if be.Uint32(b) != magicRequest {
		return request{}, false
	}
	return request{
		flags:  be.Uint16(b[4:]),
		typ:    be.Uint16(b[6:]),
		cookie: be.Uint64(b[8:]),
		offset: be.Uint64(b[16:]),
		length: be.Uint32(b[24:]),
	}, true
}

// appendSimple appends a simple reply; errno 0 is success.
func appendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = be.AppendUint32(b, magicSimple)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, cookie)
}

// appendChunk appends the header of a structured reply chunk whose payload has
// length bytes.
func appendChunk(b []byte, flags, typ uint16, cookie uint64, length uint32) []byte {
	b = be.AppendUint32(b, magicStructured)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, cookie)
	return be.AppendUint32(b, length)
}
