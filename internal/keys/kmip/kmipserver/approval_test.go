package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"crypto/tls"
	"slices"
	"sync"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// people approve what is in granted, once.
type people struct {
	mu      sync.Mutex
	granted map[string]bool // operation and identifier
	asked   []string
	late    bool // they approve while they are asked
}

func what(op kmip.Operation, id string) string { return ttlv.EnumStr(op) + " " + id }

func (p *people) Needed(op kmip.Operation) bool {
	return slices.Contains(ApprovableOperations(), op)
}

func (p *people) Use(_ context.Context, _ Tx, op kmip.Operation, o *Object) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.granted[what(op, o.ID)] {
		return "", ErrNotApproved
	}
	delete(p.granted, what(op, o.ID))
	return "approval of " + what(op, o.ID), nil
}

func (p *people) Ask(_ context.Context, op kmip.Operation, o *Object) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, what(op, o.ID))
	if p.late {
		p.granted[what(op, o.ID)] = true
		return nil
	}
	return &Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: "wait for people", Cause: "approval"}
}

func (p *people) grant(op kmip.Operation, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.granted[what(op, id)] = true
}

func (p *people) questions() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.asked)
}

// guarded is a server whose client needs approvals, and a session with it.
func guarded(t *testing.T) (*people, *ledger, *session) {
	t.Helper()
	p, saw := &people{granted: map[string]bool{}}, &ledger{}
	b := newBench(t, Limits{}, func(s *Server) {
		s.observe = saw.observe
		s.authenticate = func(context.Context, tls.ConnectionState, []kmip.Credential) (Client, error) {
			return Client{Account: "one", Approvals: p}, nil
		}
	})
	return p, saw, b.dial(t, "any")
}

// newest is the event of the latest operation.
func newest(l *ledger) Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[len(l.events)-1]
}

func reasonOf(s *session, p kmip.OperationPayload) kmip.ResultReason {
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	return s.send(&m).BatchItem[0].ResultReason
}

// TestApprovals: material gets out, wrapped or not, and keys are destroyed, only
// once for each approval.
func TestApprovals(t *testing.T) {
	t.Parallel()
	p, saw, s := guarded(t)
	const denied = kmip.ResultReasonPermissionDenied
	id := do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	usage := kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageWrapKey}
	wrapper := newKey()
	wrapper.TemplateAttribute.Attribute = append(slices.DeleteFunc(wrapper.TemplateAttribute.Attribute, func(a kmip.Attribute) bool { return a.AttributeName == usage.AttributeName }), usage)
	kek := do[payloads.CreateResponsePayload](s, wrapper).UniqueIdentifier
	do[payloads.ActivateResponsePayload](s, &payloads.ActivateRequestPayload{UniqueIdentifier: kek})
	plain := &payloads.GetRequestPayload{UniqueIdentifier: id}
	wrapped := &payloads.GetRequestPayload{UniqueIdentifier: id, KeyWrappingSpecification: &kmip.KeyWrappingSpecification{
		WrappingMethod: kmip.WrappingMethodEncrypt, EncodingOption: kmip.EncodingOptionNoEncoding,
		EncryptionKeyInformation: &kmip.EncryptionKeyInformation{
			UniqueIdentifier: kek, CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeNISTKeyWrap},
		},
	}}
	for name, get := range map[string]*payloads.GetRequestPayload{"plain": plain, "wrapped": wrapped} {
		if got := reasonOf(s, get); got != denied {
			t.Errorf("%s without approval: reason %v", name, got)
		}
		p.grant(kmip.OperationGet, id)
		if got := do[payloads.GetResponsePayload](s, get); got.UniqueIdentifier != id {
			t.Errorf("%s with approval: %+v", name, got)
		}
		if e := newest(saw); e.Approval != "approval of Get "+id {
			t.Errorf("%s: event %+v", name, e)
		}
		if got := reasonOf(s, get); got != denied {
			t.Errorf("%s for the second time: reason %v", name, got)
		}
		if e := newest(saw); e.Approval != "" || e.Cause != "approval" || e.Object != id {
			t.Errorf("%s for the second time: event %+v", name, e)
		}
	}

	// What would be refused anyway uses no approval and asks for none.
	asked := p.questions()
	p.grant(kmip.OperationDestroy, kek)
	if got := reasonOf(s, &payloads.DestroyRequestPayload{UniqueIdentifier: kek}); got != denied { // it is active
		t.Errorf("destroying an active key: reason %v", got)
	}
	if got := reasonOf(s, &payloads.GetRequestPayload{UniqueIdentifier: "no-such-key"}); got != kmip.ResultReasonItemNotFound {
		t.Errorf("no such key: reason %v", got)
	}
	if got := reasonOf(s, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypePKCS_1}); got != kmip.ResultReasonKeyFormatTypeNotSupported {
		t.Errorf("a format that there is not: reason %v", got)
	}
	if p.questions() != asked || !p.granted[what(kmip.OperationDestroy, kek)] {
		t.Error("an approval was asked for, or used, for nothing")
	}

	// By the ID Placeholder too, and in a batch each for itself.
	m := kmip.NewRequestMessage(kmip.V1_4, newKey(), &payloads.DestroyRequestPayload{}, &payloads.GetRequestPayload{})
	m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
	items := s.send(&m).BatchItem
	if items[0].Err() != nil || items[1].ResultReason != denied || items[2].ResultReason != denied || items[2].ResponsePayload != nil {
		t.Errorf("batch: %+v", items)
	}
	if p.questions() != asked+2 {
		t.Errorf("%d questions for two operations", p.questions()-asked)
	}

	destroy := &payloads.DestroyRequestPayload{UniqueIdentifier: id}
	if got := reasonOf(s, destroy); got != denied {
		t.Errorf("destroyed without approval: reason %v", got)
	}
	attributes := do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState, kmip.AttributeNameDestroyDate}})
	if len(attributes.Attribute) != 1 || attributes.Attribute[0].AttributeValue != kmip.StatePreActive {
		t.Errorf("after a refused Destroy: %+v", attributes)
	}
	p.grant(kmip.OperationDestroy, id)
	do[payloads.DestroyResponsePayload](s, destroy)
	if e := newest(saw); e.Approval != "approval of Destroy "+id {
		t.Errorf("event %+v", e)
	}
}

// TestApprovedMeanwhile goes on when the approval has come by the time that it is
// asked for.
func TestApprovedMeanwhile(t *testing.T) {
	t.Parallel()
	p, _, s := guarded(t)
	p.late = true
	id := do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	do[payloads.DestroyResponsePayload](s, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
}

// TestUnguardedMaterial: what a client registered wrapped it gets back.
func TestUnguardedMaterial(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		o    Object
		want bool
	}{
		"template": {Object{Type: kmip.ObjectTypeTemplate}, false},
		"wrapped":  {Object{Type: kmip.ObjectTypeSymmetricKey, Layout: Layout{Wrapping: &kmip.KeyWrappingData{}}}, false},
		"key":      {Object{Type: kmip.ObjectTypeSymmetricKey}, true},
		"secret":   {Object{Type: kmip.ObjectTypeSecretData}, true},
		"opaque":   {Object{Type: kmip.ObjectTypeOpaqueObject}, true},
	} {
		if guardsExport(&c.o) != c.want {
			t.Errorf("%s: guarded %v", what, !c.want)
		}
	}
}

// TestEveryOperationIsDecided fails for an operation of which nobody has decided
// whether it leads around approvals.
func TestEveryOperationIsDecided(t *testing.T) {
	t.Parallel()
	harmless := []kmip.Operation{
		// They neither give out material nor make it unrecoverable: a replacement is
		// the same account's, and a key that is revoked or archived can still be had.
		kmip.OperationCreate, kmip.OperationCreateKeyPair, kmip.OperationRegister, kmip.OperationReKey, kmip.OperationReKeyKeyPair, kmip.OperationLocate, kmip.OperationCheck, kmip.OperationGetAttributes,
		kmip.OperationGetAttributeList, kmip.OperationAddAttribute, kmip.OperationModifyAttribute, kmip.OperationDeleteAttribute, kmip.OperationObtainLease,
		kmip.OperationGetUsageAllocation, kmip.OperationActivate, kmip.OperationRevoke, kmip.OperationArchive, kmip.OperationRecover, kmip.OperationQuery,
		kmip.OperationDiscoverVersions,
		// They use keys, which is what NoExport and approvals of exports are for.
		kmip.OperationEncrypt, kmip.OperationDecrypt, kmip.OperationMAC, kmip.OperationMACVerify, kmip.OperationHash, kmip.OperationRNGRetrieve, kmip.OperationRNGSeed,
		kmip.OperationSign, kmip.OperationSignatureVerify, kmip.OperationDeriveKey,
		// Parts, and what is joined from them, are guarded like the key.
		kmip.OperationCreateSplitKey, kmip.OperationJoinSplitKey,
	}
	for _, op := range Operations() {
		if slices.Contains(harmless, op) == slices.Contains(ApprovableOperations(), op) {
			t.Errorf("%s: does it need approval?", ttlv.EnumStr(op))
		}
	}
}
