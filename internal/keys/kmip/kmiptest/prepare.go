package kmiptest

import (
	"crypto/tls"
	"fmt"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// prepare makes what a case takes for granted. TC-151 begins with a Locate of a
// fresh object in a group, and "it is assumed that the server has fresh objects
// available" there: a key that Get has not given out is put into the group.
func (p *play) prepare(conn *tls.Conn) error {
	group := p.groupAtFirst()
	if group == "" {
		return nil
	}
	m := kmip.NewRequestMessage(kmip.V1_1, &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameObjectGroup, AttributeValue: group},
		}},
	})
	response, err := send(conn, ttlv.MarshalTTLV(m))
	if err == nil && statusOf(response) != kmip.ResultStatusSuccess {
		err = fmt.Errorf("the server answered %v", statusOf(response))
	}
	if err != nil {
		return fmt.Errorf("cannot put a fresh key into group %q, which the case finds there: %w", group, err)
	}
	return nil
}

// groupAtFirst returns the group of whose members the case's first request asks for
// one, or "".
func (c *Case) groupAtFirst() (group string) {
	first := c.exchanges[0].request
	asks := false
	first.walk(func(n *node) {
		asks = asks || n.tag == kmip.TagObjectGroupMember
		if name := n.child(kmip.TagAttributeName); name != nil && name.value == string(kmip.AttributeNameObjectGroup) {
			group = n.child(kmip.TagAttributeValue).value
		}
	})
	if !asks {
		return ""
	}
	return group
}
