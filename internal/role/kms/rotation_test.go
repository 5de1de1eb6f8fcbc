package kms

import (
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
)

// TestRotation has a key older than its group's rotation: the KMS replaces it by
// itself once it runs, and puts each step on record.
func TestRotation(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	key := newAES("backup")
	activated := time.Now().Add(-100 * 24 * time.Hour).Truncate(time.Second)
	key.TemplateAttribute.Attribute = append(key.TemplateAttribute.Attribute, kmip.Attribute{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: activated})
	created := ask(t, conn, nil, key)
	if err := created.Err(); err != nil {
		t.Fatal(err)
	}
	id := created.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	group, err := b.admin(t).SetKMSGroupRotation(t.Context(), connect.NewRequest(&strongroomv1.SetKMSGroupRotationRequest{
		Name: FirstGroup, Rotation: &strongroomv1.KMSRotation{EveryDays: 90, DeactivateAfterDays: 30},
	}))
	if err != nil {
		t.Fatal(apierr.From(err))
	}
	if r := group.Msg.GetRotation(); r.GetEveryDays() != 90 || r.GetDeactivateAfterDays() != 30 {
		t.Errorf("rotation: %v", r)
	}
	b.stop()

	b = start(t, dir)
	conn = dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	value := func(name kmip.AttributeName) any {
		t.Helper()
		item := ask(t, conn, nil, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{name}})
		if err := item.Err(); err != nil {
			t.Fatal(err)
		}
		if list := item.ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute; len(list) > 0 {
			return list[0].AttributeValue
		}
		return nil
	}
	var deactivation any
	for deadline := time.Now().Add(time.Minute); deactivation == nil && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		deactivation = value(kmip.AttributeNameDeactivationDate)
	}
	at, ok := deactivation.(time.Time)
	if in := time.Until(at); !ok || in < 29*24*time.Hour || in > 30*24*time.Hour {
		t.Fatalf("the key is deactivated on %v, want in 30 days", deactivation)
	}
	link, ok := value(kmip.AttributeNameLink).(kmip.Link)
	if !ok || link.LinkType != kmip.LinkTypeReplacementObjectLink {
		t.Errorf("link %+v", link)
	}
	for _, each := range []string{id, link.LinkedObjectIdentifier} {
		if _, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: each})); err != nil {
			t.Errorf("key %s: %v", each, err)
		}
	}
	b.stop()
	b.checkAudit(t, "scheduler scheduler.ReKey group/default/key/"+id+" success", "scheduler scheduler.SetDeactivation group/default/key/"+id+" success",
		"local administrator KMSService/SetKMSGroupRotation group/default success")
}
