package luks

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"strconv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// ReencryptionOptions say how a deep rekey begins.
type ReencryptionOptions struct {
	// OldDEK and NewDEK are the volume's key and its next one, [KeySize] bytes
	// each. They are read and not kept.
	OldDEK, NewDEK *keymem.Key
	// Safe holds the wrapped NewDEK. It is in the header beside the old one until
	// the rekey ends. Nil: the key is kept elsewhere.
	Safe *keysafe.Safe
	// JournalMin and JournalMax bound the size of the journal in bytes: it is a
	// multiple of JournalMin, which is one of 4096.
	JournalMin, JournalMax int64
}

// BeginReencryption puts the metadata of a deep rekey that has rewritten nothing
// yet (INIT) into the header, which [Header.Commit] writes. From then on both
// DEKs are needed, and [Header.AddPassphrase] takes either.
//
// Errors: [ErrWrongKey] if OldDEK is not the volume's, [ErrNoSpace] if there is
// no room for the journal, [ErrUnsupported] if the volume has another layout
// than one of ours. After an error the header is as before.
func (h *Header) BeginReencryption(opts ReencryptionOptions) error {
	if err := h.beginReencryption(opts); err != nil {
		return fmt.Errorf("cannot begin re-encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

func (h *Header) beginReencryption(opts ReencryptionOptions) error {
	s, err := h.segment()
	if err != nil {
		return err
	}
	if s.Size != 0 {
		return fmt.Errorf("%w: its data have a fixed size", ErrUnsupported)
	}
	if h.bin.seqid > math.MaxUint64/2 { // it must not end in the middle
		return fmt.Errorf("%w: no numbers are left for its commits", ErrUnsupported)
	}
	if err := h.VerifyKey(opts.OldDEK); err != nil {
		return err
	}
	if n := opts.NewDEK.Len(); n != KeySize {
		return fmt.Errorf("new DEK has %d bytes, not %d", n, KeySize)
	}
	if opts.NewDEK.Equal(opts.OldDEK) {
		return errors.New("new DEK is the old one")
	}
	journal, err := h.journalArea(opts.JournalMin, opts.JournalMax)
	if err != nil {
		return err
	}

	doc := cloneJSON(h.doc)
	digests := doc["digests"].(object)
	newID, err := freeID(digests, digestsMax)
	if err != nil {
		return err
	}
	if digests[newID], err = newDigest(opts.NewDEK, "0"); err != nil { // which segments it has, place decides
		return err
	}
	r := reencryption{Reencryption: Reencryption{Segment: s, Journal: journal}, oldKey: h.meta.digestsOf(0)[0]}
	r.newKey.id, _ = strconv.Atoi(newID)
	if err := r.addSlot(doc, opts.OldDEK, opts.NewDEK); err != nil {
		return err
	}
	if opts.Safe != nil {
		if err := addSafe(doc, opts.Safe, true); err != nil {
			return err
		}
	}
	r.place(doc)
	return h.replace(doc)
}

// addSlot adds r's keyslot, seal and requirement to doc. oldDEK is nil if r.Plain.
func (r reencryption) addSlot(doc object, oldDEK, newDEK *keymem.Key) error {
	password, err := sealPassword(r.Reencryption, oldDEK, newDEK)
	if err != nil {
		return err
	}
	defer password.Close()
	return addReencryptSlot(doc, r.mode(), directionForward, areaObject(resilienceJournal, r.Journal), password)
}

func (r Reencryption) mode() string {
	if r.Plain {
		return modeEncrypt
	}
	return modeReencrypt
}

// place writes r's segments, and which digest names which, into doc.
func (r reencryption) place(doc object) {
	segments := object{}
	oldNames, newNames := []any{}, []any{}
	for i, p := range r.plan() {
		name := strconv.Itoa(i)
		segments[name] = p.encode()
		if p.oldKey {
			oldNames = append(oldNames, name)
		}
		if p.newKey {
			newNames = append(newNames, name)
		}
	}
	doc["segments"] = segments
	digests := doc["digests"].(object)
	if !r.Plain {
		digests[strconv.Itoa(r.oldKey.id)].(object)["segments"] = oldNames
	}
	digests[strconv.Itoa(r.newKey.id)].(object)["segments"] = newNames
}

// journalArea returns the place for a journal of low to high bytes, a multiple
// of low.
func (h *Header) journalArea(low, high int64) (Area, error) {
	if low < areaAlign || low%areaAlign != 0 || high < low {
		return Area{}, fmt.Errorf("journal of %d to %d bytes", low, high)
	}
	var best Area
	for _, gap := range h.FreeAreas() {
		start := (gap.Offset + areaAlign - 1) / areaAlign * areaAlign
		size := min(gap.Offset+gap.Size-start, high)
		if size -= size % low; size > best.Size {
			best = Area{start, size}
		}
	}
	if best.Size == 0 {
		return Area{}, fmt.Errorf("%w: no %d bytes left for a journal", ErrNoSpace, low)
	}
	return best, nil
}

// VerifyReencryption returns nil if the keys are the two of the rekey that is
// under way, an error wrapping [ErrWrongKey] if one is not, and one wrapping
// [ErrCorrupt] if the metadata are not those that were sealed with them.
func (h *Header) VerifyReencryption(oldDEK, newDEK *keymem.Key) error {
	fail := func(err error) error {
		return fmt.Errorf("cannot verify the re-encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	r, err := h.meta.reencryption()
	if err != nil {
		return fail(err)
	}
	if r.Plain {
		return fail(ErrEncrypting)
	}
	for _, c := range []struct {
		digest digest
		dek    *keymem.Key
		name   string
	}{{r.oldKey, oldDEK, "old"}, {r.newKey, newDEK, "new"}} {
		match, err := c.digest.verify(c.dek)
		if err != nil {
			return fail(err)
		}
		if !match {
			return fail(fmt.Errorf("%w as its %s key", ErrWrongKey, c.name))
		}
	}
	if err := r.verifySeal(oldDEK, newDEK); err != nil {
		return fail(err)
	}
	return nil
}

func (r reencryption) verifySeal(oldDEK, newDEK *keymem.Key) error {
	password, err := sealPassword(r.Reencryption, oldDEK, newDEK)
	if err != nil {
		return err
	}
	defer password.Close()
	match, err := r.seal.verify(password)
	if err == nil && !match {
		err = fmt.Errorf("%w: the seal of the re-encryption does not match", ErrCorrupt)
	}
	return err
}

// addReencryptSlot adds the keyslot that says how a volume is re-encrypted, with its
// resilience's area, the digest of password that seals it, and the requirement that
// keeps others away, to doc.
func addReencryptSlot(doc object, mode, direction string, area object, password *keymem.Key) error {
	keyslots, digests := doc["keyslots"].(object), doc["digests"].(object)
	slot, err := freeID(keyslots, keyslotsMax)
	if err != nil {
		return err
	}
	keyslots[slot] = object{
		"type": keyslotReencrypt, "key_size": number(1), "priority": number(0), "mode": mode, "direction": direction, "area": area,
	}
	sealID, err := freeID(digests, digestsMax)
	if err != nil {
		return err
	}
	seal, err := newDigest(password, "")
	if err != nil {
		return err
	}
	seal["segments"], seal["keyslots"] = []any{}, []any{slot}
	digests[sealID] = seal
	config := doc["config"].(object)
	requirements, ok := config["requirements"].(object)
	if !ok {
		requirements = object{}
		config["requirements"] = requirements
	}
	requirements["mandatory"] = []any{requirementReencrypt}
	return nil
}

// areaObject is the area of a keyslot.
func areaObject(kind string, a Area) object {
	return object{"type": kind, "offset": strconv.FormatInt(a.Offset, 10), "size": strconv.FormatInt(a.Size, 10)}
}

// sealPassword returns what the seal is a digest of. oldDEK is nil if r.Plain.
func sealPassword(r Reencryption, oldDEK, newDEK *keymem.Key) (*keymem.Key, error) {
	var tail []byte
	tail = append(tail, r.mode()+directionForward+resilienceJournal...)
	tail = binary.BigEndian.AppendUint64(tail, uint64(r.Journal.Offset))
	tail = binary.BigEndian.AppendUint64(tail, uint64(r.Journal.Size))
	if r.Plain {
		tail = append(tail, "linear"...)
		tail = binary.BigEndian.AppendUint64(tail, uint64(r.Segment.Offset))
		tail = append(tail, "dynamic"...)
	} else {
		tail = appendCryptSeal(tail, r.Segment)
	}
	tail = appendCryptSeal(tail, r.Segment)

	if r.Plain {
		return sealedText(tail, newDEK)
	}
	return sealedText(tail, oldDEK, newDEK)
}

// sealedText returns what a seal with those keys covers; tail is the rest of it.
func sealedText(tail []byte, keys ...*keymem.Key) (*keymem.Key, error) {
	n := len("v2") + len(tail)
	for _, k := range keys {
		n += k.Len()
	}
	text, err := keymem.New(n)
	if err != nil {
		return nil, err
	}
	p := text.Bytes()
	p = p[copy(p, "v2"):]
	for _, k := range keys {
		p = p[copy(p, k.Bytes()):]
		runtime.KeepAlive(k)
	}
	copy(p, tail)
	return text, nil
}

// appendCryptSeal appends what a seal covers of all of a volume's data.
func appendCryptSeal(b []byte, s Segment) []byte {
	b = append(b, "crypt"...)
	b = binary.BigEndian.AppendUint64(b, uint64(s.Offset))
	b = append(b, "dynamic"...)
	b = binary.BigEndian.AppendUint64(b, 0) // iv_tweak
	b = append(b, Cipher...)
	return binary.BigEndian.AppendUint32(b, uint32(s.SectorSize))
}

// MarkHot says that the n bytes behind the boundary are about to be rewritten
// and their old ciphertext is in the journal. last: the data end there.
func (h *Header) MarkHot(n int64, last bool) error {
	return h.advance(func(r *Reencryption) { r.Hot, r.HotIsLast = n, last })
}

// MarkClean says that the data below boundary are under the new key, the others
// under the old one.
func (h *Header) MarkClean(boundary int64) error {
	return h.advance(func(r *Reencryption) { r.Boundary, r.Hot, r.HotIsLast = boundary, 0, false })
}

// advance changes the state of the re-encryption to what change makes of it,
// if that is a state; the caller commits.
func (h *Header) advance(change func(*Reencryption)) error {
	r, err := h.meta.reencryption()
	if err == nil {
		change(&r.Reencryption)
		doc := cloneJSON(h.doc)
		r.place(doc)
		var meta *metadata
		if meta, err = decodeMetadata(doc, h.bin.size); err == nil {
			if _, err = meta.reencryption(); err == nil {
				err = h.replace(doc)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("cannot advance re-encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return nil
}

// FinishReencryption makes the header that of a volume with the new key only:
// what belongs to the old one or to the re-encryption is gone, and the areas of
// that are then among [Header.FreeAreas]. All data must be under the new key;
// the header cannot tell. The caller commits.
func (h *Header) FinishReencryption() error {
	return h.endReencryption("finish", true)
}

// CancelReencryption makes the header that of a volume with the old key only.
// Nothing must have been rewritten. The caller commits.
func (h *Header) CancelReencryption() error {
	return h.endReencryption("cancel", false)
}

func (h *Header) endReencryption(what string, keepNew bool) error {
	r, err := h.meta.reencryption()
	if err == nil && !keepNew && r.Plain {
		err = ErrEncrypting
	}
	if err == nil && !keepNew && (r.Boundary != 0 || r.Hot != 0) {
		err = errors.New("part of the data is under the new key")
	}
	if err == nil {
		doc := cloneJSON(h.doc)
		r.end(doc, keepNew)
		err = h.replace(doc)
	}
	if err != nil {
		return fmt.Errorf("cannot %s re-encryption of LUKS2 volume %s: %w", what, h.bin.uuid, err)
	}
	return nil
}

// end takes the re-encryption and one of the two keys out of doc.
func (r reencryption) end(doc object, keepNew bool) {
	keep, drop := r.oldKey, r.newKey
	if keepNew {
		keep, drop = drop, keep
	}
	// A keyslot that opens both keys, which nobody makes, goes too.
	gone := append(slices.Clone(drop.keyslots), strconv.Itoa(r.keyslot))
	keyslots := doc["keyslots"].(object)
	for _, slot := range gone {
		delete(keyslots, slot)
	}
	digests := doc["digests"].(object)
	if !r.Plain {
		delete(digests, strconv.Itoa(drop.id))
	}
	delete(digests, strconv.Itoa(r.seal.id))
	digests[strconv.Itoa(keep.id)].(object)["segments"] = []any{"0"}
	final := Reencryption{Segment: r.Segment}.plan()[0]
	doc["segments"] = object{"0": final.encode()}

	tokens := doc["tokens"].(object)
	for id, t := range tokens {
		token := t.(object)
		if token["type"] == tokenType && !r.Plain {
			if _, next := token[tokenRekey]; next != keepNew {
				delete(tokens, id)
				continue
			}
			delete(token, tokenRekey)
		}
		if token["type"] == deviceTokenType {
			delete(token, tokenStart)
		}
		token["keyslots"] = without(token["keyslots"].([]any), gone)
	}
	for _, g := range digests {
		fields := g.(object)
		fields["keyslots"] = without(fields["keyslots"].([]any), gone)
	}
	dropRequirements(doc)
}

// dropRequirements takes out of doc what only a re-encryption requires.
func dropRequirements(doc object) {
	config := doc["config"].(object)
	requirements := config["requirements"].(object)
	delete(requirements, "mandatory")
	if len(requirements) == 0 {
		delete(config, "requirements")
	}
}

// without returns the list without those names.
func without(list []any, names []string) []any {
	return slices.DeleteFunc(list, func(v any) bool {
		name, ok := v.(string)
		return ok && slices.Contains(names, name)
	})
}

// addSafe adds the token of a key safe to doc; next: of the key that a rekey
// leads to.
func addSafe(doc object, s *keysafe.Safe, next bool) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	members, err := decodeJSON(text)
	if err != nil {
		return err
	}
	members["type"], members["keyslots"] = tokenType, []any{}
	if next {
		members[tokenRekey] = tokenRekeyNext
	}
	tokens := doc["tokens"].(object)
	id, err := freeID(tokens, tokensMax)
	if err != nil {
		return err
	}
	tokens[id] = members
	return nil
}

// FreeAreas returns what no keyslot uses of the space between the header copies
// and the data, in order.
func (h *Header) FreeAreas() []Area {
	var used []area
	for _, k := range h.meta.keyslots {
		if k.area.size != 0 {
			used = append(used, k.area)
		}
	}
	slices.SortFunc(used, func(a, b area) int { return cmp.Compare(a.offset, b.offset) })
	start := 2 * h.bin.size
	var free []Area
	for _, a := range append(used, area{offset: start + h.meta.keyslotsSize}) {
		if a.offset > start {
			free = append(free, Area{start, a.offset - start})
		}
		start = a.offset + a.size
	}
	return free
}

// Superseded reports whether the storage holds a header of a later commit than
// this one: another program has written it.
func (h *Header) Superseded(r io.ReaderAt) (bool, error) {
	b := make([]byte, binarySize)
	for _, c := range []Copy{Primary, Secondary} {
		if err := readFull(r, b, c.offset(h.bin.size)); err != nil {
			return false, fmt.Errorf("cannot read LUKS2 header: %w", err)
		}
		if _, err := decodeSize(b, c); err != nil || binary.BigEndian.Uint64(b[offSeqid:]) <= h.bin.seqid {
			continue
		}
		// A copy that was torn may say anything.
		if found := readCopy(r, c.offset(h.bin.size)+h.bin.size, c, c.offset(h.bin.size)); found.err == nil {
			return true, nil
		}
	}
	return false, nil
}
