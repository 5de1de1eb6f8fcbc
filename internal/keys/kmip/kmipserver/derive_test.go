package kmipserver

import (
	"bytes"
	"crypto/aes"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/sha512"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// derive sends Derive Key, whose answer is an unknown payload to the library, and
// looks for what was made by its name.
func (s *session) derive(p *deriveRequest) (string, kmip.ResultReason) {
	s.t.Helper()
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	if _, err := s.Write(ttlv.MarshalTTLV(&m)); err != nil {
		s.t.Fatal(err)
	}
	r := s.receive()
	if item := r.BatchItem[0]; item.ResultReason != 0 || item.ResultStatus != kmip.ResultStatusSuccess {
		return "", item.ResultReason
	}
	found := do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{MaximumItems: 1, Attribute: p.TemplateAttribute.Attribute[:1]}).UniqueIdentifier
	if len(found) != 1 {
		s.t.Fatalf("%d objects were derived", len(found))
	}
	return found[0], 0
}

// TestDeriveKey derives in every way, and compares with what Go's packages say.
func TestDeriveKey(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	secret := bytes.Repeat([]byte("base key"), 4)
	register := func(t kmip.ObjectType, mask kmip.CryptographicUsageMask, activate bool) string {
		material := bytes.Clone(secret)
		block := kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &material}}}}
		var object kmip.Object = &kmip.SecretData{SecretDataType: kmip.SecretDataTypePassword, KeyBlock: block}
		if t == kmip.ObjectTypeSymmetricKey {
			block.CryptographicAlgorithm, block.CryptographicLength = kmip.CryptographicAlgorithmAES, 256
			object = &kmip.SymmetricKey{KeyBlock: block}
		}
		id := do[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
			ObjectType: t, Object: object, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{usage(mask)}},
		}).UniqueIdentifier
		if activate {
			do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		}
		return id
	}
	key, password := register(kmip.ObjectTypeSymmetricKey, kmip.CryptographicUsageDeriveKey, true), register(kmip.ObjectTypeSecretData, kmip.CryptographicUsageDeriveKey, true)
	sha := &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}
	request := func(name, base string, method derivationMethod, p derivationParameters) *deriveRequest {
		return &deriveRequest{
			ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: []string{base}, DerivationMethod: method, DerivationParameters: p,
			TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
				{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}},
				{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
				{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
				usage(kmip.CryptographicUsageEncrypt),
			}},
		}
	}
	data := []byte("label\x00context")
	sum := func(parts ...[]byte) []byte {
		h := hmac.New(sha256.New, secret)
		for _, part := range parts {
			h.Write(part)
		}
		return h.Sum(nil)
	}
	hashed := sha512.Sum384(secret)
	stretched, err := pbkdf2.Key(sha256.New, string(secret), []byte("salt"), 1000, 32)
	if err != nil {
		t.Fatal(err)
	}
	b, err := aes.NewCipher(secret)
	if err != nil {
		t.Fatal(err)
	}
	encrypted := bytes.Repeat([]byte{7}, 32)
	for i := range 2 {
		b.Encrypt(encrypted[16*i:16*i+16], encrypted[16*i:16*i+16])
	}
	for name, c := range map[string]struct {
		base   string
		method derivationMethod
		params derivationParameters
		want   []byte
	}{
		"pbkdf2":  {password, byPBKDF2, derivationParameters{CryptographicParameters: sha, Salt: []byte("salt"), IterationCount: 1000}, stretched},
		"hash":    {key, byHash, derivationParameters{CryptographicParameters: &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_384}}, hashed[:32]},
		"hmac":    {key, byHMAC, derivationParameters{CryptographicParameters: sha, DerivationData: data}, sum(data)},
		"counter": {key, byCounter, derivationParameters{CryptographicParameters: sha, DerivationData: data}, sum([]byte{0, 0, 0, 1}, data)},
		"encrypt": {key, byEncrypt, derivationParameters{CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, DerivationData: bytes.Repeat([]byte{7}, 32)}, encrypted},
	} {
		id, reason := s.derive(request(name, c.base, c.method, c.params))
		if reason != 0 {
			t.Errorf("%s: reason %v", name, reason)
			continue
		}
		if got := *s.block(id, 0).KeyValue.Plain.KeyMaterial.Bytes; !bytes.Equal(got, c.want) {
			t.Errorf("%s: another key than Go derives", name)
		}
		for of, want := range map[string]kmip.Link{
			id:     {LinkType: kmip.LinkTypeDerivationBaseObjectLink, LinkedObjectIdentifier: c.base},
			c.base: {LinkType: kmip.LinkTypeDerivedKeyLink, LinkedObjectIdentifier: id},
		} {
			list := do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: of, AttributeName: []kmip.AttributeName{kmip.AttributeNameLink}}).Attribute
			found := false
			for _, a := range list {
				found = found || a.AttributeValue == want
			}
			if !found {
				t.Errorf("%s: links %v of %s", name, list, of)
			}
		}
	}
	if twice, err := pbkdf2.Key(sha256.New, string(secret), []byte("salt"), 3, 64); err != nil || !bytes.Equal(stretch(sha256.New, secret, []byte("salt"), 3, 64), twice) {
		t.Errorf("PBKDF2 of 64 bytes: another key than Go derives, or %v", err)
	}
	// SP 800-108 over more than one block of the hash.
	long := request("long", key, byCounter, derivationParameters{CryptographicParameters: sha, DerivationData: data})
	long.ObjectType = kmip.ObjectTypeSecretData
	long.TemplateAttribute.Attribute = append(long.TemplateAttribute.Attribute[:1], usage(kmip.CryptographicUsageDeriveKey), kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(512)})
	if id, reason := s.derive(long); reason != 0 {
		t.Errorf("64 bytes: reason %v", reason)
	} else if got := *s.block(id, 0).KeyValue.Plain.KeyMaterial.Bytes; !bytes.Equal(got, append(sum([]byte{0, 0, 0, 1}, data), sum([]byte{0, 0, 0, 2}, data)...)) {
		t.Error("64 bytes: another key than NIST SP 800-108 says")
	}

	before := len(do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{}).UniqueIdentifier)
	sha1 := &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_1}
	other, sleeping := register(kmip.ObjectTypeSymmetricKey, kmip.CryptographicUsageEncrypt, true), register(kmip.ObjectTypeSymmetricKey, kmip.CryptographicUsageDeriveKey, false)
	pair := do[payloads.CreateKeyPairResponsePayload](s, newPair(kmip.CryptographicAlgorithmECDSA, 256)).PrivateKeyUniqueIdentifier
	hmacOf := derivationParameters{CryptographicParameters: sha, DerivationData: data}
	two := request("x", key, byHMAC, hmacOf)
	two.UniqueIdentifier = append(two.UniqueIdentifier, password)
	large := request("x", key, byCounter, hmacOf)
	large.TemplateAttribute.Attribute[1].AttributeValue, large.TemplateAttribute.Attribute[2].AttributeValue = kmip.CryptographicAlgorithmHMACSHA256, int32(4096)
	wrongType := request("x", key, byHMAC, hmacOf)
	wrongType.ObjectType = kmip.ObjectTypePrivateKey
	for what, c := range map[string]struct {
		request *deriveRequest
		want    kmip.ResultReason
	}{
		"a key for other things":    {request("x", other, byHMAC, hmacOf), kmip.ResultReasonPermissionDenied},
		"a key that is not active":  {request("x", sleeping, byHMAC, hmacOf), kmip.ResultReasonPermissionDenied},
		"a private key":             {request("x", pair, byHMAC, hmacOf), kmip.ResultReasonInvalidField},
		"no such key":               {request("x", "none", byHMAC, hmacOf), kmip.ResultReasonItemNotFound},
		"a hash that is too short":  {request("x", key, byHMAC, derivationParameters{CryptographicParameters: sha1, DerivationData: data}), kmip.ResultReasonCryptographicFailure},
		"too little to encrypt":     {request("x", key, byEncrypt, derivationParameters{CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, DerivationData: make([]byte, 16)}), kmip.ResultReasonCryptographicFailure},
		"too many iterations":       {request("x", password, byPBKDF2, derivationParameters{CryptographicParameters: sha, Salt: []byte("salt"), IterationCount: iterationsMax + 1}), kmip.ResultReasonInvalidField},
		"no salt":                   {request("x", password, byPBKDF2, derivationParameters{CryptographicParameters: sha, IterationCount: 1000}), kmip.ResultReasonInvalidField},
		"a password that encrypts":  {request("x", password, byEncrypt, derivationParameters{CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, DerivationData: make([]byte, 32)}), kmip.ResultReasonInvalidField},
		"another method":            {request("x", key, 6, hmacOf), kmip.ResultReasonFeatureNotSupported},
		"derivation data elsewhere": {two, kmip.ResultReasonFeatureNotSupported},
		"too much":                  {large, kmip.ResultReasonInvalidField},
		"a private key to be made":  {wrongType, kmip.ResultReasonInvalidField},
		"a name that is another's":  {request("hmac", key, byHMAC, hmacOf), kmip.ResultReasonInvalidField},
	} {
		if _, reason := s.derive(c.request); reason != c.want {
			t.Errorf("%s: reason %v, want %v", what, reason, c.want)
		}
	}
	// Two keys and a pair were made since.
	if n := len(do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{}).UniqueIdentifier); n != before+4 {
		t.Errorf("%d objects, want %d", n, before+4)
	}
}
