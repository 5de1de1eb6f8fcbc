package luks

import (
	"errors"
	"fmt"
	"strconv"

	"strongroom/internal/crypto/keysafe"
)

// tokenType is the type of the LUKS2 token that holds a key safe.
const tokenType = "strongroom"

// The member of the token whose key safe holds the DEK that a rekey leads to.
const (
	tokenRekey     = "rekey"
	tokenRekeyNext = "next"
)

// Safes returns the key safes in the header, in the order of their tokens:
// none, one, or two while a rekey is in progress, that of the new key last. It
// returns an error if one of them is not valid, wrapping [keysafe.ErrInvalid]
// or [keysafe.ErrVersion].
func (h *Header) Safes() ([]*keysafe.Safe, error) {
	var safes, next []*keysafe.Safe
	for _, t := range h.meta.tokens {
		if t.kind != tokenType {
			continue
		}
		members := make(object, len(t.fields))
		for name, value := range t.fields {
			if name != "type" && name != "keyslots" && !(name == tokenRekey && value == tokenRekeyNext) {
				members[name] = value
			}
		}
		safe := new(keysafe.Safe)
		if err := safe.UnmarshalJSON(encodeJSON(members)); err != nil {
			return nil, fmt.Errorf("cannot read the key safe in token %d of LUKS2 volume %s: %w", t.id, h.bin.uuid, err)
		}
		if t.fields[tokenRekey] != nil {
			next = append(next, safe)
			continue
		}
		safes = append(safes, safe)
	}
	return append(safes, next...), nil
}

// SetSafe makes s the only key safe in the header; nil: none. The header is
// written by [Header.Commit]. It returns an error wrapping [ErrNoSpace] if the
// safe does not fit, or [ErrReencrypting] during a deep rekey, and then changes
// nothing.
func (h *Header) SetSafe(s *keysafe.Safe) error {
	if err := h.setSafe(s); err != nil {
		return fmt.Errorf("cannot put key safe into LUKS2 header: %w", err)
	}
	return nil
}

func (h *Header) setSafe(s *keysafe.Safe) error {
	if err := h.checkRequirements(); err != nil && !errors.Is(err, ErrEncrypting) {
		return err // with two safes, one cannot be the only one
	}
	doc := cloneJSON(h.doc)
	tokens := doc["tokens"].(object)
	for _, t := range h.meta.tokens {
		if t.kind == tokenType {
			delete(tokens, strconv.Itoa(t.id))
		}
	}
	if s != nil {
		if err := addSafe(doc, s, false); err != nil {
			return err
		}
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

// SetNextSafe makes s the key safe of the key that the deep rekey under way leads
// to. The header is written by [Header.Commit]. It returns an error wrapping
// [ErrNoSpace] if the safe does not fit, [ErrUnsupported] if no rekey is under
// way, and then changes nothing.
func (h *Header) SetNextSafe(s *keysafe.Safe) error {
	_, err := h.meta.reencryption()
	if err == nil {
		doc := cloneJSON(h.doc)
		tokens := doc["tokens"].(object)
		for id, t := range tokens {
			if token := t.(object); token["type"] == tokenType && token[tokenRekey] != nil {
				delete(tokens, id)
			}
		}
		if err = addSafe(doc, s, true); err == nil {
			err = h.replace(doc)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot put the next key safe into LUKS2 header: %w", err)
	}
	return nil
}
