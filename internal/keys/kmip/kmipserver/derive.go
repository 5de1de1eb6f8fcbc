package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"crypto/hmac"
	"crypto/subtle"
	"encoding/binary"
	"hash"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
)

// deriveRequest is the request of Derive Key (KMIP 1.4 section 4.5), which the
// library lacks.
type deriveRequest struct {
	ObjectType           kmip.ObjectType
	UniqueIdentifier     []string
	DerivationMethod     derivationMethod
	DerivationParameters derivationParameters
	TemplateAttribute    kmip.TemplateAttribute
}

func (*deriveRequest) Operation() kmip.Operation { return kmip.OperationDeriveKey }

type derivationParameters struct {
	CryptographicParameters *kmip.CryptographicParameters
	InitializationVector    []byte `ttlv:",omitempty"`
	DerivationData          []byte `ttlv:",omitempty"`
	Salt                    []byte `ttlv:",omitempty"`
	IterationCount          int32  `ttlv:",omitempty"`
}

type deriveResponse struct{ UniqueIdentifier string }

func (*deriveResponse) Operation() kmip.Operation { return kmip.OperationDeriveKey }

// derivationMethod is the enumeration of KMIP 1.4 section 9.1.3.2.21.
type derivationMethod uint32

const (
	byPBKDF2  derivationMethod = 1
	byHash    derivationMethod = 2
	byHMAC    derivationMethod = 3
	byEncrypt derivationMethod = 4
	byCounter derivationMethod = 5 // NIST SP 800-108, counter mode
)

func (m *derivationMethod) TagDecodeTTLV(d *ttlv.Decoder, tag int) error {
	v, err := d.Enum(tag, tag)
	*m = derivationMethod(v)
	return err
}

func (m *derivationMethod) TagEncodeTTLV(e *ttlv.Encoder, tag int) { e.Enum(tag, tag, uint32(*m)) }

const (
	derivedMax    = 64        // bytes of a derived object
	iterationsMax = 1_000_000 // of PBKDF2
)

// deriveKey makes a key or secret data from another, and links both.
func (r *request) deriveKey(p *deriveRequest) (kmip.OperationPayload, error) {
	if p.ObjectType != kmip.ObjectTypeSymmetricKey && p.ObjectType != kmip.ObjectTypeSecretData {
		return nil, refuse(kmip.ResultReasonInvalidField, "symmetric keys and secret data can be derived")
	}
	if len(p.UniqueIdentifier) > 1 {
		return nil, refuse(kmip.ResultReasonFeatureNotSupported, "derivation data is taken from the request only")
	}
	given := ""
	if len(p.UniqueIdentifier) > 0 {
		given = p.UniqueIdentifier[0]
	}
	o := &Object{ID: newID(), Type: p.ObjectType}
	defer func() { r.discard(o) }()
	err := r.update(given, func(tx Tx, base *Object) error {
		t := kmip.ObjectTypeSymmetricKey
		if base.Type == kmip.ObjectTypeSecretData {
			t = base.Type
		}
		if err := r.keyOf(t, base, kmip.CryptographicUsageDeriveKey, true); err != nil {
			return err
		}
		if err := r.fill(tx, o, p.TemplateAttribute); err != nil {
			return err
		}
		size, err := o.derivedSize()
		if err != nil {
			return err
		}
		derived, err := derive(base, p.DerivationMethod, p.DerivationParameters, size)
		if err != nil {
			return err
		}
		defer keymem.Wipe(derived)
		if len(derived) < size {
			return refuse(kmip.ResultReasonCryptographicFailure, "this derivation gives %d bytes, and %d are wanted", len(derived), size)
		}
		o.Material.Close() // of a run before
		if o.Material, err = keymem.Take(derived[:size]); err != nil {
			return err
		}
		if err := allocate(base, uses(base, len(p.DerivationParameters.DerivationData))); err != nil {
			return err
		}
		o.add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeDerivationBaseObjectLink, LinkedObjectIdentifier: base.ID})
		base.add(kmip.AttributeNameLink, kmip.Link{LinkType: kmip.LinkTypeDerivedKeyLink, LinkedObjectIdentifier: o.ID})
		r.created(o)
		return r.insert(tx, o)
	})
	if err != nil {
		return nil, err
	}
	id := o.ID
	r.placeholder, r.object = id, id
	r.give(o)
	o = nil
	return &deriveResponse{UniqueIdentifier: id}, nil
}

// derivedSize completes the layout of a derived object by its attributes and
// returns its size in bytes.
func (o *Object) derivedSize() (int, error) {
	if _, ok := attribute[kmip.CryptographicUsageMask](o, kmip.AttributeNameCryptographicUsageMask); !ok {
		return 0, refuse(kmip.ResultReasonInvalidField, "Cryptographic Usage Mask is missing")
	}
	bits, ok := attribute[int32](o, kmip.AttributeNameCryptographicLength)
	if !ok {
		return 0, refuse(kmip.ResultReasonInvalidField, "Cryptographic Length is missing")
	}
	o.Layout = Layout{Format: kmip.KeyFormatTypeRaw, Length: bits}
	size := int(bits / 8)
	if o.Type == kmip.ObjectTypeSecretData {
		o.Layout.SecretType = kmip.SecretDataTypeSeed
		if bits < 80 || bits%8 != 0 {
			return 0, refuse(kmip.ResultReasonInvalidField, "secret data has whole bytes, and 80 bits at least")
		}
	} else {
		algorithm, ok := attribute[kmip.CryptographicAlgorithm](o, kmip.AttributeNameCryptographicAlgorithm)
		if !ok {
			return 0, refuse(kmip.ResultReasonInvalidField, "Cryptographic Algorithm is missing")
		}
		var err error
		if size, err = keySize(algorithm, bits); err != nil {
			return 0, err
		}
		o.Layout.Algorithm = algorithm
	}
	if size > derivedMax {
		return 0, refuse(kmip.ResultReasonInvalidField, "at most %d bytes can be derived", derivedMax)
	}
	return size, nil
}

// derive returns size bytes or more derived from base; fewer if the method gives no
// more.
func derive(base *Object, method derivationMethod, p derivationParameters, size int) ([]byte, error) {
	secret, params := base.Material.Bytes(), parameters(base, p.CryptographicParameters)
	if method == byEncrypt {
		if base.Type != kmip.ObjectTypeSymmetricKey {
			return nil, refuse(kmip.ResultReasonInvalidField, "only a symmetric key encrypts")
		}
		b, err := blockCipher(base)
		if err != nil {
			return nil, err
		}
		return encryptBlocks(b, params, p.InitializationVector, p.DerivationData)
	}
	hasher, err := hasher(params.HashingAlgorithm)
	if err != nil {
		return nil, err
	}
	switch method {
	case byPBKDF2:
		if p.IterationCount < 1 || p.IterationCount > iterationsMax || len(p.Salt) == 0 {
			return nil, refuse(kmip.ResultReasonInvalidField, "PBKDF2 needs a salt and 1 to %d iterations", iterationsMax)
		}
		return stretch(hasher, secret, p.Salt, int(p.IterationCount), size), nil
	case byHash:
		if len(p.DerivationData) > 0 {
			return nil, refuse(kmip.ResultReasonInvalidField, "the hash is that of the key alone")
		}
		if params.HashingAlgorithm == kmip.HashingAlgorithmSHA_256 { // see born
			return nil, refuse(kmip.ResultReasonInvalidField, "this hash is the key's Digest, which is no secret: derive by another, or by HMAC")
		}
		h := hasher()
		h.Write(secret)
		return h.Sum(nil), nil
	case byHMAC:
		h := hmac.New(hasher, secret)
		h.Write(p.DerivationData)
		return h.Sum(nil), nil
	case byCounter:
		return counterKDF(hasher, secret, p.DerivationData, size), nil
	}
	return nil, refuse(kmip.ResultReasonFeatureNotSupported, "this derivation method is not supported")
}

// stretch is PBKDF2 of RFC 8018 section 5.2. The library's wants the password as a
// string, which cannot be wiped.
func stretch(hasher func() hash.Hash, password, salt []byte, iterations, size int) []byte {
	h := hmac.New(hasher, password)
	out, u := make([]byte, 0, size+h.Size()), make([]byte, 0, h.Size()) // they do not grow and leave copies
	for i := uint32(1); len(out) < size; i++ {
		h.Reset()
		h.Write(salt)
		h.Write(binary.BigEndian.AppendUint32(nil, i))
		u = h.Sum(u[:0])
		out = append(out, u...)
		block := out[len(out)-len(u):]
		for range iterations - 1 {
			h.Reset()
			h.Write(u)
			u = h.Sum(u[:0])
			subtle.XORBytes(block, block, u)
		}
	}
	keymem.Wipe(u)
	return out
}

// counterKDF is the KDF in counter mode of NIST SP 800-108 section 5.1 with HMAC, a
// counter of 32 bits in front, and data as the fixed input.
func counterKDF(hasher func() hash.Hash, key, data []byte, size int) []byte {
	h := hmac.New(hasher, key)
	out := make([]byte, 0, size+h.Size())
	for i := uint32(1); len(out) < size; i++ {
		h.Reset()
		h.Write(binary.BigEndian.AppendUint32(nil, i))
		h.Write(data)
		out = h.Sum(out)
	}
	return out
}
