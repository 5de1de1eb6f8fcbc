// Package leaktest looks for key bytes where none may be: in logs, errors,
// encodings and whatever fmt prints. It is for tests only.
package leaktest

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
)

// Print returns what values look like in all the ways in which a program might
// print them: every verb of fmt, slog and JSON.
func Print(values ...any) string {
	var out strings.Builder
	log := slog.New(slog.NewJSONHandler(&out, nil))
	for _, value := range values {
		for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			fmt.Fprintf(&out, format+"\n", value)
		}
		log.Info("value", "value", value)
		if encoded, err := json.Marshal(value); err == nil {
			out.Write(encoded)
		}
	}
	return out.String()
}

// Refute fails the test if text shows 8 bytes of a key in a row: raw, in hex,
// in base64, or as fmt and JSON print bytes.
func Refute(t testing.TB, text string, keys ...*keymem.Key) {
	t.Helper()
	for i, key := range keys {
		if form := find(text, key.Bytes()); form != "" {
			t.Errorf("the text shows bytes of key %d in %s", i, form)
		}
	}
}

// find returns the form in which text shows a part of secret, or "".
func find(text string, secret []byte) string {
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
