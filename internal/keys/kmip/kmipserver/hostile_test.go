package kmipserver

import (
	"bytes"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

func with(name kmip.AttributeName, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
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
