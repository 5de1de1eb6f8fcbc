package luks

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

// A keyslot holds the volume key, spread over many sectors by the
// anti-forensic splitter and enciphered under a key derived from a passphrase.
const (
	keyslotType   = "luks2"
	keyslotSector = 512 // bytes; the unit of encryption of a keyslot area
	saltLength    = 32  // bytes, of the salts made here

	// PassphraseMax is the longest passphrase in bytes, as in cryptsetup.
	PassphraseMax = 512
)

// ErrNoPassphrase: the volume has no keyslot that a passphrase can open.
var ErrNoPassphrase = errors.New("no keyslot for a passphrase")

// AddPassphrase adds a keyslot that gives dek, the volume key, to whoever knows
// passphrase (1 to [PassphraseMax] bytes), here and in cryptsetup. It writes
// the keyslot area to w, flushes it, and commits the header. cost may be zero.
//
// Errors: [ErrWrongKey] if dek is not the volume's key, [ErrNoSpace] if there
// is no room for one more keyslot, those of [Header.Commit] and of w. After an
// error the header in memory is as before, but for its seqid.
func (h *Header) AddPassphrase(w Storage, dek, passphrase *keymem.Key, cost Argon2id) error {
	if err := h.addPassphrase(w, dek, passphrase, cost.orDefault()); err != nil {
		return fmt.Errorf("cannot add passphrase to LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

func (h *Header) addPassphrase(w Storage, dek, passphrase *keymem.Key, cost Argon2id) error {
	if n := passphrase.Len(); n > PassphraseMax {
		return fmt.Errorf("passphrase has %d bytes, at most %d are allowed", n, PassphraseMax)
	}
	if err := h.checkWritable(); err != nil {
		return err
	}
	owners, err := h.digestsFor(dek)
	if err != nil {
		return err
	}
	size := (int64(afStripes*dek.Len()) + areaAlign - 1) / areaAlign * areaAlign
	offset, err := h.freeArea(size)
	if err != nil {
		return err
	}
	salt := make([]byte, saltLength)
	rand.Read(salt)
	kdf := argon2KDF{kind: "argon2id", cost: cost, salt: salt}
	sealed, err := sealKey(dek, passphrase, kdf, int(size))
	if err != nil {
		return err
	}

	doc := cloneJSON(h.doc)
	keyslots := doc["keyslots"].(object)
	id, err := freeID(keyslots, keyslotsMax)
	if err != nil {
		return err
	}
	keyslots[id] = object{
		"type": keyslotType, "key_size": number(dek.Len()),
		"af": object{"type": "luks1", "stripes": number(afStripes), "hash": afHash},
		"area": object{
			"type": "raw", "encryption": Cipher, "key_size": number(xts.KeySize256),
			"offset": strconv.FormatInt(offset, 10), "size": strconv.FormatInt(size, 10),
		},
		"kdf": kdf.encode(),
	}
	for _, g := range owners {
		fields := doc["digests"].(object)[strconv.Itoa(g.id)].(object)
		fields["keyslots"] = append(fields["keyslots"].([]any), id)
	}

	before := *h
	if err := h.replace(doc); err != nil {
		return err
	}
	// The area must be on the storage before a header names it.
	if _, err = w.WriteAt(sealed, offset); err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = h.commit(w)
	}
	if err != nil {
		h.doc, h.meta = before.doc, before.meta
	}
	return err
}

// digestsFor returns the digests that a keyslot for dek belongs to: those of
// the data, or during a deep rekey that of the key which it is.
func (h *Header) digestsFor(dek *keymem.Key) ([]digest, error) {
	if e, err := h.meta.encryptionInPlace(); err == nil {
		return []digest{e.key}, h.VerifyEncryption(dek)
	}
	r, err := h.meta.reencryption()
	if err != nil {
		return h.meta.digestsOf(0), h.VerifyKey(dek)
	}
	keys := []digest{r.oldKey, r.newKey}
	if r.Plain {
		keys = keys[1:]
	}
	for _, g := range keys {
		if match, err := g.verify(dek); match || err != nil {
			return []digest{g}, err
		}
	}
	return nil, fmt.Errorf("%w %s", ErrWrongKey, h.bin.uuid)
}

// freeArea returns the offset of size bytes in the keyslot area that no
// keyslot uses.
func (h *Header) freeArea(size int64) (int64, error) {
	for _, gap := range h.FreeAreas() {
		start := (gap.Offset + areaAlign - 1) / areaAlign * areaAlign
		if gap.Offset+gap.Size-start >= size {
			return start, nil
		}
	}
	return 0, fmt.Errorf("%w: no %d bytes left for a keyslot", ErrNoSpace, size)
}

// UnlockPassphrase returns the volume key, which the caller must close, from
// the first keyslot that passphrase opens; it reads the keyslot areas from r.
//
// Errors: [ErrWrongKey] if no keyslot opens, [ErrNoPassphrase] if there is
// none, [ErrUnsupported] if this package can read none of them, which includes
// those whose cost exceeds the limits in docs/spec/luks2-header.md.
//
// During a deep rekey it returns the old key; [Header.UnlockNextPassphrase]
// returns the new one. During an encryption in place it returns the key of that.
func (h *Header) UnlockPassphrase(r io.ReaderAt, passphrase *keymem.Key) (*keymem.Key, error) {
	owners := h.meta.digestsOf(0)
	if state, err := h.meta.reencryption(); err == nil && state.Plain {
		owners = []digest{state.newKey}
	} else if err == nil {
		owners = []digest{state.oldKey}
	} else if e, err := h.meta.encryptionInPlace(); err == nil {
		owners = []digest{e.key}
	}
	dek, err := h.unlockPassphrase(context.Background(), r, passphrase, owners)
	if err != nil {
		return nil, fmt.Errorf("cannot unlock LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return dek, nil
}

// UnlockNextPassphrase returns the key that the deep rekey under way leads to,
// like [Header.UnlockPassphrase].
func (h *Header) UnlockNextPassphrase(r io.ReaderAt, passphrase *keymem.Key) (*keymem.Key, error) {
	state, err := h.meta.reencryption()
	if err != nil {
		return nil, fmt.Errorf("cannot unlock the next key of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	dek, err := h.unlockPassphrase(context.Background(), r, passphrase, []digest{state.newKey})
	if err != nil {
		return nil, fmt.Errorf("cannot unlock the next key of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return dek, nil
}

// unlockPassphrase looks at the keyslots of the owners, and at ctx between them.
func (h *Header) unlockPassphrase(ctx context.Context, r io.ReaderAt, passphrase *keymem.Key, owners []digest) (*keymem.Key, error) {
	var slots []passphraseSlot
	for _, k := range h.meta.keyslots {
		if k.kind == keyslotType && opens(k, owners) {
			slots = append(slots, passphraseSlot{k.id, func() (*keymem.Key, error) { return k.open(r, passphrase) }})
		}
	}
	return unlock(ctx, slots, owners)
}

// passphraseSlot is a keyslot and what it gives with a passphrase: a key, which the
// caller closes, right or wrong.
type passphraseSlot struct {
	number int
	open   func() (*keymem.Key, error)
}

// unlock returns the first key from one of the slots that is one of the owners'. It
// looks at ctx between two slots.
func unlock(ctx context.Context, slots []passphraseSlot, owners []digest) (*keymem.Key, error) {
	result := ErrNoPassphrase
	for _, s := range slots {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		dek, err := s.open()
		if errors.Is(err, ErrUnsupported) {
			if result == ErrNoPassphrase {
				result = fmt.Errorf("keyslot %d: %w", s.number, err)
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("keyslot %d: %w", s.number, err)
		}
		match, err := verifyAny(owners, dek)
		if match {
			return dek, nil
		}
		dek.Close()
		if err != nil {
			return nil, err
		}
		result = ErrWrongKey
	}
	return nil, result
}

// opens reports whether keyslot k holds the key of one of the owners.
func opens(k keyslot, owners []digest) bool {
	return slices.ContainsFunc(owners, func(g digest) bool {
		return slices.Contains(g.keyslots, strconv.Itoa(k.id))
	})
}

// open returns what is in the keyslot: the volume key, if the passphrase is
// right.
func (k keyslot) open(r io.ReaderAt, passphrase *keymem.Key) (*keymem.Key, error) {
	d := new(decoder)
	f := k.fields
	f.d = d
	var (
		splitter    = f.get("af")
		stripes     = splitter.get("stripes").integer(1, 1<<20)
		splitHash   = splitter.get("hash").text()
		encryption  = f.get("area").get("encryption").text()
		areaKeySize = f.get("area").get("key_size").integer(1, 512)
		kdf         = decodeKDF(f.get("kdf"))
	)
	if splitter.get("type").text() != "luks1" || stripes != afStripes {
		d.fail(splitter.path, "is no splitter known here")
	}
	if encryption != Cipher || areaKeySize != xts.KeySize256 && areaKeySize != xts.KeySize128 {
		d.fail(f.path+".area", "is not encrypted with AES-XTS")
	}
	split := stripes * k.keySize
	if split > keymem.SizeMax || k.area.size < int64(roundUp(split)) {
		d.fail(f.path+".area", "is too small for the key, or the key too large")
	}
	if d.err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, d.err)
	}

	areaKey, err := kdf.derive(passphrase, areaKeySize)
	if err != nil {
		return nil, err
	}
	defer areaKey.Close()
	return openArea(r, k.area.offset, areaKey, k.keySize, splitHash)
}

// openArea returns the key of keySize bytes that a keyslot area at an offset
// holds: the volume key, if areaKey is right. The caller has checked keySize.
func openArea(r io.ReaderAt, offset int64, areaKey *keymem.Key, keySize int, splitHash string) (*keymem.Key, error) {
	split := afStripes * keySize
	sealed := make([]byte, roundUp(split))
	if err := readFull(r, sealed, offset); err != nil {
		return nil, err
	}
	material, err := keymem.New(len(sealed))
	if err != nil {
		return nil, err
	}
	defer material.Close()
	cipher, err := xts.New(areaKey)
	if err != nil {
		return nil, err
	}
	defer cipher.Close()
	cipher.Decrypt(material.Bytes(), sealed, 0, keyslotSector)

	dek, err := keymem.New(keySize)
	if err != nil {
		return nil, err
	}
	if err := afMerge(dek.Bytes(), material.Bytes()[:split], splitHash); err != nil {
		dek.Close()
		return nil, err
	}
	return dek, nil
}

// sealKey returns the size bytes of a keyslot area that holds dek.
func sealKey(dek, passphrase *keymem.Key, kdf argon2KDF, size int) ([]byte, error) {
	areaKey, err := kdf.derive(passphrase, xts.KeySize256)
	if err != nil {
		return nil, err
	}
	defer areaKey.Close()
	cipher, err := xts.New(areaKey)
	if err != nil {
		return nil, err
	}
	defer cipher.Close()
	material, err := keymem.New(size)
	if err != nil {
		return nil, err
	}
	defer material.Close()
	if err := afSplit(material.Bytes()[:afStripes*dek.Len()], dek.Bytes(), afHash); err != nil {
		return nil, err
	}
	sealed := make([]byte, size)
	cipher.Encrypt(sealed, material.Bytes(), 0, keyslotSector)
	return sealed, nil
}

// roundUp rounds up to whole sectors of a keyslot area.
func roundUp(n int) int { return (n + keyslotSector - 1) / keyslotSector * keyslotSector }
