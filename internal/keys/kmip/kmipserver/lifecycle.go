package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"crypto/sha256"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/crypto/keymem"
)

const leaseTime = time.Hour

// template returns the attributes of t with those of the templates it names in
// front; its own win over theirs (KMIP 1.2 section 2.1.8).
func (r *request) template(v Reader, t kmip.TemplateAttribute) ([]kmip.Attribute, error) {
	var list []kmip.Attribute
	for _, name := range t.Name {
		found := false
		for o, err := range v.Find(Query{Name: name.NameValue}) {
			if err != nil {
				return nil, err
			}
			if o.Type != kmip.ObjectTypeTemplate {
				continue
			}
			found = true
			if len(list)+len(o.Template) > attributesMax {
				return nil, errAttributes
			}
			for _, a := range o.Template {
				rule, ok := ruleOf(a.AttributeName, r.version)
				own := !rule.multi && slices.ContainsFunc(t.Attribute, func(b kmip.Attribute) bool { return b.AttributeName == a.AttributeName })
				if ok && rule.initial && !own {
					list = append(list, a)
				}
			}
		}
		if !found {
			return nil, refuse(kmip.ResultReasonItemNotFound, "there is no template %.64q", name.NameValue)
		}
	}
	return append(list, t.Attribute...), nil
}

// created is born for an object that the server made, not its client.
func (r *request) created(o *Object) {
	if _, ok := o.date(kmip.AttributeNameOriginalCreationDate); !ok {
		o.set(kmip.AttributeNameOriginalCreationDate, r.now)
	}
	r.born(o)
}

// born completes a new object: it has its attributes, layout and material.
func (r *request) born(o *Object) {
	o.set(kmip.AttributeNameInitialDate, r.now)
	if hasState(o.Type) {
		o.set(kmip.AttributeNameState, kmip.StatePreActive)
	}
	o.set(kmip.AttributeNameLeaseTime, leaseTime)
	if o.Type == kmip.ObjectTypeTemplate {
		return
	}
	if o.Material != nil {
		sum := sha256.Sum256(o.Material.Bytes())
		o.unset(kmip.AttributeNameDigest)
		o.add(kmip.AttributeNameDigest, kmip.Digest{HashingAlgorithm: kmip.HashingAlgorithmSHA_256, DigestValue: sum[:], KeyFormatType: o.Layout.Format})
	}
	if _, ok := attribute[bool](o, kmip.AttributeNameFresh); !ok {
		o.set(kmip.AttributeNameFresh, true)
	}
	o.startUsage()
	o.noteHistory(true)
}

// noteHistory has Always Sensitive and Never Extractable say what Sensitive and
// Extractable, which have just been set, have been since the object was born (KMIP 1.4
// sections 3.49 and 3.51). Objects with neither of these have neither of those.
func (o *Object) noteHistory(born bool) {
	if sensitive, ok := attribute[bool](o, kmip.AttributeNameSensitive); ok {
		always, _ := attribute[bool](o, kmip.AttributeNameAlwaysSensitive)
		o.set(kmip.AttributeNameAlwaysSensitive, sensitive && (born || always))
	}
	if extractable, ok := attribute[bool](o, kmip.AttributeNameExtractable); ok {
		never, _ := attribute[bool](o, kmip.AttributeNameNeverExtractable)
		o.set(kmip.AttributeNameNeverExtractable, !extractable && (born || never))
	}
}

// startUsage starts the count of usage limits that have none at their total.
func (o *Object) startUsage() {
	if limits, ok := attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits); ok && limits.UsageLimitsCount == nil {
		total := limits.UsageLimitsTotal
		limits.UsageLimitsCount = &total
		o.set(kmip.AttributeNameUsageLimits, limits)
	}
}

// uniqueName refuses a Name that another object of the account has (KMIP 1.4
// section 3.2).
func uniqueName(v Reader, id string, names ...string) error {
	for _, name := range names {
		for other, err := range v.Find(Query{Name: name}) {
			if err != nil {
				return err
			}
			if other.ID != id && !destroyed(other) {
				return refuse(kmip.ResultReasonInvalidField, "the name %.64q is in use", name)
			}
		}
	}
	return nil
}

func destroyed(o *Object) bool {
	return o.state() == kmip.StateDestroyed || o.state() == kmip.StateDestroyedCompromised
}

// fill gives a new object the attributes that a client wants it to have.
func (r *request) fill(v Reader, o *Object, t kmip.TemplateAttribute) error {
	o.Attributes = nil
	attributes, err := r.template(v, t)
	if err != nil {
		return err
	}
	return r.initial(o, attributes)
}

// insert stores a new object, if the client may have one of its type and its names are
// free.
func (r *request) insert(tx Tx, o *Object) error {
	if err := r.client.Policy.checkType(o); err != nil {
		return err
	}
	if err := uniqueName(tx, o.ID, namesOf(o)...); err != nil {
		return err
	}
	return r.put(tx, o)
}

func (r *request) create(p *payloads.CreateRequestPayload) (kmip.OperationPayload, error) {
	if p.ObjectType != kmip.ObjectTypeSymmetricKey {
		return nil, refuse(kmip.ResultReasonInvalidField, "Create makes symmetric keys only")
	}
	o := &Object{ID: newID(), Type: p.ObjectType}
	defer func() { r.discard(o) }()
	err := r.change(func(tx Tx) error {
		if err := r.fill(tx, o, p.TemplateAttribute); err != nil {
			return err
		}
		if err := generate(o); err != nil {
			return err
		}
		r.created(o)
		return r.insert(tx, o)
	})
	if err != nil {
		return nil, err
	}
	r.placeholder, r.object = o.ID, o.ID
	id := o.ID
	r.give(o)
	o = nil
	return &payloads.CreateResponsePayload{ObjectType: p.ObjectType, UniqueIdentifier: id}, nil
}

// discard releases the material of an object that no store has taken.
func (r *request) discard(o *Object) {
	if o != nil {
		o.Material.Close()
	}
}

// give hands an object to the store, which has it once the transaction ends.
func (r *request) give(o *Object) {
	if r.tx != nil {
		r.made = append(r.made, o.Material)
	}
}

// generate makes the material of o from its algorithm and length.
func generate(o *Object) error {
	algorithm, ok := attribute[kmip.CryptographicAlgorithm](o, kmip.AttributeNameCryptographicAlgorithm)
	if !ok {
		return refuse(kmip.ResultReasonInvalidField, "Cryptographic Algorithm is missing")
	}
	if _, ok := attribute[kmip.CryptographicUsageMask](o, kmip.AttributeNameCryptographicUsageMask); !ok {
		return refuse(kmip.ResultReasonInvalidField, "Cryptographic Usage Mask is missing")
	}
	bits, ok := attribute[int32](o, kmip.AttributeNameCryptographicLength)
	if !ok {
		bits = 256
		if algorithm == kmip.CryptographicAlgorithm3DES {
			bits = 168
		}
		o.set(kmip.AttributeNameCryptographicLength, bits)
	}
	size, err := keySize(algorithm, bits)
	if err != nil {
		return err
	}
	if o.Material == nil || o.Material.Len() != size {
		o.Material.Close()
		if o.Material, err = keymem.Random(size); err != nil {
			return err
		}
	}
	o.Layout = Layout{Format: kmip.KeyFormatTypeRaw, Algorithm: algorithm, Length: bits}
	return nil
}

// keySize returns the bytes of a key of bits.
func keySize(algorithm kmip.CryptographicAlgorithm, bits int32) (int, error) {
	ok := false
	size := int(bits / 8)
	switch algorithm {
	case kmip.CryptographicAlgorithmAES:
		ok = bits == 128 || bits == 192 || bits == 256
	case kmip.CryptographicAlgorithm3DES:
		ok = bits == 112 || bits == 168 || bits == 128 || bits == 192
		switch bits {
		case 112:
			size = 16
		case 168:
			size = 24
		}
	case kmip.CryptographicAlgorithmHMACSHA1, kmip.CryptographicAlgorithmHMACSHA224, kmip.CryptographicAlgorithmHMACSHA256,
		kmip.CryptographicAlgorithmHMACSHA384, kmip.CryptographicAlgorithmHMACSHA512:
		ok = bits >= 80 && bits <= 4096 && bits%8 == 0
	case kmip.CryptographicAlgorithmDES:
		ok, size = bits == 56 || bits == 64, 8
	case kmip.CryptographicAlgorithmBlowfish, kmip.CryptographicAlgorithmCamellia, kmip.CryptographicAlgorithmCAST5, kmip.CryptographicAlgorithmIDEA,
		kmip.CryptographicAlgorithmMARS, kmip.CryptographicAlgorithmRC2, kmip.CryptographicAlgorithmRC4, kmip.CryptographicAlgorithmRC5,
		kmip.CryptographicAlgorithmSKIPJACK, kmip.CryptographicAlgorithmTwofish:
		// Kept for others; this server does not compute with them.
		ok = bits >= 40 && bits <= 2048 && bits%8 == 0
	default:
		return 0, refuse(kmip.ResultReasonInvalidField, "keys of algorithm %d cannot be made here", algorithm)
	}
	if !ok {
		return 0, refuse(kmip.ResultReasonInvalidField, "a key of this algorithm cannot have %d bits", bits)
	}
	return size, nil
}

func (r *request) activate(p *payloads.ActivateRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.ActivateResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		if o.state() != kmip.StatePreActive {
			return refuse(kmip.ResultReasonPermissionDenied, "only a pre-active object can be activated")
		}
		o.set(kmip.AttributeNameActivationDate, r.now)
		out.UniqueIdentifier = o.ID
		return nil
	})
	return out, err
}

func (r *request) revoke(p *payloads.RevokeRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.RevokeResponsePayload{}
	err := r.updateAny(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		if o.Archived {
			return refuse(kmip.ResultReasonObjectArchived, "the object is archived")
		}
		code := p.RevocationReason.RevocationReasonCode
		compromised := code == kmip.RevocationReasonCodeKeyCompromise || code == kmip.RevocationReasonCodeCACompromise
		state := o.state()
		switch {
		case code == 0:
			return refuse(kmip.ResultReasonInvalidField, "Revocation Reason Code is missing")
		case p.CompromiseOccurrenceDate != nil && !validDate(*p.CompromiseOccurrenceDate):
			return refuse(kmip.ResultReasonInvalidField, "Compromise Occurrence Date has an invalid value")
		case !hasState(o.Type):
			return refuse(kmip.ResultReasonPermissionDenied, "this type of object has no state")
		case compromised && state == kmip.StateDestroyed:
			o.set(kmip.AttributeNameState, kmip.StateDestroyedCompromised)
		case state == kmip.StateDestroyed, state == kmip.StateDestroyedCompromised:
			return refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed")
		case compromised:
			o.set(kmip.AttributeNameState, kmip.StateCompromised)
		case state == kmip.StateActive:
			o.set(kmip.AttributeNameState, kmip.StateDeactivated)
			o.set(kmip.AttributeNameDeactivationDate, r.now)
		default:
			return refuse(kmip.ResultReasonPermissionDenied, "only an active object can be revoked for this reason")
		}
		if compromised {
			occurred := r.now
			if p.CompromiseOccurrenceDate != nil {
				occurred = *p.CompromiseOccurrenceDate
			}
			o.set(kmip.AttributeNameCompromiseOccurrenceDate, occurred)
			o.set(kmip.AttributeNameCompromiseDate, r.now)
		}
		o.set(kmip.AttributeNameRevocationReason, p.RevocationReason)
		out.UniqueIdentifier = o.ID
		return nil
	})
	return out, err
}

// destroy forgets the material and keeps the attributes (KMIP 1.4 section
// 4.21).
func (r *request) destroy(p *payloads.DestroyRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.DestroyResponsePayload{}
	err := r.approved(kmip.OperationDestroy, p.UniqueIdentifier, func(id string, use func(Tx, *Object) error) error {
		return r.updateAny(id, func(tx Tx, o *Object) error {
			switch o.state() {
			case kmip.StateActive:
				return refuse(kmip.ResultReasonPermissionDenied, "the object is active: revoke it first")
			case kmip.StateDestroyed, kmip.StateDestroyedCompromised:
				return refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed already")
			}
			if err := use(tx, o); err != nil {
				return err
			}
			o.Destroy(r.now)
			out.UniqueIdentifier = o.ID
			return nil
		})
	})
	return out, err
}

// Destroy makes o a destroyed object, whatever its state: its material is
// forgotten, its attributes stay.
func (o *Object) Destroy(when time.Time) {
	if o.state() == kmip.StateCompromised {
		o.set(kmip.AttributeNameState, kmip.StateDestroyedCompromised)
	} else {
		o.set(kmip.AttributeNameState, kmip.StateDestroyed)
	}
	o.set(kmip.AttributeNameDestroyDate, when)
	o.Material = nil
}

func (r *request) archive(p *payloads.ArchiveRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.ArchiveResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		o.Archived = true
		o.set(kmip.AttributeNameArchiveDate, r.now)
		out.UniqueIdentifier = o.ID
		return nil
	})
	return out, err
}

func (r *request) recoverObject(p *payloads.RecoverRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.RecoverResponsePayload{}
	err := r.updateAny(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		o.Archived = false
		o.unset(kmip.AttributeNameArchiveDate)
		out.UniqueIdentifier = o.ID
		return nil
	})
	return out, err
}

func (r *request) obtainLease(p *payloads.ObtainLeaseRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.ObtainLeaseResponsePayload{LeaseTime: leaseTime}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		if err := usable(o); err != nil {
			return err
		}
		if s := o.state(); s == kmip.StateDeactivated || s == kmip.StateCompromised {
			return refuse(kmip.ResultReasonPermissionDenied, "the object is no longer active")
		}
		out.UniqueIdentifier = o.ID
		out.LastChangeDate, _ = o.date(kmip.AttributeNameLastChangeDate)
		return nil
	})
	return out, err
}

func (r *request) getUsageAllocation(p *payloads.GetUsageAllocationRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.GetUsageAllocationResponsePayload{}
	err := r.update(p.UniqueIdentifier, func(_ Tx, o *Object) error {
		if p.UsageLimitsCount <= 0 {
			return refuse(kmip.ResultReasonInvalidField, "the amount to allocate must be positive")
		}
		if _, ok := attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits); !ok {
			return refuse(kmip.ResultReasonPermissionDenied, "the object has no usage limits")
		}
		out.UniqueIdentifier = o.ID
		return allocate(o, p.UsageLimitsCount)
	})
	return out, err
}

// allocate takes n of the uses that o's limits leave; without limits there is
// nothing to take.
func allocate(o *Object, n int64) error {
	limits, ok := attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits)
	if !ok {
		return nil
	}
	left := limits.UsageLimitsTotal
	if limits.UsageLimitsCount != nil {
		left = *limits.UsageLimitsCount
	}
	if n > left {
		return refuse(kmip.ResultReasonPermissionDenied, "%d uses are asked for and %d are left", n, left)
	}
	left -= n
	limits.UsageLimitsCount = &left
	o.set(kmip.AttributeNameUsageLimits, limits)
	return nil
}

// check tells what stands against a use; only the Unique Identifier comes back
// if nothing does (KMIP 1.4 section 4.10).
func (r *request) check(p *checkPayload) (kmip.OperationPayload, error) {
	out := &checkPayload{}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		if err := usable(o); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		if missing := p.CryptographicUsageMask &^ o.usage(); missing != 0 {
			out.CryptographicUsageMask = missing
		}
		if limits, ok := attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits); ok && p.UsageLimitsCount != nil && *p.UsageLimitsCount > *limits.UsageLimitsCount {
			out.UsageLimitsCount = limits.UsageLimitsCount
		}
		if p.LeaseTime != nil && *p.LeaseTime > leaseTime {
			longest := leaseTime
			out.LeaseTime = &longest
		}
		return nil
	})
	return out, err
}
