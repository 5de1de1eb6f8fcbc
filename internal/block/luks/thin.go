package luks

import (
	"fmt"
	"strconv"
)

// thinTokenType is the type of the token that a thin volume has.
const thinTokenType = "strongroom-thin"

// Thin reports whether sectors that were never written may stand for zeros that
// somebody relies on, as after a thin import: dm-crypt reads noise there.
func (h *Header) Thin() bool {
	for _, t := range h.meta.tokens {
		if t.kind == thinTokenType {
			return true
		}
	}
	return false
}

// SetThin changes what [Header.Thin] reports. The header is written by
// [Header.Commit]. It returns an error wrapping [ErrNoSpace] if there is no room
// for that, or [ErrReencrypting] during a deep rekey, and then changes nothing.
func (h *Header) SetThin(thin bool) error {
	if err := h.setThin(thin); err != nil {
		return fmt.Errorf("cannot note in LUKS2 header whether the volume is thin: %w", err)
	}
	return nil
}

func (h *Header) setThin(thin bool) error {
	if err := h.checkRequirements(); err != nil {
		return err
	}
	if thin == h.Thin() {
		return nil
	}
	doc := cloneJSON(h.doc)
	tokens := doc["tokens"].(object)
	for _, t := range h.meta.tokens {
		if t.kind == thinTokenType {
			delete(tokens, strconv.Itoa(t.id))
		}
	}
	if thin {
		id, err := freeID(tokens, tokensMax)
		if err != nil {
			return err
		}
		tokens[id] = object{"type": thinTokenType, "keyslots": []any{}}
	}
	return h.replace(doc)
}
