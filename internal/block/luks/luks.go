// Package luks reads and writes LUKS2 volume headers: where the data of an
// encrypted disk lies, how it is enciphered, a digest that tells the right
// volume key (DEK) from a wrong one, the key safe that holds the wrapped DEK,
// and optional passphrase keyslots for recovery.
//
// The format is the LUKS2 On-Disk Format Specification 1.1.1, in the profile
// that docs/spec/luks2-header.md writes down. cryptsetup(8) and the kernel's
// dm-crypt open such a volume with the DEK and nothing of ours; volumes that
// cryptsetup made can be read, and what other programs keep in their headers
// survives a rewrite.
//
// Invariants: nothing is written but by [Header.Commit] and
// [Header.AddPassphrase]; after a power loss at any instant of a Commit, the
// header reads as it was before or as it is after; a header that this package
// does not wholly understand is never written; no key is kept in a Header.
//
// A Header is not safe for concurrent use. Whoever commits one holds the lock
// on the volume (for a file, flock(2), which cryptsetup honours too): the
// package itself locks nothing.
package luks

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// Sentinels that callers branch on; they are wrapped with the details.
var (
	// ErrNotLUKS: there is no LUKS header, or something else was written over it.
	ErrNotLUKS = errors.New("not a LUKS volume")
	// ErrVersion: the header is of another version of LUKS, such as LUKS1.
	ErrVersion = errors.New("unsupported LUKS version")
	// ErrCorrupt: both copies of the header are damaged.
	ErrCorrupt = errors.New("LUKS header is damaged")
	// ErrTruncated: the storage ends before the header or the data do.
	ErrTruncated = errors.New("LUKS volume is truncated")
	// ErrWrongKey: the key or passphrase does not open this volume.
	ErrWrongKey = errors.New("key does not belong to the volume")
	// ErrUnsupported: the header is sound, and asks for something that this
	// package does not do.
	ErrUnsupported = errors.New("LUKS feature is not supported")
	// ErrNoSpace: the header or its keyslot area is full.
	ErrNoSpace = errors.New("no space left in the LUKS header")
)

// Sizes in bytes.
const (
	// KeySize is the length of a DEK made for a volume of ours: XTS-AES-256.
	KeySize = 64
	// DataOffsetMin is the smallest data offset: room for the two header
	// copies, and none for a keyslot.
	DataOffsetMin = 2 * headerSizeDefault
	// DataOffsetDefault leaves room for some keyslots and for the journal of a
	// rekey. It is also cryptsetup's default.
	DataOffsetDefault = 16 << 20
)

// Cipher is the only cipher specification that is supported, in dm-crypt's
// notation.
const Cipher = "aes-xts-plain64"

// Options says what [New] makes.
type Options struct {
	// UUID is the volume's UUID in its canonical form (lower case, 36 bytes).
	// Empty: a random one.
	UUID string
	// Label is a name for people, 0 to 47 bytes of UTF-8 without NUL.
	Label string
	// SectorSize is the unit of encryption in bytes: 512 (0 means that too), or
	// 4096 for a disk with logical blocks of 4096 bytes only.
	SectorSize int
	// DataOffset is where the data starts, in bytes from the start of the
	// storage: a multiple of 4096 and at least [DataOffsetMin]. 0 means
	// [DataOffsetDefault].
	DataOffset int64
	// Detached keeps the header on storage of its own, of DataOffset bytes; the
	// data are all of another device, Device.
	Detached bool
	Device   DataDevice
	// DEK is the volume key, [KeySize] bytes. It is read and not kept.
	DEK *keymem.Key
	// Safe holds the wrapped DEK. It may be nil, for a volume whose key is kept
	// elsewhere; see [Header.SetSafe].
	Safe *keysafe.Safe
	// AllowDiscards lets discards through to the storage, with us and, by the
	// flag in the header, with dm-crypt: they show which sectors are in use.
	AllowDiscards bool
	// Thin as in [Header.Thin].
	Thin bool
}

// Header is a LUKS2 header in memory. See [New] and [Read].
type Header struct {
	bin    binaryHeader
	salts  [2]salt // by Copy
	doc    object  // the JSON metadata, with everything that others put there
	meta   *metadata
	damage [2]error // by Copy; what is wrong with it on the storage, or nil
	unsure []byte   // the copy that the next commit relies on, if it was only read: it may not be durable
	// late is in damage, of the copy that the next flush makes durable and so
	// good; nil: there is none.
	late *error
}

// New makes the header of a new volume. Nothing is written until
// [Header.Commit], which writes the header copies only: what an earlier use
// left in the first DataOffset bytes of the storage is the caller's to erase.
func New(opts Options) (*Header, error) {
	h, err := newHeader(opts)
	if err != nil {
		return nil, fmt.Errorf("cannot make LUKS2 header: %w", err)
	}
	return h, nil
}

func newHeader(opts Options) (*Header, error) {
	if opts.UUID == "" {
		opts.UUID = uuid.NewString()
	}
	if err := checkUUID(opts.UUID); err != nil {
		return nil, err
	}
	if opts.SectorSize == 0 {
		opts.SectorSize = 512
	}
	if opts.SectorSize != 512 && opts.SectorSize != 4096 {
		return nil, fmt.Errorf("sector size %d is neither 512 nor 4096", opts.SectorSize)
	}
	if opts.DataOffset == 0 {
		opts.DataOffset = DataOffsetDefault
	}
	if opts.DataOffset < DataOffsetMin || opts.DataOffset%areaAlign != 0 {
		return nil, fmt.Errorf("data offset %d is not a multiple of %d from %d up", opts.DataOffset, areaAlign, DataOffsetMin)
	}
	if opts.DEK.Len() != KeySize {
		return nil, fmt.Errorf("DEK has %d bytes, not %d", opts.DEK.Len(), KeySize)
	}

	h := &Header{bin: binaryHeader{size: headerSizeDefault, uuid: opts.UUID}}
	for copy := range h.salts {
		rand.Read(h.salts[copy][:])
	}
	if err := h.SetLabel(opts.Label); err != nil {
		return nil, err
	}

	dataOffset := opts.DataOffset
	if opts.Detached {
		dataOffset = 0
	}
	config := object{
		"json_size":     strconv.FormatInt(headerSizeDefault-binarySize, 10),
		"keyslots_size": strconv.FormatInt(min(opts.DataOffset-2*headerSizeDefault, keyslotsSizeMax), 10),
	}
	if opts.AllowDiscards {
		config["flags"] = []any{flagAllowDiscards}
	}
	digest, err := newDigest(opts.DEK, "0")
	if err != nil {
		return nil, err
	}
	doc := object{
		"config":   config,
		"keyslots": object{},
		"tokens":   object{},
		"segments": object{"0": object{
			"type": "crypt", "offset": strconv.FormatInt(dataOffset, 10), "size": "dynamic",
			"iv_tweak": "0", "encryption": Cipher, "sector_size": number(opts.SectorSize),
		}},
		"digests": object{"0": digest},
	}
	if err := h.replace(doc); err != nil {
		return nil, err
	}
	if opts.Safe != nil {
		if err := h.SetSafe(opts.Safe); err != nil {
			return nil, err
		}
	}
	if opts.Detached {
		if err := h.setDataDevice(opts.Device); err != nil {
			return nil, err
		}
	}
	return h, h.SetThin(opts.Thin)
}

// replace makes doc the header's metadata if it is valid and fits.
func (h *Header) replace(doc object) error {
	meta, err := decodeMetadata(doc, h.bin.size)
	if err != nil {
		return err
	}
	if n, room := int64(len(encodeJSON(doc))), h.bin.size-binarySize-1; n > room {
		return fmt.Errorf("%w: metadata has %d bytes, %d fit", ErrNoSpace, n, room)
	}
	h.doc, h.meta = doc, meta
	return nil
}

// UUID returns the volume's UUID as text. In a header that others made it may
// be any printable ASCII of up to 39 bytes.
func (h *Header) UUID() string { return h.bin.uuid }

// Label returns the name for people, at most 47 bytes. It may be empty.
func (h *Header) Label() string { return h.bin.label }

// SetLabel changes the label: 0 to 47 bytes of UTF-8 without NUL.
func (h *Header) SetLabel(label string) error {
	if err := checkText(label, labelSize); err != nil {
		return fmt.Errorf("cannot set label: %w", err)
	}
	h.bin.label = label
	return nil
}

// SetUUID changes the volume's UUID, given in its canonical form. A key safe in
// the header belongs to the old one: [Header.SetSafe] replaces it.
func (h *Header) SetUUID(id string) error {
	if err := checkUUID(id); err != nil {
		return fmt.Errorf("cannot set UUID: %w", err)
	}
	h.bin.uuid = id
	return nil
}

func checkUUID(id string) error {
	if parsed, err := uuid.Parse(id); err != nil || parsed.String() != id {
		return fmt.Errorf("%q is not a UUID in canonical form", id)
	}
	return nil
}

// Seqid returns the number of the commit that wrote the header; 0: it was
// never written.
func (h *Header) Seqid() uint64 { return h.bin.seqid }

// Size returns the length in bytes of one copy of the header; the second copy
// follows the first.
func (h *Header) Size() int64 { return h.bin.size }

// AllowDiscards reports whether discards may reach the storage.
func (h *Header) AllowDiscards() bool { return h.meta.allowDiscards() }

func toBase64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
