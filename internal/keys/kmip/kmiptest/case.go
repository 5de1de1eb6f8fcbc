// Package kmiptest replays the conformance test cases that OASIS publishes
// with the KMIP profiles against any server: each request of a case in order
// over TLS, each response compared with the one the case expects.
//
// A case is an XML file of request and response messages (KMIP Profiles 1.3,
// section 5.4). "$NAME" stands for a value that the server chooses, "$NOW" with
// an offset in seconds for a time. What may differ (KMIP Profiles 1.3, "Permitted
// Test Case Variations"): values that the server chooses (identifiers, time
// stamps, dates and key material that no request of the case names, digests of
// generated keys, result messages, server information), the order of
// attributes, further attributes where none was asked for by name, and which
// operations and objects Query lists. All else must be the same; in particular
// no field may be added or missing.
//
// A server that answers at once what a case polls for is held to that answer
// (pending.go); what a case waits for comes sooner (wait.go); what it takes for
// granted is made for it (prepare.go).
//
// The cases under testdata are © OASIS Open; see testdata/NOTICE.
package kmiptest

import (
	"bytes"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	_ "github.com/ovh/kmip-go/payloads" // registers names of enumerations
	"github.com/ovh/kmip-go/ttlv"
)

// node is one value of a case.
type node struct {
	tag      int
	kind     ttlv.Type
	value    string // as in the file; a reference if it starts with '$'
	enumTag  int    // whose names an enumeration or mask uses
	children []*node
}

func (n *node) child(tag int) *node {
	for _, c := range n.children {
		if c.tag == tag {
			return c
		}
	}
	return nil
}

// walk calls f with n and all below it.
func (n *node) walk(f func(*node)) {
	f(n)
	for _, c := range n.children {
		c.walk(f)
	}
}

// exchange is a request and the response expected for it.
type exchange struct{ request, response *node }

// Case is one test case.
type Case struct {
	Name      string
	exchanges []exchange
	// literals are the values that requests name; see the package comment.
	literals   map[string]bool
	operations map[string]bool
}

var errNotClient = errors.New("the server speaks first in this case")

// Load reads the case in file.
func Load(file string) (*Case, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c := &Case{Name: strings.TrimSuffix(file[strings.LastIndexByte(file, '/')+1:], ".xml"), literals: map[string]bool{}, operations: map[string]bool{}}
	if err := c.parse(f); err != nil {
		return nil, fmt.Errorf("cannot read test case %s: %w", c.Name, err)
	}
	return c, nil
}

func (c *Case) parse(r io.Reader) error {
	d := xml.NewDecoder(r)
	var pending *node
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		start, ok := token.(xml.StartElement)
		if !ok || start.Name.Local == "KMIP" {
			continue
		}
		n, err := parseNode(d, start, nil, "")
		if err != nil {
			return err
		}
		switch {
		case n.tag == kmip.TagRequestMessage && pending == nil:
			pending = n
		case n.tag == kmip.TagResponseMessage && pending != nil:
			c.exchanges = append(c.exchanges, exchange{request: pending, response: n})
			c.note(pending)
			pending = nil
		default:
			return errNotClient
		}
	}
	if pending != nil || len(c.exchanges) == 0 {
		return errNotClient
	}
	return nil
}

// note remembers what a request names.
func (c *Case) note(request *node) {
	request.walk(func(n *node) {
		if n.value != "" {
			c.literals[strings.ToLower(n.value)] = true
		}
		if n.tag == kmip.TagOperation {
			c.operations[n.value] = true
		}
	})
}

// tags maps the names of the standard's tags to their numbers.
var tags = sync.OnceValue(func() map[string]int {
	names := map[string]int{}
	for tag := 0x420001; tag < 0x420200; tag++ {
		names[ttlv.TagString(tag)] = tag
	}
	return names
})

func tagOf(start xml.StartElement) (int, error) {
	name := start.Name.Local
	for _, a := range start.Attr {
		if name == "TTLV" && a.Name.Local == "tag" {
			tag, err := strconv.ParseInt(strings.TrimPrefix(a.Value, "0x"), 16, 32)
			return int(tag), err
		}
	}
	if tag, ok := tags()[name]; ok {
		return tag, nil
	}
	return 0, fmt.Errorf("unknown tag %s", name)
}

var kinds = map[string]ttlv.Type{
	"": ttlv.TypeStructure, "Structure": ttlv.TypeStructure, "Integer": ttlv.TypeInteger, "LongInteger": ttlv.TypeLongInteger,
	"BigInteger": ttlv.TypeBigInteger, "Enumeration": ttlv.TypeEnumeration, "Boolean": ttlv.TypeBoolean, "TextString": ttlv.TypeTextString,
	"ByteString": ttlv.TypeByteString, "DateTime": ttlv.TypeDateTime, "Interval": ttlv.TypeInterval,
}

// parseNode reads one element. In attribute values, names belong to the
// enumeration that the attribute is called after.
func parseNode(d *xml.Decoder, start xml.StartElement, parent *node, attribute string) (*node, error) {
	tag, err := tagOf(start)
	if err != nil {
		return nil, err
	}
	n := &node{tag: tag, enumTag: tag}
	kind := ""
	for _, a := range start.Attr {
		switch a.Name.Local {
		case "type":
			kind = a.Value
		case "value":
			n.value = a.Value
		}
	}
	var ok bool
	if n.kind, ok = kinds[kind]; !ok {
		return nil, fmt.Errorf("unknown type %q", kind)
	}
	if tag == kmip.TagAttributeName {
		n.value = strings.Join(strings.Fields(n.value), " ") // line breaks of the published document
	}
	if tag == kmip.TagAttributeValue && attribute != "" {
		if t, ok := tags()[strings.NewReplacer(" ", "", ".", "_").Replace(attribute)]; ok {
			n.enumTag = t
		}
	}
	for {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		switch token := token.(type) {
		case xml.StartElement:
			name := ""
			if a := n.child(kmip.TagAttributeName); a != nil {
				name = a.value
			}
			c, err := parseNode(d, token, n, name)
			if err != nil {
				return nil, err
			}
			n.children = append(n.children, c)
		case xml.EndElement:
			return n, nil
		}
	}
}

// encode returns n as TTLV; resolve replaces references.
func (n *node) encode(resolve func(tag int, reference string) (string, error)) (message []byte, err error) {
	e := ttlv.NewTTLVEncoder()
	if err := n.encodeTo(&e, resolve); err != nil {
		return nil, err
	}
	return bytes.Clone(e.Bytes()), nil
}

func (n *node) encodeTo(e *ttlv.Encoder, resolve func(tag int, reference string) (string, error)) (err error) {
	if n.kind == ttlv.TypeStructure {
		e.Struct(n.tag, func(e *ttlv.Encoder) {
			for _, c := range n.children {
				if err == nil {
					err = c.encodeTo(e, resolve)
				}
			}
		})
		return err
	}
	value, err := resolve(n.tag, n.value)
	if err != nil {
		return err
	}
	v, err := n.parse(value)
	if err != nil {
		return fmt.Errorf("%s %q: %w", ttlv.TagString(n.tag), value, err)
	}
	ttlv.Value{Tag: n.tag, Value: v}.EncodeTTLV(e)
	return nil
}

// parse returns value as what [ttlv.Value] holds for n's type.
func (n *node) parse(value string) (any, error) {
	switch n.kind {
	case ttlv.TypeInteger:
		if v, err := strconv.ParseInt(value, 0, 32); err == nil {
			return int32(v), nil
		}
		mask := int32(0)
		for _, name := range strings.FieldsFunc(value, func(r rune) bool { return r == ' ' || r == '|' }) {
			if v, err := strconv.ParseUint(name, 0, 32); err == nil {
				mask |= int32(v)
				continue
			}
			v, err := ttlv.BitmaskByStr(n.enumTag, name)
			if err != nil {
				return nil, err
			}
			mask |= v
		}
		return mask, nil
	case ttlv.TypeEnumeration:
		if v, err := strconv.ParseUint(value, 0, 32); err == nil {
			return ttlv.Enum(v), nil
		}
		v, err := ttlv.EnumByName(n.enumTag, value)
		if err != nil { // the library has PolynomialSharingGF2_8 without the line
			v, err = ttlv.EnumByName(n.enumTag, strings.ReplaceAll(value, "_", ""))
		}
		return ttlv.Enum(v), err
	case ttlv.TypeLongInteger:
		return strconv.ParseInt(value, 0, 64)
	case ttlv.TypeBigInteger:
		b, err := hex.DecodeString(value)
		v := new(big.Int).SetBytes(b)
		if len(b) > 0 && b[0]&0x80 != 0 {
			v.Sub(v, new(big.Int).Lsh(big.NewInt(1), uint(8*len(b))))
		}
		return v, err
	case ttlv.TypeBoolean:
		return strconv.ParseBool(value)
	case ttlv.TypeTextString:
		return value, nil
	case ttlv.TypeByteString:
		return hex.DecodeString(value)
	case ttlv.TypeDateTime:
		return time.Parse(time.RFC3339, value)
	case ttlv.TypeInterval:
		v, err := strconv.ParseUint(value, 0, 32)
		return time.Duration(v) * time.Second, err
	}
	return nil, errors.New("no such type")
}
