package providertest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"testing"
)

func TestFindLeak(t *testing.T) {
	t.Parallel()
	secret := make([]byte, 32)
	for i := range secret {
		secret[i] = byte(0x80 + 3*i)
	}
	numbers, err := json.Marshal([32]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	for want, text := range map[string]string{
		"":          "kp-1: key provider is closed [redacted]",
		"raw":       "x" + string(secret[3:11]) + "y",
		"hex":       fmt.Sprintf("%X", secret),
		"base64":    base64.StdEncoding.EncodeToString(append([]byte("x"), secret...)),
		"decimal":   fmt.Sprint(secret[7:20]),
		"Go source": fmt.Sprintf("%#v", secret),
	} {
		if got := findLeak(text, secret); got != want {
			t.Errorf("findLeak(%q) = %q, want %q", text, got, want)
		}
	}
	if got := findLeak(string(numbers), secret); got != "decimal" {
		t.Errorf("JSON numbers: %q", got)
	}
}
