package luks

import (
	"encoding/json"
	"fmt"
	"strconv"

	"strongroom/internal/crypto/keysafe"
)

// tokenType is the type of the LUKS2 token that holds a key safe.
const tokenType = "strongroom"

// Safes returns the key safes in the header, in the order of their tokens:
// none, one, or two while a rekey is in progress. It returns an error if one
// of them is not valid, wrapping [keysafe.ErrInvalid] or [keysafe.ErrVersion].
func (h *Header) Safes() ([]*keysafe.Safe, error) {
	var safes []*keysafe.Safe
	for _, t := range h.meta.tokens {
		if t.kind != tokenType {
			continue
		}
		members := make(object, len(t.fields))
		for name, value := range t.fields {
			if name != "type" && name != "keyslots" {
				members[name] = value
			}
		}
		safe := new(keysafe.Safe)
		if err := safe.UnmarshalJSON(encodeJSON(members)); err != nil {
			return nil, fmt.Errorf("cannot read the key safe in token %d of LUKS2 volume %s: %w", t.id, h.bin.uuid, err)
		}
		safes = append(safes, safe)
	}
	return safes, nil
}

// SetSafe makes s the only key safe in the header; nil: none. The header is
// written by [Header.Commit]. It returns an error wrapping [ErrNoSpace], and
// changes nothing, if the safe does not fit.
func (h *Header) SetSafe(s *keysafe.Safe) error {
	if err := h.setSafe(s); err != nil {
		return fmt.Errorf("cannot put key safe into LUKS2 header: %w", err)
	}
	return nil
}

func (h *Header) setSafe(s *keysafe.Safe) error {
	doc := cloneJSON(h.doc)
	tokens := doc["tokens"].(object)
	for _, t := range h.meta.tokens {
		if t.kind == tokenType {
			delete(tokens, strconv.Itoa(t.id))
		}
	}
	if s != nil {
		text, err := json.Marshal(s)
		if err != nil {
			return err
		}
		members, err := decodeJSON(text)
		if err != nil {
			return err
		}
		members["type"], members["keyslots"] = tokenType, []any{}
		id, err := freeID(tokens, tokensMax)
		if err != nil {
			return err
		}
		tokens[id] = members
	}
	return h.replace(doc)
}

// freeID returns the lowest number below limit that is no name in members.
func freeID(members object, limit int) (string, error) {
	for i := range limit {
		if id := strconv.Itoa(i); members[id] == nil {
			return id, nil
		}
	}
	return "", fmt.Errorf("%w: all %d places are taken", ErrNoSpace, limit)
}
