package kmiptest

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// play is one run of a case.
type play struct {
	*Case
	start      time.Time
	references map[string]string // what "$NAME" stands for, as in an XML file
	last       map[int]string    // the value of each tag that came last
	made       bool              // the request makes the bytes of the response: it encrypts
	randomIV   bool              // with an initialization vector of the server's
	waits      bool              // the case waits for a time to come
	named      bool              // the request asks for attributes by name
	differs    []string
}

// resolve returns what a value in a request stands for.
// A few cases refer to a value that their expected response spells out: then
// it is the last one of that tag.
func (p *play) resolve(tag int, reference string) (string, error) {
	if !strings.HasPrefix(reference, "$") {
		// What the server made takes the place of what the case had.
		if v, ok := p.references[strings.ToLower(reference)]; ok && tag == kmip.TagData || ok && tag == kmip.TagIVCounterNonce {
			return v, nil
		}
		if at, ok := p.ahead(reference); ok {
			return at, nil
		}
		return reference, nil
	}
	if at, ok := p.now(reference); ok {
		return at.Format(time.RFC3339), nil
	}
	if v, ok := p.references[reference]; ok {
		return v, nil
	}
	if v, ok := p.last[tag]; ok && tag != kmip.TagUniqueIdentifier {
		return v, nil
	}
	return "", fmt.Errorf("%s is not known: the response that should have told it did not", reference)
}

// now returns the time that "$NOW", with or without an offset, stands for.
func (p *play) now(reference string) (time.Time, bool) {
	offset, ok := strings.CutPrefix(reference, "$NOW")
	if !ok {
		return time.Time{}, false
	}
	if offset == "" {
		return p.start, true
	}
	seconds, err := strconv.Atoi(offset)
	if p.waits && seconds > 0 {
		return p.start.Add(soon), err == nil
	}
	return p.start.Add(time.Duration(seconds) * time.Second), err == nil
}

func (p *play) differ(path, format string, args ...any) {
	p.differs = append(p.differs, path+": "+fmt.Sprintf(format, args...))
}

// ignored tells values that may differ, or be there or not.
func ignored(tag int) bool {
	switch tag {
	case kmip.TagTimeStamp, kmip.TagResultMessage, kmip.TagVendorIdentification, kmip.TagServerInformation, kmip.TagServerCorrelationValue:
		return true
	}
	return false
}

// nowSlack is how far a server's idea of "$NOW" may be from ours.
const nowSlack = 60 * time.Second

// compare notes how got differs from want.
func (p *play) compare(path string, want *node, got ttlv.Value) {
	path += "/" + ttlv.TagString(want.tag)
	if _, ok := got.Value.(ttlv.Struct); !ok && p.last != nil {
		p.last[got.Tag] = text(got.Value)
	}
	if fields, ok := got.Value.(ttlv.Struct); ok || want.kind == ttlv.TypeStructure {
		if !ok || want.kind != ttlv.TypeStructure {
			p.differ(path, "one is a structure")
			return
		}
		p.compareFields(path, want, fields)
		return
	}
	if strings.HasPrefix(want.value, "$") {
		p.compareReference(path, want, got)
		return
	}
	value, err := want.parse(want.value)
	if err != nil {
		p.differ(path, "the case says %q: %v", want.value, err)
		return
	}
	if fmt.Sprintf("%T", value) != fmt.Sprintf("%T", got.Value) {
		p.differ(path, "want a %T, got a %T", value, got.Value)
		return
	}
	if !p.same(want, value, got.Value) {
		p.differ(path, "want %.60q, got %.60q", want.value, text(got.Value))
	}
}

// same compares two values of one type, free ones by what must be the same of
// them.
func (p *play) same(want *node, value, got any) bool {
	free := !p.literals[strings.ToLower(want.value)]
	generated := p.generated()
	switch value := value.(type) {
	case string:
		if want.tag == kmip.TagUniqueIdentifier {
			return true // spelt out in a few cases instead of "$NAME"
		}
	case time.Duration:
		if want.tag == kmip.TagLeaseTime {
			return true // the server's policy
		}
	case time.Time:
		return free || value.Equal(got.(time.Time))
	case []byte:
		chosen := want.tag == kmip.TagKeyMaterial || want.tag == kmip.TagData || want.tag == kmip.TagIVCounterNonce
		if p.made && (generated || p.randomIV) && (want.tag == kmip.TagData || want.tag == kmip.TagIVCounterNonce) {
			p.references[strings.ToLower(want.value)] = text(got)
			return len(value) == len(got.([]byte))
		}
		if free && chosen && p.operations["CreateKeyPair"] {
			return max(len(value), len(got.([]byte)))-min(len(value), len(got.([]byte))) <= 8 // numbers in DER begin with no zeros
		}
		if free && chosen && generated || want.tag == kmip.TagDigestValue && generated {
			return len(value) == len(got.([]byte))
		}
		return bytes.Equal(value, got.([]byte))
	case *big.Int:
		if free && generated && want.tag != kmip.TagPublicExponent {
			return got.(*big.Int).Sign() > 0 // of a key that the server made
		}
		return value.Cmp(got.(*big.Int)) == 0
	}
	return value == got
}

// generated reports whether the server makes keys of the case itself.
func (c *Case) generated() bool {
	o := c.operations
	return o["Create"] || o["ReKey"] || o["CreateKeyPair"] || o["ReKeyKeyPair"] || o["CreateSplitKey"] || !o["Register"]
}

func text(v any) string {
	switch v := v.(type) {
	case []byte:
		return hex.EncodeToString(v)
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case ttlv.Enum:
		return fmt.Sprintf("0x%08x", uint32(v))
	}
	return fmt.Sprint(v)
}

func (p *play) compareReference(path string, want *node, got ttlv.Value) {
	if at, ok := p.now(want.value); ok {
		is, ok := got.Value.(time.Time)
		if !ok || is.Sub(at).Abs() > nowSlack+time.Since(p.start) {
			p.differ(path, "want about %s, got %v", want.value, text(got.Value))
		}
		return
	}
	known, ok := p.references[want.value]
	if !ok {
		p.references[want.value] = text(got.Value)
		return
	}
	if known != text(got.Value) {
		p.differ(path, "want %s, which is %.60s, got %.60s", want.value, known, text(got.Value))
	}
}

// compareFields compares the fields of a structure: in order, but for
// repeated ones, which are matched by what they are called.
func (p *play) compareFields(path string, want *node, got ttlv.Struct) {
	left := append(ttlv.Struct(nil), got...)
	query := strings.Contains(path, "(Query)")
	last := -1
	for _, w := range want.children {
		at := p.find(path, w, left)
		if at < 0 {
			free := ignored(w.tag) || query && (w.tag == kmip.TagOperation || w.tag == kmip.TagObjectType)
			if !free {
				p.differ(path, "%s is missing", describe(w))
			}
			continue
		}
		if at < last && w.tag != kmip.TagAttribute && w.tag != kmip.TagAttributeName && w.tag != kmip.TagUniqueIdentifier && !query {
			p.differ(path, "%s comes too early", describe(w))
		}
		last = at
		if !ignored(w.tag) {
			p.compare(nameItem(path, want), w, left[at])
		}
		left[at].Tag = 0 // used
	}
	for _, g := range left {
		extra := g.Tag != 0 && !ignored(g.Tag)
		switch g.Tag {
		case kmip.TagAttribute:
			extra = extra && (p.named || !strings.HasSuffix(path, "/ResponsePayload"))
		case kmip.TagAttributeName, kmip.TagOperation, kmip.TagObjectType, kmip.TagProtocolVersion:
			extra = extra && !strings.HasSuffix(path, "/ResponsePayload")
		}
		if extra {
			p.differ(path, "%s is not expected", ttlv.TagString(g.Tag))
		}
	}
}

// nameItem puts the operation into the path of a batch item.
func nameItem(path string, n *node) string {
	if n.tag == kmip.TagBatchItem {
		if op := n.child(kmip.TagOperation); op != nil && !strings.HasSuffix(path, ")") {
			return path + "(" + op.value + ")"
		}
	}
	return path
}

func describe(n *node) string {
	if a := n.child(kmip.TagAttributeName); n.tag == kmip.TagAttribute && a != nil {
		return fmt.Sprintf("attribute %q", a.value)
	}
	if n.value != "" {
		return fmt.Sprintf("%s %.60q", ttlv.TagString(n.tag), n.value)
	}
	return ttlv.TagString(n.tag)
}

// find returns the place of what w is to be compared with, or -1.
func (p *play) find(path string, w *node, fields ttlv.Struct) int {
	first := -1
	for i, g := range fields {
		if g.Tag != w.tag {
			continue
		}
		if first < 0 {
			first = i
		}
		switch w.tag {
		case kmip.TagAttribute, kmip.TagProtocolVersion:
			trial := &play{Case: p.Case, start: p.start, waits: p.waits, references: cloneOf(p.references), named: p.named}
			if trial.compare("", w, g); len(trial.differs) == 0 {
				return i
			}
			if w.tag == kmip.TagProtocolVersion {
				first = i
				continue
			}
			if name, ok := g.Value.(ttlv.Struct); !ok || len(name) == 0 || name[0].Value != w.child(kmip.TagAttributeName).value {
				if first == i {
					first = -1
				}
			}
		case kmip.TagAttributeName, kmip.TagOperation, kmip.TagObjectType, kmip.TagUniqueIdentifier:
			known := w.value
			if v, ok := p.references[known]; ok {
				known = v
			}
			if v, err := w.parse(known); err == nil && v == g.Value || known == text(g.Value) {
				return i
			}
			if w.tag != kmip.TagUniqueIdentifier && strings.HasSuffix(path, "/ResponsePayload") && (w.tag == kmip.TagAttributeName || strings.Contains(path, "(Query)")) {
				first = -1
			}
		default:
			return i
		}
	}
	return first
}

func cloneOf(m map[string]string) map[string]string {
	c := make(map[string]string, len(m))
	for k, v := range m {
		c[k] = v
	}
	return c
}
