package kmipserver

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// splitter asks a server directly, as one client.
type splitter struct {
	t      *testing.T
	server *Server
	client Client
}

func newSplitter(t *testing.T) *splitter {
	return &splitter{t: t, server: newBench(t, Limits{}).server, client: Client{Account: "one"}}
}

// reason carries out an operation and returns why it was refused, 0 if it was not.
func (s *splitter) reason(p kmip.OperationPayload, use func(kmip.OperationPayload)) kmip.ResultReason {
	s.t.Helper()
	err := s.server.Do(context.Background(), Caller{Client: s.client}, p, func(got kmip.OperationPayload) error {
		if use != nil {
			use(got)
		}
		return nil
	})
	if refusal := (*Refusal)(nil); errors.As(err, &refusal) {
		return refusal.Reason
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return 0
}

// ask returns what an operation gives, and the reason of a refusal.
func ask[T any](s *splitter, p kmip.OperationPayload) (out *T, reason kmip.ResultReason) {
	s.t.Helper()
	reason = s.reason(p, func(got kmip.OperationPayload) { out = any(got).(*T) })
	return out, reason
}

func must[T any](s *splitter, p kmip.OperationPayload) *T {
	s.t.Helper()
	out, reason := ask[T](s, p)
	if reason != 0 {
		s.t.Fatalf("%T is refused: %v", p, reason)
	}
	return out
}

// material returns the bytes of an object, or why it is not given out.
func (s *splitter) material(id string) (b []byte, reason kmip.ResultReason) {
	s.t.Helper()
	reason = s.reason(&payloads.GetRequestPayload{UniqueIdentifier: id}, func(got kmip.OperationPayload) {
		of, err := material(got.(*payloads.GetResponsePayload).Object)
		if err != nil {
			s.t.Error(err)
		}
		b = bytes.Clone(of)
	})
	return b, reason
}

// forge registers a part that says it is of key, and is not.
func (s *splitter) forge(key string, id int32) string {
	s.t.Helper()
	bytes := make([]byte, 32)
	return must[payloads.RegisterResponsePayload](s, &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeSplitKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameLink, AttributeValue: kmip.Link{LinkType: kmip.LinkTypeParentLink, LinkedObjectIdentifier: key}},
		}},
		Object: &kmip.SplitKey{SplitKeyParts: 2, KeyPartIdentifier: id, SplitKeyThreshold: 2, SplitKeyMethod: byXOR, KeyBlock: kmip.KeyBlock{
			KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &bytes}}},
		}},
	}).UniqueIdentifier
}

func (s *splitter) create(more ...kmip.Attribute) string {
	s.t.Helper()
	return must[payloads.CreateResponsePayload](s, &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: append(aes256(), more...)},
	}).UniqueIdentifier
}

func aes256() []kmip.Attribute {
	return []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		usage(kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt),
	}
}

func splitting(id string, parts, threshold int32, method kmip.SplitKeyMethod) *createSplitKeyRequest {
	return &createSplitKeyRequest{
		ObjectType: kmip.ObjectTypeSplitKey, UniqueIdentifier: id, SplitKeyParts: parts, SplitKeyThreshold: threshold, SplitKeyMethod: method,
	}
}

func joining(parts ...string) *joinSplitKeyRequest {
	return &joinSplitKeyRequest{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: parts, TemplateAttribute: &kmip.TemplateAttribute{Attribute: aes256()}}
}

const (
	byXOR  = kmip.SplitKeyMethodXOR
	byGF28 = kmip.SplitKeyMethodPolynomialSharingGF28
)

// TestSplitAndJoin splits a key by each method and joins it again, also when the key
// is gone.
func TestSplitAndJoin(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		method           kmip.SplitKeyMethod
		parts, threshold int32
	}{{byXOR, 3, 3}, {byGF28, 5, 3}, {byGF28, partsMax, 2}} {
		s := newSplitter(t)
		key := s.create()
		want, _ := s.material(key)
		parts := must[createSplitKeyResponse](s, splitting(key, c.parts, c.threshold, c.method)).UniqueIdentifier
		if len(parts) != int(c.parts) {
			t.Fatalf("%d parts, want %d", len(parts), c.parts)
		}
		for _, id := range parts {
			if part, _ := s.material(id); len(part) != len(want) || bytes.Equal(part, want) {
				t.Errorf("a part is %d bytes, or the key", len(part))
			}
		}
		must[payloads.DestroyResponsePayload](s, &payloads.DestroyRequestPayload{UniqueIdentifier: key})
		last := parts[len(parts)-int(c.threshold):]
		joined := must[joinSplitKeyResponse](s, joining(last...)).UniqueIdentifier
		if got, _ := s.material(joined); !bytes.Equal(got, want) {
			t.Errorf("%v: the parts give another key", c)
		}
		for what, ids := range map[string][]string{"none": nil, "too few": last[1:], "one twice": append(last[1:len(last):len(last)], last[1])} {
			if _, reason := ask[joinSplitKeyResponse](s, joining(ids...)); reason != kmip.ResultReasonCryptographicFailure {
				t.Errorf("%v: %s: %v", c, what, reason)
			}
		}
	}
}

// TestSplitNewKey splits a key that is made for it and never kept.
func TestSplitNewKey(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	p := splitting("", 3, 2, byGF28)
	p.TemplateAttribute.Attribute = aes256()
	parts := must[createSplitKeyResponse](s, p).UniqueIdentifier
	a := must[joinSplitKeyResponse](s, joining(parts[0], parts[2])).UniqueIdentifier
	b := must[joinSplitKeyResponse](s, joining(parts[2], parts[1])).UniqueIdentifier
	first, _ := s.material(a)
	second, _ := s.material(b)
	if len(first) != 32 || !bytes.Equal(first, second) {
		t.Errorf("parts give keys of %d and %d bytes, or different ones", len(first), len(second))
	}
}

// TestSplitRefused has asked what cannot be split or joined.
func TestSplitRefused(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	key := s.create()
	limited := s.create(kmip.Attribute{AttributeName: kmip.AttributeNameUsageLimits, AttributeValue: kmip.UsageLimits{UsageLimitsTotal: 5, UsageLimitsUnit: kmip.UsageLimitsUnitObject}})
	part := must[createSplitKeyResponse](s, splitting(key, 2, 2, byXOR)).UniqueIdentifier
	other := must[createSplitKeyResponse](s, splitting(s.create(), 2, 2, byXOR)).UniqueIdentifier
	wrongType := splitting(key, 3, 2, byGF28)
	wrongType.ObjectType = kmip.ObjectTypeSymmetricKey
	broader := joining(part...)
	broader.TemplateAttribute.Attribute[2] = usage(kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageWrapKey)
	secret := joining(part...)
	secret.ObjectType = kmip.ObjectTypeSecretData
	for what, c := range map[string]struct {
		p    kmip.OperationPayload
		want kmip.ResultReason
	}{
		"one part":              {splitting(key, 1, 1, byGF28), kmip.ResultReasonInvalidField},
		"a threshold of one":    {splitting(key, 3, 1, byGF28), kmip.ResultReasonInvalidField},
		"more than there are":   {splitting(key, 3, 4, byGF28), kmip.ResultReasonInvalidField},
		"negative":              {splitting(key, -1, -1, byGF28), kmip.ResultReasonInvalidField},
		"too many":              {splitting(key, partsMax+1, 2, byGF28), kmip.ResultReasonInvalidField},
		"some of XOR":           {splitting(key, 3, 2, byXOR), kmip.ResultReasonInvalidField},
		"another method":        {splitting(key, 3, 2, kmip.SplitKeyMethodPolynomialSharingGF216), kmip.ResultReasonFeatureNotSupported},
		"another type":          {wrongType, kmip.ResultReasonInvalidField},
		"a part":                {splitting(part[0], 3, 2, byGF28), kmip.ResultReasonInvalidField},
		"usage limits":          {splitting(limited, 3, 2, byGF28), kmip.ResultReasonPermissionDenied},
		"no such key":           {splitting("none", 3, 2, byGF28), kmip.ResultReasonItemNotFound},
		"join: a key":           {joining(part[0], key), kmip.ResultReasonInvalidField},
		"join: of two keys":     {joining(part[0], other[1]), kmip.ResultReasonCryptographicFailure},
		"join: a forged part":   {joining(part[0], s.forge(key, 2)), kmip.ResultReasonCryptographicFailure},
		"join: may do more":     {broader, kmip.ResultReasonPermissionDenied},
		"join: of no data type": {secret, kmip.ResultReasonInvalidField},
	} {
		if reason := s.reason(c.p, nil); reason != c.want {
			t.Errorf("%s: %v, want %v", what, reason, c.want)
		}
	}
}

// TestSplitIsNoWayAround: parts, and what is joined from them, may not do what the key
// may not.
func TestSplitIsNoWayAround(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	kept := s.create(kmip.Attribute{AttributeName: kmip.AttributeNameExtractable, AttributeValue: false}, kmip.Attribute{AttributeName: kmip.AttributeNameSensitive, AttributeValue: true})
	p := splitting(kept, 2, 2, byXOR)
	p.TemplateAttribute.Attribute = []kmip.Attribute{{AttributeName: kmip.AttributeNameExtractable, AttributeValue: true}, {AttributeName: kmip.AttributeNameSensitive, AttributeValue: false}}
	parts := must[createSplitKeyResponse](s, p).UniqueIdentifier
	joined := must[joinSplitKeyResponse](s, joining(parts...)).UniqueIdentifier
	for _, id := range append(parts, joined) {
		if _, reason := s.material(id); reason != kmip.ResultReasonSensitive {
			t.Errorf("%s is given out: %v", id, reason)
		}
	}

	s.client.Policy = &Policy{NoExport: true}
	parts = must[createSplitKeyResponse](s, splitting(s.create(), 2, 2, byXOR)).UniqueIdentifier
	if _, reason := s.material(parts[0]); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a part of a key is exported: %v", reason)
	}
	s.client.Policy = &Policy{KeyTypes: []KeyType{{Algorithm: kmip.CryptographicAlgorithmAES}}}
	if _, reason := ask[createSplitKeyResponse](s, splitting(s.create(), 2, 2, byXOR)); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a split key is none of the types that are allowed: %v", reason)
	}

	s.client.Policy = nil
	key := s.create()
	parts = must[createSplitKeyResponse](s, splitting(key, 2, 2, byGF28)).UniqueIdentifier
	must[payloads.RevokeResponsePayload](s, &payloads.RevokeRequestPayload{UniqueIdentifier: key, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}})
	if _, reason := ask[joinSplitKeyResponse](s, joining(parts...)); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a compromised key is joined again: %v", reason)
	}
	if _, reason := ask[createSplitKeyResponse](s, splitting(key, 2, 2, byGF28)); reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("a compromised key is split: %v", reason)
	}
}

// TestSplitCounts has an operation admitted for as many objects as it makes.
func TestSplitCounts(t *testing.T) {
	t.Parallel()
	s := newSplitter(t)
	made := map[kmip.Operation]int{}
	s.client.Admit = func(_ context.Context, op kmip.Operation, makes int) (func(error), error) {
		made[op] += makes
		return func(error) {}, nil
	}
	key := s.create()
	parts := must[createSplitKeyResponse](s, splitting(key, 5, 2, byGF28)).UniqueIdentifier
	must[joinSplitKeyResponse](s, joining(parts[:2]...))
	before := made[kmip.OperationCreateSplitKey]
	if _, reason := ask[createSplitKeyResponse](s, splitting(key, 1<<31-1, 2, byGF28)); reason != kmip.ResultReasonInvalidField || made[kmip.OperationCreateSplitKey] != before {
		t.Errorf("more parts than there can be: reason %v, admitted %d", reason, made[kmip.OperationCreateSplitKey]-before)
	}
	if made[kmip.OperationCreate] != 1 || made[kmip.OperationCreateSplitKey] != 5 || made[kmip.OperationJoinSplitKey] != 1 || made[kmip.OperationGet] != 0 {
		t.Errorf("admitted: %v", made)
	}
}
