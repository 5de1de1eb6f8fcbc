package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"reflect"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// attributesMax is how many attributes clients can give an object, or a template to
// objects, each value counted.
const attributesMax = 1024

var errAttributes = refuse(kmip.ResultReasonInvalidField, "an object with over %d attributes", attributesMax)

// rule says what may be done with an attribute (the table at each attribute in
// KMIP 1.4 section 3).
type rule struct {
	since   kmip.ProtocolVersion
	multi   bool // may have several values
	initial bool // a client may give it when it makes the object
	add     bool // a client may add it later
	modify  bool
	delete  bool
}

// ruleOf returns the rule of an attribute, and whether there is such an
// attribute for a client of version v.
func ruleOf(name kmip.AttributeName, v kmip.ProtocolVersion) (rule, bool) {
	r, ok := attributeRules[name]
	if !ok && len(name) > 2 && name[:2] == "x-" {
		r, ok = rule{multi: true, initial: true, add: true, modify: true, delete: true}, true
	}
	if !ok && len(name) > 2 && name[:2] == "y-" {
		r, ok = rule{multi: true}, true
	}
	return r, ok && ttlv.CompareVersions(v, r.since) >= 0
}

// attributeRules is read only.
var attributeRules = map[kmip.AttributeName]rule{
	kmip.AttributeNameUniqueIdentifier:               {},
	kmip.AttributeNameObjectType:                     {},
	kmip.AttributeNameName:                           {multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameCryptographicAlgorithm:         {initial: true},
	kmip.AttributeNameCryptographicLength:            {initial: true},
	kmip.AttributeNameCryptographicParameters:        {multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameCryptographicDomainParameters:  {initial: true},
	kmip.AttributeNameCertificateType:                {},
	kmip.AttributeNameCertificateLength:              {since: kmip.V1_1},
	kmip.AttributeNameX509CertificateIdentifier:      {since: kmip.V1_1},
	kmip.AttributeNameX509CertificateSubject:         {since: kmip.V1_1},
	kmip.AttributeNameX509CertificateIssuer:          {since: kmip.V1_1},
	kmip.AttributeNameCertificateIdentifier:          {},
	kmip.AttributeNameCertificateSubject:             {},
	kmip.AttributeNameCertificateIssuer:              {},
	kmip.AttributeNameDigitalSignatureAlgorithm:      {since: kmip.V1_1, multi: true},
	kmip.AttributeNameDigest:                         {multi: true},
	kmip.AttributeNameOperationPolicyName:            {initial: true},
	kmip.AttributeNameCryptographicUsageMask:         {initial: true, add: true},
	kmip.AttributeNameLeaseTime:                      {},
	kmip.AttributeNameUsageLimits:                    {initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameState:                          {},
	kmip.AttributeNameInitialDate:                    {},
	kmip.AttributeNameActivationDate:                 {initial: true, add: true, modify: true},
	kmip.AttributeNameProcessStartDate:               {initial: true, add: true, modify: true},
	kmip.AttributeNameProtectStopDate:                {initial: true, add: true, modify: true},
	kmip.AttributeNameDeactivationDate:               {initial: true, add: true, modify: true},
	kmip.AttributeNameDestroyDate:                    {},
	kmip.AttributeNameCompromiseOccurrenceDate:       {},
	kmip.AttributeNameCompromiseDate:                 {},
	kmip.AttributeNameRevocationReason:               {},
	kmip.AttributeNameArchiveDate:                    {},
	kmip.AttributeNameObjectGroup:                    {multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameLink:                           {multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameApplicationSpecificInformation: {multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameContactInformation:             {initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameLastChangeDate:                 {},
	kmip.AttributeNameFresh:                          {since: kmip.V1_1, initial: true},
	kmip.AttributeNameAlternativeName:                {since: kmip.V1_2, multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameKeyValuePresent:                {since: kmip.V1_2},
	kmip.AttributeNameKeyValueLocation:               {since: kmip.V1_2, multi: true, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameOriginalCreationDate:           {since: kmip.V1_2, initial: true, add: true},
	kmip.AttributeNameRandomNumberGenerator:          {since: kmip.V1_3, initial: true},
	kmip.AttributeNamePKCS_12FriendlyName:            {since: kmip.V1_4, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameDescription:                    {since: kmip.V1_4, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameComment:                        {since: kmip.V1_4, initial: true, add: true, modify: true, delete: true},
	kmip.AttributeNameSensitive:                      {since: kmip.V1_4, initial: true, add: true, modify: true},
	kmip.AttributeNameAlwaysSensitive:                {since: kmip.V1_4},
	kmip.AttributeNameExtractable:                    {since: kmip.V1_4, initial: true, add: true, modify: true},
	kmip.AttributeNameNeverExtractable:               {since: kmip.V1_4},
}

// visible returns o's attributes for a client of r's version, Unique
// Identifier and Object Type in front.
func (r *request) visible(o *Object) []kmip.Attribute {
	list := []kmip.Attribute{
		{AttributeName: kmip.AttributeNameUniqueIdentifier, AttributeValue: o.ID},
		{AttributeName: kmip.AttributeNameObjectType, AttributeValue: o.Type},
	}
	for _, a := range o.Attributes {
		if _, ok := ruleOf(a.AttributeName, r.version); ok {
			list = append(list, a)
		}
	}
	return list
}

// initial checks attributes that a client gives for a new object and adds them
// to o.
func (r *request) initial(o *Object, attributes []kmip.Attribute) error {
	for _, a := range attributes {
		rule, ok := ruleOf(a.AttributeName, r.version)
		if !ok || !rule.initial {
			return refuse(kmip.ResultReasonInvalidField, "attribute %q cannot be set by a client", a.AttributeName)
		}
		if err := r.checkValue(o, a); err != nil {
			return err
		}
		has := o.has(a.AttributeName)
		if !rule.multi && (has || indexOf(a) != 0) {
			return refuse(kmip.ResultReasonIndexOutofBounds, "attribute %q can have one value only, with index 0", a.AttributeName)
		}
		if len(o.Attributes) >= attributesMax {
			return errAttributes
		}
		a.AttributeValue = uncounted(a.AttributeValue)
		if indexOf(a) < 0 || o.index(a.AttributeName, indexOf(a)) >= 0 && a.AttributeIndex != nil {
			return refuse(kmip.ResultReasonInvalidField, "attribute %q is given twice with index %d", a.AttributeName, indexOf(a))
		}
		if has && a.AttributeIndex == nil {
			o.add(a.AttributeName, a.AttributeValue)
			continue
		}
		if a.AttributeIndex != nil && *a.AttributeIndex == 0 {
			a.AttributeIndex = nil
		}
		o.Attributes = append(o.Attributes, a)
	}
	return nil
}

// checkValue refuses values that the codec lets through or that contradict
// the object.
func (r *request) checkValue(o *Object, a kmip.Attribute) error {
	invalid := false
	switch v := a.AttributeValue.(type) {
	case nil:
		invalid = true
	case kmip.Name:
		invalid = v.NameValue == "" || v.NameType == 0
	case kmip.UsageLimits:
		invalid = v.UsageLimitsTotal < 0 || v.UsageLimitsUnit == 0 || v.UsageLimitsCount != nil && *v.UsageLimitsCount < 0
	case int32:
		invalid = a.AttributeName == kmip.AttributeNameCryptographicLength && v < 0
	case time.Time:
		invalid = !validDate(v)
		state := o.state()
		if a.AttributeName == kmip.AttributeNameActivationDate && state != 0 && state != kmip.StatePreActive {
			return refuse(kmip.ResultReasonPermissionDenied, "the object has been activated")
		}
	}
	if invalid {
		return refuse(kmip.ResultReasonInvalidField, "attribute %q has an invalid value", a.AttributeName)
	}
	return nil
}

// dateMax is the last date that is kept: the clock of Go goes wrong before that of
// KMIP ends.
var dateMax = time.Date(9999, time.December, 31, 23, 59, 59, 0, time.UTC)

func validDate(t time.Time) bool { return t.Unix() >= 0 && t.Unix() <= dateMax.Unix() }

// uncounted returns an attribute's value without what only the server counts (KMIP 1.4
// section 3.21).
func uncounted(value any) any {
	if limits, ok := value.(kmip.UsageLimits); ok {
		limits.UsageLimitsCount = nil
		return limits
	}
	return value
}

// checkChange refuses a change of an attribute that would give back what was taken, or
// used up: to is its new value, nil for none (KMIP 1.4 sections 3.21, 3.25 to 3.27,
// 3.48 and 3.50).
func (r *request) checkChange(o *Object, name kmip.AttributeName, to any) error {
	denied := false
	switch name {
	case kmip.AttributeNameUsageLimits:
		limits, ok := attribute[kmip.UsageLimits](o, name)
		denied = ok && limits.UsageLimitsCount != nil && *limits.UsageLimitsCount != limits.UsageLimitsTotal
	case kmip.AttributeNameSensitive:
		sensitive, _ := attribute[bool](o, name)
		denied = sensitive && to != true
	case kmip.AttributeNameExtractable:
		extractable, ok := attribute[bool](o, name)
		denied = ok && !extractable && to != false
	case kmip.AttributeNameDeactivationDate, kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
		state := o.state()
		at, ok := o.date(name)
		denied = hasState(o.Type) && state != kmip.StatePreActive && state != kmip.StateActive ||
			name != kmip.AttributeNameDeactivationDate && ok && !at.After(r.now)
	}
	if denied {
		return refuse(kmip.ResultReasonPermissionDenied, "attribute %q can no longer be changed so", name)
	}
	return nil
}

func (r *request) getAttributes(p *payloads.GetAttributesRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.GetAttributesResponsePayload{}
	for i, name := range p.AttributeName {
		if slices.Contains(p.AttributeName[:i], name) {
			return nil, refuse(kmip.ResultReasonInvalidMessage, "attribute %.64q is asked for twice", name)
		}
	}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		out.UniqueIdentifier = o.ID
		for _, a := range r.visible(o) {
			if len(p.AttributeName) == 0 || slices.Contains(p.AttributeName, a.AttributeName) {
				out.Attribute = append(out.Attribute, a)
			}
		}
		return nil
	})
	return out, err
}

func (r *request) getAttributeList(p *payloads.GetAttributeListRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.GetAttributeListResponsePayload{}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		out.UniqueIdentifier = o.ID
		for _, a := range r.visible(o) {
			if !slices.Contains(out.AttributeName, a.AttributeName) {
				out.AttributeName = append(out.AttributeName, a.AttributeName)
			}
		}
		return nil
	})
	return out, err
}

func (r *request) addAttribute(p *payloads.AddAttributeRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.AddAttributeResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(tx Tx, o *Object) error {
		a := p.Attribute
		rule, ok := ruleOf(a.AttributeName, r.version)
		if !ok || !rule.add {
			return refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be added by a client", a.AttributeName)
		}
		if a.AttributeIndex != nil {
			return refuse(kmip.ResultReasonInvalidField, "Add Attribute takes no index")
		}
		if err := r.checkValue(o, a); err != nil {
			return err
		}
		if !rule.multi && o.has(a.AttributeName) {
			return refuse(kmip.ResultReasonIndexOutofBounds, "attribute %q has a value and can have one only", a.AttributeName)
		}
		if len(o.Attributes) >= attributesMax {
			return errAttributes
		}
		if err := r.checkChange(o, a.AttributeName, a.AttributeValue); err != nil {
			return err
		}
		if name, ok := a.AttributeValue.(kmip.Name); ok {
			if err := uniqueName(tx, o.ID, name.NameValue); err != nil {
				return err
			}
		}
		out.UniqueIdentifier, out.Attribute = o.ID, o.add(a.AttributeName, uncounted(a.AttributeValue))
		if a.AttributeName == kmip.AttributeNameUsageLimits {
			o.startUsage()
			out.Attribute = o.Attributes[o.index(a.AttributeName, 0)]
		}
		o.noteHistory(false)
		return nil
	})
	return out, err
}

func (r *request) modifyAttribute(p *payloads.ModifyAttributeRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.ModifyAttributeResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(tx Tx, o *Object) error {
		a := p.Attribute
		rule, ok := ruleOf(a.AttributeName, r.version)
		if !ok {
			return refuse(kmip.ResultReasonItemNotFound, "there is no attribute %q", a.AttributeName)
		}
		if !rule.modify {
			return refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be modified by a client", a.AttributeName)
		}
		i := o.index(a.AttributeName, indexOf(a))
		if i < 0 {
			return refuse(kmip.ResultReasonItemNotFound, "the object has no attribute %q with index %d", a.AttributeName, indexOf(a))
		}
		if err := r.checkValue(o, a); err != nil {
			return err
		}
		if name, ok := a.AttributeValue.(kmip.Name); ok {
			if err := uniqueName(tx, o.ID, name.NameValue); err != nil {
				return err
			}
		}
		if err := r.checkChange(o, a.AttributeName, a.AttributeValue); err != nil {
			return err
		}
		o.Attributes[i].AttributeValue = uncounted(a.AttributeValue)
		o.startUsage()
		out.UniqueIdentifier, out.Attribute = o.ID, o.Attributes[i]
		o.noteHistory(false)
		return nil
	})
	return out, err
}

func (r *request) deleteAttribute(p *payloads.DeleteAttributeRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.DeleteAttributeResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		index := int32(0)
		if p.AttributeIndex != nil {
			index = *p.AttributeIndex
		}
		rule, ok := ruleOf(p.AttributeName, r.version)
		if !ok {
			return refuse(kmip.ResultReasonItemNotFound, "there is no attribute %q", p.AttributeName)
		}
		if !rule.delete {
			return refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be deleted by a client", p.AttributeName)
		}
		i := o.index(p.AttributeName, index)
		if i < 0 {
			return refuse(kmip.ResultReasonItemNotFound, "the object has no attribute %q with index %d", p.AttributeName, index)
		}
		if err := r.checkChange(o, p.AttributeName, nil); err != nil {
			return err
		}
		out.UniqueIdentifier, out.Attribute = o.ID, o.Attributes[i]
		o.Attributes = slices.Delete(o.Attributes, i, i+1)
		return nil
	})
	return out, err
}

// matches reports whether o has every wanted attribute, exactly. Two values of
// one date are a range (KMIP 1.4 section 4.9); every other repeated attribute
// must be there with each of its values.
func matches(o *Object, wanted []kmip.Attribute) bool {
	dates := map[kmip.AttributeName][]time.Time{}
	for _, w := range wanted {
		if at, ok := w.AttributeValue.(time.Time); ok {
			dates[w.AttributeName] = append(dates[w.AttributeName], at)
			continue
		}
		if !hasValue(o, w) {
			return false
		}
	}
	for name, bounds := range dates {
		at, ok := o.date(name)
		if !ok || len(bounds) > 2 {
			return false
		}
		from, to := bounds[0], bounds[len(bounds)-1]
		if to.Before(from) {
			from, to = to, from
		}
		if at.Before(from) || at.After(to) {
			return false
		}
	}
	return true
}

func hasValue(o *Object, w kmip.Attribute) bool {
	switch w.AttributeName {
	case kmip.AttributeNameUniqueIdentifier:
		return w.AttributeValue == o.ID
	case kmip.AttributeNameObjectType:
		return w.AttributeValue == o.Type
	}
	return slices.ContainsFunc(o.Attributes, func(a kmip.Attribute) bool {
		if a.AttributeName != w.AttributeName {
			return false
		}
		if w.AttributeIndex != nil && indexOf(a) != *w.AttributeIndex {
			return false
		}
		if want, ok := w.AttributeValue.(kmip.CryptographicUsageMask); ok {
			have, _ := a.AttributeValue.(kmip.CryptographicUsageMask)
			return have&want == want
		}
		return reflect.DeepEqual(a.AttributeValue, w.AttributeValue)
	})
}
