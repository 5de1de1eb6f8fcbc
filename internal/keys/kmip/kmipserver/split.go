package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"crypto/sha256"
	"crypto/subtle"
	"math/big"
	"slices"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/shamir"
)

// A split key is one part of a key, of which a threshold gives the key back
// (KMIP 1.4 section 2.2.5). Parts are objects of their own: each has its state, is
// given out and destroyed by itself. What the key may not do, its parts and what is
// joined from them may not do either.

// Part is what a Split Key is a part of, and which one. It is zero for other
// objects.
type Part struct {
	Parts     uint8 // how many there are
	ID        uint8 // which this is, from 1
	Threshold uint8 // how many give the key
	Method    kmip.SplitKeyMethod
}

// partsMax is into how many parts a key is split at the most. One transaction makes
// all of them.
const partsMax = 32

// createSplitKeyRequest is the request of Create Split Key (KMIP 1.4 section 4.38),
// which the library lacks, as it does the three below.
type createSplitKeyRequest struct {
	ObjectType        kmip.ObjectType
	UniqueIdentifier  string `ttlv:",omitempty"`
	SplitKeyParts     int32
	SplitKeyThreshold int32
	SplitKeyMethod    kmip.SplitKeyMethod
	PrimeFieldSize    *big.Int
	TemplateAttribute kmip.TemplateAttribute
}

func (*createSplitKeyRequest) Operation() kmip.Operation { return kmip.OperationCreateSplitKey }

type createSplitKeyResponse struct{ UniqueIdentifier []string }

func (*createSplitKeyResponse) Operation() kmip.Operation { return kmip.OperationCreateSplitKey }

// joinSplitKeyRequest is the request of Join Split Key (KMIP 1.4 section 4.39).
type joinSplitKeyRequest struct {
	ObjectType        kmip.ObjectType
	UniqueIdentifier  []string
	SecretDataType    kmip.SecretDataType `ttlv:",omitempty"`
	TemplateAttribute *kmip.TemplateAttribute
}

func (*joinSplitKeyRequest) Operation() kmip.Operation { return kmip.OperationJoinSplitKey }

type joinSplitKeyResponse struct{ UniqueIdentifier string }

func (*joinSplitKeyResponse) Operation() kmip.Operation { return kmip.OperationJoinSplitKey }

// newPart refuses what is no part of a key, and what cannot be kept.
func newPart(parts, id, threshold int32, method kmip.SplitKeyMethod) (Part, error) {
	switch {
	case parts < shamir.ThresholdMin || parts > shamir.SharesMax || threshold < shamir.ThresholdMin || threshold > parts || id < 1 || id > parts:
		return Part{}, refuse(kmip.ResultReasonInvalidField, "part %d of %d, of which %d give the key: there are %d to %d, and %d are needed at least", id, parts, threshold, shamir.ThresholdMin, shamir.SharesMax, shamir.ThresholdMin)
	case method == kmip.SplitKeyMethodXOR && threshold != parts:
		return Part{}, refuse(kmip.ResultReasonInvalidField, "by XOR, all %d parts give the key, and not %d", parts, threshold)
	case method != kmip.SplitKeyMethodXOR && method != kmip.SplitKeyMethodPolynomialSharingGF28:
		return Part{}, refuse(kmip.ResultReasonFeatureNotSupported, "the methods are XOR and Polynomial Sharing GF(2^8)")
	}
	return Part{Parts: uint8(parts), ID: uint8(id), Threshold: uint8(threshold), Method: method}, nil
}

// partOf reads what a client registers.
func partOf(o *kmip.SplitKey) (Part, error) {
	return newPart(o.SplitKeyParts, o.KeyPartIdentifier, o.SplitKeyThreshold, o.SplitKeyMethod)
}

// object returns the part as KMIP has it.
func (p Part) object(block kmip.KeyBlock) *kmip.SplitKey {
	return &kmip.SplitKey{
		SplitKeyParts: int32(p.Parts), KeyPartIdentifier: int32(p.ID), SplitKeyThreshold: int32(p.Threshold), SplitKeyMethod: p.Method, KeyBlock: block,
	}
}

// of returns part id of the same key.
func (p Part) of(id uint8) Part {
	p.ID = id
	return p
}

// createSplitKey splits a key of the client's, or one that is made for it and not
// kept, into parts.
func (r *request) createSplitKey(p *createSplitKeyRequest) (kmip.OperationPayload, error) {
	if p.ObjectType != kmip.ObjectTypeSplitKey {
		return nil, refuse(kmip.ResultReasonInvalidField, "Create Split Key makes split keys only")
	}
	part, err := newPart(p.SplitKeyParts, 1, p.SplitKeyThreshold, p.SplitKeyMethod)
	if err != nil {
		return nil, err
	}
	if part.Parts > partsMax {
		return nil, refuse(kmip.ResultReasonInvalidField, "a key is split into %d parts at the most", partsMax)
	}
	out := &createSplitKeyResponse{}
	parts := make([]*Object, part.Parts)
	for i := range parts {
		parts[i] = &Object{ID: newID(), Type: kmip.ObjectTypeSplitKey}
		out.UniqueIdentifier = append(out.UniqueIdentifier, parts[i].ID)
	}
	defer func() {
		for _, o := range parts {
			r.discard(o)
		}
	}()
	split := func(tx Tx, key *Object) error {
		shares, err := part.split(key.Material)
		if err != nil {
			return err
		}
		defer shamir.Close(shares)
		for i, o := range parts {
			o.Material.Close() // of a run before
			o.Material, shares[i].Value = shares[i].Value, nil
			o.Layout = Layout{Format: kmip.KeyFormatTypeRaw, Algorithm: key.Layout.Algorithm, Length: key.Layout.Length, Part: part.of(uint8(i + 1))}
			if err := r.makePart(tx, o, key, p.TemplateAttribute); err != nil {
				return err
			}
		}
		return nil
	}
	if p.UniqueIdentifier == "" && r.placeholder == "" {
		err = r.change(func(tx Tx) error {
			key, err := r.passing(tx, p.TemplateAttribute)
			if err != nil {
				return err
			}
			defer key.Material.Close()
			return split(tx, key)
		})
	} else {
		err = r.update(p.UniqueIdentifier, func(tx Tx, key *Object) error {
			if err := divisible(key); err != nil {
				return err
			}
			return split(tx, key)
		})
	}
	if err != nil {
		return nil, err
	}
	r.placeholder = ""
	for _, o := range parts {
		r.give(o)
	}
	parts = nil
	return out, nil
}

// passing makes the key that is split and not kept.
func (r *request) passing(tx Tx, t kmip.TemplateAttribute) (*Object, error) {
	key := &Object{Type: kmip.ObjectTypeSymmetricKey}
	if err := r.fill(tx, key, t); err != nil {
		return nil, err
	}
	err := generate(key)
	if err == nil {
		err = r.client.Policy.checkType(key)
	}
	if err != nil {
		key.Material.Close()
		return nil, err
	}
	return key, nil
}

// divisible refuses to split what is no key, or one whose use is counted or over:
// parts cannot be counted, and would bring it back.
func divisible(key *Object) error {
	_, counted := attribute[kmip.UsageLimits](key, kmip.AttributeNameUsageLimits)
	switch state := key.state(); {
	case key.Type != kmip.ObjectTypeSymmetricKey && key.Type != kmip.ObjectTypeSecretData, key.Layout.Wrapping != nil:
		return refuse(kmip.ResultReasonInvalidField, "symmetric keys and secret data in the clear can be split")
	case key.Material == nil:
		return errElsewhere
	case key.Material.Len() > shamir.SecretMax:
		return refuse(kmip.ResultReasonInvalidField, "a key of over %d bytes cannot be split", shamir.SecretMax)
	case counted:
		return refuse(kmip.ResultReasonPermissionDenied, "a key with usage limits cannot be split: what is joined would have none")
	case state != kmip.StatePreActive && state != kmip.StateActive:
		return refuse(kmip.ResultReasonPermissionDenied, "the key's state does not allow this")
	}
	return nil
}

// makePart completes and stores one part of key.
func (r *request) makePart(tx Tx, o, key *Object, t kmip.TemplateAttribute) error {
	if err := r.fill(tx, o, t); err != nil {
		return err
	}
	if key.Layout.Algorithm != 0 {
		o.set(kmip.AttributeNameCryptographicAlgorithm, key.Layout.Algorithm)
	}
	if key.Layout.Length != 0 {
		o.set(kmip.AttributeNameCryptographicLength, key.Layout.Length)
	}
	if err := o.inherit(key); err != nil {
		return err
	}
	if key.ID != "" {
		o.add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeParentLink, LinkedObjectIdentifier: key.ID})
	}
	r.created(o)
	return r.insert(tx, o)
}

// inherit gives o what from may not do: o is made of it.
func (o *Object) inherit(from *Object) error {
	if mask, ok := attribute[kmip.CryptographicUsageMask](from, kmip.AttributeNameCryptographicUsageMask); ok {
		if o.usage()&^mask != 0 {
			return refuse(kmip.ResultReasonPermissionDenied, "the usage mask allows more than that of the key")
		}
		if o.usage() == 0 {
			o.set(kmip.AttributeNameCryptographicUsageMask, mask)
		}
	}
	if sensitive, _ := attribute[bool](from, kmip.AttributeNameSensitive); sensitive {
		o.set(kmip.AttributeNameSensitive, true)
	}
	if extractable, ok := attribute[bool](from, kmip.AttributeNameExtractable); ok && !extractable {
		o.set(kmip.AttributeNameExtractable, false)
	}
	return nil
}

// errNotJoined refuses parts that do not give a key: too few of them, or of
// different keys.
var errNotJoined = refuse(kmip.ResultReasonCryptographicFailure, "these parts do not give a key: they are too few, or not of one key")

// joinSplitKey makes the key that parts give.
func (r *request) joinSplitKey(p *joinSplitKeyRequest) (kmip.OperationPayload, error) {
	if p.ObjectType != kmip.ObjectTypeSymmetricKey && p.ObjectType != kmip.ObjectTypeSecretData {
		return nil, refuse(kmip.ResultReasonInvalidField, "symmetric keys and secret data can be joined")
	}
	if p.ObjectType == kmip.ObjectTypeSecretData && p.SecretDataType == 0 {
		return nil, refuse(kmip.ResultReasonInvalidField, "Secret Data Type is missing")
	}
	if len(p.UniqueIdentifier) > shamir.SharesMax {
		return nil, refuse(kmip.ResultReasonInvalidField, "there are %d parts of a key at the most", shamir.SharesMax)
	}
	o := &Object{ID: newID(), Type: p.ObjectType}
	defer func() { r.discard(o) }()
	err := r.change(func(tx Tx) error {
		parts, err := r.parts(tx, p.UniqueIdentifier)
		if err != nil {
			return err
		}
		o.Material.Close() // of a run before
		if o.Material, err = join(parts); err != nil {
			return err
		}
		if err := r.verifyJoined(tx, o, parts[0]); err != nil {
			return err
		}
		l := parts[0].Layout
		o.Attributes, o.Layout = nil, Layout{Format: kmip.KeyFormatTypeRaw, Algorithm: l.Algorithm, Length: l.Length, SecretType: p.SecretDataType}
		if p.TemplateAttribute != nil {
			if err := r.fill(tx, o, *p.TemplateAttribute); err != nil {
				return err
			}
		}
		if err := describe(o); err != nil {
			return err
		}
		for _, part := range parts {
			if err := o.inherit(part); err != nil {
				return err
			}
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
	return &joinSplitKeyResponse{UniqueIdentifier: id}, nil
}

// parts returns the split keys that are to be joined.
func (r *request) parts(v Reader, ids []string) ([]*Object, error) {
	var list []*Object
	for _, id := range ids {
		o, err := r.load(v, id)
		if err != nil {
			return nil, err
		}
		if err := usable(o); err != nil {
			return nil, err
		}
		state := o.state()
		switch {
		case o.Type != kmip.ObjectTypeSplitKey || o.Layout.Wrapping != nil:
			return nil, refuse(kmip.ResultReasonInvalidField, "split keys in the clear can be joined")
		case o.Material == nil:
			return nil, errElsewhere
		case state != kmip.StatePreActive && state != kmip.StateActive:
			return nil, refuse(kmip.ResultReasonPermissionDenied, "a part's state does not allow this")
		}
		list = append(list, o)
	}
	return list, nil
}

// parent returns the identifier of the key that a part was split from here, or "".
func (o *Object) parent() string {
	for _, a := range o.Attributes {
		if link, ok := a.AttributeValue.(kmip.Link); ok && link.LinkType == kmip.LinkTypeParentLink {
			return link.LinkedObjectIdentifier
		}
	}
	return ""
}

// split returns the parts of a key. The caller closes their values.
func (p Part) split(key *keymem.Key) ([]shamir.Share, error) {
	if p.Method == kmip.SplitKeyMethodPolynomialSharingGF28 {
		return shamir.KMIP.Split(key, int(p.Threshold), int(p.Parts))
	}
	// By XOR: all parts but the last are random.
	last, err := key.Clone()
	if err != nil {
		return nil, err
	}
	shares := make([]shamir.Share, p.Parts)
	shares[p.Parts-1].Value = last
	for i := range p.Parts - 1 {
		if shares[i].Value, err = keymem.Random(key.Len()); err != nil {
			shamir.Close(shares)
			return nil, err
		}
		subtle.XORBytes(last.Bytes(), last.Bytes(), shares[i].Value.Bytes())
	}
	return shares, nil
}

// join returns the key that parts give, which the caller closes. Whether it is the
// right one, [request.verifyJoined] knows.
func join(parts []*Object) (*keymem.Key, error) {
	if len(parts) == 0 {
		return nil, errNotJoined
	}
	first := parts[0]
	shares := make([]shamir.Share, 0, len(parts))
	for _, o := range parts {
		part := o.Layout.Part
		if part.of(1) != first.Layout.Part.of(1) || o.parent() != first.parent() || o.Material.Len() != first.Material.Len() {
			return nil, errNotJoined
		}
		if slices.ContainsFunc(shares, func(s shamir.Share) bool { return s.Point == part.ID }) {
			return nil, errNotJoined
		}
		shares = append(shares, shamir.Share{Threshold: part.Threshold, Point: part.ID, Value: o.Material})
	}
	if len(shares) < int(first.Layout.Part.Threshold) {
		return nil, errNotJoined
	}
	if first.Layout.Part.Method == kmip.SplitKeyMethodPolynomialSharingGF28 {
		return shamir.KMIP.Combine(shares)
	}
	key, err := keymem.New(first.Material.Len())
	if err != nil {
		return nil, err
	}
	for _, s := range shares {
		subtle.XORBytes(key.Bytes(), key.Bytes(), s.Value.Bytes())
	}
	return key, nil
}

// verifyJoined refuses a joined key that is not the one that was split, as far as
// that is known here, or that was compromised since: its parts outlive it.
func (r *request) verifyJoined(v Reader, o, part *Object) error {
	id := part.parent()
	if id == "" {
		return nil
	}
	key, err := r.load(v, id)
	if err != nil {
		return err
	}
	if state := key.state(); state == kmip.StateCompromised || state == kmip.StateDestroyedCompromised {
		return refuse(kmip.ResultReasonPermissionDenied, "the key was compromised")
	}
	digest, ok := attribute[kmip.Digest](key, kmip.AttributeNameDigest)
	sum := sha256.Sum256(o.Material.Bytes())
	if ok && subtle.ConstantTimeCompare(digest.DigestValue, sum[:]) != 1 {
		return errNotJoined
	}
	return nil
}
