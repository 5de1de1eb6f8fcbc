package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/testca"
)

// newCertificate returns a certificate of its own with two names.
func newCertificate(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(0x0fedcba987), Subject: pkix.Name{CommonName: "array-7", Organization: []string{"Storage"}},
		NotAfter: time.Unix(1<<31, 0), DNSNames: []string{"array-7.example", "array.example"},
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func certificate(der []byte) *payloads.RegisterRequestPayload {
	return &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeCertificate, Object: &kmip.Certificate{CertificateType: kmip.CertificateTypeX_509, CertificateValue: der},
	}
}

// TestCertificate registers a certificate, finds it by what it says, and has it back,
// by a client too that gets no keys; one that may have keys of some types only cannot
// register it.
func TestCertificate(t *testing.T) {
	t.Parallel()
	policies := map[string]*Policy{"bound": {NoExport: true}, "typed": {KeyTypes: []KeyType{{Algorithm: kmip.CryptographicAlgorithmAES}}}}
	b := newBench(t, Limits{}, func(s *Server) {
		s.authenticate = func(ctx context.Context, state tls.ConnectionState, credentials []kmip.Credential) (Client, error) {
			client, err := byCommonName(ctx, state, credentials)
			client.Policy = policies[client.Account]
			return client, err
		}
	})
	s, der := b.dial(t, "bound"), newCertificate(t)
	id := do[payloads.RegisterResponsePayload](s, certificate(bytes.Clone(der))).UniqueIdentifier
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	o := &Object{Attributes: do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}).Attribute}
	length, _ := attribute[int32](o, kmip.AttributeNameCertificateLength)
	bits, _ := attribute[int32](o, kmip.AttributeNameCryptographicLength)
	algorithm, _ := attribute[kmip.DigitalSignatureAlgorithm](o, kmip.AttributeNameDigitalSignatureAlgorithm)
	named, _ := attribute[kmip.CertificateIdentifier](o, kmip.AttributeNameCertificateIdentifier)
	identifier, _ := attribute[kmip.X_509CertificateIdentifier](o, kmip.AttributeNameX509CertificateIdentifier)
	subject, _ := attribute[kmip.X_509CertificateSubject](o, kmip.AttributeNameX509CertificateSubject)
	if int(length) != len(der) || bits != 384 || algorithm != kmip.DigitalSignatureAlgorithmECDSAWithSHA384 || named != (kmip.CertificateIdentifier{Issuer: "CN=authority", SerialNumber: "0FEDCBA987"}) ||
		!bytes.Equal(identifier.IssuerDistinguishedName, parsed.RawIssuer) || !bytes.Equal(identifier.CertificateSerialNumber, []byte("\x02\x05\x0f\xed\xcb\xa9\x87")) ||
		!bytes.Equal(subject.SubjectDistinguishedName, parsed.RawSubject) || len(subject.SubjectAlternativeName) != 2 || string(subject.SubjectAlternativeName[0]) != "\x82\x0farray-7.example" {
		t.Errorf("attributes %+v", o.Attributes)
	}
	for name, value := range map[kmip.AttributeName]any{
		kmip.AttributeNameX509CertificateSubject: subject,
		kmip.AttributeNameCertificateSubject:     kmip.CertificateSubject{CertificateSubjectDistinguishedName: "CN=array-7,O=Storage"},
	} {
		found := do[payloads.LocateResponsePayload](s, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{{AttributeName: name, AttributeValue: value}}})
		if len(found.UniqueIdentifier) != 1 || found.UniqueIdentifier[0] != id {
			t.Errorf("by %s: %v", name, found.UniqueIdentifier)
		}
	}
	got, _ := do[payloads.GetResponsePayload](s, &payloads.GetRequestPayload{UniqueIdentifier: id}).Object.(*kmip.Certificate)
	if got == nil || got.CertificateType != kmip.CertificateTypeX_509 || !bytes.Equal(got.CertificateValue, der) {
		t.Errorf("got %+v", got)
	}
	b.dial(t, "typed").refused("of a type that is not allowed", certificate(bytes.Clone(der)), kmip.ResultReasonPermissionDenied)
	for what, bad := range map[string][]byte{
		"nothing": nil, "cut off": der[:len(der)-1], "with something behind": append(bytes.Clone(der), 0), "a sequence": {0x30, 0},
	} {
		s.refused(what, certificate(bytes.Clone(bad)), kmip.ResultReasonInvalidField)
	}
	pgp := certificate(bytes.Clone(der))
	pgp.Object.(*kmip.Certificate).CertificateType = kmip.CertificateTypePGP
	s.refused("PGP", pgp, kmip.ResultReasonInvalidField)
}

// TestKeyElsewhere registers a key without its value: it can be had as that, and
// nothing is done that needs the value.
func TestKeyElsewhere(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := b.dial(t, "one")
	key := func() *payloads.RegisterRequestPayload {
		return &payloads.RegisterRequestPayload{
			ObjectType: kmip.ObjectTypeSymmetricKey,
			TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
				usage(kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt | kmip.CryptographicUsageWrapKey | kmip.CryptographicUsageDeriveKey | kmip.CryptographicUsageMACGenerate),
				{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: time.Unix(1, 0)},
			}},
			Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256}},
		}
	}
	id := do[payloads.RegisterResponsePayload](s, key()).UniqueIdentifier
	whole := do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	got, _ := do[payloads.GetResponsePayload](s, &payloads.GetRequestPayload{UniqueIdentifier: id}).Object.(*kmip.SymmetricKey)
	if got == nil || got.KeyBlock.KeyValue != nil || got.KeyBlock.CryptographicLength != 256 {
		t.Errorf("got %+v", got)
	}
	ecb := &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}
	hash := &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}
	wrapping := &kmip.KeyWrappingSpecification{
		WrappingMethod:           kmip.WrappingMethodEncrypt,
		EncryptionKeyInformation: &kmip.EncryptionKeyInformation{UniqueIdentifier: id, CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeNISTKeyWrap}},
	}
	aes := []kmip.Attribute{
		usage(kmip.CryptographicUsageEncrypt),
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
	}
	for what, p := range map[string]kmip.OperationPayload{
		"encrypt":     &payloads.EncryptRequestPayload{UniqueIdentifier: id, CryptographicParameters: ecb, Data: make([]byte, 16)},
		"decrypt":     &payloads.DecryptRequestPayload{UniqueIdentifier: id, CryptographicParameters: ecb, Data: make([]byte, 16)},
		"MAC":         &MACRequest{UniqueIdentifier: id, CryptographicParameters: hash, Data: make([]byte, 16)},
		"re-key":      &payloads.RekeyRequestPayload{UniqueIdentifier: id},
		"other form":  &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypeTransparentSymmetricKey},
		"wrap it":     &payloads.GetRequestPayload{UniqueIdentifier: id, KeyWrappingSpecification: wrapping},
		"wrap by it":  &payloads.GetRequestPayload{UniqueIdentifier: whole, KeyWrappingSpecification: wrapping},
		"derive from": &deriveRequest{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: []string{id}, DerivationMethod: byHash, DerivationParameters: derivationParameters{CryptographicParameters: hash}, TemplateAttribute: kmip.TemplateAttribute{Attribute: aes}},
	} {
		s.refused(what, p, kmip.ResultReasonKeyValueNotPresent)
	}
	unsized := key()
	unsized.Object.(*kmip.SymmetricKey).KeyBlock.CryptographicLength = 0
	s.refused("no length", unsized, kmip.ResultReasonInvalidField)
	present := key()
	present.TemplateAttribute.Attribute = append(present.TemplateAttribute.Attribute, kmip.Attribute{AttributeName: kmip.AttributeNameKeyValuePresent, AttributeValue: true})
	s.refused("Key Value Present of the client", present, kmip.ResultReasonInvalidField)
	old := kmip.NewRequestMessage(kmip.V1_1, key())
	if item := s.send(&old).BatchItem[0]; item.ResultReason != kmip.ResultReasonInvalidField {
		t.Errorf("KMIP 1.1: %v %v", item.ResultReason, item.ResultMessage)
	}
}

// FuzzCertificate describes anything that is registered as a certificate.
func FuzzCertificate(f *testing.F) {
	f.Add(newCertificate(f))
	f.Add(testca.New(f).Client(f, "fuzz").Certificate[0])
	f.Fuzz(func(t *testing.T, der []byte) {
		if len(der) == 0 || len(der) > 1<<16 {
			return
		}
		o := &Object{Type: kmip.ObjectTypeCertificate}
		var err error
		if o.Material, err = keymem.Take(bytes.Clone(der)); err != nil {
			t.Fatal(err)
		}
		defer o.Material.Close()
		if err := describeCertificate(o); err != nil {
			if len(o.Attributes) > 0 {
				t.Error("refused, and described nevertheless")
			}
			return
		}
		if length, _ := attribute[int32](o, kmip.AttributeNameCertificateLength); int(length) != len(der) {
			t.Errorf("a length of %d of %d", length, len(der))
		}
	})
}
