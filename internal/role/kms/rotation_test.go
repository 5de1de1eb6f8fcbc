package kms

import (
	"bytes"
	"fmt"
	"os"
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

// TestRotationKilled kills the KMS again and again while it rotates a group's
// keys: in the end each has one replacement, and none is lost.
func TestRotationKilled(t *testing.T) {
	t.Parallel()
	dir, socket := filepath.Join(t.TempDir(), "kms"), filepath.Join(socketDir(t), "s")
	b := start(t, dir)
	cfg := tlsOf(t, dir, first(t, dir))
	conn := dial(t, b.addr, cfg)
	const keys = 40
	activated := time.Now().Add(-100 * 24 * time.Hour).Truncate(time.Second)
	secrets := map[string][]byte{}
	names := map[string]string{}
	for i := range keys {
		name := fmt.Sprint("backup-", i)
		key := newAES(name)
		key.TemplateAttribute.Attribute = append(key.TemplateAttribute.Attribute, kmip.Attribute{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: activated})
		created := ask(t, conn, nil, key)
		if err := created.Err(); err != nil {
			t.Fatal(err)
		}
		id := created.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
		secret, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}))
		if err != nil {
			t.Fatal(err)
		}
		secrets[id], names[id] = secret, name
	}
	if _, err := b.admin(t).SetKMSGroupRotation(t.Context(), connect.NewRequest(&strongroomv1.SetKMSGroupRotationRequest{
		Name: FirstGroup, Rotation: &strongroomv1.KMSRotation{EveryDays: 90, DeactivateAfterDays: 30},
	})); err != nil {
		t.Fatal(apierr.From(err))
	}
	b.stop()

	// Each process gets a little further than the one before, and is killed there.
	recorded := func() (bytes int64) {
		files, err := filepath.Glob(filepath.Join(dir, "audit", "*.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil {
				bytes += info.Size()
			}
		}
		return bytes
	}
	// In all they write some 70 kB.
	const kills, step = 6, 8000
	for kill, begin := 1, recorded(); kill <= kills; kill++ {
		p := startProcess(t, dir, socket)
		for began := time.Now(); recorded() < begin+int64(kill)*step; time.Sleep(time.Millisecond) {
			if time.Since(began) > time.Minute {
				t.Fatalf("process %d does not get on: %d bytes on record", kill, recorded()-begin)
			}
		}
		p.kill()
	}

	b = start(t, dir)
	conn = dial(t, b.addr, cfg)
	link := func(id string, kind kmip.LinkType) (to []string) {
		item := ask(t, conn, nil, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameLink}})
		if err := item.Err(); err != nil {
			t.Fatal(err)
		}
		for _, a := range item.ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute {
			if l, ok := a.AttributeValue.(kmip.Link); ok && l.LinkType == kind {
				to = append(to, l.LinkedObjectIdentifier)
			}
		}
		return to
	}
	// What a kill left half-way, and what led on from it, the next process does.
	for id := range secrets {
		for begin := time.Now(); len(link(id, kmip.LinkTypeReplacementObjectLink)) == 0; time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatalf("key %s is not replaced", id)
			}
		}
	}
	all := ask(t, conn, nil, &payloads.LocateRequestPayload{})
	if err := all.Err(); err != nil {
		t.Fatal(err)
	}
	if n := len(all.ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier); n != 2*keys {
		t.Errorf("%d keys and their replacements, want %d", n, 2*keys)
	}
	for id, secret := range secrets {
		if got, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id})); err != nil || !bytes.Equal(got, secret) {
			t.Errorf("key %s, which was replaced: %v", id, err)
		}
		next := link(id, kmip.LinkTypeReplacementObjectLink)
		if len(next) != 1 {
			t.Errorf("key %s is replaced by %v", id, next)
			continue
		}
		if back := link(next[0], kmip.LinkTypeReplacedObjectLink); len(back) != 1 || back[0] != id {
			t.Errorf("key %s replaces %v, want %s", next[0], back, id)
		}
		found := ask(t, conn, nil, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{{
			AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: names[id], NameType: kmip.NameTypeUninterpretedTextString},
		}}})
		if err := found.Err(); err != nil {
			t.Fatal(err)
		}
		if ids := found.ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier; len(ids) != 1 || ids[0] != next[0] {
			t.Errorf("%s finds %v, want the replacement %s", names[id], ids, next[0])
		}
	}
	b.stop()
	b.checkAudit(t)
}
