package kmipserver

import (
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// TestDigestIsNoKey: no key is derived that an attribute of its base tells.
func TestDigestIsNoKey(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	base := newKey(with(kmip.AttributeNameActivationDate, time.Unix(b.clock.Load(), 0)))
	base.TemplateAttribute.Attribute[2] = usage(kmip.CryptographicUsageDeriveKey)
	id := must[payloads.CreateResponsePayload](s, base).UniqueIdentifier
	for hash, want := range map[kmip.HashingAlgorithm]kmip.ResultReason{
		kmip.HashingAlgorithmSHA_256: kmip.ResultReasonInvalidField, kmip.HashingAlgorithmSHA_512: 0,
	} {
		p := &deriveRequest{
			ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: []string{id}, DerivationMethod: byHash,
			DerivationParameters: derivationParameters{CryptographicParameters: &kmip.CryptographicParameters{HashingAlgorithm: hash}},
			TemplateAttribute:    kmip.TemplateAttribute{Attribute: aes256()},
		}
		if reason := s.reason(p, nil); reason != want {
			t.Errorf("hash %d: reason %v, want %v", hash, reason, want)
		}
	}
}

// TestCounterIsNotReused: data is not encrypted twice by one key stream because a client
// has left out the counter.
func TestCounterIsNotReused(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	yes := true
	id := s.create(with(kmip.AttributeNameActivationDate, time.Unix(b.clock.Load(), 0)))
	p := &payloads.EncryptRequestPayload{UniqueIdentifier: id, Data: []byte("data"), CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeCTR}}
	if reason := s.reason(p, nil); reason != kmip.ResultReasonInvalidMessage {
		t.Errorf("without a counter: reason %v", reason)
	}
	p.CryptographicParameters.RandomIV, p.Data = &yes, []byte("data")
	if out := must[payloads.EncryptResponsePayload](s, p); len(out.IVCounterNonce) != 16 {
		t.Errorf("a random counter of %d bytes", len(out.IVCounterNonce))
	}
}

// TestPlaceholderOfFailure: what should have made or found an object, and did not, leaves
// none of before for the items behind it.
func TestPlaceholderOfFailure(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	never := newKey()
	never.TemplateAttribute.Attribute[1].AttributeValue = int32(7)
	for name, p := range map[string]kmip.OperationPayload{
		"Create": never,
		"Locate": &payloads.LocateRequestPayload{MaximumItems: -1},
	} {
		m := kmip.NewRequestMessage(kmip.V1_4, newKey(), p, &payloads.DestroyRequestPayload{})
		m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
		items := s.send(&m).BatchItem
		if len(items) != 3 || items[0].Err() != nil || items[1].Err() == nil || items[2].ResultReason != kmip.ResultReasonItemNotFound {
			t.Errorf("%s: %+v", name, items)
		}
	}
}

// TestRotationGoesOn: keys that cannot be made anew do not keep others from it.
func TestRotationGoesOn(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := &splitter{t: t, server: b.server, client: Client{Account: "one"}}
	now := with(kmip.AttributeNameActivationDate, time.Unix(b.clock.Load(), 0))
	for range maintainFailures + 1 {
		p := registering([]byte("odd"), now) // an AES key of 24 bits
		must[payloads.RegisterResponsePayload](s, p)
	}
	id := s.create(now)
	b.pass(time.Hour)
	var steps []Step
	err := b.server.Maintain(t.Context(), "one", Rotation{Every: time.Hour}, func(Step) error { return nil }, func(step Step, err error) error {
		if err == nil {
			steps = append(steps, step)
		}
		return nil
	})
	if err != nil || len(steps) != 1 || steps[0].Object != id || steps[0].Kind != StepRekey {
		t.Errorf("steps %+v, %v; want %s re-keyed", steps, err, id)
	}
}
