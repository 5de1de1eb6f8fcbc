package leaktest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

func testSecret() []byte {
	secret := make([]byte, 32)
	for i := range secret {
		secret[i] = byte(0x80 + 3*i)
	}
	return secret
}

func TestFind(t *testing.T) {
	t.Parallel()
	secret := testSecret()
	for want, text := range map[string]string{
		"":       "kp-1: key provider is closed [redacted]",
		"raw":    "x" + string(secret[3:11]) + "y",
		"hex":    strings.ToUpper(hex.EncodeToString(secret)),
		"base64": base64.StdEncoding.EncodeToString(append([]byte("x"), secret...)),
	} {
		if got := find(text, secret); got != want {
			t.Errorf("find(%q) = %q, want %q", text, got, want)
		}
	}
	for _, value := range []any{
		secret, [32]byte(secret),
		struct{ b []byte }{secret},
		&struct{ B [32]byte }{[32]byte(secret)},
		errors.New(string(secret)), bytes.NewBuffer(secret),
	} {
		if find(Print(value), secret) == "" {
			t.Errorf("a secret in a %T is not found", value)
		}
	}
	if form := find(Print("nothing", 1, errors.New("x")), secret); form != "" {
		t.Errorf("found %s where nothing is", form)
	}
}
