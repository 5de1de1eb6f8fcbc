package kmipserver

import (
	"crypto/sha256"
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// locateMax is how many identifiers one answer holds at most.
const locateMax = 10000

// locate finds objects, newest first, and members of a group oldest first. The
// default member of a group is the oldest that no Get has given out, and the oldest
// once all have been: whoever asks for it and gets it, in turn, uses up a group of
// keys made beforehand (KMIP 1.3 section 4.9 leaves the choice to the server).
// Destroyed objects are found only by someone who asks for their state or for
// their Destroy Date. It looks no further than to the end of the page that was
// asked for, and tells how many objects there are only where it has seen all.
func (r *request) locate(p *payloads.LocateRequestPayload) (kmip.OperationPayload, error) {
	if p.MaximumItems < 0 || p.OffsetItems < 0 {
		return nil, refuse(kmip.ResultReasonInvalidField, "a negative number of items")
	}
	query, err := r.queryOf(p)
	if err != nil {
		return nil, err
	}
	page := page{query: r.fingerprint(p), offset: int(p.OffsetItems)}
	skip := page.offset
	if page.offset > 0 && r.conn.next.query == page.query && r.conn.next.offset == page.offset {
		query.After, skip = r.conn.next.after, 0
	}
	limit := locateMax
	if p.MaximumItems > 0 {
		limit = min(limit, int(p.MaximumItems))
	}
	id := func(o *Object) string { return o.ID }
	var found []string
	var passed int
	if p.ObjectGroupMember == kmip.ObjectGroupMemberDefault {
		limit = 1
		fresh := *p
		fresh.ObjectGroupMember = kmip.ObjectGroupMemberFresh
		if found, passed, err = search(r, &fresh, query, skip, limit, id); err != nil {
			return nil, err
		}
	}
	if len(found) == 0 {
		if found, passed, err = search(r, p, query, skip, limit, id); err != nil {
			return nil, err
		}
	}
	out := &payloads.LocateResponsePayload{UniqueIdentifier: found}
	if len(found) > 0 {
		r.conn.next = page.behind(found) // also of the last: clients ask for one more
	}
	if len(found) < limit && page.offset > 0 { // all have been seen
		located := int32(page.offset - skip + passed)
		out.LocatedItems = &located
	}
	r.placeholder = ""
	if len(found) == 1 {
		r.placeholder = found[0]
	}
	return out, nil
}

// queryOf returns what the store is asked for to find what p asks for.
func (r *request) queryOf(p *payloads.LocateRequestPayload) (Query, error) {
	query := Query{Newest: p.ObjectGroupMember == 0} // of a group, the oldest is the next to use
	for _, a := range p.Attribute {
		if _, ok := ruleOf(a.AttributeName, r.version); !ok {
			return Query{}, refuse(kmip.ResultReasonInvalidField, "there is no attribute %.64q", a.AttributeName)
		}
		if name, ok := a.AttributeValue.(kmip.Name); ok {
			query.Name = name.NameValue
		}
	}
	return query, nil
}

// wantsDestroyed reports whether p asks for destroyed objects, too.
func wantsDestroyed(p *payloads.LocateRequestPayload) bool {
	return slices.ContainsFunc(p.Attribute, func(a kmip.Attribute) bool {
		state, _ := a.AttributeValue.(kmip.State)
		return state == kmip.StateDestroyed || state == kmip.StateDestroyedCompromised || a.AttributeName == kmip.AttributeNameDestroyDate
	})
}

// search picks from objects that p asks for, behind the first skip, up to limit. It
// returns how many it has seen, those that it skipped included.
func search[T any](r *request, p *payloads.LocateRequestPayload, query Query, skip, limit int, pick func(*Object) T) (found []T, passed int, err error) {
	storage := p.StorageStatusMask
	if storage == 0 {
		storage = kmip.StorageStatusOnlineStorage
	}
	destroyedToo := wantsDestroyed(p)
	err = r.server.store.View(r.ctx, r.client.Account, func(v Reader) error {
		found, passed = nil, 0
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
			if storage&where == 0 || destroyed(o) && !destroyedToo || p.ObjectGroupMember == kmip.ObjectGroupMemberFresh && !fresh {
				continue
			}
			if !matches(o, p.Attribute) {
				continue
			}
			if passed++; passed <= skip {
				continue
			}
			if found = append(found, pick(o)); len(found) == limit {
				break
			}
		}
		return nil
	})
	return found, passed, err
}

// page is a place in what a Locate finds. A connection keeps the one at which its
// last ended, for the next to go on from there: to skip what was found costs as
// much as to find it.
type page struct {
	query  [sha256.Size]byte // what is looked for, and whose
	offset int               // Offset Items
	after  string            // the object in front of it
}

// behind returns the page that begins where this one, found, ends.
func (p page) behind(found []string) page {
	return page{query: p.query, offset: p.offset + len(found), after: found[len(found)-1]}
}

// fingerprint stands for what p looks for, whatever page of it.
func (r *request) fingerprint(p *payloads.LocateRequestPayload) [sha256.Size]byte {
	q := *p
	q.MaximumItems, q.OffsetItems = 0, 0
	enc := ttlv.NewTTLVEncoder()
	enc.TextString(kmip.TagUniqueIdentifier, r.client.Account)
	enc.TagAny(kmip.TagRequestPayload, &q)
	return sha256.Sum256(enc.Bytes())
}
