package luks

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// ErrReencrypting: a deep rekey of the volume is under way, so that it needs
// both DEKs. It is also an [ErrUnsupported] for those who know only one.
var ErrReencrypting = fmt.Errorf("%w: a re-encryption is in progress", ErrUnsupported)

// Names in the metadata of a re-encryption; see docs/spec/online-rekey.md.
const (
	requirementReencrypt = "online-reencrypt-v2"
	keyslotReencrypt     = "reencrypt"
	modeReencrypt        = "reencrypt"
	directionForward     = "forward"
	resilienceJournal    = "journal"

	flagHot      = "in-reencryption"
	flagPrevious = "backup-previous"
	flagFinal    = "backup-final"
)

// Reencryption is how far a deep rekey has come, or an encryption in place under
// a detached header. Offsets and lengths are in bytes, those without another word
// from the start of the data.
type Reencryption struct {
	// Plain: it is an encryption in place. What is said of the old key and the old
	// ciphertext is then of plain data.
	Plain bool
	// Segment is the data, all of it, of which part is under either key.
	Segment Segment
	// Boundary is where the data under the old key begin; below it they are
	// under the new one.
	Boundary int64
	// Hot is the length of the zone at Boundary that is being rewritten, whose
	// old ciphertext is in the journal; 0: none is.
	Hot int64
	// HotIsLast: the hot zone reaches to the end of the data.
	HotIsLast bool
	// Journal is where on the storage the journal lies.
	Journal Area
}

// Area is a range of the storage, in bytes.
type Area struct{ Offset, Size int64 }

// reencryption is Reencryption with the numbers of what belongs to it.
type reencryption struct {
	Reencryption
	keyslot              int
	oldKey, newKey, seal digest
}

// plannedSegment is a segment and whose digests name it.
type plannedSegment struct {
	segment
	oldKey, newKey bool
}

// plan returns the segments that are r's on disk.
func (r Reencryption) plan() []plannedSegment {
	crypt := func(off, size int64, oldKey, newKey bool, flags ...string) plannedSegment {
		return plannedSegment{segment{
			kind: "crypt", offset: r.Segment.Offset + off, size: size, flags: flags,
			ivTweak: off / 512, encryption: Cipher, sectorSize: r.Segment.SectorSize,
		}, oldKey, newKey}
	}
	old := func(off int64, flags ...string) plannedSegment {
		if r.Plain {
			return plannedSegment{segment: segment{kind: "linear", offset: r.Segment.Offset + off, size: dynamicSize, flags: flags}}
		}
		return crypt(off, dynamicSize, true, false, flags...)
	}
	var list []plannedSegment
	if r.Boundary > 0 {
		list = append(list, crypt(0, r.Boundary, false, true))
	}
	if r.Hot > 0 {
		list = append(list, crypt(r.Boundary, r.Hot, !r.Plain, true, flagHot))
	}
	if !r.HotIsLast {
		list = append(list, old(r.Boundary+r.Hot))
	}
	return append(list, old(0, flagPrevious), crypt(0, dynamicSize, false, true, flagFinal))
}

// Reencryption returns the state of a deep rekey or of an encryption in place
// under a detached header, and false if none is under way. It returns an error wrapping [ErrUnsupported] for one of another kind,
// such as cryptsetup's own, or a header with other requirements.
func (h *Header) Reencryption() (Reencryption, bool, error) {
	if len(h.meta.mandatory) == 0 {
		return Reencryption{}, false, nil
	}
	if _, err := h.meta.encryptionInPlace(); err == nil {
		return Reencryption{}, false, fmt.Errorf("cannot open LUKS2 volume %s: %w", h.bin.uuid, ErrEncrypting)
	}
	r, err := h.meta.reencryption()
	if err != nil {
		return Reencryption{}, false, fmt.Errorf("cannot go on with the re-encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return r.Reencryption, true, nil
}

func (m *metadata) reencryption() (reencryption, error) {
	refuse := func(format string, args ...any) (reencryption, error) {
		return reencryption{}, fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
	}
	if !slices.Equal(m.mandatory, []string{requirementReencrypt}) {
		return refuse("it has the requirements %.80q", m.mandatory)
	}
	var r reencryption
	found := 0
	for _, k := range m.keyslots {
		if k.kind != keyslotReencrypt {
			continue
		}
		mode, direction, resilience := k.member("mode"), k.member("direction"), k.areaKind
		if mode != modeReencrypt && mode != modeEncrypt || direction != directionForward || resilience != resilienceJournal {
			return refuse("it is of mode %.20q, direction %.20q, resilience %.20q", mode, direction, resilience)
		}
		r.Plain = mode == modeEncrypt
		r.keyslot, r.Journal = k.id, Area{k.area.offset, k.area.size}
		found++
	}
	if found != 1 {
		return refuse("it has %d keyslots of type %s", found, keyslotReencrypt)
	}

	backups := len(m.segments) - 2
	if backups < 1 || !slices.Equal(m.segments[backups].flags, []string{flagPrevious}) || !slices.Equal(m.segments[backups+1].flags, []string{flagFinal}) {
		return refuse("its last two segments are not %s and %s", flagPrevious, flagFinal)
	}
	previous, final := m.digestsOf(backups), m.digestsOf(backups+1)
	seals := slices.DeleteFunc(slices.Clone(m.digests), func(g digest) bool { return !slices.Contains(g.keyslots, strconv.Itoa(r.keyslot)) })
	if len(final) != 1 || len(seals) != 1 || len(seals[0].segments) != 0 {
		return refuse("its digests are not one for each key and a seal")
	}
	r.newKey, r.seal = final[0], seals[0]
	switch {
	case r.Plain && (len(previous) != 0 || r.newKey.id == r.seal.id):
		return refuse("its digests are not one for the key and a seal")
	case r.Plain && m.segments[backups+1].offset != 0:
		return refuse("it is encrypted in place, and its data are not on a device of their own")
	case !r.Plain && (len(previous) != 1 || previous[0].id == final[0].id):
		return refuse("its digests are not one for each key and a seal")
	case !r.Plain:
		r.oldKey = previous[0]
	}
	for _, k := range m.keyslots {
		name := strconv.Itoa(k.id)
		if (slices.Contains(r.oldKey.keyslots, name) || slices.Contains(r.newKey.keyslots, name)) && k.keySize != KeySize {
			return refuse("a volume key has %d bytes, not %d", k.keySize, KeySize)
		}
	}

	r.Segment = Segment{Offset: m.segments[backups+1].offset, SectorSize: m.segments[backups+1].sectorSize}
	for i, s := range m.segments[:backups] {
		switch {
		case slices.Equal(s.flags, []string{flagHot}):
			r.Hot, r.HotIsLast = s.size, i == backups-1
		case m.names(r.newKey, i):
			r.Boundary = s.size
		}
	}
	if r.Plain && r.Segment.SectorSize != encryptionSector {
		return refuse("its disk had sectors of %d bytes", r.Segment.SectorSize)
	}
	if r.Boundary < 0 || r.Hot < 0 || r.Hot > r.Journal.Size { // negative: dynamic
		return refuse("its zone has no end or does not fit into the journal")
	}
	plan := r.plan()
	if len(plan) != len(m.segments) {
		return refuse("its segments are of no known state")
	}
	for i, p := range plan {
		if !p.equal(m.segments[i]) || m.names(r.oldKey, i) != p.oldKey || m.names(r.newKey, i) != p.newKey || m.segments[i].integrity {
			return refuse("its segment %d is of no known state", i)
		}
	}
	return r, nil
}

// names reports whether digest g names segment i.
func (m *metadata) names(g digest, i int) bool { return slices.Contains(g.segments, strconv.Itoa(i)) }

func (s segment) equal(o segment) bool {
	return s.kind == o.kind && s.offset == o.offset && s.size == o.size && slices.Equal(s.flags, o.flags) &&
		s.ivTweak == o.ivTweak && s.encryption == o.encryption && s.sectorSize == o.sectorSize
}

// encode returns the segment as metadata.
func (s segment) encode() object {
	size := "dynamic"
	if s.size != dynamicSize {
		size = strconv.FormatInt(s.size, 10)
	}
	o := object{"type": s.kind, "offset": strconv.FormatInt(s.offset, 10), "size": size}
	if s.kind == "crypt" {
		o["iv_tweak"], o["encryption"], o["sector_size"] = strconv.FormatInt(s.ivTweak, 10), s.encryption, number(s.sectorSize)
	}
	if len(s.flags) > 0 {
		flags := make([]any, len(s.flags))
		for i, flag := range s.flags {
			flags[i] = flag
		}
		o["flags"] = flags
	}
	return o
}

// checkWritable returns an error for a header that this package may not write: one
// with requirements, but for those of a re-encryption or encryption of ours, or one
// after which no commit would count as later.
func (h *Header) checkWritable() error {
	if h.bin.seqid == math.MaxUint64 {
		return fmt.Errorf("%w: no number is left for a later commit", ErrUnsupported)
	}
	if len(h.meta.mandatory) == 0 {
		return nil
	}
	if _, err := h.meta.reencryption(); err == nil {
		return nil
	}
	if _, err := h.meta.encryptionInPlace(); err == nil {
		return nil
	}
	return h.checkRequirements()
}
