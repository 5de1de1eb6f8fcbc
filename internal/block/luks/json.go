package luks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"
)

// Metadata is kept as a tree of object, []any, string, json.Number, bool and
// nil, so that what other programs put there survives. A tree is never changed
// once a Header holds it: writers work on a clone.
type object = map[string]any

// Limits that no header in practice comes near to.
const (
	jsonDepthMax = 16     // levels of nesting
	jsonNodesMax = 65_536 // values in the whole text
)

// decodeJSON parses text, at most a JSON area of 4 MiB, which must be one
// object. Stricter than JSON itself: the text is UTF-8 and no name occurs
// twice in an object.
func decodeJSON(text []byte) (object, error) {
	if !utf8.Valid(text) {
		return nil, errors.New("not UTF-8")
	}
	p := jsonParser{dec: json.NewDecoder(bytes.NewReader(text))}
	p.dec.UseNumber()
	value, err := p.value(0)
	if err != nil {
		return nil, err
	}
	if _, err := p.dec.Token(); err != io.EOF {
		return nil, errors.New("text after the end of the object")
	}
	doc, ok := value.(object)
	if !ok {
		return nil, errors.New("not a JSON object")
	}
	return doc, nil
}

type jsonParser struct {
	dec   *json.Decoder
	nodes int
}

func (p *jsonParser) value(depth int) (any, error) {
	token, err := p.dec.Token()
	if err != nil {
		return nil, err
	}
	if p.nodes++; p.nodes > jsonNodesMax {
		return nil, fmt.Errorf("more than %d values", jsonNodesMax)
	}
	delim, ok := token.(json.Delim)
	if !ok {
		return token, nil
	}
	if depth++; depth > jsonDepthMax {
		return nil, fmt.Errorf("more than %d levels deep", jsonDepthMax)
	}
	var result any
	if delim == '[' {
		result, err = p.array(depth)
	} else {
		result, err = p.object(depth)
	}
	if err != nil {
		return nil, err
	}
	_, err = p.dec.Token() // the closing delimiter
	return result, err
}

func (p *jsonParser) array(depth int) (any, error) {
	list := []any{}
	for p.dec.More() {
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

func (p *jsonParser) object(depth int) (any, error) {
	members := object{}
	for p.dec.More() {
		token, err := p.dec.Token()
		if err != nil {
			return nil, err
		}
		name := token.(string) // the decoder accepts nothing else here
		if _, twice := members[name]; twice {
			return nil, fmt.Errorf("%.40q occurs twice", name)
		}
		if members[name], err = p.value(depth); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// encodeJSON returns the canonical text: no white space, names in byte order,
// numbers as they were read.
func encodeJSON(doc object) []byte {
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(doc); err != nil {
		panic("luks: metadata tree holds what JSON cannot: " + err.Error())
	}
	return bytes.TrimSuffix(text.Bytes(), []byte("\n"))
}

func number(n int) json.Number { return json.Number(strconv.Itoa(n)) }

// cloneJSON returns a copy of a tree that shares nothing changeable with it.
func cloneJSON[T any](tree T) T {
	var clone func(v any) any
	clone = func(v any) any {
		switch v := v.(type) {
		case object:
			c := make(object, len(v))
			for name, member := range v {
				c[name] = clone(member)
			}
			return c
		case []any:
			c := make([]any, len(v))
			for i, element := range v {
				c[i] = clone(element)
			}
			return c
		default:
			return v
		}
	}
	return clone(tree).(T)
}
