package directory

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"
)

const (
	// APIKeyPrefix begins every API key, so that those who look for secrets where
	// none belong know one.
	APIKeyPrefix = "srk_"

	credentialIDBytes = 6
	apiKeyBytes       = 32
	apiKeySize        = len(APIKeyPrefix) + 2*credentialIDBytes + 1 + 2*apiKeyBytes
)

// AddAPIKey gives an application whose interface is REST a new API key. The key is
// not kept: the caller shows it once and wipes it. Earlier ones stay valid until
// they are revoked, so that keys can be changed without a gap. life 0 means for
// ever.
func (d *Directory) AddAPIKey(ctx context.Context, app string, life time.Duration) (c Credential, key []byte, err error) {
	id := newCredentialID()
	for d.hasKey(id) {
		id = newCredentialID()
	}
	raw := make([]byte, apiKeyBytes)
	defer clear(raw)
	rand.Read(raw)
	key = make([]byte, 0, apiKeySize)
	key = append(key, APIKeyPrefix...)
	key = append(key, id...)
	key = append(key, '_')
	key = hex.AppendEncode(key, raw)
	return d.addSecret(ctx, app, Credential{ID: id, Kind: APIKey}, key, life)
}

func (d *Directory) hasKey(id string) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	_, ok := d.index.keys[id]
	return ok
}

// apiKeyID returns the identifier in the text of an API key; false for anything
// else.
func apiKeyID(key []byte) (id string, ok bool) {
	rest, ok := bytes.CutPrefix(key, []byte(APIKeyPrefix))
	if !ok || len(key) != apiKeySize || rest[2*credentialIDBytes] != '_' {
		return "", false
	}
	return string(rest[:2*credentialIDBytes]), true
}
