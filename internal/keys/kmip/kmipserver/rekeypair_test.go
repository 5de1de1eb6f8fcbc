package kmipserver

import (
	"crypto/rsa"
	"crypto/x509"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/crypto/keymem"
)

// attributesOf returns what Get Attributes tells of an object.
func (s *session) attributesOf(id string) *Object {
	s.t.Helper()
	return &Object{ID: id, Attributes: do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}).Attribute}
}

// TestRekeyKeyPair replaces a key pair, once: names, links and dates are as they are
// to be, and the new halves belong to one another.
func TestRekeyKeyPair(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := b.dial(t, "one")
	p := newPair(kmip.CryptographicAlgorithmECDSA, 256)
	p.PrivateKeyTemplateAttribute = &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "signer", NameType: kmip.NameTypeUninterpretedTextString}},
		{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: time.Unix(b.clock.Load()-3600, 0)},
		{AttributeName: kmip.AttributeNameDeactivationDate, AttributeValue: time.Unix(b.clock.Load()+3600, 0)},
	}}
	old := do[payloads.CreateKeyPairResponsePayload](s, p)
	request := &payloads.RekeyKeyPairRequestPayload{PrivateKeyUniqueIdentifier: old.PrivateKeyUniqueIdentifier}
	made := do[payloads.RekeyKeyPairResponsePayload](s, request)
	private, public := s.attributesOf(made.PrivateKeyUniqueIdentifier), s.attributesOf(made.PublicKeyUniqueIdentifier)
	oldPrivate, oldPublic := s.attributesOf(old.PrivateKeyUniqueIdentifier), s.attributesOf(old.PublicKeyUniqueIdentifier)
	for _, c := range []struct {
		from *Object
		link kmip.LinkType
		to   *Object
	}{
		{private, kmip.LinkTypePublicKeyLink, public},
		{public, kmip.LinkTypePrivateKeyLink, private},
		{private, kmip.LinkTypeReplacedObjectLink, oldPrivate},
		{public, kmip.LinkTypeReplacedObjectLink, oldPublic},
		{oldPrivate, kmip.LinkTypeReplacementObjectLink, private},
		{oldPublic, kmip.LinkTypeReplacementObjectLink, public},
		{oldPrivate, kmip.LinkTypePublicKeyLink, oldPublic},
	} {
		if id, _ := linkTo(c.from, c.link); id != c.to.ID {
			t.Errorf("%v of %s is %q, want %s", c.link, c.from.ID, id, c.to.ID)
		}
	}
	if names := namesOf(private); len(names) != 1 || names[0] != "signer" || len(namesOf(oldPrivate)) != 0 {
		t.Errorf("names %v, old %v", names, namesOf(oldPrivate))
	}
	until, _ := private.date(kmip.AttributeNameDeactivationDate)
	if private.state() != kmip.StateActive || until.Unix() != b.clock.Load()+7200 || private.usage() != kmip.CryptographicUsageSign || public.usage() != kmip.CryptographicUsageVerify {
		t.Errorf("state %v until %v, usage %v and %v", private.state(), until, private.usage(), public.usage())
	}
	key, err := x509.ParseECPrivateKey(*s.block(private.ID, 0).KeyValue.Plain.KeyMaterial.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	other, err := x509.ParsePKIXPublicKey(*s.block(public.ID, 0).KeyValue.Plain.KeyMaterial.Bytes)
	if err != nil || !key.PublicKey.Equal(other) {
		t.Errorf("the new halves are not of one pair: %v", err)
	}
	before, err := x509.ParseECPrivateKey(*s.block(oldPrivate.ID, 0).KeyValue.Plain.KeyMaterial.Bytes)
	if err != nil || before.Equal(key) {
		t.Errorf("the key is not another: %v", err)
	}
	s.refused("a second time", request, kmip.ResultReasonPermissionDenied)
	s.refused("a public key", &payloads.RekeyKeyPairRequestPayload{PrivateKeyUniqueIdentifier: public.ID}, kmip.ResultReasonInvalidField)
	s.refused("one that is not there", &payloads.RekeyKeyPairRequestPayload{PrivateKeyUniqueIdentifier: "none"}, kmip.ResultReasonItemNotFound)
	aes := do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	s.refused("a symmetric key", &payloads.RekeyKeyPairRequestPayload{PrivateKeyUniqueIdentifier: aes}, kmip.ResultReasonInvalidField)
	stranger := b.dial(t, "two")
	stranger.refused("somebody else's", &payloads.RekeyKeyPairRequestPayload{PrivateKeyUniqueIdentifier: private.ID}, kmip.ResultReasonItemNotFound)
}

// TestTransparentRSA has a key pair in transparent formats, registers it in them and
// signs with it; keys whose numbers do not belong together are refused or kept.
func TestTransparentRSA(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	made := do[payloads.CreateKeyPairResponsePayload](s, newPair(kmip.CryptographicAlgorithmRSA, 2048))
	want, err := x509.ParsePKCS1PrivateKey(*s.block(made.PrivateKeyUniqueIdentifier, kmip.KeyFormatTypePKCS_1).KeyValue.Plain.KeyMaterial.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	shown := s.block(made.PrivateKeyUniqueIdentifier, kmip.KeyFormatTypeTransparentRSAPrivateKey)
	numbers := shown.KeyValue.Plain.KeyMaterial.TransparentRSAPrivateKey
	if numbers == nil || numbers.Modulus.Cmp(want.N) != 0 || numbers.PrivateExponent.Cmp(want.D) != 0 || numbers.CRTCoefficient.Cmp(want.Precomputed.Qinv) != 0 {
		t.Fatal("the numbers are not those of the key")
	}
	sign := usage(kmip.CryptographicUsageSign)
	active := kmip.Attribute{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: time.Unix(1, 0)}
	register := func(t kmip.ObjectType, o kmip.Object, a ...kmip.Attribute) *payloads.RegisterRequestPayload {
		return &payloads.RegisterRequestPayload{ObjectType: t, Object: o, TemplateAttribute: kmip.TemplateAttribute{Attribute: a}}
	}
	private := do[payloads.RegisterResponsePayload](s, register(kmip.ObjectTypePrivateKey, &kmip.PrivateKey{KeyBlock: *shown}, sign, active)).UniqueIdentifier
	again := s.block(private, 0)
	if k := again.KeyValue.Plain.KeyMaterial.TransparentRSAPrivateKey; again.KeyFormatType != kmip.KeyFormatTypeTransparentRSAPrivateKey || k == nil || k.PrivateExponent.Cmp(want.D) != 0 {
		t.Errorf("registered, and had back as %v", again.KeyFormatType)
	}
	der, err := x509.ParsePKCS1PrivateKey(*s.block(private, kmip.KeyFormatTypePKCS_1).KeyValue.Plain.KeyMaterial.Bytes)
	if err != nil || !der.Equal(want) {
		t.Errorf("not the key in PKCS #1: %v", err)
	}
	shownPublic := s.block(made.PublicKeyUniqueIdentifier, kmip.KeyFormatTypeTransparentRSAPublicKey)
	public := do[payloads.RegisterResponsePayload](s, register(kmip.ObjectTypePublicKey, &kmip.PublicKey{KeyBlock: *shownPublic}, usage(kmip.CryptographicUsageVerify), active)).UniqueIdentifier
	params := &kmip.CryptographicParameters{PaddingMethod: kmip.PaddingMethodPSS, HashingAlgorithm: kmip.HashingAlgorithmSHA_256}
	signature := do[payloads.SignResponsePayload](s, &payloads.SignRequestPayload{UniqueIdentifier: private, CryptographicParameters: params, Data: []byte("text")}).SignatureData
	verdict := do[payloads.SignatureVerifyResponsePayload](s, &payloads.SignatureVerifyRequestPayload{UniqueIdentifier: public, CryptographicParameters: params, Data: []byte("text"), SignatureData: signature})
	if verdict.ValidityIndicator != kmip.ValidityIndicatorValid {
		t.Error("the signature is not valid")
	}
	short := *shown
	short.CryptographicLength = 1024
	s.refused("another length", register(kmip.ObjectTypePrivateKey, &kmip.PrivateKey{KeyBlock: short}, sign), kmip.ResultReasonInvalidField)
	s.refused("of the other half's format", register(kmip.ObjectTypePublicKey, &kmip.PublicKey{KeyBlock: *shown}, sign), kmip.ResultReasonKeyFormatTypeNotSupported)
	numbers.PrivateExponent = numbers.P
	odd := do[payloads.RegisterResponsePayload](s, register(kmip.ObjectTypePrivateKey, &kmip.PrivateKey{KeyBlock: *shown}, sign, active)).UniqueIdentifier
	s.refused("numbers that do not belong together", &payloads.SignRequestPayload{UniqueIdentifier: odd, CryptographicParameters: params, Data: []byte("text")}, kmip.ResultReasonKeyFormatTypeNotSupported)
}

// FuzzTransparent reads anything as an RSA key in a transparent format.
func FuzzTransparent(f *testing.F) {
	private, public, err := kind{kmip.CryptographicAlgorithmRSA, 1024}.generate()
	if err != nil {
		f.Fatal(err)
	}
	defer private.Material.Close()
	defer public.Material.Close()
	key, err := private.private()
	if err != nil {
		f.Fatal(err)
	}
	seed, err := showPrivate(key.(*rsa.PrivateKey))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, true)
	f.Add(showPublic(key.Public().(*rsa.PublicKey)), false)
	f.Fuzz(func(t *testing.T, encoded []byte, secret bool) {
		if len(encoded) == 0 || len(encoded) > 1<<14 {
			return
		}
		o := &Object{Type: kmip.ObjectTypePublicKey, Layout: Layout{Format: kmip.KeyFormatTypeTransparentRSAPublicKey}}
		if secret {
			o = &Object{Type: kmip.ObjectTypePrivateKey, Layout: Layout{Format: kmip.KeyFormatTypeTransparentRSAPrivateKey}}
		}
		var err error
		if o.Material, err = keymem.Take(append([]byte{}, encoded...)); err != nil {
			t.Fatal(err)
		}
		defer o.Material.Close()
		if describePair(o) == nil && o.Layout.Length < 0 {
			t.Errorf("a key of %d bits", o.Layout.Length)
		}
	})
}
