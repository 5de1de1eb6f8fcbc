package luks

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"strongroom/internal/crypto/keymem"
)

// Layout of a LUKS1 header, big-endian, of LUKS On-Disk Format Specification
// 1.2.3; offsets and lengths in bytes. It has no checksum.
const (
	header1Size = 592

	off1Cipher     = 8
	off1Mode       = 40
	off1Hash       = 72
	off1Payload    = 104 // 32 bits, in sectors of 512 bytes
	off1KeySize    = 108 // 32 bits
	off1Digest     = 112
	off1DigestSalt = 132
	off1Iterations = 164 // 32 bits, of the digest
	off1UUID       = 168
	off1Slots      = 208

	name1Size   = 32
	digest1Size = 20
	salt1Size   = 32

	slots1    = 8
	slot1Size = 48 // active, iterations, salt, offset in sectors, stripes

	slot1Active   = 0x00ac71f3
	slot1Inactive = 0x0000dead
)

// header1 is a LUKS1 header that can be read: AES-XTS with a volume key of
// [KeySize] bytes.
type header1 struct {
	uuid    string
	segment Segment
	hash    string // of the key derivation and the splitter
	digest  digest
	slots   []slot1 // that are in use
}

type slot1 struct {
	number int
	kdf    pbkdf2KDF
	offset int64 // bytes
}

// readLUKS1 reads the header of a LUKS1 volume on storage of size bytes.
func readLUKS1(r io.ReaderAt, size int64) (*header1, error) {
	if size < header1Size {
		return nil, fmt.Errorf("%w: the storage ends inside the header", ErrTruncated)
	}
	b := make([]byte, header1Size)
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	h, err := decodeLUKS1(b)
	if err != nil {
		return nil, err
	}
	for _, s := range h.slots {
		if s.offset+int64(roundUp(afStripes*KeySize)) > h.segment.Offset {
			return nil, fmt.Errorf("%w: keyslot %d reaches into the data", ErrCorrupt, s.number)
		}
	}
	length, err := h.segment.Length(size)
	if err != nil {
		return nil, err
	}
	if length == 0 {
		return nil, fmt.Errorf("%w: it ends where its data should start", ErrTruncated)
	}
	return h, nil
}

// decodeLUKS1 parses the header1Size bytes of a header.
func decodeLUKS1(b []byte) (*header1, error) {
	var names [3]string
	for i, field := range []struct {
		name string
		off  int
	}{{"cipher", off1Cipher}, {"cipher mode", off1Mode}, {"hash", off1Hash}} {
		var err error
		if names[i], err = decodeText(b, field.off, name1Size); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, field.name, err)
		}
	}
	uuid, _, found := bytes.Cut(b[off1UUID:off1UUID+uuidSize], []byte{0})
	if !found || checkText(string(uuid), uuidSize) != nil {
		return nil, fmt.Errorf("%w: the UUID is not text", ErrCorrupt)
	}
	if cipher := names[0] + "-" + names[1]; cipher != Cipher {
		return nil, fmt.Errorf("%w: its cipher is %.70q, not %s", ErrUnsupported, cipher, Cipher)
	}
	if n := binary.BigEndian.Uint32(b[off1KeySize:]); n != KeySize {
		return nil, fmt.Errorf("%w: its volume key has %d bytes, not %d", ErrUnsupported, n, KeySize)
	}
	if _, err := hashByName(names[2]); err != nil {
		return nil, err
	}
	h := &header1{
		uuid: string(uuid), hash: names[2],
		segment: Segment{Offset: int64(binary.BigEndian.Uint32(b[off1Payload:])) * 512, SectorSize: 512},
		digest: digest{
			kind: "pbkdf2", hash: names[2], iterations: int(binary.BigEndian.Uint32(b[off1Iterations:])),
			salt: b[off1DigestSalt : off1DigestSalt+salt1Size], value: b[off1Digest : off1Digest+digest1Size],
		},
	}
	if h.segment.Offset == 0 {
		return nil, fmt.Errorf("%w: its data are apart from its header", ErrUnsupported)
	}
	if h.digest.iterations == 0 {
		return nil, fmt.Errorf("%w: its digest has no iterations", ErrCorrupt)
	}
	for i := range slots1 {
		s := b[off1Slots+i*slot1Size:][:slot1Size]
		switch binary.BigEndian.Uint32(s) {
		case slot1Inactive:
			continue
		case slot1Active:
		default:
			return nil, fmt.Errorf("%w: keyslot %d is neither in use nor free", ErrCorrupt, i)
		}
		slot := slot1{
			number: i,
			kdf:    pbkdf2KDF{hash: h.hash, iterations: int(binary.BigEndian.Uint32(s[4:])), salt: s[8 : 8+salt1Size]},
			offset: int64(binary.BigEndian.Uint32(s[40:])) * 512,
		}
		if stripes := binary.BigEndian.Uint32(s[44:]); slot.kdf.iterations == 0 || slot.offset < header1Size || stripes != afStripes {
			return nil, fmt.Errorf("%w: keyslot %d at %d has %d iterations and %d stripes", ErrCorrupt, i, slot.offset, slot.kdf.iterations, stripes)
		}
		h.slots = append(h.slots, slot)
	}
	return h, nil
}

// unlock returns the volume key from the first keyslot that passphrase opens.
func (h *header1) unlock(ctx context.Context, r io.ReaderAt, passphrase *keymem.Key) (*keymem.Key, error) {
	var slots []passphraseSlot
	for _, s := range h.slots {
		slots = append(slots, passphraseSlot{s.number, func() (*keymem.Key, error) { return h.open(r, s, passphrase) }})
	}
	return unlock(ctx, slots, []digest{h.digest})
}

func (h *header1) open(r io.ReaderAt, s slot1, passphrase *keymem.Key) (*keymem.Key, error) {
	areaKey, err := s.kdf.derive(passphrase, KeySize)
	if err != nil {
		return nil, err
	}
	defer areaKey.Close()
	return openArea(r, s.offset, areaKey, KeySize, h.hash)
}
