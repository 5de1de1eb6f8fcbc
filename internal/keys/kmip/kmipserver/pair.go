package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/crypto/keymem"
)

// The halves of a key pair are objects whose material is an encoding in DER, or of
// TTLV in a transparent format. Go's crypto packages compute with copies of their
// own, which live as long as one request and are not in locked memory.

// errUnread says that this server keeps a key that it cannot compute with.
var errUnread = refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "this server keeps the key, but cannot compute with keys of its kind")

const (
	// numberMax bounds the numbers of RSA keys that this server computes with, in bits:
	// one operation with a larger one takes longer than any deadline.
	numberMax = 16384
	// pairMax bounds the encoding of a half of a key pair that this server reads, in
	// bytes: a private key of numberMax bits takes under 10 KiB.
	pairMax = 12 << 10
)

// isKey tells the objects that are keys by themselves.
func isKey(t kmip.ObjectType) bool {
	return t == kmip.ObjectTypeSymmetricKey || t == kmip.ObjectTypePrivateKey || t == kmip.ObjectTypePublicKey
}

// pair reports whether o is half of a key pair.
func (o *Object) pair() bool {
	return o.Type == kmip.ObjectTypePrivateKey || o.Type == kmip.ObjectTypePublicKey
}

// isPublic tells the objects that hold no secret by what they are.
func (o *Object) isPublic() bool {
	return o.Type == kmip.ObjectTypePublicKey || o.Type == kmip.ObjectTypeCertificate
}

// private parses the material of a private key, which must be in the clear.
func (o *Object) private() (crypto.Signer, error) {
	if o.Material.Len() > pairMax {
		return nil, errUnread
	}
	var key any
	var err error
	switch der := o.Material.Bytes(); o.Layout.Format {
	case kmip.KeyFormatTypePKCS_1:
		key, err = x509.ParsePKCS1PrivateKey(der)
	case kmip.KeyFormatTypeECPrivateKey:
		key, err = x509.ParseECPrivateKey(der)
	case kmip.KeyFormatTypeTransparentRSAPrivateKey:
		key, err = transparentPrivate(der)
	default:
		key, err = x509.ParsePKCS8PrivateKey(der)
	}
	if err != nil {
		return nil, errUnread
	}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		if key.N.BitLen() <= numberMax {
			return key, nil
		}
	case *ecdsa.PrivateKey:
		return key, nil
	}
	return nil, errUnread
}

// public parses the material of a public key, which must be in the clear.
func (o *Object) public() (crypto.PublicKey, error) {
	if o.Material.Len() > pairMax {
		return nil, errUnread
	}
	var key any
	var err error
	switch der := o.Material.Bytes(); o.Layout.Format {
	case kmip.KeyFormatTypePKCS_1:
		key, err = x509.ParsePKCS1PublicKey(der)
	case kmip.KeyFormatTypeTransparentRSAPublicKey:
		key, err = transparentPublic(der)
	default:
		key, err = x509.ParsePKIXPublicKey(der)
	}
	if err != nil {
		return nil, errUnread
	}
	if key, ok := key.(*rsa.PublicKey); ok && key.N.BitLen() > numberMax {
		return nil, errUnread
	}
	return key, nil
}

// describePair adds to a half of a key pair in the clear what its material tells,
// which must not contradict what it was registered with. A key of a kind that this
// server does not know is kept with what was told.
func describePair(o *Object) error {
	var public crypto.PublicKey
	var err error
	if o.Type == kmip.ObjectTypePublicKey {
		public, err = o.public()
	} else {
		var key crypto.Signer
		if key, err = o.private(); err == nil {
			public = key.Public()
		}
	}
	if err != nil {
		return nil // what was told is checked by the caller
	}
	bits, ok := int32(0), false
	l := &o.Layout
	switch key := public.(type) {
	case *rsa.PublicKey:
		if l.Algorithm == 0 {
			l.Algorithm = kmip.CryptographicAlgorithmRSA
		}
		bits, ok = int32(key.N.BitLen()), l.Algorithm == kmip.CryptographicAlgorithmRSA
	case *ecdsa.PublicKey:
		if l.Algorithm == 0 {
			l.Algorithm = kmip.CryptographicAlgorithmECDSA
		}
		bits, ok = int32(key.Params().BitSize), elliptical(l.Algorithm)
	default:
		return nil
	}
	if l.Length == 0 {
		l.Length = bits
	}
	if !ok || l.Length != bits {
		return refuse(kmip.ResultReasonInvalidField, "the key has %d bits, or is of another algorithm than told", bits)
	}
	return nil
}

// elliptical tells the names that KMIP has for keys on elliptic curves.
func elliptical(a kmip.CryptographicAlgorithm) bool {
	return a == kmip.CryptographicAlgorithmECDSA || a == kmip.CryptographicAlgorithmECDH || a == kmip.CryptographicAlgorithmEC
}

// reformat returns the material of a half of a key pair in another format.
func reformat(o *Object, format kmip.KeyFormatType) (der []byte, err error) {
	if !slices.Contains(formats(o.Type), format) {
		return nil, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the object cannot be had in this key format")
	}
	var key any
	if o.Type == kmip.ObjectTypePublicKey {
		key, err = o.public()
	} else {
		key, err = o.private()
	}
	if err != nil {
		return nil, err
	}
	if der, err = encodeKey(key, format); err != nil {
		return nil, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the object cannot be had in this key format")
	}
	return der, nil
}

var errFormat = errors.New("the format is not for this kind of key")

// encodeKey returns the encoding of half a key pair in a format.
func encodeKey(key any, format kmip.KeyFormatType) ([]byte, error) {
	switch key := key.(type) {
	case *rsa.PrivateKey:
		switch format {
		case kmip.KeyFormatTypePKCS_1:
			return x509.MarshalPKCS1PrivateKey(key), nil
		case kmip.KeyFormatTypeTransparentRSAPrivateKey:
			return showPrivate(key)
		case kmip.KeyFormatTypePKCS_8:
			return x509.MarshalPKCS8PrivateKey(key)
		}
	case *ecdsa.PrivateKey:
		switch format {
		case kmip.KeyFormatTypeECPrivateKey:
			return x509.MarshalECPrivateKey(key)
		case kmip.KeyFormatTypePKCS_8:
			return x509.MarshalPKCS8PrivateKey(key)
		}
	case *rsa.PublicKey:
		switch format {
		case kmip.KeyFormatTypePKCS_1:
			return x509.MarshalPKCS1PublicKey(key), nil
		case kmip.KeyFormatTypeTransparentRSAPublicKey:
			return showPublic(key), nil
		case kmip.KeyFormatTypeX_509:
			return x509.MarshalPKIXPublicKey(key)
		}
	case *ecdsa.PublicKey:
		if format == kmip.KeyFormatTypeX_509 {
			return x509.MarshalPKIXPublicKey(key)
		}
	}
	return nil, errFormat
}

// kind is what kind of key pair is to be made.
type kind struct {
	algorithm kmip.CryptographicAlgorithm
	bits      int32
}

// kindOf reads it from the attributes of one half.
func kindOf(o *Object) (kind, error) {
	var k kind
	var ok bool
	if k.algorithm, ok = attribute[kmip.CryptographicAlgorithm](o, kmip.AttributeNameCryptographicAlgorithm); !ok {
		return k, refuse(kmip.ResultReasonInvalidField, "Cryptographic Algorithm is missing")
	}
	if _, ok := attribute[kmip.CryptographicUsageMask](o, kmip.AttributeNameCryptographicUsageMask); !ok {
		return k, refuse(kmip.ResultReasonInvalidField, "Cryptographic Usage Mask is missing")
	}
	k.bits, ok = attribute[int32](o, kmip.AttributeNameCryptographicLength)
	if domain, given := attribute[kmip.CryptographicDomainParameters](o, kmip.AttributeNameCryptographicDomainParameters); given && elliptical(k.algorithm) {
		bits := map[kmip.RecommendedCurve]int32{kmip.RecommendedCurveP_256: 256, kmip.RecommendedCurveP_384: 384, kmip.RecommendedCurveP_521: 521}[domain.RecommendedCurve]
		if bits == 0 || ok && k.bits != bits {
			return k, refuse(kmip.ResultReasonInvalidField, "the curve must be P-256, P-384 or P-521, and have the key's length")
		}
		k.bits, ok = bits, true
	}
	if !ok {
		return k, refuse(kmip.ResultReasonInvalidField, "Cryptographic Length is missing")
	}
	return k, nil
}

// generate makes a key pair and returns its halves, each in the format that is
// usual for it.
func (k kind) generate() (private, public *Object, err error) {
	var key crypto.Signer
	privateFormat, publicFormat := kmip.KeyFormatTypePKCS_1, kmip.KeyFormatTypePKCS_1
	curves := map[int32]elliptic.Curve{256: elliptic.P256(), 384: elliptic.P384(), 521: elliptic.P521()}
	switch {
	case k.algorithm == kmip.CryptographicAlgorithmRSA && slices.Contains([]int32{1024, 2048, 3072, 4096}, k.bits):
		key, err = rsa.GenerateKey(rand.Reader, int(k.bits))
	case elliptical(k.algorithm) && curves[k.bits] != nil:
		key, err = ecdsa.GenerateKey(curves[k.bits], rand.Reader)
		privateFormat, publicFormat = kmip.KeyFormatTypeECPrivateKey, kmip.KeyFormatTypeX_509
	default:
		err = refuse(kmip.ResultReasonInvalidField, "key pairs are RSA with 1024, 2048, 3072 or 4096 bits, or on the curves P-256, P-384 and P-521")
	}
	if err != nil {
		return nil, nil, err
	}
	half := func(key any, format kmip.KeyFormatType) (*keymem.Key, Layout, error) {
		der, err := encodeKey(key, format)
		if err != nil {
			return nil, Layout{}, err
		}
		material, err := keymem.Take(der)
		return material, Layout{Format: format, Algorithm: k.algorithm, Length: k.bits}, err
	}
	private, public = &Object{Type: kmip.ObjectTypePrivateKey}, &Object{Type: kmip.ObjectTypePublicKey}
	if private.Material, private.Layout, err = half(key, privateFormat); err != nil {
		return nil, nil, err
	}
	if public.Material, public.Layout, err = half(key.Public(), publicFormat); err != nil {
		private.Material.Close()
		return nil, nil, err
	}
	return private, public, nil
}

// freshPair is a key pair that a request makes.
type freshPair struct {
	private, public *Object
	made            kind
}

// make makes the pair that the attributes of its halves ask for, unless it has made
// it: f of a transaction may run again.
func (n *freshPair) make(r *request, halves [2]*Object) error {
	want, err := kindOf(halves[0])
	if err != nil {
		return err
	}
	if other, err := kindOf(halves[1]); err != nil {
		return err
	} else if other != want {
		return refuse(kmip.ResultReasonInvalidField, "both halves of a key pair have one algorithm and length")
	}
	if n.private != nil && n.made == want {
		return nil
	}
	n.discard(r)
	n.made = want
	n.private, n.public, err = want.generate()
	return err
}

// discard drops a pair that was not given.
func (n *freshPair) discard(r *request) {
	r.discard(n.private)
	r.discard(n.public)
}

// give leaves the pair, which is stored, to the request.
func (n *freshPair) give(r *request) {
	r.give(n.private)
	r.give(n.public)
	n.private, n.public = nil, nil
}

// createKeyPair makes a key pair (KMIP 1.4 section 4.2).
func (r *request) createKeyPair(p *payloads.CreateKeyPairRequestPayload) (kmip.OperationPayload, error) {
	privateID, publicID := newID(), newID()
	var n freshPair
	defer func() { n.discard(r) }()
	err := r.change(func(tx Tx) error {
		var halves [2]*Object
		for i, half := range []struct {
			object *Object
			own    *kmip.TemplateAttribute
		}{
			{&Object{ID: privateID, Type: kmip.ObjectTypePrivateKey}, p.PrivateKeyTemplateAttribute},
			{&Object{ID: publicID, Type: kmip.ObjectTypePublicKey}, p.PublicKeyTemplateAttribute},
		} {
			attributes, err := r.pairTemplate(tx, p.CommonTemplateAttribute, half.own)
			if err != nil {
				return err
			}
			if err := r.initial(half.object, attributes); err != nil {
				return err
			}
			halves[i] = half.object
		}
		if err := n.make(r, halves); err != nil {
			return err
		}
		for i, o := range []*Object{n.private, n.public} {
			o.ID, o.Attributes = halves[i].ID, halves[i].Attributes
			o.set(kmip.AttributeNameCryptographicLength, n.made.bits)
			link := kmip.Link{LinkType: kmip.LinkTypePublicKeyLink, LinkedObjectIdentifier: publicID}
			if o == n.public {
				link = kmip.Link{LinkType: kmip.LinkTypePrivateKeyLink, LinkedObjectIdentifier: privateID}
			}
			o.add(kmip.AttributeNameLink, link)
			r.created(o)
			if err := r.insert(tx, o); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.placeholder, r.object = privateID, privateID
	n.give(r)
	return &payloads.CreateKeyPairResponsePayload{PrivateKeyUniqueIdentifier: privateID, PublicKeyUniqueIdentifier: publicID}, nil
}

// pairTemplate returns the attributes of one half: its own win over those that
// both have.
func (r *request) pairTemplate(v Reader, common, own *kmip.TemplateAttribute) ([]kmip.Attribute, error) {
	var lists [2][]kmip.Attribute
	for i, t := range []*kmip.TemplateAttribute{common, own} {
		if t == nil {
			continue
		}
		var err error
		if lists[i], err = r.template(v, *t); err != nil {
			return nil, err
		}
	}
	lists[0] = slices.DeleteFunc(lists[0], func(a kmip.Attribute) bool {
		rule, _ := ruleOf(a.AttributeName, r.version)
		return !rule.multi && slices.ContainsFunc(lists[1], func(b kmip.Attribute) bool { return b.AttributeName == a.AttributeName })
	})
	return append(lists[0], lists[1]...), nil
}
