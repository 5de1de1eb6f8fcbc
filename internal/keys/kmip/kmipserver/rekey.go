package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// rekey makes a replacement of a symmetric key: Name moves to it, both are
// linked, dates keep their distances (KMIP 1.4 section 4.4).
func (r *request) rekey(p *payloads.RekeyRequestPayload) (kmip.OperationPayload, error) {
	id, err := r.replace(p, func(*Object) error { return nil })
	if err != nil {
		return nil, err
	}
	r.placeholder, r.object = id, id
	return &payloads.RekeyResponsePayload{UniqueIdentifier: id}, nil
}

// replace is rekey if allow, which is given the key as it is, has no error. It
// returns the identifier of the replacement.
func (r *request) replace(p *payloads.RekeyRequestPayload, allow func(*Object) error) (string, error) {
	n := &Object{ID: newID(), Type: kmip.ObjectTypeSymmetricKey}
	defer func() { r.discard(n) }()
	err := r.update(p.UniqueIdentifier, func(tx Tx, old *Object) error {
		if err := allow(old); err != nil {
			return err
		}
		if old.Type != kmip.ObjectTypeSymmetricKey || old.Layout.Wrapping != nil {
			return refuse(kmip.ResultReasonInvalidField, "only a symmetric key in the clear can be re-keyed")
		}
		if old.elsewhere() {
			return errElsewhere
		}
		if _, ok := linkTo(old, kmip.LinkTypeReplacementObjectLink); ok {
			return refuse(kmip.ResultReasonPermissionDenied, "the key has been re-keyed already")
		}
		n.Attributes = nil
		if err := r.inherit(tx, n, old, p); err != nil {
			return err
		}
		if err := generate(n); err != nil {
			return err
		}
		if err := r.client.Policy.checkType(n); err != nil {
			return err
		}
		r.created(n)
		if err := uniqueName(tx, old.ID, namesOf(n)...); err != nil {
			return err
		}
		old.unset(kmip.AttributeNameName)
		old.add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeReplacementObjectLink, LinkedObjectIdentifier: n.ID})
		return r.put(tx, n)
	})
	if err != nil {
		return "", err
	}
	id := n.ID
	n = nil // the store has it
	return id, nil
}

func linkTo(o *Object, t kmip.LinkType) (string, bool) {
	for _, a := range o.Attributes {
		if link, ok := a.AttributeValue.(kmip.Link); ok && link.LinkType == t {
			return link.LinkedObjectIdentifier, true
		}
	}
	return "", false
}

// inherit gives n what a replacement has of old, and what the request asks.
func (r *request) inherit(tx Tx, n, old *Object, p *payloads.RekeyRequestPayload) error {
	asked := kmip.TemplateAttribute{}
	if p.TemplateAttribute != nil {
		asked = *p.TemplateAttribute
	}
	given, err := r.template(tx, asked)
	if err != nil {
		return err
	}
	n.add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeReplacedObjectLink, LinkedObjectIdentifier: old.ID})
	for _, a := range old.Attributes {
		isGiven := slices.ContainsFunc(given, func(b kmip.Attribute) bool { return b.AttributeName == a.AttributeName })
		if !isGiven && inherited(a.AttributeName) {
			n.Attributes = append(n.Attributes, a)
		}
	}
	if limits, ok := attribute[kmip.UsageLimits](n, kmip.AttributeNameUsageLimits); ok {
		limits.UsageLimitsCount = nil // born starts it anew
		n.set(kmip.AttributeNameUsageLimits, limits)
	}
	if err := r.initial(n, given); err != nil {
		return err
	}
	was, hadActivation := old.date(kmip.AttributeNameActivationDate)
	if p.Offset == nil && !hadActivation {
		return nil
	}
	activation := r.now // a replacement of what was activated takes over at once
	if p.Offset != nil {
		activation = r.now.Add(*p.Offset)
	}
	if hadActivation {
		shift := activation.Sub(was)
		for _, name := range []kmip.AttributeName{kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate, kmip.AttributeNameDeactivationDate} {
			shiftDate(n, old, name, shift)
		}
	}
	if n.index(kmip.AttributeNameActivationDate, 0) < 0 {
		n.set(kmip.AttributeNameActivationDate, activation)
	}
	return nil
}

func shiftDate(n, old *Object, name kmip.AttributeName, by time.Duration) {
	if at, ok := old.date(name); ok && n.index(name, 0) < 0 {
		n.set(name, at.Add(by))
	}
}

// inherited tells the attributes that a replacement key has of the key it
// replaces (KMIP 1.4 table 165): not its dates, state, links and digest.
func inherited(name kmip.AttributeName) bool {
	switch name {
	case kmip.AttributeNameName, kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength,
		kmip.AttributeNameCryptographicParameters, kmip.AttributeNameCryptographicDomainParameters, kmip.AttributeNameCryptographicUsageMask, kmip.AttributeNameOperationPolicyName,
		kmip.AttributeNameUsageLimits, kmip.AttributeNameObjectGroup, kmip.AttributeNameApplicationSpecificInformation,
		kmip.AttributeNameContactInformation, kmip.AttributeNameAlternativeName, kmip.AttributeNameDescription,
		kmip.AttributeNameSensitive, kmip.AttributeNameExtractable:
		return true
	}
	return name.IsCustom()
}
