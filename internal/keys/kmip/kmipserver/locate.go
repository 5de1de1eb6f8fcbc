package kmipserver

import (
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// locateMax is how many identifiers one answer holds at most.
const locateMax = 10000

// locate finds objects, newest first, and members of a group oldest first.
// Destroyed objects are found only by someone who asks for their state or for
// their Destroy Date.
func (r *request) locate(p *payloads.LocateRequestPayload) (kmip.OperationPayload, error) {
	if p.MaximumItems < 0 || p.OffsetItems < 0 {
		return nil, refuse(kmip.ResultReasonInvalidField, "a negative number of items")
	}
	query := Query{}
	wantsDestroyed := false
	for _, a := range p.Attribute {
		if _, ok := ruleOf(a.AttributeName, r.version); !ok {
			return nil, refuse(kmip.ResultReasonInvalidField, "there is no attribute %.64q", a.AttributeName)
		}
		switch v := a.AttributeValue.(type) {
		case kmip.Name:
			query.Name = v.NameValue
		case kmip.State:
			wantsDestroyed = wantsDestroyed || v == kmip.StateDestroyed || v == kmip.StateDestroyedCompromised
		}
		if a.AttributeName == kmip.AttributeNameDestroyDate {
			wantsDestroyed = true
		}
	}
	storage := p.StorageStatusMask
	if storage == 0 {
		storage = kmip.StorageStatusOnlineStorage
	}
	var found []string
	err := r.server.store.View(r.ctx, r.client.Account, func(v Reader) error {
		for o, err := range v.Find(query) {
			if err != nil {
				return err
			}
			if err := r.ctx.Err(); err != nil {
				return err
			}
			o.advance(r.now)
			where := kmip.StorageStatusOnlineStorage
			if o.Archived {
				where = kmip.StorageStatusArchivalStorage
			}
			fresh, _ := attribute[bool](o, kmip.AttributeNameFresh)
			if storage&where == 0 || destroyed(o) && !wantsDestroyed || p.ObjectGroupMember == kmip.ObjectGroupMemberFresh && !fresh {
				continue
			}
			if matches(o, p.Attribute) {
				found = append(found, o.ID)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := &payloads.LocateResponsePayload{}
	if p.OffsetItems > 0 {
		located := int32(len(found))
		out.LocatedItems = &located
	}
	if p.ObjectGroupMember == 0 { // of a group, the oldest is the next to use
		slices.Reverse(found)
	}
	found = found[min(int(p.OffsetItems), len(found)):]
	limit := locateMax
	if p.MaximumItems > 0 {
		limit = min(limit, int(p.MaximumItems))
	}
	out.UniqueIdentifier = found[:min(limit, len(found))]
	r.placeholder = ""
	if len(out.UniqueIdentifier) == 1 {
		r.placeholder = out.UniqueIdentifier[0]
	}
	return out, nil
}
