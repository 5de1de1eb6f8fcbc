package luks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"strongroom/internal/crypto/keymem"
)

// NewEncryption makes the header of a plain disk of size bytes that is about to
// be encrypted in place, and of which nothing is yet. The data offset in opts is
// how far its data will be moved: at most size. Nothing is written; see
// docs/spec/in-place-encryption.md for what has to be before.
func NewEncryption(opts Options, size int64) (*Header, error) {
	h, err := New(opts)
	if err == nil {
		if err = h.beginEncryption(opts.DEK, size); err == nil {
			return h, nil
		}
		err = fmt.Errorf("cannot make LUKS2 header: %w", err)
	}
	return nil, err
}

func (h *Header) beginEncryption(dek *keymem.Key, size int64) error {
	s, err := h.segment()
	if err != nil {
		return err
	}
	if s.SectorSize != encryptionSector {
		return fmt.Errorf("sectors of %d bytes for a disk that has %d", s.SectorSize, encryptionSector)
	}
	e := encryption{
		Encryption: Encryption{Size: size, Shift: s.Offset, Boundary: size, area: Area{2 * h.bin.size, areaAlign}},
		key:        h.meta.digestsOf(0)[0],
	}
	if err := e.check(); err != nil {
		return err
	}
	doc := cloneJSON(h.doc)
	password, err := e.sealPassword(dek)
	if err != nil {
		return err
	}
	defer password.Close()
	area := areaObject(resilienceDatashift, e.area)
	area["shift_size"] = strconv.FormatInt(e.Shift, 10)
	if err := addReencryptSlot(doc, modeEncrypt, directionBackward, area, password); err != nil {
		return err
	}
	e.place(doc)
	return h.replace(doc)
}

// place writes e's segments, and which of them are under the key, into doc.
func (e encryption) place(doc object) {
	segments, names := object{}, []any{}
	for i, p := range e.plan() {
		name := strconv.Itoa(i)
		segments[name] = p.encode()
		if p.encrypted {
			names = append(names, name)
		}
	}
	doc["segments"] = segments
	doc["digests"].(object)[strconv.Itoa(e.key.id)].(object)["segments"] = names
}

// sealPassword returns what the seal is a digest of.
func (e Encryption) sealPassword(dek *keymem.Key) (*keymem.Key, error) {
	linear := func(b []byte, off, size int64) []byte {
		b = append(b, "linear"...)
		b = binary.BigEndian.AppendUint64(b, uint64(off))
		return binary.BigEndian.AppendUint64(b, uint64(size))
	}
	tail := []byte(modeEncrypt + directionBackward + resilienceDatashift)
	tail = binary.BigEndian.AppendUint64(tail, uint64(e.area.Offset))
	tail = binary.BigEndian.AppendUint64(tail, uint64(e.area.Size))
	tail = binary.BigEndian.AppendUint64(tail, uint64(e.Shift))
	tail = linear(tail, 0, e.Size)
	tail = appendCryptSeal(tail, Segment{Offset: e.Shift, SectorSize: encryptionSector})
	tail = linear(tail, e.Size+e.Shift, e.Shift)
	return sealedText(tail, dek)
}

// VerifyEncryption returns nil if dek is the key of the encryption in place that
// is under way, an error wrapping [ErrWrongKey] if it is not, and one wrapping
// [ErrCorrupt] if the metadata are not those that were sealed with it.
func (h *Header) VerifyEncryption(dek *keymem.Key) error {
	if err := h.verifyEncryption(dek); err != nil {
		return fmt.Errorf("cannot verify the encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

func (h *Header) verifyEncryption(dek *keymem.Key) error {
	if r, err := h.meta.reencryption(); err == nil && r.Plain {
		match, err := r.newKey.verify(dek)
		if err == nil && !match {
			err = ErrWrongKey
		}
		if err == nil {
			err = r.verifySeal(nil, dek)
		}
		return err
	}
	e, err := h.meta.encryptionInPlace()
	if err != nil {
		return err
	}
	match, err := e.key.verify(dek)
	if err != nil {
		return err
	}
	if !match {
		return ErrWrongKey
	}
	password, err := e.sealPassword(dek)
	if err != nil {
		return err
	}
	defer password.Close()
	if match, err = e.seal.verify(password); err == nil && !match {
		err = fmt.Errorf("%w: the seal of the encryption does not match", ErrCorrupt)
	}
	return err
}

// MarkEncrypted says that the data from boundary on are encrypted, those below it
// not; the caller commits.
func (h *Header) MarkEncrypted(boundary int64) error {
	e, err := h.meta.encryptionInPlace()
	if err == nil {
		e.Boundary, e.hot = boundary, 0
		if err = e.check(); err == nil {
			doc := cloneJSON(h.doc)
			e.place(doc)
			err = h.replace(doc)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot go on with the encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

// FinishEncryption makes the header that of a plain LUKS2 volume; the caller
// commits. All data must be encrypted.
func (h *Header) FinishEncryption() error {
	e, err := h.meta.encryptionInPlace()
	if err == nil && e.Boundary != 0 {
		err = errors.New("part of its data is plain")
	}
	if err == nil {
		doc := cloneJSON(h.doc)
		delete(doc["keyslots"].(object), strconv.Itoa(e.keyslot))
		digests := doc["digests"].(object)
		delete(digests, strconv.Itoa(e.seal.id))
		digests[strconv.Itoa(e.key.id)].(object)["segments"] = []any{"0"}
		final := Reencryption{Segment: Segment{Offset: e.Shift, SectorSize: encryptionSector}}.plan()[0]
		doc["segments"] = object{"0": final.encode()}
		dropRequirements(doc)
		err = h.replace(doc)
	}
	if err != nil {
		return fmt.Errorf("cannot finish the encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

// Image returns both copies of the header as the last commit wrote them.
func (h *Header) Image() []byte {
	return append(encodeCopy(h.bin, h.salts[Primary], h.doc, Primary), encodeCopy(h.bin, h.salts[Secondary], h.doc, Secondary)...)
}
