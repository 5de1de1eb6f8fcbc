package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"crypto/aes"
	"encoding/binary"
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
)

// keyBlock returns the key block of an object that has one.
func keyBlock(o kmip.Object) *kmip.KeyBlock {
	switch o := o.(type) {
	case *kmip.SymmetricKey:
		return &o.KeyBlock
	case *kmip.SecretData:
		return &o.KeyBlock
	case *kmip.PrivateKey:
		return &o.KeyBlock
	case *kmip.PublicKey:
		return &o.KeyBlock
	case *kmip.PGPKey:
		return &o.KeyBlock
	case *kmip.SplitKey:
		return &o.KeyBlock
	}
	return nil
}

// material returns the bytes of an object as a client sent them. They are the
// object's own, not a copy; nil for a template, and for a key whose value is
// elsewhere (KMIP 1.4 section 2.1.3: its Key Block has no Key Value).
func material(o kmip.Object) ([]byte, error) {
	switch o := o.(type) {
	case *kmip.OpaqueObject:
		return o.OpaqueDataValue, nil
	case *kmip.Certificate:
		return o.CertificateValue, nil
	case *kmip.Template:
		return nil, nil
	}
	block := keyBlock(o)
	switch {
	case block == nil:
		return nil, refuse(kmip.ResultReasonInvalidField, "objects of this type cannot be kept here")
	case block.KeyValue == nil:
		return nil, nil
	case block.KeyValue.Wrapped != nil:
		return *block.KeyValue.Wrapped, nil
	case block.KeyValue.Plain == nil:
		return nil, refuse(kmip.ResultReasonInvalidField, "Key Material is missing")
	case block.KeyValue.Plain.KeyMaterial.Bytes != nil:
		return *block.KeyValue.Plain.KeyMaterial.Bytes, nil
	case block.KeyValue.Plain.KeyMaterial.TransparentSymmetricKey != nil:
		return block.KeyValue.Plain.KeyMaterial.TransparentSymmetricKey.Key, nil
	}
	return nil, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the key format is not supported for this type of object")
}

func (r *request) register(p *payloads.RegisterRequestPayload) (kmip.OperationPayload, error) {
	o := &Object{ID: newID(), Type: p.ObjectType}
	defer func() { r.discard(o) }()
	flatten(p.Object)
	bytes, err := material(p.Object)
	if err != nil {
		return nil, err
	}
	if len(bytes) > 0 {
		r.conceal(bytes) // and not before the answer: a batch may run this again
		if len(bytes) > keymem.SizeMax {
			return nil, refuse(kmip.ResultReasonInvalidField, "an object of over %d bytes", keymem.SizeMax)
		}
		if o.Material, err = keymem.New(len(bytes)); err != nil {
			return nil, err
		}
		copy(o.Material.Bytes(), bytes)
	} else if o.Type != kmip.ObjectTypeTemplate && !r.valueless(p.Object) {
		return nil, refuse(kmip.ResultReasonInvalidField, "the object is empty")
	}
	if o.Layout, err = layout(p.Object); err != nil {
		return nil, err
	}
	err = r.change(func(tx Tx) error {
		o.Attributes = nil
		attributes, err := r.template(tx, p.TemplateAttribute)
		if err != nil {
			return err
		}
		if t, ok := p.Object.(*kmip.Template); ok {
			if attributes, err = r.fillTemplate(o, attributes, t.Attribute); err != nil {
				return err
			}
		}
		if block := keyBlock(p.Object); block != nil {
			attributes = append(attributes, block.GetAttributes()...)
		}
		if err := r.initial(o, attributes); err != nil {
			return err
		}
		if err := describe(o); err != nil {
			return err
		}
		r.born(o)
		if o.Material == nil && o.Type != kmip.ObjectTypeTemplate {
			o.set(kmip.AttributeNameKeyValuePresent, false)
		}
		return r.insert(tx, o)
	})
	if err != nil {
		return nil, err
	}
	r.placeholder, r.object = o.ID, o.ID
	id := o.ID
	r.give(o)
	o = nil
	return &payloads.RegisterResponsePayload{UniqueIdentifier: id}, nil
}

// flatten makes key material that is a structure its encoding.
func flatten(o kmip.Object) {
	block := keyBlock(o)
	if block == nil || block.KeyValue == nil || block.KeyValue.Plain == nil {
		return
	}
	m := &block.KeyValue.Plain.KeyMaterial
	if encoded := encodeTransparent(m); encoded != nil {
		forget(m)
		*m = kmip.KeyMaterial{Bytes: &encoded}
	}
}

// valueless reports whether a client registers a key whose value is elsewhere: only
// what describes it is to be kept here.
func (r *request) valueless(o kmip.Object) bool {
	block := keyBlock(o)
	return block != nil && block.KeyValue == nil && block.KeyWrappingData == nil && r.atLeast(kmip.V1_2)
}

// fillTemplate sets what template o gives to other objects. A Name in it is the
// template's own (KMIP 1.0 section 2.2.6); it is added to own.
func (r *request) fillTemplate(o *Object, own, content []kmip.Attribute) ([]kmip.Attribute, error) {
	o.Template = nil
	trial := &Object{Type: o.Type}
	if err := r.initial(trial, content); err != nil {
		return nil, err
	}
	for _, a := range trial.Attributes {
		if a.AttributeName == kmip.AttributeNameName {
			own = append(own, a)
		} else {
			o.Template = append(o.Template, a)
		}
	}
	return own, nil
}

func layout(object kmip.Object) (Layout, error) {
	var l Layout
	switch o := object.(type) {
	case *kmip.OpaqueObject:
		l.OpaqueType = o.OpaqueDataType
	case *kmip.SecretData:
		l.SecretType = o.SecretDataType
	case *kmip.PGPKey:
		l.PGPVersion = o.PGPKeyVersion
	case *kmip.SplitKey:
		part, err := partOf(o)
		if err != nil {
			return l, err
		}
		l.Part = part
	case *kmip.Certificate:
		if o.CertificateType != kmip.CertificateTypeX_509 {
			return l, refuse(kmip.ResultReasonInvalidField, "certificates are kept of the type X.509 only")
		}
	}
	block := keyBlock(object)
	if block == nil {
		return l, nil
	}
	l.Format, l.Compression, l.Wrapping = block.KeyFormatType, block.KeyCompressionType, block.KeyWrappingData
	l.Algorithm, l.Length = block.CryptographicAlgorithm, block.CryptographicLength
	if l.Wrapping == nil && block.KeyValue != nil && block.KeyValue.Wrapped != nil {
		return Layout{}, refuse(kmip.ResultReasonInvalidField, "a wrapped key needs Key Wrapping Data")
	}
	if l.Wrapping != nil && l.Wrapping.EncryptionKeyInformation == nil && l.Wrapping.MACSignatureKeyInformation == nil {
		return Layout{}, refuse(kmip.ResultReasonInvalidField, "Key Wrapping Data names no key")
	}
	if slices.Contains(formats(object.ObjectType()), l.Format) {
		return l, nil
	}
	return Layout{}, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the key format is not supported for this type of object")
}

// formats returns the key formats in which keys of a type are kept.
func formats(t kmip.ObjectType) []kmip.KeyFormatType {
	switch t {
	case kmip.ObjectTypePrivateKey:
		return []kmip.KeyFormatType{kmip.KeyFormatTypePKCS_1, kmip.KeyFormatTypePKCS_8, kmip.KeyFormatTypeECPrivateKey, kmip.KeyFormatTypeTransparentRSAPrivateKey}
	case kmip.ObjectTypePublicKey:
		return []kmip.KeyFormatType{kmip.KeyFormatTypePKCS_1, kmip.KeyFormatTypeX_509, kmip.KeyFormatTypeTransparentRSAPublicKey}
	}
	return []kmip.KeyFormatType{kmip.KeyFormatTypeRaw, kmip.KeyFormatTypeOpaque, kmip.KeyFormatTypeTransparentSymmetricKey}
}

// describe brings attributes and key block of a registered key in line: what
// one tells and the other does not is copied, contradictions are refused.
func describe(o *Object) error {
	if isKey(o.Type) {
		if _, ok := attribute[kmip.CryptographicUsageMask](o, kmip.AttributeNameCryptographicUsageMask); !ok {
			return refuse(kmip.ResultReasonInvalidField, "Cryptographic Usage Mask is missing")
		}
	}
	if o.Type == kmip.ObjectTypeCertificate {
		return describeCertificate(o)
	}
	if !isKey(o.Type) {
		if o.Layout.Algorithm != 0 {
			o.set(kmip.AttributeNameCryptographicAlgorithm, o.Layout.Algorithm)
		}
		if o.Layout.Length != 0 {
			o.set(kmip.AttributeNameCryptographicLength, o.Layout.Length)
		}
		return nil
	}
	algorithm, told := attribute[kmip.CryptographicAlgorithm](o, kmip.AttributeNameCryptographicAlgorithm)
	bits, sized := attribute[int32](o, kmip.AttributeNameCryptographicLength)
	l := &o.Layout
	if l.Algorithm == 0 {
		l.Algorithm = algorithm
	}
	if l.Length == 0 {
		l.Length = bits
	}
	switch {
	case l.Wrapping != nil:
	case o.Material == nil:
		if l.Length == 0 {
			return refuse(kmip.ResultReasonInvalidField, "Cryptographic Length is missing, and there is no Key Value that tells it")
		}
	case o.Type != kmip.ObjectTypeSymmetricKey:
		if err := describePair(o); err != nil {
			return err
		}
	case l.Length == 0:
		l.Length = int32(8 * o.Material.Len())
	}
	if l.Algorithm == 0 || told && algorithm != l.Algorithm || sized && bits != l.Length {
		return refuse(kmip.ResultReasonInvalidField, "algorithm or length is missing, or differs between attributes and key block")
	}
	if l.Wrapping == nil && o.Material != nil && o.Type == kmip.ObjectTypeSymmetricKey && !fits(l.Algorithm, l.Length, o.Material.Len()) {
		return refuse(kmip.ResultReasonInvalidField, "a key of %d bits has %d bytes", l.Length, o.Material.Len())
	}
	o.set(kmip.AttributeNameCryptographicAlgorithm, l.Algorithm)
	o.set(kmip.AttributeNameCryptographicLength, l.Length)
	return nil
}

// fits tells whether size bytes are a key of bits; DES counts its parity bits
// or leaves them out.
func fits(algorithm kmip.CryptographicAlgorithm, bits int32, size int) bool {
	if int64(bits) == 8*int64(size) {
		return true
	}
	des := algorithm == kmip.CryptographicAlgorithmDES || algorithm == kmip.CryptographicAlgorithm3DES
	return des && int64(bits) == 7*int64(size)
}

func (r *request) get(p *payloads.GetRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.GetResponsePayload{}
	err := r.giveOut(p.UniqueIdentifier, func(v Reader, o *Object) (err error) {
		out.ObjectType, out.UniqueIdentifier = o.Type, o.ID
		out.Object, err = r.export(v, o, p)
		return err
	})
	return out, err
}

// giveOut has read give out an object: with an approval, if that is needed, and
// made stale for the first to get it.
func (r *request) giveOut(given string, read func(Reader, *Object) error) error {
	fresh, guarded := false, false
	secrets := r.secretSize
	readable := func(v Reader, o *Object) error {
		r.secretSize = secrets // what was read before is not in the answer
		if destroyed(o) {
			return refuse(kmip.ResultReasonItemNotFound, "the object is destroyed")
		}
		if err := usable(o); err != nil {
			return err
		}
		fresh, _ = attribute[bool](o, kmip.AttributeNameFresh)
		return read(v, o)
	}
	id := ""
	err := r.view(given, func(v Reader, o *Object) error {
		id = o.ID
		// Then nothing is read yet: the approval is used up with it.
		if guarded = r.needsApproval(kmip.OperationGet) && guardsExport(o); guarded {
			return nil
		}
		return readable(v, o)
	})
	switch {
	case err != nil:
		return err
	case guarded:
		return r.approved(kmip.OperationGet, given, func(id string, use func(Tx, *Object) error) error {
			return r.stale(id, readable, use)
		})
	case fresh:
		return r.stale(id, readable, nil)
	}
	return nil
}

// stale reads an object and makes it stale, before the answer is sent, for the
// first to get it; and if use is not nil, uses an approval.
func (r *request) stale(id string, read func(Reader, *Object) error, use func(Tx, *Object) error) error {
	return r.change(func(tx Tx) error {
		o, err := r.load(tx, id)
		if err != nil {
			return err
		}
		if err := read(tx, o); err != nil {
			return err
		}
		if use != nil {
			if err := use(tx, o); err != nil {
				return err
			}
		}
		if fresh, _ := attribute[bool](o, kmip.AttributeNameFresh); !fresh {
			return nil
		}
		o.set(kmip.AttributeNameFresh, false)
		return r.put(tx, o)
	})
}

// export returns o as the request wants it.
func (r *request) export(v Reader, o *Object, p *payloads.GetRequestPayload) (kmip.Object, error) {
	if p.KeyCompressionType != 0 {
		return nil, refuse(kmip.ResultReasonKeyCompressionTypeNotSupported, "key compression is not supported")
	}
	if err := r.checkExport(o, p.KeyWrappingSpecification != nil); err != nil {
		return nil, err
	}
	if p.KeyWrappingSpecification != nil && keyless(o.Type) {
		return nil, refuse(kmip.ResultReasonIllegalOperation, "objects of this type have no key that can be wrapped")
	}
	switch o.Type {
	case kmip.ObjectTypeTemplate:
		return &kmip.Template{Attribute: o.Template}, nil
	case kmip.ObjectTypeOpaqueObject:
		return &kmip.OpaqueObject{OpaqueDataType: o.Layout.OpaqueType, OpaqueDataValue: r.reveal(o.Material)}, nil
	case kmip.ObjectTypeCertificate:
		return &kmip.Certificate{CertificateType: kmip.CertificateTypeX_509, CertificateValue: r.reveal(o.Material)}, nil
	}
	block, err := r.block(v, o, p)
	if err != nil {
		return nil, err
	}
	switch o.Type {
	case kmip.ObjectTypeSecretData:
		return &kmip.SecretData{SecretDataType: o.Layout.SecretType, KeyBlock: block}, nil
	case kmip.ObjectTypePrivateKey:
		return &kmip.PrivateKey{KeyBlock: block}, nil
	case kmip.ObjectTypePublicKey:
		return &kmip.PublicKey{KeyBlock: block}, nil
	case kmip.ObjectTypePGPKey:
		return &kmip.PGPKey{PGPKeyVersion: o.Layout.PGPVersion, KeyBlock: block}, nil
	case kmip.ObjectTypeSplitKey:
		return o.Layout.Part.object(block), nil
	case kmip.ObjectTypeSymmetricKey:
		return &kmip.SymmetricKey{KeyBlock: block}, nil
	}
	return nil, refuse(kmip.ResultReasonInvalidField, "objects of type %d are not given out here", o.Type)
}

// keyless tells the objects that have no Key Block.
func keyless(t kmip.ObjectType) bool {
	return t == kmip.ObjectTypeTemplate || t == kmip.ObjectTypeOpaqueObject || t == kmip.ObjectTypeCertificate
}

// checkExport refuses to give out o's material, wrapped by another key or not.
func (r *request) checkExport(o *Object, wrapped bool) error {
	sensitive, _ := attribute[bool](o, kmip.AttributeNameSensitive)
	if sensitive && !wrapped && o.Layout.Wrapping == nil {
		return refuse(kmip.ResultReasonSensitive, "the object is sensitive: it can be had wrapped only")
	}
	if extractable, ok := attribute[bool](o, kmip.AttributeNameExtractable); ok && !extractable {
		return refuse(kmip.ResultReasonNotExtractable, "the object is not extractable")
	}
	return r.client.Policy.checkExport(o)
}

func (r *request) block(v Reader, o *Object, p *payloads.GetRequestPayload) (kmip.KeyBlock, error) {
	l := o.Layout
	block := kmip.KeyBlock{
		KeyFormatType: l.Format, KeyCompressionType: l.Compression,
		CryptographicAlgorithm: l.Algorithm, CryptographicLength: l.Length, KeyWrappingData: l.Wrapping,
	}
	if l.Wrapping != nil {
		if p.KeyFormatType != 0 && p.KeyFormatType != l.Format || p.KeyWrappingSpecification != nil {
			return kmip.KeyBlock{}, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the object is wrapped and can be had as it was registered only")
		}
		wrapped := r.reveal(o.Material)
		block.KeyValue = &kmip.KeyValue{Wrapped: &wrapped}
		return block, nil
	}
	if o.Material == nil {
		if p.KeyFormatType != 0 && p.KeyFormatType != l.Format || p.KeyWrappingSpecification != nil {
			return kmip.KeyBlock{}, errElsewhere
		}
		return block, nil
	}
	bytes := r.reveal(o.Material)
	if p.KeyFormatType != 0 && p.KeyFormatType != l.Format && o.pair() {
		var err error
		if bytes, err = reformat(o, p.KeyFormatType); err != nil {
			return kmip.KeyBlock{}, err
		}
		r.conceal(bytes)
		r.secretSize += len(bytes)
		block.KeyFormatType = p.KeyFormatType
	} else if p.KeyFormatType != 0 && p.KeyFormatType != l.Format {
		raw := l.Format == kmip.KeyFormatTypeRaw || l.Format == kmip.KeyFormatTypeTransparentSymmetricKey
		if !raw || o.Type != kmip.ObjectTypeSymmetricKey || p.KeyFormatType != kmip.KeyFormatTypeRaw && p.KeyFormatType != kmip.KeyFormatTypeTransparentSymmetricKey {
			return kmip.KeyBlock{}, refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the object cannot be had in this key format")
		}
		block.KeyFormatType = p.KeyFormatType
	}
	value := &kmip.PlainKeyValue{}
	if transparent(block.KeyFormatType) {
		var err error
		if value.KeyMaterial, err = decodeTransparent(block.KeyFormatType, bytes); err != nil {
			return kmip.KeyBlock{}, err
		}
		r.forget = append(r.forget, &value.KeyMaterial)
	} else if block.KeyFormatType == kmip.KeyFormatTypeTransparentSymmetricKey {
		value.KeyMaterial.TransparentSymmetricKey = &kmip.TransparentSymmetricKey{Key: bytes}
	} else {
		value.KeyMaterial.Bytes = &bytes
	}
	block.KeyValue = &kmip.KeyValue{Plain: value}
	if p.KeyWrappingSpecification == nil {
		return block, nil
	}
	return block, r.wrap(v, o, &block, p.KeyWrappingSpecification)
}

// errElsewhere refuses to use a key whose value this server does not have.
var errElsewhere = refuse(kmip.ResultReasonKeyValueNotPresent, "the key's value is not here: only what describes it was registered")

// wrap replaces the key value of block by itself, encrypted by AES key wrap
// (RFC 3394, with padding RFC 5649) as spec wants (KMIP 1.4 sections 2.1.5 and 2.1.6).
func (r *request) wrap(v Reader, o *Object, block *kmip.KeyBlock, spec *kmip.KeyWrappingSpecification) error {
	info := spec.EncryptionKeyInformation
	if spec.WrappingMethod != kmip.WrappingMethodEncrypt || info == nil || spec.MACSignatureKeyInformation != nil {
		return refuse(kmip.ResultReasonFeatureNotSupported, "keys are wrapped by encryption only")
	}
	kek, err := r.load(v, info.UniqueIdentifier)
	if err != nil {
		return err
	}
	if err := r.keyFor(kek, kmip.CryptographicUsageWrapKey, true); err != nil {
		return err
	}
	if kek.Layout.Algorithm != kmip.CryptographicAlgorithmAES {
		return refuse(kmip.ResultReasonInvalidField, "the wrapping key is not an AES key")
	}
	if kek.has(kmip.AttributeNameUsageLimits) {
		return refuse(kmip.ResultReasonPermissionDenied, "a key with usage limits cannot wrap: here it would not be counted")
	}
	params := info.CryptographicParameters
	if params == nil {
		if own, ok := attribute[kmip.CryptographicParameters](kek, kmip.AttributeNameCryptographicParameters); ok {
			params = &own
		}
	}
	if params == nil || params.BlockCipherMode != kmip.BlockCipherModeNISTKeyWrap && params.BlockCipherMode != kmip.BlockCipherModeAESKeyWrapPadding {
		return refuse(kmip.ResultReasonFeatureNotSupported, "the wrapping mode must be NIST Key Wrap or AES Key Wrap Padding")
	}
	value := block.KeyValue.Plain
	for _, a := range r.visible(o) {
		if slices.Contains(spec.AttributeName, a.AttributeName) {
			value.Attribute = append(value.Attribute, a)
		}
	}
	var clear []byte
	switch {
	case spec.EncodingOption == kmip.EncodingOptionNoEncoding:
		if len(value.Attribute) > 0 || value.KeyMaterial.Bytes == nil {
			return refuse(kmip.ResultReasonEncodingOptionError, "attributes and transparent keys can be wrapped with TTLV encoding only")
		}
		clear = *value.KeyMaterial.Bytes
	default:
		enc := ttlv.NewTTLVEncoder()
		enc.ByteString(kmip.TagKeyMaterial, make([]byte, 8192+2*o.Material.Len())) // room, see encode
		enc.Clear()
		enc.TagAny(kmip.TagKeyValue, value)
		clear = enc.Bytes()
		r.conceal(clear)
	}
	var wrapped []byte
	if params.BlockCipherMode == kmip.BlockCipherModeAESKeyWrapPadding {
		wrapped, err = wrapPadded(kek.Material, clear)
	} else if len(clear)%8 != 0 || len(clear) < 16 {
		return refuse(kmip.ResultReasonCryptographicFailure, "%d bytes cannot be wrapped by NIST Key Wrap", len(clear))
	} else {
		wrapped, err = wrapAES(kek.Material, keyWrapIV, clear)
	}
	if err != nil {
		return err
	}
	block.KeyValue = &kmip.KeyValue{Wrapped: &wrapped}
	block.KeyWrappingData = &kmip.KeyWrappingData{WrappingMethod: spec.WrappingMethod, EncryptionKeyInformation: info, EncodingOption: spec.EncodingOption}
	return nil
}

// keyWrapIV is the initial value of RFC 3394 section 2.2.3.1.
const keyWrapIV = 0xa6a6a6a6a6a6a6a6

// wrapPadded is the key wrap with padding of RFC 5649 section 4.1, of one or more
// bytes.
func wrapPadded(kek *keymem.Key, clear []byte) ([]byte, error) {
	iv := 0xa65959a6<<32 | uint64(len(clear))
	padded := make([]byte, (len(clear)+7)/8*8)
	defer keymem.Wipe(padded)
	copy(padded, clear)
	if len(padded) > 8 {
		return wrapAES(kek, iv, padded)
	}
	c, err := aes.NewCipher(kek.Bytes())
	if err != nil {
		return nil, err
	}
	out := append(binary.BigEndian.AppendUint64(make([]byte, 0, 16), iv), padded...)
	c.Encrypt(out, out)
	return out, nil
}

// wrapAES is the key wrap of RFC 3394 section 2.2.1. clear is two or more
// blocks of 8 bytes.
func wrapAES(kek *keymem.Key, iv uint64, clear []byte) ([]byte, error) {
	c, err := aes.NewCipher(kek.Bytes())
	if err != nil {
		return nil, err
	}
	out := make([]byte, 8+len(clear))
	copy(out[8:], clear)
	n := len(clear) / 8
	var b [16]byte
	defer keymem.Wipe(b[:])
	binary.BigEndian.PutUint64(b[:8], iv)
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(b[8:], out[8*i:8*i+8])
			c.Encrypt(b[:], b[:])
			copy(out[8*i:], b[8:])
			counter := binary.BigEndian.Uint64(b[:8]) ^ uint64(n*j+i)
			binary.BigEndian.PutUint64(b[:8], counter)
		}
	}
	copy(out, b[:8])
	return out, nil
}
