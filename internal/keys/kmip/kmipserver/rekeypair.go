package kmipserver

import (
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// rekeyKeyPair makes a replacement of a key pair: names move to its halves, which
// are linked with those they replace, and dates keep their distances (KMIP 1.4
// section 4.5).
func (r *request) rekeyKeyPair(p *payloads.RekeyKeyPairRequestPayload) (kmip.OperationPayload, error) {
	ids := [2]string{newID(), newID()}
	var n freshPair
	defer func() { n.discard(r) }()
	err := r.update(p.PrivateKeyUniqueIdentifier, func(tx Tx, oldPrivate *Object) error {
		oldPublic, err := r.publicOf(tx, oldPrivate)
		if err != nil {
			return err
		}
		old := [2]*Object{oldPrivate, oldPublic}
		halves := [2]*Object{{ID: ids[0], Type: kmip.ObjectTypePrivateKey}, {ID: ids[1], Type: kmip.ObjectTypePublicKey}}
		halves[0].add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypePublicKeyLink, LinkedObjectIdentifier: ids[1]})
		halves[1].add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypePrivateKeyLink, LinkedObjectIdentifier: ids[0]})
		for i, own := range []*kmip.TemplateAttribute{p.PrivateKeyTemplateAttribute, p.PublicKeyTemplateAttribute} {
			given, err := r.pairTemplate(tx, p.CommonTemplateAttribute, own)
			if err != nil {
				return err
			}
			asked := &payloads.RekeyRequestPayload{Offset: p.Offset, TemplateAttribute: &kmip.TemplateAttribute{Attribute: given}}
			if err := r.inherit(tx, halves[i], old[i], asked); err != nil {
				return err
			}
		}
		if err := n.make(r, halves); err != nil {
			return err
		}
		for i, o := range []*Object{n.private, n.public} {
			o.ID, o.Attributes = halves[i].ID, halves[i].Attributes
			if err := r.client.Policy.checkType(o); err != nil {
				return err
			}
			r.created(o)
			if err := uniqueName(tx, old[i].ID, namesOf(o)...); err != nil {
				return err
			}
			old[i].unset(kmip.AttributeNameName)
			old[i].add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeReplacementObjectLink, LinkedObjectIdentifier: o.ID})
			if err := r.put(tx, o); err != nil {
				return err
			}
		}
		return r.put(tx, oldPublic)
	})
	if err != nil {
		return nil, err
	}
	r.placeholder, r.object = ids[0], ids[0]
	n.give(r)
	return &payloads.RekeyKeyPairResponsePayload{PrivateKeyUniqueIdentifier: ids[0], PublicKeyUniqueIdentifier: ids[1]}, nil
}

// publicOf returns the public key of private, if the pair can be re-keyed.
func (r *request) publicOf(v Reader, private *Object) (*Object, error) {
	if private.Type != kmip.ObjectTypePrivateKey || private.Layout.Wrapping != nil {
		return nil, refuse(kmip.ResultReasonInvalidField, "only a private key in the clear can be re-keyed")
	}
	if private.elsewhere() {
		return nil, errElsewhere
	}
	if _, err := private.private(); err != nil { // a key of its kind cannot be made
		return nil, err
	}
	id, ok := linkTo(private, kmip.LinkTypePublicKeyLink)
	if !ok {
		return nil, refuse(kmip.ResultReasonInvalidField, "the private key has no link to its public key")
	}
	public, err := r.load(v, id)
	if err != nil {
		return nil, err
	}
	if err := usable(public); err != nil {
		return nil, err
	}
	if public.Type != kmip.ObjectTypePublicKey {
		return nil, refuse(kmip.ResultReasonInvalidField, "what the private key is linked to is no public key")
	}
	for _, half := range []*Object{private, public} {
		if _, ok := linkTo(half, kmip.LinkTypeReplacementObjectLink); ok {
			return nil, refuse(kmip.ResultReasonPermissionDenied, "the key pair has been re-keyed already")
		}
	}
	return public, nil
}
