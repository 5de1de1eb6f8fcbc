package providertest

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
)

// RefuteLeak fails the test if text shows 8 bytes of key in a row: raw, in hex,
// in base64, or as fmt prints bytes.
func RefuteLeak(t testing.TB, text string, key *keymem.Key) {
	t.Helper()
	if form := findLeak(text, key.Bytes()); form != "" {
		t.Errorf("the text shows key bytes in %s", form)
	}
}

// findLeak returns the form in which text shows a part of secret, or "".
func findLeak(text string, secret []byte) string {
	const window = 8
	lower := strings.ToLower(text)
	for i := 0; i+window <= len(secret); i++ {
		part := secret[i : i+window]
		decimal := strings.Trim(fmt.Sprint(part), "[]")
		source := strings.Trim(fmt.Sprintf("%#v", part), "[]byte{}")
		// Whole groups of three bytes look the same in base64 wherever the
		// encoding began.
		base := base64.RawStdEncoding.EncodeToString(part[:6])
		switch {
		case strings.Contains(text, string(part)):
			return "raw"
		case strings.Contains(lower, hex.EncodeToString(part)):
			return "hex"
		case strings.Contains(text, base), strings.Contains(text, base64.RawURLEncoding.EncodeToString(part[:6])):
			return "base64"
		case strings.Contains(text, decimal), strings.Contains(text, strings.ReplaceAll(decimal, " ", ",")):
			return "decimal"
		case strings.Contains(lower, source):
			return "Go source"
		}
	}
	return ""
}
