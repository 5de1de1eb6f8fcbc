package luks

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	"strongroom/internal/crypto/keymem"
)

// ErrDetached: the storage holds a detached header only; the data are on another
// device. It is also an [ErrUnsupported].
var ErrDetached = fmt.Errorf("%w: it is a detached header, its data are on another device", ErrUnsupported)

// ErrOtherDevice: a detached header was made for another device than the one it
// was given with.
var ErrOtherDevice = errors.New("header belongs to another device")

// deviceTokenType is the type of the token in a detached header that tells what
// device the data are on.
const deviceTokenType = "strongroom-device"

// Members of that token.
const (
	tokenSize  = "size"
	tokenStart = "start"
)

// startSize is the length in bytes of [DataDevice.Start].
const startSize = 32

// DataDevice is what a detached header knows of the device with its data.
type DataDevice struct {
	// Size is its length in bytes; 0: unknown, as in the headers of other programs.
	Size int64
	// Start is a hash of 32 bytes by which an encryption in place knows its device
	// again; see docs/spec/in-place-encryption.md. Nil when none is under way.
	Start []byte
}

// Detached reports whether the data are on another device than the header.
func (h *Header) Detached() bool { return h.meta.detached() }

// DataDevice returns what a detached header knows of the device with its data.
func (h *Header) DataDevice() (DataDevice, error) {
	var found *token
	for _, t := range h.meta.tokens {
		if t.kind != deviceTokenType {
			continue
		}
		if found != nil {
			return DataDevice{}, fmt.Errorf("%w: it has two tokens of type %s", ErrCorrupt, deviceTokenType)
		}
		found = &t
	}
	if found == nil {
		return DataDevice{}, nil
	}
	d := new(decoder)
	f := field{d: d, path: fmt.Sprintf("tokens.%d", found.id), value: found.fields, present: true}
	device := DataDevice{Size: f.get(tokenSize).decimal()}
	if start := f.optional(tokenStart); start.present {
		device.Start = start.base64(startSize, startSize)
	}
	if d.err == nil && device.Size == 0 {
		d.fail(f.path+"."+tokenSize, "is zero")
	}
	if d.err != nil {
		return DataDevice{}, fmt.Errorf("%w: %w", ErrCorrupt, d.err)
	}
	return device, nil
}

func (h *Header) setDataDevice(device DataDevice) error {
	doc := cloneJSON(h.doc)
	tokens := doc["tokens"].(object)
	id, err := freeID(tokens, tokensMax)
	if err != nil {
		return err
	}
	token := object{"type": deviceTokenType, "keyslots": []any{}, tokenSize: strconv.FormatInt(device.Size, 10)}
	if device.Start != nil {
		token[tokenStart] = base64.StdEncoding.EncodeToString(bytes.Clone(device.Start))
	}
	tokens[id] = token
	return h.replace(doc)
}

// checkDetached returns an error unless h is a detached header, whole on storage
// of size bytes, of a device of dataSize bytes.
func (h *Header) checkDetached(size, dataSize int64) error {
	if !h.Detached() {
		return fmt.Errorf("%w: it is not a detached header, its data follow it", ErrUnsupported)
	}
	if room := 2*h.bin.size + h.meta.keyslotsSize; size < room {
		return fmt.Errorf("%w: it has %d bytes, and needs %d", ErrTruncated, size, room)
	}
	device, err := h.DataDevice()
	if err != nil {
		return err
	}
	if device.Size != 0 && device.Size != dataSize {
		return fmt.Errorf("%w: it is for one of %d bytes, this one has %d", ErrOtherDevice, device.Size, dataSize)
	}
	return h.checkStorage(dataSize)
}

// NewDetachedEncryption makes the detached header of a plain device that is about
// to be encrypted in place, and of which nothing is yet. opts has Detached set;
// the journal's size is from journalMin to journalMax, in bytes. Nothing is
// written.
func NewDetachedEncryption(opts Options, journalMin, journalMax int64) (*Header, error) {
	h, err := New(opts)
	if err == nil {
		if err = h.beginDetachedEncryption(opts.DEK, journalMin, journalMax); err == nil {
			return h, nil
		}
		err = fmt.Errorf("cannot make LUKS2 header: %w", err)
	}
	return nil, err
}

func (h *Header) beginDetachedEncryption(dek *keymem.Key, journalMin, journalMax int64) error {
	s, err := h.segment()
	if err != nil {
		return err
	}
	if !h.Detached() || s.SectorSize != encryptionSector {
		return fmt.Errorf("%w: data at %d in sectors of %d bytes", ErrUnsupported, s.Offset, s.SectorSize)
	}
	journal, err := h.journalArea(journalMin, journalMax)
	if err != nil {
		return err
	}
	doc := cloneJSON(h.doc)
	r := reencryption{Reencryption: Reencryption{Plain: true, Segment: s, Journal: journal}, newKey: h.meta.digestsOf(0)[0]}
	if err := r.addSlot(doc, nil, dek); err != nil {
		return err
	}
	r.place(doc)
	return h.replace(doc)
}
