package kmipclient

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
)

// settle runs a change. If its answer was lost, done tells from what is now
// whether it was done; if not, it is run once more.
func (c *Client) settle(ctx context.Context, p kmip.OperationPayload, key string, done func() (bool, error)) (kmip.OperationPayload, error) {
	for attempt := 0; ; attempt++ {
		out, err := c.try(ctx, p, key, true)
		var refused *KMIPError
		if attempt > 0 && errors.As(err, &refused) { // the first may have been done late
			if was, asked := done(); asked == nil && was {
				return nil, nil
			}
		}
		if !errors.Is(err, errLost) {
			return out, err
		}
		was, asked := done()
		if asked != nil {
			return nil, &UnknownOutcome{Operation: p.Operation(), Key: key, Err: errors.Join(err, asked)}
		}
		if was {
			return nil, nil
		}
		if attempt == 1 {
			return nil, err
		}
	}
}

// Create makes an AES-256 key for encryption and returns its identifier. It is
// Pre-Active until [Client.Activate].
func (c *Client) Create(ctx context.Context) (id string, err error) {
	return c.CreateNamed(ctx, "strongroom-"+uuid.NewString())
}

// CreateNamed is [Client.Create] of a key with that Name, which no other key
// may have: by it [Client.Find] finds the key when the caller was interrupted.
func (c *Client) CreateNamed(ctx context.Context, keyName string) (id string, err error) {
	name := kmip.Name{NameValue: keyName, NameType: kmip.NameTypeUninterpretedTextString}
	out, err := c.settle(ctx, &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameName, AttributeValue: name},
		}},
	}, name.NameValue, func() (bool, error) {
		found, err := c.locate(ctx, name)
		if len(found) > 0 {
			id = found[0]
		}
		return id != "", err
	})
	if err != nil {
		return "", c.describe("create a key", err)
	}
	if out != nil {
		id = out.(*payloads.CreateResponsePayload).UniqueIdentifier
	}
	return id, nil
}

// Find returns the identifiers of the keys with that Name; none is no error.
func (c *Client) Find(ctx context.Context, keyName string) ([]string, error) {
	found, err := c.locate(ctx, kmip.Name{NameValue: keyName, NameType: kmip.NameTypeUninterpretedTextString})
	return found, c.describe("look for key "+keyName, err)
}

// Keys returns the identifiers of all symmetric keys that the servers show us.
func (c *Client) Keys(ctx context.Context) ([]string, error) {
	found, err := c.locateBy(ctx, "", kmip.Attribute{AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey})
	return found, c.describe("list the keys", err)
}

const (
	// pageMax is how many identifiers are asked for at a time.
	pageMax = 5000
	// listMax bounds the identifiers that are held, in bytes: a server can make up any
	// number.
	listMax = 64 << 20
)

// Labelled returns the identifiers of all keys whose custom attribute has that
// value, as the servers say: not all of them look at custom attributes, so that
// [Client.Describe] must be asked of each before anything is done to it.
func (c *Client) Labelled(ctx context.Context, name, value string) ([]string, error) {
	ids, err := c.pages(ctx, kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: value}})
	return ids, c.describe("list the keys", err)
}

// pages asks for all keys, page by page. Keys that are made meanwhile shift the
// pages, so that one may come twice; those that are destroyed may hide another,
// which is there the next time. A server that knows no pages (KMIP 1.2 and
// older) shows the first one again, and is asked for all at once.
func (c *Client) pages(ctx context.Context, by kmip.Attribute) ([]string, error) {
	var ids []string
	size := 0
	seen := map[string]bool{}
	for limit := int32(pageMax); ; {
		out, err := c.try(ctx, &payloads.LocateRequestPayload{MaximumItems: limit, OffsetItems: int32(len(ids)), Attribute: []kmip.Attribute{by}}, "", false)
		if err != nil {
			return nil, err
		}
		page := out.(*payloads.LocateResponsePayload).UniqueIdentifier
		before := len(ids)
		for _, id := range page {
			if !seen[id] {
				seen[id] = true
				ids = append(ids, id)
				size += len(id)
			}
		}
		switch {
		case size > listMax:
			return nil, fmt.Errorf("the identifiers of its keys are over %d bytes", listMax)
		case limit == 0, len(ids) == before && len(page) < pageMax:
			return ids, nil
		case len(ids) == before:
			limit = 0
		}
	}
}

// Description is what a server tells of a key beyond its material.
type Description struct {
	State   kmip.State
	Name    string            // the first; empty if it has none
	Created time.Time         // zero if the server does not tell
	Labels  map[string]string // its custom attributes of text
}

// Describe returns what is known of a key.
func (c *Client) Describe(ctx context.Context, id string) (Description, error) {
	list, err := c.attributes(ctx, id)
	return descriptionOf(list), c.describe("describe key "+id, err)
}

func descriptionOf(list []kmip.Attribute) Description {
	d := Description{Labels: map[string]string{}}
	for _, a := range list {
		switch v := a.AttributeValue.(type) {
		case kmip.State:
			d.State = v
		case kmip.Name:
			if d.Name == "" {
				d.Name = v.NameValue
			}
		case time.Time:
			if a.AttributeName == kmip.AttributeNameInitialDate {
				d.Created = v
			}
		case ttlv.Value:
			if text, ok := v.Value.(string); ok {
				d.Labels[string(a.AttributeName)] = text
			}
		}
	}
	return d
}

// namesakesMax is how many keys of one Name are believed: there is one, or a few that
// are destroyed.
const namesakesMax = 64

// locate returns the keys that have a Name, as each of them says: what a server finds
// may be destroyed, and not every server looks at what it is asked for.
func (c *Client) locate(ctx context.Context, name kmip.Name) ([]string, error) {
	found, err := c.locateBy(ctx, name.NameValue, kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: name})
	if err != nil || len(found) == 0 {
		return nil, err
	}
	if len(found) > namesakesMax {
		return nil, fmt.Errorf("the server has %d keys of the name %s: it does not look at names", len(found), name.NameValue)
	}
	var named []string
	for _, id := range found {
		list, err := c.attributes(ctx, id, kmip.AttributeNameName)
		var refused *KMIPError
		if errors.As(err, &refused) && refused.Reason == kmip.ResultReasonItemNotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(list, func(a kmip.Attribute) bool {
			is, ok := a.AttributeValue.(kmip.Name)
			return ok && is.NameValue == name.NameValue
		}) {
			named = append(named, id)
		}
	}
	return named, nil
}

func (c *Client) locateBy(ctx context.Context, key string, by kmip.Attribute) ([]string, error) {
	out, err := c.try(ctx, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{by}}, key, false)
	if err != nil {
		return nil, err
	}
	return out.(*payloads.LocateResponsePayload).UniqueIdentifier, nil
}

// Get returns the material of a symmetric key. The caller closes it.
func (c *Client) Get(ctx context.Context, id string) (*keymem.Key, error) {
	out, err := c.try(ctx, &payloads.GetRequestPayload{UniqueIdentifier: id}, id, false)
	if err != nil {
		return nil, c.describe("get key "+id, err)
	}
	material, err := out.(*payloads.GetResponsePayload).SymmetricKey()
	if err == nil && len(material) == 0 {
		err = errors.New("the key is empty")
	}
	if err != nil {
		return nil, c.describe("get key "+id, err)
	}
	return keymem.Take(material)
}

// State returns a key's state.
func (c *Client) State(ctx context.Context, id string) (kmip.State, error) {
	state, err := c.state(ctx, id)
	return state, c.describe("read the state of key "+id, err)
}

func (c *Client) state(ctx context.Context, id string) (kmip.State, error) {
	list, err := c.attributes(ctx, id, kmip.AttributeNameState)
	if err != nil {
		return 0, err
	}
	for _, a := range list {
		if state, ok := a.AttributeValue.(kmip.State); ok {
			return state, nil
		}
	}
	return 0, fmt.Errorf("the server tells no state of key %s", id)
}

func (c *Client) attributes(ctx context.Context, id string, names ...kmip.AttributeName) ([]kmip.Attribute, error) {
	out, err := c.try(ctx, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: names}, id, false)
	if err != nil {
		return nil, err
	}
	return out.(*payloads.GetAttributesResponsePayload).Attribute, nil
}

// Activate makes a Pre-Active key Active.
func (c *Client) Activate(ctx context.Context, id string) error {
	_, err := c.settle(ctx, &payloads.ActivateRequestPayload{UniqueIdentifier: id}, id, func() (bool, error) {
		state, err := c.state(ctx, id)
		return state == kmip.StateActive, err
	})
	return c.describe("activate key "+id, err)
}

// Revoke ends the use of an Active key: it becomes Deactivated, or Compromised
// for that reason. What it protects can still be read.
func (c *Client) Revoke(ctx context.Context, id string, reason kmip.RevocationReasonCode) error {
	_, err := c.settle(ctx, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: reason}}, id, func() (bool, error) {
		state, err := c.state(ctx, id)
		return state == kmip.StateDeactivated || state == kmip.StateCompromised, err
	})
	return c.describe("revoke key "+id, err)
}

// Destroy makes the server forget a key's material. The key must not be
// Active. A key that is destroyed or gone is no error.
func (c *Client) Destroy(ctx context.Context, id string) error {
	gone := func() (bool, error) {
		state, err := c.state(ctx, id)
		var refused *KMIPError
		if errors.As(err, &refused) && refused.Reason == kmip.ResultReasonItemNotFound {
			return true, nil
		}
		return state == kmip.StateDestroyed || state == kmip.StateDestroyedCompromised, err
	}
	_, err := c.settle(ctx, &payloads.DestroyRequestPayload{UniqueIdentifier: id}, id, gone)
	var refused *KMIPError
	if errors.As(err, &refused) {
		if was, asked := gone(); asked == nil && was {
			return nil
		}
	}
	return c.describe("destroy key "+id, err)
}

// Rekey makes a replacement of a key and returns its identifier. A key that
// has one already keeps it, and that one is returned.
func (c *Client) Rekey(ctx context.Context, id string) (replacement string, err error) {
	linked := func() (bool, error) {
		list, err := c.attributes(ctx, id, kmip.AttributeNameLink)
		for _, a := range list {
			if link, ok := a.AttributeValue.(kmip.Link); ok && link.LinkType == kmip.LinkTypeReplacementObjectLink {
				replacement = link.LinkedObjectIdentifier
			}
		}
		return replacement != "", err
	}
	if has, err := linked(); err != nil || has {
		return replacement, c.describe("re-key "+id, err)
	}
	out, err := c.settle(ctx, &payloads.RekeyRequestPayload{UniqueIdentifier: id}, id, linked)
	if err != nil {
		return "", c.describe("re-key "+id, err)
	}
	if out != nil {
		replacement = out.(*payloads.RekeyResponsePayload).UniqueIdentifier
	}
	return replacement, nil
}

// SetCustom gives a key a custom attribute; name starts with "x-". One that is
// there with this value already is no error.
func (c *Client) SetCustom(ctx context.Context, id, name, value string) error {
	_, err := c.settle(ctx, &payloads.AddAttributeRequestPayload{
		UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: value}},
	}, id, func() (bool, error) {
		is, err := c.custom(ctx, id, name)
		return is == value, err
	})
	return c.describe("label key "+id, err)
}

// Custom returns a key's custom attribute, or "" if it has none.
func (c *Client) Custom(ctx context.Context, id, name string) (string, error) {
	value, err := c.custom(ctx, id, name)
	return value, c.describe("read the labels of key "+id, err)
}

func (c *Client) custom(ctx context.Context, id, name string) (string, error) {
	list, err := c.attributes(ctx, id, kmip.AttributeName(name))
	if err != nil {
		return "", err
	}
	for _, a := range list {
		if v, ok := a.AttributeValue.(ttlv.Value); ok {
			text, _ := v.Value.(string)
			return text, nil
		}
	}
	return "", nil
}
