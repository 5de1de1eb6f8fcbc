package kms

import (
	"bytes"
	"crypto/tls"
	"path/filepath"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// vcenter plays vCenter 7: KMIP 1.1, a connection for each task that begins with
// Discover Versions, batch ids of its own.
type vcenter struct {
	t    *testing.T
	addr string
	tls  *tls.Config
	n    byte // of the next batch id
}

// task opens a connection and discovers versions, as each task does.
func (v *vcenter) task() *tls.Conn {
	v.t.Helper()
	conn := dial(v.t, v.addr, v.tls)
	v.send(conn, true, &payloads.DiscoverVersionsRequestPayload{})
	return conn
}

// send sends a batch, which must succeed with its ids echoed, and returns the
// payloads.
func (v *vcenter) send(conn *tls.Conn, withID bool, items ...kmip.OperationPayload) []kmip.OperationPayload {
	v.t.Helper()
	m := kmip.NewRequestMessage(kmip.V1_1, items...)
	for i := range m.BatchItem {
		m.BatchItem[i].UniqueBatchItemID = nil
		if withID {
			m.BatchItem[i].UniqueBatchItemID = []byte{0x51, 0x4c, 0x4b, 0x43, v.n, 0, 0, 0}
			v.n++
		}
	}
	r, err := exchange(conn, &m)
	if err != nil {
		v.t.Fatal(err)
	}
	if r.Header.ProtocolVersion != kmip.V1_1 || len(r.BatchItem) != len(items) {
		v.t.Fatalf("answered in KMIP %v, with %d items of %d", r.Header.ProtocolVersion, len(r.BatchItem), len(items))
	}
	var out []kmip.OperationPayload
	for i, item := range r.BatchItem {
		if err := item.Err(); err != nil {
			v.t.Fatalf("%T: %v", items[i], err)
		}
		if !bytes.Equal(item.UniqueBatchItemID, m.BatchItem[i].UniqueBatchItemID) {
			v.t.Errorf("%T: batch id %x, sent %x", items[i], item.UniqueBatchItemID, m.BatchItem[i].UniqueBatchItemID)
		}
		out = append(out, item.ResponsePayload)
	}
	return out
}

// attributes asks for one attribute in a request of its own.
func (v *vcenter) attributes(conn *tls.Conn, id string, name kmip.AttributeName) []kmip.Attribute {
	v.t.Helper()
	out := v.send(conn, true, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{name}})
	return out[0].(*payloads.GetAttributesResponsePayload).Attribute
}

// label looks for custom attributes, which must be absent, and adds them in one
// batch.
func (v *vcenter) label(id string, labels ...string) {
	v.t.Helper()
	conn := v.task()
	defer conn.Close()
	var batch []kmip.OperationPayload
	for i := 0; i < len(labels); i += 2 {
		name := kmip.AttributeName(labels[i])
		if got := v.attributes(conn, id, name); len(got) != 0 {
			v.t.Errorf("%s before it was added: %v", name, got)
		}
		batch = append(batch, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: name, AttributeValue: labels[i+1]}})
	}
	v.send(conn, true, batch...)
	for i := 0; i < len(labels); i += 2 {
		got := v.attributes(conn, id, kmip.AttributeName(labels[i]))
		if len(got) != 1 || got[0].AttributeValue.(ttlv.Value).Value != labels[i+1] {
			v.t.Errorf("%s: %v, want %q", labels[i], got, labels[i+1])
		}
	}
}

// newKEK makes a key for an entity as vCenter does.
func (v *vcenter) newKEK(component, name, identifier string) string {
	v.t.Helper()
	conn := v.task()
	create := &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
	}}}
	id := v.send(conn, true, create)[0].(*payloads.CreateResponsePayload).UniqueIdentifier
	conn.Close()
	v.label(id, "x-Product_Version", "7.0.3 build-19480866", "x-Vendor", "VMware, Inc.", "x-Product", "VMware vSphere")
	if secret := v.get(id); len(secret) != 32 {
		v.t.Errorf("a key of %d bytes", len(secret))
	}
	v.label(id, "x-Identifier", identifier, "x-Component", component, "x-Name", name)
	return id
}

// get fetches a key, and activates it if it is not.
func (v *vcenter) get(id string) []byte {
	v.t.Helper()
	conn := v.task()
	defer conn.Close()
	out := v.send(conn, true, &payloads.GetRequestPayload{UniqueIdentifier: id})
	secret, err := secretOf(kmip.ResponseBatchItem{ResponsePayload: out[0]})
	if err != nil {
		v.t.Fatal(err)
	}
	state := v.attributes(conn, id, kmip.AttributeNameState)
	if len(state) == 1 && state[0].AttributeValue == kmip.StatePreActive {
		v.send(conn, true, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		state = v.attributes(conn, id, kmip.AttributeNameState)
	}
	if len(state) != 1 || state[0].AttributeValue != kmip.StateActive {
		v.t.Errorf("state of %s: %v", id, state)
	}
	return secret
}

// TestVCenter plays what vCenter 7.0.3 was seen to say to a KMS: trust, health
// check, a host key, a VM key, and both again after a restart of the KMS.
func TestVCenter(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	v := &vcenter{t: t, addr: b.addr, tls: tlsOf(t, dir, first(t, dir))}

	dial(t, b.addr, v.tls).Close() // reachable
	conn := dial(t, b.addr, v.tls)
	versions := v.send(conn, false, &payloads.DiscoverVersionsRequestPayload{})[0].(*payloads.DiscoverVersionsResponsePayload)
	if len(versions.ProtocolVersion) != 5 {
		t.Errorf("versions %v", versions.ProtocolVersion)
	}
	v.send(conn, true, &payloads.DiscoverVersionsRequestPayload{})
	info := v.send(conn, true, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}})
	if got := info[0].(*payloads.QueryResponsePayload).VendorIdentification; got == "" {
		t.Error("the server does not say whose it is")
	}
	conn.Close()

	host := v.newKEK("ESXi Server", "10.0.0.11", "ea8f1a0e-44c8-4a4f-9d3a-3b5f3e6f7a01")
	vm := v.newKEK("Virtual Machine", "web-1", "502f9d51-5c0f-4d0e-9a2f-0d5d4f0c1b02")
	secrets := map[string][]byte{host: v.get(host), vm: v.get(vm)}
	if bytes.Equal(secrets[host], secrets[vm]) {
		t.Error("two keys are one")
	}

	dial(t, b.addr, v.tls).Close() // the health check, every five minutes
	conn = v.task()
	v.send(conn, true, &payloads.DiscoverVersionsRequestPayload{})
	conn.Close()

	b.stop()
	b = start(t, dir)
	v.addr = b.addr
	for id, secret := range secrets {
		if !bytes.Equal(v.get(id), secret) {
			t.Errorf("key %s is another after a restart", id)
		}
	}
	b.stop()
	b.checkAudit(t, "application:first kmip.Activate group/default/key/"+vm+" success")
}
