package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

func with(name kmip.AttributeName, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
}

func indexed(name kmip.AttributeName, index int32, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeIndex: &index, AttributeValue: value}
}

// registering returns a request to register an AES key of these bytes.
func registering(secret []byte, more ...kmip.Attribute) *payloads.RegisterRequestPayload {
	secret = bytes.Clone(secret)
	return &payloads.RegisterRequestPayload{
		ObjectType:        kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: append([]kmip.Attribute{usage(kmip.CryptographicUsageEncrypt)}, more...)},
		Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{
			KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: int32(8 * len(secret)),
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &secret}}},
		}},
	}
}

// TestRegisterRunAgain: a Register that is run a second time, for a conflict of the
// transaction that it shares or for an item of it that failed, stores the key that
// was sent.
func TestRegisterRunAgain(t *testing.T) {
	t.Parallel()
	secret := bytes.Repeat([]byte("register"), 4)
	label := &payloads.AddAttributeRequestPayload{Attribute: with("x-vm", "web")}
	for name, second := range map[string]kmip.OperationPayload{
		"conflict": label,
		"failure":  &payloads.ActivateRequestPayload{UniqueIdentifier: "none"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := &commits{Memory: NewMemory()}
			defer store.Close()
			s := newBench(t, Limits{}, func(s *Server) { s.store = store }).dial(t, "one")
			m := kmip.NewRequestMessage(kmip.V1_4, registering(secret), second)
			item := s.send(&m).BatchItem[0]
			if err := item.Err(); err != nil {
				t.Fatal(err)
			}
			id := item.ResponsePayload.(*payloads.RegisterResponsePayload).UniqueIdentifier
			if got := *s.block(id, 0).KeyValue.Plain.KeyMaterial.Bytes; !bytes.Equal(got, secret) {
				t.Errorf("the key that was stored is %x, not the one that was sent", got)
			}
		})
	}
}

// TestSingleValues: an attribute that can have one value has it at index 0, where the
// server looks for it and sets it.
func TestSingleValues(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	kept := s.create(with(kmip.AttributeNameSensitive, true), with(kmip.AttributeNameExtractable, false))
	p := splitting(kept, 2, 2, byXOR)
	p.TemplateAttribute.Attribute = []kmip.Attribute{indexed(kmip.AttributeNameSensitive, 1, false), indexed(kmip.AttributeNameExtractable, 1, true)}
	if out, reason := ask[createSplitKeyResponse](s, p); reason == 0 {
		if _, reason := s.material(out.UniqueIdentifier[0]); reason != kmip.ResultReasonSensitive {
			t.Errorf("a part of a sensitive key is given out: %v", reason)
		}
	}
	far := time.Now().Add(time.Hour)
	for _, a := range []kmip.Attribute{
		indexed(kmip.AttributeNameSensitive, 1, false),
		indexed(kmip.AttributeNameActivationDate, 1, far),
		indexed(kmip.AttributeNameUsageLimits, 1, kmip.UsageLimits{UsageLimitsTotal: 1, UsageLimitsUnit: kmip.UsageLimitsUnitObject}),
	} {
		if reason := s.reason(newKey(a), nil); reason != kmip.ResultReasonInvalidField && reason != kmip.ResultReasonIndexOutofBounds {
			t.Errorf("%s at index 1: reason %v", a.AttributeName, reason)
		}
	}
	if id := s.create(indexed(kmip.AttributeNameSensitive, 0, true)); id != "" {
		if _, reason := s.material(id); reason != kmip.ResultReasonSensitive {
			t.Errorf("index 0: reason %v", reason)
		}
	}
}

// TestRightsDoNotGrow: what narrows the use of an object is not widened by its client
// (KMIP 1.4 sections 3.19, 3.21, 3.25 to 3.27, 3.48, 3.50).
func TestRightsDoNotGrow(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	date := func(d time.Duration) time.Time { return time.Unix(b.clock.Load(), 0).Add(d) }
	modify := func(id string, a kmip.Attribute) kmip.ResultReason {
		return s.reason(&payloads.ModifyAttributeRequestPayload{UniqueIdentifier: id, Attribute: a}, nil)
	}
	add := func(id string, a kmip.Attribute) kmip.ResultReason {
		return s.reason(&payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: a}, nil)
	}
	limits := func(total int64) kmip.Attribute {
		return with(kmip.AttributeNameUsageLimits, kmip.UsageLimits{UsageLimitsTotal: total, UsageLimitsUnit: kmip.UsageLimitsUnitObject})
	}
	const denied = kmip.ResultReasonPermissionDenied
	check := func(what string, got, want kmip.ResultReason) {
		t.Helper()
		if got != want {
			t.Errorf("%s: reason %v, want %v", what, got, want)
		}
	}

	key := s.create(with(kmip.AttributeNameSensitive, true), with(kmip.AttributeNameExtractable, false))
	check("another usage mask", modify(key, usage(kmip.CryptographicUsageDeriveKey)), denied)
	check("no longer sensitive", modify(key, with(kmip.AttributeNameSensitive, false)), denied)
	check("extractable again", modify(key, with(kmip.AttributeNameExtractable, true)), denied)
	open := s.create(with(kmip.AttributeNameSensitive, false), with(kmip.AttributeNameExtractable, true))
	check("sensitive", modify(open, with(kmip.AttributeNameSensitive, true)), 0)
	check("not extractable", modify(open, with(kmip.AttributeNameExtractable, false)), 0)

	dated := s.create(with(kmip.AttributeNameActivationDate, date(0)), with(kmip.AttributeNameProtectStopDate, date(time.Minute)),
		with(kmip.AttributeNameProcessStartDate, date(time.Minute)), with(kmip.AttributeNameDeactivationDate, date(time.Hour)))
	for _, name := range []kmip.AttributeName{kmip.AttributeNameProtectStopDate, kmip.AttributeNameProcessStartDate} {
		check(string(name)+" before it", modify(dated, with(name, date(2*time.Minute))), 0)
	}
	b.pass(2 * time.Minute)
	for _, name := range []kmip.AttributeName{kmip.AttributeNameProtectStopDate, kmip.AttributeNameProcessStartDate} {
		check(string(name)+" that has passed", modify(dated, with(name, date(time.Hour))), denied)
	}
	check("Deactivation Date", modify(dated, with(kmip.AttributeNameDeactivationDate, date(2*time.Hour))), 0)
	b.pass(3 * time.Hour)
	check("Deactivation Date that has passed", modify(dated, with(kmip.AttributeNameDeactivationDate, date(time.Hour))), denied)
	late := s.create(with(kmip.AttributeNameActivationDate, date(0)))
	must[payloads.RevokeResponsePayload](s, &payloads.RevokeRequestPayload{UniqueIdentifier: late, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}})
	check("Protect Stop Date of a compromised key", add(late, with(kmip.AttributeNameProtectStopDate, date(time.Hour))), denied)

	counted := s.create(limits(2), with(kmip.AttributeNameActivationDate, date(0)))
	check("limits before use", modify(counted, limits(3)), 0)
	allocate := &payloads.GetUsageAllocationRequestPayload{UniqueIdentifier: counted, UsageLimitsCount: 3}
	check("the new limit", s.reason(allocate, nil), 0)
	check("limits after use", modify(counted, limits(100)), denied)
	check("no limits after use", s.reason(&payloads.DeleteAttributeRequestPayload{UniqueIdentifier: counted, AttributeName: kmip.AttributeNameUsageLimits}, nil), denied)
	check("over the limit", s.reason(allocate, nil), denied)
	many := int64(1000)
	counting := limits(1)
	counting.AttributeValue = kmip.UsageLimits{UsageLimitsTotal: 1, UsageLimitsCount: &many, UsageLimitsUnit: kmip.UsageLimitsUnitObject}
	allocate.UsageLimitsCount = 2
	for what, make := range map[string]func() string{
		"made":     func() string { return s.create(counting) },
		"added":    func() string { id := s.create(); check("adding", add(id, counting), 0); return id },
		"modified": func() string { id := s.create(limits(1)); check("modifying", modify(id, counting), 0); return id },
	} {
		allocate.UniqueIdentifier = make()
		check("a count of the client's own, "+what, s.reason(allocate, nil), denied)
	}
}

// TestSensitiveHistory: whether an object has always been sensitive, and never
// extractable, its attributes say (KMIP 1.4 sections 3.49 and 3.51).
func TestSensitiveHistory(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	told := func(id string) map[kmip.AttributeName]any {
		out := must[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{
			kmip.AttributeNameAlwaysSensitive, kmip.AttributeNameNeverExtractable,
		}})
		is := map[kmip.AttributeName]any{}
		for _, a := range out.Attribute {
			is[a.AttributeName] = a.AttributeValue
		}
		return is
	}
	check := func(what, id string, always, never any) {
		t.Helper()
		if is := told(id); is[kmip.AttributeNameAlwaysSensitive] != always || is[kmip.AttributeNameNeverExtractable] != never {
			t.Errorf("%s: %v", what, is)
		}
	}
	sensitive, hidden := with(kmip.AttributeNameSensitive, true), with(kmip.AttributeNameExtractable, false)
	kept := s.create(sensitive, hidden)
	check("from the beginning", kept, true, true)
	must[payloads.ModifyAttributeResponsePayload](s, &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: kept, Attribute: sensitive})
	check("set again", kept, true, true)
	check("its replacement", must[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: kept}).UniqueIdentifier, true, true)
	later := s.create()
	check("neither", later, nil, nil)
	must[payloads.AddAttributeResponsePayload](s, &payloads.AddAttributeRequestPayload{UniqueIdentifier: later, Attribute: sensitive})
	must[payloads.AddAttributeResponsePayload](s, &payloads.AddAttributeRequestPayload{UniqueIdentifier: later, Attribute: hidden})
	check("later", later, false, false)
	changed := s.create(with(kmip.AttributeNameSensitive, false), with(kmip.AttributeNameExtractable, true))
	must[payloads.ModifyAttributeResponsePayload](s, &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: changed, Attribute: sensitive})
	must[payloads.ModifyAttributeResponsePayload](s, &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: changed, Attribute: hidden})
	check("changed", changed, false, false)
}

// TestRekeyKeepsToPolicy: a replacement is of a type that the client may have.
func TestRekeyKeepsToPolicy(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	s.client.Policy = &Policy{KeyTypes: []KeyType{{Algorithm: kmip.CryptographicAlgorithmAES, Bits: 256}}}
	id := s.create()
	asked := &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
		with(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithm3DES), with(kmip.AttributeNameCryptographicLength, int32(168)),
	}}
	if reason := s.reason(&payloads.RekeyRequestPayload{UniqueIdentifier: id, TemplateAttribute: asked}, nil); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a key of a type that is not allowed: reason %v", reason)
	}
	must[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: id})
}

// TestSensitiveOpaque: an object that cannot be wrapped is not given out in the clear to
// who asks for it wrapped.
func TestSensitiveOpaque(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	id := must[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 0x80000001, OpaqueDataValue: []byte("secret")},
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{with(kmip.AttributeNameSensitive, true)}},
	}).UniqueIdentifier
	if _, reason := s.material(id); reason != kmip.ResultReasonSensitive {
		t.Errorf("plain: reason %v", reason)
	}
	get := &payloads.GetRequestPayload{UniqueIdentifier: id, KeyWrappingSpecification: &kmip.KeyWrappingSpecification{WrappingMethod: kmip.WrappingMethodEncrypt}}
	if reason := s.reason(get, nil); reason == 0 {
		t.Error("it is given out in the clear to who asks for it wrapped")
	}
}

// TestAttributesAreBounded: neither templates nor one attribute after the other make an
// object larger than can be worked with.
func TestAttributesAreBounded(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	var content []kmip.Attribute
	for i := range 200 {
		content = append(content, with(kmip.AttributeName(fmt.Sprintf("x-%d", i)), "b"))
	}
	name := kmip.Name{NameValue: "t", NameType: kmip.NameTypeUninterpretedTextString}
	must[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeTemplate, Object: &kmip.Template{Attribute: append(content, with(kmip.AttributeNameName, name))},
	})
	p := newKey()
	must[payloads.CreateResponsePayload](s, p)
	for range 300 {
		p.TemplateAttribute.Name = append(p.TemplateAttribute.Name, name)
	}
	began := time.Now()
	if reason := s.reason(p, nil); reason != kmip.ResultReasonInvalidField {
		t.Errorf("one template 300 times: reason %v after %v", reason, time.Since(began))
	}
	id := s.create()
	for i := range 3000 {
		if reason := s.reason(&payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: with("x-a", "b")}, nil); reason != 0 {
			if i < 200 {
				t.Errorf("attribute %d: reason %v", i, reason)
			}
			return
		}
	}
	t.Error("an object has 3000 attributes")
}

// TestDates: a date that the clock cannot reach is refused, not taken for one that
// has come.
func TestDates(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	for _, seconds := range []int64{-1, 1<<63 - 1, 1 << 55} {
		at := with(kmip.AttributeNameActivationDate, time.Unix(seconds, 0))
		if reason := s.reason(newKey(at), nil); reason != kmip.ResultReasonInvalidField {
			t.Errorf("activation at %d: reason %v", seconds, reason)
		}
		occurred := time.Unix(seconds, 0)
		revoke := &payloads.RevokeRequestPayload{
			UniqueIdentifier: s.create(), RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}, CompromiseOccurrenceDate: &occurred,
		}
		if reason := s.reason(revoke, nil); reason != kmip.ResultReasonInvalidField {
			t.Errorf("compromised at %d: reason %v", seconds, reason)
		}
	}
	year := with(kmip.AttributeNameDeactivationDate, time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC))
	must[payloads.CreateResponsePayload](s, newKey(year))
}

// TestUsesAreCounted: everything that a key with usage limits protects counts.
func TestUsesAreCounted(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	now := with(kmip.AttributeNameActivationDate, time.Unix(b.clock.Load(), 0))
	limits := func(unit kmip.UsageLimitsUnit, total int64) kmip.Attribute {
		return with(kmip.AttributeNameUsageLimits, kmip.UsageLimits{UsageLimitsTotal: total, UsageLimitsUnit: unit})
	}
	key := func(mask kmip.CryptographicUsageMask, more ...kmip.Attribute) string {
		p := newKey(append(more, now)...)
		p.TemplateAttribute.Attribute[2] = usage(mask)
		return must[payloads.CreateResponsePayload](s, p).UniqueIdentifier
	}
	once := limits(kmip.UsageLimitsUnitObject, 1)
	sha := &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}
	pair := newPair(kmip.CryptographicAlgorithmECDSA, 256)
	pair.PrivateKeyTemplateAttribute = &kmip.TemplateAttribute{Attribute: []kmip.Attribute{limits(kmip.UsageLimitsUnitByte, 32), now}}
	for name, p := range map[string]kmip.OperationPayload{
		"MAC": &MACRequest{
			UniqueIdentifier: key(kmip.CryptographicUsageMACGenerate, once), Data: []byte("data"),
			CryptographicParameters: &kmip.CryptographicParameters{CryptographicAlgorithm: kmip.CryptographicAlgorithmHMACSHA256},
		},
		"Derive Key": &deriveRequest{
			ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: []string{key(kmip.CryptographicUsageDeriveKey, once)}, DerivationMethod: byHMAC,
			DerivationParameters: derivationParameters{CryptographicParameters: sha, DerivationData: []byte("data")}, TemplateAttribute: kmip.TemplateAttribute{Attribute: aes256()},
		},
		"Sign of a digest": &payloads.SignRequestPayload{
			UniqueIdentifier:        must[payloads.CreateKeyPairResponsePayload](s, pair).PrivateKeyUniqueIdentifier,
			CryptographicParameters: sha, DigestedData: make([]byte, 32),
		},
	} {
		if reason := s.reason(p, nil); reason != 0 {
			t.Errorf("%s within the limit: reason %v", name, reason)
		}
		if reason := s.reason(p, nil); reason != kmip.ResultReasonPermissionDenied {
			t.Errorf("%s over the limit: reason %v", name, reason)
		}
	}

	wrapped := func(kek string) kmip.ResultReason {
		return s.reason(&payloads.GetRequestPayload{UniqueIdentifier: key(kmip.CryptographicUsageEncrypt), KeyWrappingSpecification: &kmip.KeyWrappingSpecification{
			WrappingMethod: kmip.WrappingMethodEncrypt, EncodingOption: kmip.EncodingOptionNoEncoding,
			EncryptionKeyInformation: &kmip.EncryptionKeyInformation{
				UniqueIdentifier: kek, CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeNISTKeyWrap},
			},
		}}, nil)
	}
	if reason := wrapped(key(kmip.CryptographicUsageWrapKey, once)); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a key whose uses are limited wraps: reason %v", reason)
	}
	kek := key(kmip.CryptographicUsageWrapKey, with(kmip.AttributeNameProtectStopDate, time.Unix(b.clock.Load(), 0).Add(time.Minute)))
	if reason := wrapped(kek); reason != 0 {
		t.Errorf("before the Protect Stop Date: reason %v", reason)
	}
	b.pass(time.Minute)
	if reason := wrapped(kek); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("at the Protect Stop Date: reason %v", reason)
	}
}

// TestHugeNumbers: no request computes for longer than a deadline can be held with
// what is too large to be a key or a name.
func TestHugeNumbers(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	verify := func(bits uint) kmip.ResultReason {
		modulus := new(big.Int).SetBit(big.NewInt(1), int(bits)-1, 1)
		der := x509.MarshalPKCS1PublicKey(&rsa.PublicKey{N: modulus, E: 1<<31 - 1})
		id := must[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
			ObjectType: kmip.ObjectTypePublicKey,
			TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
				usage(kmip.CryptographicUsageVerify), with(kmip.AttributeNameActivationDate, time.Unix(b.clock.Load(), 0)),
				with(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmRSA), with(kmip.AttributeNameCryptographicLength, int32(bits)),
			}},
			Object: &kmip.PublicKey{KeyBlock: kmip.KeyBlock{
				KeyFormatType: kmip.KeyFormatTypePKCS_1, KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &der}}},
			}},
		}).UniqueIdentifier
		return s.reason(&payloads.SignatureVerifyRequestPayload{
			UniqueIdentifier: id, Data: []byte("data"), SignatureData: big.NewInt(2).FillBytes(make([]byte, bits/8)),
			CryptographicParameters: &kmip.CryptographicParameters{PaddingMethod: kmip.PaddingMethodPKCS1V1_5, HashingAlgorithm: kmip.HashingAlgorithmSHA_256},
		}, nil)
	}
	if reason := verify(4096); reason != 0 {
		t.Errorf("4096 bits: reason %v", reason)
	}
	for _, bits := range []uint{32768, 262144} {
		if reason := verify(bits); reason != kmip.ResultReasonKeyFormatTypeNotSupported {
			t.Errorf("%d bits are computed with: reason %v", bits, reason)
		}
	}

	var c x509Certificate
	if _, err := asn1.Unmarshal(newCertificate(t), &c); err != nil {
		t.Fatal(err)
	}
	name := make(pkix.RDNSequence, 4000)
	for i := range name {
		name[i] = pkix.RelativeDistinguishedNameSET{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "a"}}
	}
	raw, err := asn1.Marshal(name)
	if err != nil {
		t.Fatal(err)
	}
	c.Body.Issuer = asn1.RawValue{FullBytes: raw}
	der, err := asn1.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if reason := s.reason(certificate(der), nil); reason != kmip.ResultReasonInvalidField {
		t.Errorf("a name of %d bytes: reason %v", len(raw), reason)
	}
}

// TestLateItems: items of a batch that are reached after the deadline of the request
// are not carried out.
func TestLateItems(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{Request: 50 * time.Millisecond}, func(s *Server) {
		s.log = slog.New(slog.DiscardHandler)
		s.authenticate = func(ctx context.Context, _ tls.ConnectionState, _ []kmip.Credential) (Client, error) {
			<-ctx.Done()
			return Client{Account: "one"}, nil
		}
	})
	for _, items := range [][]kmip.OperationPayload{{newKey()}, {newKey(), newKey()}} {
		s := b.dial(t, "one")
		m := kmip.NewRequestMessage(kmip.V1_4, items...)
		if _, err := s.Write(ttlv.MarshalTTLV(&m)); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read %d bytes, %v; want the connection closed", n, err)
		}
	}
	if err := b.server.store.View(context.Background(), "one", func(v Reader) error {
		for o := range v.Find(Query{}) {
			t.Errorf("key %s was made", o.ID)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// hungry is a listener that has no descriptor left for so many connections.
type hungry struct {
	net.Listener
	fail atomic.Int32
}

func (l *hungry) Accept() (net.Conn, error) {
	if l.fail.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

// TestDescriptorsRunOut: whoever takes the last file descriptor of the process does not
// end its server.
func TestDescriptorsRunOut(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{}, func(s *Server) { s.log = slog.New(slog.DiscardHandler) })
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = plain.Addr().String()
	l := &hungry{Listener: plain}
	l.fail.Store(3)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- b.server.Serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	do[payloads.CreateResponsePayload](b.dial(t, "one"), newKey())
}

// TestRefusedConnectionsAreFewLines: connections that are refused for their number do
// not fill the log.
func TestRefusedConnectionsAreFewLines(t *testing.T) {
	t.Parallel()
	var lines counter
	b := newBench(t, Limits{Connections: 1}, func(s *Server) { s.log = slog.New(slog.NewTextHandler(&lines, nil)) })
	b.dial(t, "one")
	const tries = 50
	began := time.Now()
	for range tries {
		over, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		over.SetDeadline(time.Now().Add(10 * time.Second))
		if n, _ := over.Read(make([]byte, 1)); n != 0 {
			t.Error("a connection over the limit got an answer")
		}
		over.Close()
	}
	if most := int64(time.Since(began)/time.Second) + 2; lines.Load() > most {
		t.Errorf("%d lines for %d connections, want %d at most", lines.Load(), tries, most)
	}
}

// counter counts writes.
type counter struct{ atomic.Int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.Add(1)
	return len(b), nil
}

// TestAnswersAreBounded: what a request of a few bytes asks for does not fill the
// server's memory.
func TestAnswersAreBounded(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{Answer: 64 << 10}).dial(t, "one")
	large := strings.Repeat("x", 40<<10)
	id := do[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 0x80000001, OpaqueDataValue: []byte(large)},
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{with("x-a", large)}},
	}).UniqueIdentifier
	for name, p := range map[string]kmip.OperationPayload{
		"Get":            &payloads.GetRequestPayload{UniqueIdentifier: id},
		"Get Attributes": &payloads.GetAttributesRequestPayload{UniqueIdentifier: id},
	} {
		m := kmip.NewRequestMessage(kmip.V1_4, p, &payloads.QueryRequestPayload{})
		for i, item := range s.send(&m).BatchItem { // also the first Get, which makes the object stale
			if item.Err() != nil {
				t.Errorf("%s, item %d: %v", name, i, item.Err())
			}
		}
		m = kmip.NewRequestMessage(kmip.V1_4, p, p, p)
		for i, item := range s.send(&m).BatchItem {
			if item.ResultReason != kmip.ResultReasonResponseTooLarge || item.ResponsePayload != nil {
				t.Errorf("%s, item %d: reason %v", name, i, item.ResultReason)
			}
		}
	}
}
