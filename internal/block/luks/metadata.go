package luks

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Limits of cryptsetup and of the specification.
const (
	keyslotsMax     = 32
	tokensMax       = 32
	segmentsMax     = 32
	digestsMax      = 8
	keyslotsSizeMax = 128 << 20 // bytes
	areaAlign       = 4096      // bytes
)

const flagAllowDiscards = "allow-discards"

// metadata is the part of the JSON tree that this package understands, checked.
type metadata struct {
	keyslotsSize int64 // bytes for keyslot areas, behind the header copies
	flags        []string
	mandatory    []string // requirements that a reader must know
	segments     []segment
	digests      []digest
	keyslots     []keyslot
	tokens       []token
}

type segment struct {
	kind       string
	offset     int64 // bytes
	size       int64 // bytes, or dynamicSize
	flags      []string
	ivTweak    int64 // 512-byte units; crypt segments only, as what follows
	encryption string
	sectorSize int // bytes
	integrity  bool
}

// dynamicSize is the size of a segment that reaches to the end of the storage.
const dynamicSize = -1

type digest struct {
	id         int
	kind       string
	keyslots   []string
	segments   []string
	hash       string
	iterations int
	salt       []byte
	value      []byte
}

type keyslot struct {
	id       int
	kind     string
	keySize  int // bytes
	area     area
	areaKind string
	fields   field // for what depends on the kind
}

// member returns a member that depends on the kind; "" if it is not a string.
func (k keyslot) member(name string) string {
	f := k.fields
	f.d = new(decoder) // its failures are nobody's
	return f.optional(name).text()
}

// areaNumber returns a 64-bit number in the area that depends on its kind.
func (k keyslot) areaNumber(name string) (int64, error) {
	f := k.fields
	f.d = new(decoder)
	n := f.optional("area").get(name).decimal()
	return n, f.d.err
}

type area struct{ offset, size int64 } // bytes; size 0: none

type token struct {
	id     int
	kind   string
	fields object
}

func (m *metadata) allowDiscards() bool { return slices.Contains(m.flags, flagAllowDiscards) }

// decodeMetadata checks doc, the metadata of a header copy of headerSize bytes.
func decodeMetadata(doc object, headerSize int64) (*metadata, error) {
	d := new(decoder)
	root := field{d: d, value: doc, present: true}
	m := new(metadata)

	config := root.get("config")
	if jsonSize := config.get("json_size").decimal(); jsonSize != headerSize-binarySize {
		d.fail(config.path+".json_size", "does not fit the size of the header")
	}
	m.keyslotsSize = config.get("keyslots_size").decimal()
	if m.keyslotsSize%areaAlign != 0 || m.keyslotsSize > keyslotsSizeMax {
		d.fail(config.path+".keyslots_size", "is not a multiple of 4096 up to 128 MiB")
	}
	m.flags = config.optional("flags").texts()
	m.mandatory = config.optional("requirements").optional("mandatory").texts()

	for i, f := range root.get("segments").numbered(segmentsMax) {
		if f.id != i {
			d.fail(f.path, "numbers of segments leave a gap")
		}
		m.segments = append(m.segments, decodeSegment(f))
	}
	if len(m.segments) == 0 {
		d.fail("segments", "has none")
	}
	for _, f := range root.get("digests").numbered(digestsMax) {
		m.digests = append(m.digests, decodeDigest(f))
	}
	for _, f := range root.get("keyslots").numbered(keyslotsMax) {
		m.keyslots = append(m.keyslots, decodeKeyslot(f))
	}
	for _, f := range root.get("tokens").numbered(tokensMax) {
		f.get("keyslots").references(root.get("keyslots"))
		m.tokens = append(m.tokens, token{id: f.id, kind: f.get("type").text(), fields: f.object()})
	}
	for _, f := range root.get("digests").numbered(digestsMax) {
		f.get("keyslots").references(root.get("keyslots"))
		f.get("segments").references(root.get("segments"))
	}
	m.checkSegments(d)
	m.checkAreas(d, headerSize)
	if d.err != nil {
		return nil, d.err
	}
	return m, nil
}

func decodeSegment(f numberedField) segment {
	s := segment{
		kind:   f.get("type").text(),
		offset: f.get("offset").decimal(),
		flags:  f.optional("flags").texts(),
	}
	if size := f.get("size"); size.text() == "dynamic" {
		s.size = dynamicSize
	} else if s.size = size.decimal(); s.size == 0 {
		f.d.fail(size.path, "is zero")
	}
	if s.size > math.MaxInt64-s.offset {
		f.d.fail(f.path, "reaches beyond the largest offset")
	}
	if s.kind != "crypt" {
		return s
	}
	s.ivTweak = f.get("iv_tweak").decimal()
	s.encryption = f.get("encryption").text()
	s.sectorSize = f.get("sector_size").integer(512, 4096)
	s.integrity = f.optional("integrity").present
	if s.sectorSize&(s.sectorSize-1) != 0 {
		f.d.fail(f.path+".sector_size", "is not a power of two")
	}
	if s.offset%512 != 0 || s.size != dynamicSize && s.sectorSize > 0 && s.size%int64(s.sectorSize) != 0 {
		f.d.fail(f.path, "is not aligned to sectors")
	}
	return s
}

func decodeDigest(f numberedField) digest {
	g := digest{
		id:       f.id,
		kind:     f.get("type").text(),
		keyslots: f.get("keyslots").texts(),
		segments: f.get("segments").texts(),
		salt:     f.get("salt").base64(16, 64),
		value:    f.get("digest").base64(20, 64), // a shorter one would take wrong keys for right
	}
	if g.kind == "pbkdf2" {
		g.hash = f.get("hash").text()
		g.iterations = f.get("iterations").integer(1, math.MaxInt32)
	}
	return g
}

func decodeKeyslot(f numberedField) keyslot {
	k := keyslot{
		id:      f.id,
		kind:    f.get("type").text(),
		keySize: f.get("key_size").integer(1, 512),
		fields:  f.field,
	}
	if a := f.optional("area"); a.present {
		k.areaKind = a.get("type").text()
		k.area = area{offset: a.get("offset").decimal(), size: a.get("size").decimal()}
	}
	return k
}

// checkSegments checks that every encrypted segment has a digest.
func (m *metadata) checkSegments(d *decoder) {
	for i, s := range m.segments {
		if s.kind == "crypt" && len(m.digestsOf(i)) == 0 {
			d.fail(fmt.Sprintf("segments.%d", i), "has no digest")
		}
	}
}

// digestsOf returns the digests of the keys of segment i.
func (m *metadata) digestsOf(i int) []digest {
	var found []digest
	for _, g := range m.digests {
		if slices.Contains(g.segments, strconv.Itoa(i)) {
			found = append(found, g)
		}
	}
	return found
}

// checkAreas checks that header copies, keyslot areas and data do not overlap.
func (m *metadata) checkAreas(d *decoder, headerSize int64) {
	first, end := 2*headerSize, 2*headerSize+m.keyslotsSize
	for i, s := range m.segments {
		if !m.detached() && s.offset < end && !slices.ContainsFunc(s.flags, isBackupFlag) {
			d.fail(fmt.Sprintf("segments.%d", i), "begins inside the header")
		}
	}
	areas := make([]keyslot, 0, len(m.keyslots))
	for _, k := range m.keyslots {
		if k.area.size != 0 {
			areas = append(areas, k)
		}
	}
	slices.SortFunc(areas, func(a, b keyslot) int { return cmp.Compare(a.area.offset, b.area.offset) })
	for _, k := range areas {
		path := fmt.Sprintf("keyslots.%d.area", k.id)
		if k.area.offset < first || k.area.offset > end || k.area.size > end-k.area.offset {
			d.fail(path, "is outside the keyslot area or overlaps another")
			return
		}
		first = k.area.offset + k.area.size
	}
}

// detached reports whether the data are on another device: only there can they
// begin at 0.
func (m *metadata) detached() bool {
	return len(m.segments) > 0 && m.segments[0].offset == 0 && !slices.ContainsFunc(m.segments[0].flags, isBackupFlag)
}

func isBackupFlag(flag string) bool { return strings.HasPrefix(flag, "backup-") }

// decoder collects the first error, so that decoding reads like the format.
type decoder struct{ err error }

func (d *decoder) fail(path, problem string) {
	if d.err == nil {
		d.err = fmt.Errorf("%s %s", path, problem)
	}
}

// field is a place in the tree. After a failure its getters return zero values.
type field struct {
	d       *decoder
	path    string
	value   any
	present bool
}

type numberedField struct {
	field
	id int
}

// get returns a member that must be there.
func (f field) get(name string) field {
	m := f.optional(name)
	if !m.present {
		f.d.fail(m.path, "is missing")
	}
	return m
}

// optional returns a member; in one that is not there, every getter returns
// the zero value without a failure.
func (f field) optional(name string) field {
	path := name
	if f.path != "" {
		path = f.path + "." + name
	}
	value, present := f.object()[name]
	return field{d: f.d, path: path, value: value, present: present}
}

func (f field) object() object {
	o, ok := f.value.(object)
	if !ok && f.present {
		f.d.fail(f.path, "is not an object")
	}
	return o
}

// numbered returns the members of an object whose names are numbers from 0 to
// limit-1, in the order of the numbers.
func (f field) numbered(limit int) []numberedField {
	var members []numberedField
	for name := range f.object() {
		id, err := strconv.Atoi(name)
		if err != nil || id < 0 || id >= limit || strconv.Itoa(id) != name {
			f.d.fail(f.path, fmt.Sprintf("has the name %.40q, which is not a number below %d", name, limit))
			return nil
		}
		members = append(members, numberedField{field: f.get(name), id: id})
	}
	slices.SortFunc(members, func(a, b numberedField) int { return cmp.Compare(a.id, b.id) })
	return members
}

func (f field) text() string {
	s, ok := f.value.(string)
	if !ok && f.present {
		f.d.fail(f.path, "is not a string")
	}
	return s
}

func (f field) texts() []string {
	if !f.present {
		return nil
	}
	list, ok := f.value.([]any)
	if !ok {
		f.d.fail(f.path, "is not an array")
	}
	texts := make([]string, 0, len(list))
	for _, v := range list {
		s, ok := v.(string)
		if !ok {
			f.d.fail(f.path, "holds something else than strings")
		}
		texts = append(texts, s)
	}
	return texts
}

// references checks an array of names of members of target.
func (f field) references(target field) {
	known := target.object()
	seen := map[string]bool{}
	for _, name := range f.texts() {
		if _, ok := known[name]; !ok || seen[name] {
			f.d.fail(f.path, fmt.Sprintf("names %.40q, which is not in %s or occurs twice", name, target.path))
		}
		seen[name] = true
	}
}

// decimal returns a 64-bit number, which JSON holds as a string.
func (f field) decimal() int64 {
	if !f.present {
		return 0
	}
	n, err := parseDecimal(f.text())
	if err != nil {
		f.d.fail(f.path, err.Error())
	}
	return n
}

func parseDecimal(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, errors.New("is not a decimal number in a string")
	}
	return n, nil
}

// integer returns a JSON number from low to high.
func (f field) integer(low, high int) int {
	if !f.present {
		return 0
	}
	literal, _ := f.value.(json.Number)
	n, err := strconv.Atoi(literal.String())
	if err != nil || n < low || n > high || strconv.Itoa(n) != literal.String() {
		f.d.fail(f.path, fmt.Sprintf("is not a whole number from %d to %d", low, high))
		return 0
	}
	return n
}

// base64 returns the bytes of a string, low to high of them.
func (f field) base64(low, high int) []byte {
	text := f.text()
	if len(text) > base64.StdEncoding.EncodedLen(high) {
		text = ""
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(b) < low || len(b) > high {
		f.d.fail(f.path, fmt.Sprintf("is not base64 of %d to %d bytes", low, high))
		return nil
	}
	return b
}
