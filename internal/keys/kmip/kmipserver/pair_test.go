package kmipserver

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

func usage(mask kmip.CryptographicUsageMask) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: mask}
}

func newPair(algorithm kmip.CryptographicAlgorithm, bits int32) *payloads.CreateKeyPairRequestPayload {
	return &payloads.CreateKeyPairRequestPayload{
		CommonTemplateAttribute: &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: algorithm},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: bits},
			usage(kmip.CryptographicUsageSign), // the public key's own wins
		}},
		PublicKeyTemplateAttribute: &kmip.TemplateAttribute{Attribute: []kmip.Attribute{usage(kmip.CryptographicUsageVerify)}},
	}
}

// refused sends one operation, which must fail for a reason.
func (s *session) refused(what string, p kmip.OperationPayload, want kmip.ResultReason) {
	s.t.Helper()
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	if item := s.send(&m).BatchItem[0]; item.ResultReason != want || item.ResponsePayload != nil {
		s.t.Errorf("%s: reason %v, %v; want %v", what, item.ResultReason, item.ResultMessage, want)
	}
}

// block returns the key block of an object in a format.
func (s *session) block(id string, format kmip.KeyFormatType) *kmip.KeyBlock {
	s.t.Helper()
	b := keyBlock(do[payloads.GetResponsePayload](s, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: format}).Object)
	if b == nil || b.KeyValue.Plain == nil {
		s.t.Fatalf("no key block of %s", id)
	}
	return b
}

// TestKeyPairs makes key pairs, has them as Go's own packages read them, and signs
// here what is verified there, and the other way round.
func TestKeyPairs(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	rsaParams := func(padding kmip.PaddingMethod) *kmip.CryptographicParameters {
		return &kmip.CryptographicParameters{PaddingMethod: padding, HashingAlgorithm: kmip.HashingAlgorithmSHA_256}
	}
	ec := []*kmip.CryptographicParameters{
		{HashingAlgorithm: kmip.HashingAlgorithmSHA_256},
		{DigitalSignatureAlgorithm: kmip.DigitalSignatureAlgorithmECDSAWithSHA256},
	}
	salt := int32(20)
	for _, c := range []struct {
		algorithm       kmip.CryptographicAlgorithm
		bits            int32
		private, public []kmip.KeyFormatType // the first is the one it was made in
		params          []*kmip.CryptographicParameters
	}{
		{
			kmip.CryptographicAlgorithmRSA, 2048,
			[]kmip.KeyFormatType{kmip.KeyFormatTypePKCS_1, kmip.KeyFormatTypePKCS_8},
			[]kmip.KeyFormatType{kmip.KeyFormatTypePKCS_1, kmip.KeyFormatTypeX_509},
			[]*kmip.CryptographicParameters{
				rsaParams(kmip.PaddingMethodPKCS1V1_5), rsaParams(kmip.PaddingMethodPSS),
				{DigitalSignatureAlgorithm: kmip.DigitalSignatureAlgorithmSHA_256WithRSAEncryption},
				{DigitalSignatureAlgorithm: kmip.DigitalSignatureAlgorithmRSASSA_PSS, HashingAlgorithm: kmip.HashingAlgorithmSHA_256, SaltLength: &salt},
			},
		},
		{kmip.CryptographicAlgorithmECDSA, 256, []kmip.KeyFormatType{kmip.KeyFormatTypeECPrivateKey, kmip.KeyFormatTypePKCS_8}, []kmip.KeyFormatType{kmip.KeyFormatTypeX_509}, ec},
		{kmip.CryptographicAlgorithmEC, 384, []kmip.KeyFormatType{kmip.KeyFormatTypeECPrivateKey, kmip.KeyFormatTypePKCS_8}, []kmip.KeyFormatType{kmip.KeyFormatTypeX_509}, ec},
		{kmip.CryptographicAlgorithmECDSA, 521, []kmip.KeyFormatType{kmip.KeyFormatTypeECPrivateKey, kmip.KeyFormatTypePKCS_8}, []kmip.KeyFormatType{kmip.KeyFormatTypeX_509}, ec},
	} {
		t.Run(fmt.Sprint(c.algorithm, c.bits), func(t *testing.T) {
			t.Parallel()
			s := b.dial(t, "one")
			made := do[payloads.CreateKeyPairResponsePayload](s, newPair(c.algorithm, c.bits))
			private, public := made.PrivateKeyUniqueIdentifier, made.PublicKeyUniqueIdentifier
			for id, want := range map[string]struct {
				link  kmip.Link
				usage kmip.CryptographicUsageMask
				first kmip.KeyFormatType
			}{
				private: {kmip.Link{LinkType: kmip.LinkTypePublicKeyLink, LinkedObjectIdentifier: public}, kmip.CryptographicUsageSign, c.private[0]},
				public:  {kmip.Link{LinkType: kmip.LinkTypePrivateKeyLink, LinkedObjectIdentifier: private}, kmip.CryptographicUsageVerify, c.public[0]},
			} {
				o := &Object{Attributes: do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}).Attribute}
				link, _ := attribute[kmip.Link](o, kmip.AttributeNameLink)
				bits, _ := attribute[int32](o, kmip.AttributeNameCryptographicLength)
				if link != want.link || o.usage() != want.usage || bits != c.bits || o.state() != kmip.StatePreActive {
					t.Errorf("attributes %v", o.Attributes)
				}
				block := s.block(id, 0)
				if block.KeyFormatType != want.first || block.CryptographicAlgorithm != c.algorithm || block.CryptographicLength != c.bits {
					t.Errorf("key block %v %v %d", block.KeyFormatType, block.CryptographicAlgorithm, block.CryptographicLength)
				}
			}
			var key crypto.Signer
			for _, format := range c.private {
				der := *s.block(private, format).KeyValue.Plain.KeyMaterial.Bytes
				parsed, err := parsePrivate(der, format)
				if err != nil || key != nil && !key.(interface{ Equal(crypto.PrivateKey) bool }).Equal(parsed) {
					t.Fatalf("%v: %v, or another key", format, err)
				}
				key = parsed
			}
			for _, format := range c.public {
				der := *s.block(public, format).KeyValue.Plain.KeyMaterial.Bytes
				var parsed any
				var err error
				if format == kmip.KeyFormatTypePKCS_1 {
					parsed, err = x509.ParsePKCS1PublicKey(der)
				} else {
					parsed, err = x509.ParsePKIXPublicKey(der)
				}
				if err != nil || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(parsed) {
					t.Fatalf("%v: %v, or the public key of another", format, err)
				}
			}
			s.refused("a format that is not for it", &payloads.GetRequestPayload{UniqueIdentifier: public, KeyFormatType: kmip.KeyFormatTypeRaw}, kmip.ResultReasonKeyFormatTypeNotSupported)

			data := []byte("what is signed")
			digest := sha256.Sum256(data)
			sign := func(params *kmip.CryptographicParameters) *payloads.SignRequestPayload {
				return &payloads.SignRequestPayload{UniqueIdentifier: private, Data: data, CryptographicParameters: params}
			}
			s.refused("a key that was not activated", sign(c.params[0]), kmip.ResultReasonPermissionDenied)
			do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: private})
			do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: public})
			verify := func(data, signature []byte, params *kmip.CryptographicParameters) kmip.ValidityIndicator {
				t.Helper()
				return do[payloads.SignatureVerifyResponsePayload](s, &payloads.SignatureVerifyRequestPayload{
					UniqueIdentifier: public, Data: data, SignatureData: signature, CryptographicParameters: params,
				}).ValidityIndicator
			}
			for i, params := range c.params {
				signature := do[payloads.SignResponsePayload](s, sign(params)).SignatureData
				if !verified(key.Public(), digest[:], signature) {
					t.Errorf("%d: Go does not verify the signature", i)
				}
				byDigest := do[payloads.SignResponsePayload](s, &payloads.SignRequestPayload{UniqueIdentifier: private, DigestedData: digest[:], CryptographicParameters: params}).SignatureData
				for _, good := range [][]byte{signature, byDigest} {
					if got := verify(data, good, params); got != kmip.ValidityIndicatorValid {
						t.Errorf("%d: its own signature is %v", i, got)
					}
				}
				other := bytes.Clone(signature)
				other[len(other)/2] ^= 1
				if verify(data, other, params) != kmip.ValidityIndicatorInvalid || verify([]byte("another"), signature, params) != kmip.ValidityIndicatorInvalid || verify(data, nil, params) != kmip.ValidityIndicatorInvalid {
					t.Errorf("%d: a wrong signature is not invalid", i)
				}
			}
			theirs, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			if got := verify(data, theirs, c.params[0]); got != kmip.ValidityIndicatorValid {
				t.Errorf("Go's signature is %v", got)
			}

			wrong := kmip.DigitalSignatureAlgorithmECDSAWithSHA256
			if c.algorithm != kmip.CryptographicAlgorithmRSA {
				wrong = kmip.DigitalSignatureAlgorithmSHA_256WithRSAEncryption
			}
			s.refused("another kind's algorithm", sign(&kmip.CryptographicParameters{DigitalSignatureAlgorithm: wrong}), kmip.ResultReasonInvalidField)
			s.refused("no hash", sign(&kmip.CryptographicParameters{PaddingMethod: kmip.PaddingMethodPSS}), kmip.ResultReasonInvalidField)
			s.refused("data and digest", &payloads.SignRequestPayload{UniqueIdentifier: private, Data: data, DigestedData: digest[:], CryptographicParameters: c.params[0]}, kmip.ResultReasonInvalidField)
			s.refused("a public key that signs", &payloads.SignRequestPayload{UniqueIdentifier: public, Data: data, CryptographicParameters: c.params[0]}, kmip.ResultReasonInvalidField)
			s.refused("a private key that encrypts", &payloads.EncryptRequestPayload{UniqueIdentifier: private, Data: data, CryptographicParameters: &kmip.AES_GCM}, kmip.ResultReasonInvalidField)
			s.refused("a private key that is re-keyed", &payloads.RekeyRequestPayload{UniqueIdentifier: private}, kmip.ResultReasonInvalidField)
			do[payloads.RevokeResponsePayload](s, &payloads.RevokeRequestPayload{UniqueIdentifier: private, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation}})
			s.refused("a key that was revoked", sign(c.params[0]), kmip.ResultReasonPermissionDenied)
			do[payloads.DestroyResponsePayload](s, &payloads.DestroyRequestPayload{UniqueIdentifier: private})
			s.refused("a key that was destroyed", &payloads.GetRequestPayload{UniqueIdentifier: private}, kmip.ResultReasonItemNotFound)
		})
	}
}

func parsePrivate(der []byte, format kmip.KeyFormatType) (crypto.Signer, error) {
	switch format {
	case kmip.KeyFormatTypePKCS_1:
		return x509.ParsePKCS1PrivateKey(der)
	case kmip.KeyFormatTypeECPrivateKey:
		return x509.ParseECPrivateKey(der)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return key.(crypto.Signer), nil
}

func verified(public crypto.PublicKey, digest, signature []byte) bool {
	switch key := public.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, signature) == nil || rsa.VerifyPSS(key, crypto.SHA256, digest, signature, nil) == nil
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest, signature)
	}
	return false
}

// TestKeyPairsRefused: what cannot be a key pair is not made, and no half of one.
func TestKeyPairsRefused(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	named := func(name string) *kmip.TemplateAttribute {
		return &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			usage(kmip.CryptographicUsageVerify),
			{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}},
		}}
	}
	taken := newPair(kmip.CryptographicAlgorithmECDSA, 256)
	taken.PublicKeyTemplateAttribute = named("taken")
	do[payloads.CreateKeyPairResponsePayload](s, taken)
	count := func() int {
		t.Helper()
		return len(do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{}).UniqueIdentifier)
	}
	before := count()
	differ := newPair(kmip.CryptographicAlgorithmECDSA, 256)
	differ.PublicKeyTemplateAttribute.Attribute = append(differ.PublicKeyTemplateAttribute.Attribute, kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(384)})
	curve := newPair(kmip.CryptographicAlgorithmECDSA, 256)
	curve.CommonTemplateAttribute.Attribute = append(curve.CommonTemplateAttribute.Attribute,
		kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicDomainParameters, AttributeValue: kmip.CryptographicDomainParameters{RecommendedCurve: kmip.RecommendedCurveP_384}})
	for what, p := range map[string]*payloads.CreateKeyPairRequestPayload{
		"a small RSA key":            newPair(kmip.CryptographicAlgorithmRSA, 512),
		"a huge RSA key":             newPair(kmip.CryptographicAlgorithmRSA, 1<<30),
		"no curve":                   newPair(kmip.CryptographicAlgorithmECDSA, 255),
		"a symmetric algorithm":      newPair(kmip.CryptographicAlgorithmAES, 256),
		"halves that differ":         differ,
		"a curve of another length":  curve,
		"nothing":                    {},
		"a name that is another's":   taken,
		"one name for both its keys": {CommonTemplateAttribute: &kmip.TemplateAttribute{Attribute: append(slices.Clone(named("both").Attribute), taken.CommonTemplateAttribute.Attribute[:2]...)}},
	} {
		s.refused(what, p, kmip.ResultReasonInvalidField)
	}
	if n := count(); n != before {
		t.Errorf("%d objects, before %d", n, before)
	}
}

// TestRegisterPairs: halves of key pairs that a client brings are as they say, or
// kept without being used.
func TestRegisterPairs(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	register := func(material []byte, format kmip.KeyFormatType, algorithm kmip.CryptographicAlgorithm, bits int32) *payloads.RegisterRequestPayload {
		material = bytes.Clone(material)
		return &payloads.RegisterRequestPayload{
			ObjectType: kmip.ObjectTypePrivateKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{usage(kmip.CryptographicUsageSign)}},
			Object: &kmip.PrivateKey{KeyBlock: kmip.KeyBlock{
				KeyFormatType: format, CryptographicAlgorithm: algorithm, CryptographicLength: bits,
				KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &material}}},
			}},
		}
	}
	id := do[payloads.RegisterResponsePayload](s, register(der, kmip.KeyFormatTypeECPrivateKey, 0, 0)).UniqueIdentifier
	if b := s.block(id, 0); b.CryptographicAlgorithm != kmip.CryptographicAlgorithmECDSA || b.CryptographicLength != 256 || !bytes.Equal(*b.KeyValue.Plain.KeyMaterial.Bytes, der) {
		t.Errorf("registered, it is %v with %d bits", b.CryptographicAlgorithm, b.CryptographicLength)
	}
	s.refused("another length", register(der, kmip.KeyFormatTypeECPrivateKey, 0, 384), kmip.ResultReasonInvalidField)
	s.refused("another algorithm", register(der, kmip.KeyFormatTypeECPrivateKey, kmip.CryptographicAlgorithmRSA, 256), kmip.ResultReasonInvalidField)
	s.refused("a format of public keys", register(der, kmip.KeyFormatTypeX_509, 0, 0), kmip.ResultReasonKeyFormatTypeNotSupported)
	s.refused("of which nothing is known", register([]byte("a key of some kind"), kmip.KeyFormatTypePKCS_8, 0, 0), kmip.ResultReasonInvalidField)
	id = do[payloads.RegisterResponsePayload](s, register([]byte("a key of some kind"), kmip.KeyFormatTypePKCS_8, kmip.CryptographicAlgorithmDSA, 1024)).UniqueIdentifier
	do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
	s.refused("to sign with it", &payloads.SignRequestPayload{UniqueIdentifier: id, Data: []byte("x"), CryptographicParameters: &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}},
		kmip.ResultReasonKeyFormatTypeNotSupported)
}
