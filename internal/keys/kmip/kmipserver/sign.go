package kmipserver

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// saltMax bounds the salt of a PSS signature, in bytes.
const saltMax = 512

// scheme is how a signature is made.
type scheme struct {
	hash crypto.Hash
	pss  bool // of RSA: PSS, not PKCS #1 v1.5
	salt *int // of PSS, in bytes; nil: as long as the hash, and any when verifying
}

// digitalSignatures are the schemes that have a name of their own.
var digitalSignatures = map[kmip.DigitalSignatureAlgorithm]struct {
	algorithm kmip.CryptographicAlgorithm
	hash      crypto.Hash
}{
	kmip.DigitalSignatureAlgorithmSHA_1WithRSAEncryption:   {kmip.CryptographicAlgorithmRSA, crypto.SHA1},
	kmip.DigitalSignatureAlgorithmSHA_224WithRSAEncryption: {kmip.CryptographicAlgorithmRSA, crypto.SHA224},
	kmip.DigitalSignatureAlgorithmSHA_256WithRSAEncryption: {kmip.CryptographicAlgorithmRSA, crypto.SHA256},
	kmip.DigitalSignatureAlgorithmSHA_384WithRSAEncryption: {kmip.CryptographicAlgorithmRSA, crypto.SHA384},
	kmip.DigitalSignatureAlgorithmSHA_512WithRSAEncryption: {kmip.CryptographicAlgorithmRSA, crypto.SHA512},
	kmip.DigitalSignatureAlgorithmECDSAWithSHA_1:           {kmip.CryptographicAlgorithmECDSA, crypto.SHA1},
	kmip.DigitalSignatureAlgorithmECDSAWithSHA224:          {kmip.CryptographicAlgorithmECDSA, crypto.SHA224},
	kmip.DigitalSignatureAlgorithmECDSAWithSHA256:          {kmip.CryptographicAlgorithmECDSA, crypto.SHA256},
	kmip.DigitalSignatureAlgorithmECDSAWithSHA384:          {kmip.CryptographicAlgorithmECDSA, crypto.SHA384},
	kmip.DigitalSignatureAlgorithmECDSAWithSHA512:          {kmip.CryptographicAlgorithmECDSA, crypto.SHA512},
}

var hashes = map[kmip.HashingAlgorithm]crypto.Hash{
	kmip.HashingAlgorithmSHA_1: crypto.SHA1, kmip.HashingAlgorithmSHA_224: crypto.SHA224, kmip.HashingAlgorithmSHA_256: crypto.SHA256,
	kmip.HashingAlgorithmSHA_384: crypto.SHA384, kmip.HashingAlgorithmSHA_512: crypto.SHA512,
}

// schemeOf returns how to sign with a key of RSA, or of an elliptic curve, by the
// parameters of a request or the key's own.
func schemeOf(o *Object, given *kmip.CryptographicParameters, isRSA bool) (scheme, error) {
	params := parameters(o, given)
	s := scheme{hash: hashes[params.HashingAlgorithm], pss: params.PaddingMethod == kmip.PaddingMethodPSS}
	if params.SaltLength != nil {
		salt := int(*params.SaltLength)
		if salt < 1 || salt > saltMax { // 0 is another thing to the library
			return s, refuse(kmip.ResultReasonInvalidField, "a salt of %d bytes", salt)
		}
		s.salt = &salt
	}
	switch named, ok := digitalSignatures[params.DigitalSignatureAlgorithm]; {
	case ok && (named.algorithm == kmip.CryptographicAlgorithmRSA) != isRSA:
		return s, refuse(kmip.ResultReasonInvalidField, "the signature algorithm is not for this kind of key")
	case ok:
		s.hash, s.pss = named.hash, false
	case params.DigitalSignatureAlgorithm == kmip.DigitalSignatureAlgorithmRSASSA_PSS && isRSA:
		s.pss = true
	case params.DigitalSignatureAlgorithm != 0:
		return s, refuse(kmip.ResultReasonFeatureNotSupported, "this signature algorithm is not supported")
	case isRSA && !s.pss && params.PaddingMethod != kmip.PaddingMethodPKCS1V1_5:
		return s, refuse(kmip.ResultReasonInvalidField, "RSA signatures need the padding method PKCS1 v1.5 or PSS")
	}
	if s.hash == 0 {
		return s, refuse(kmip.ResultReasonInvalidField, "Hashing Algorithm is missing or not supported")
	}
	return s, nil
}

// digest returns the hash of data, or digested as that.
func (s scheme) digest(data, digested []byte) ([]byte, error) {
	switch {
	case len(digested) == 0:
		h := s.hash.New()
		h.Write(data)
		return h.Sum(nil), nil
	case len(data) > 0 || len(digested) != s.hash.Size():
		return nil, refuse(kmip.ResultReasonInvalidField, "either Data or Digested Data of %d bytes is wanted", s.hash.Size())
	}
	return digested, nil
}

func (r *request) sign(p *payloads.SignRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.SignResponsePayload{}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.spend(p.UniqueIdentifier, len(p.Data)+len(p.DigestedData), func(o *Object) error {
		if err := r.keyOf(kmip.ObjectTypePrivateKey, o, kmip.CryptographicUsageSign, true); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		key, err := o.private()
		if err != nil {
			return err
		}
		_, isRSA := key.(*rsa.PrivateKey)
		s, err := schemeOf(o, p.CryptographicParameters, isRSA)
		if err != nil {
			return err
		}
		digest, err := s.digest(p.Data, p.DigestedData)
		if err != nil {
			return err
		}
		opts := crypto.SignerOpts(s.hash)
		if s.pss {
			opts = s.options(rsa.PSSSaltLengthEqualsHash)
		}
		if out.SignatureData, err = key.Sign(rand.Reader, digest, opts); err != nil {
			return errCrypto
		}
		return nil
	})
	return out, err
}

func (r *request) signatureVerify(p *payloads.SignatureVerifyRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.SignatureVerifyResponsePayload{ValidityIndicator: kmip.ValidityIndicatorInvalid}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		if err := r.keyOf(kmip.ObjectTypePublicKey, o, kmip.CryptographicUsageVerify, false); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		public, err := o.public()
		if err != nil {
			return err
		}
		_, isRSA := public.(*rsa.PublicKey)
		s, err := schemeOf(o, p.CryptographicParameters, isRSA)
		if err != nil {
			return err
		}
		digest, err := s.digest(p.Data, p.DigestedData)
		if err != nil {
			return err
		}
		if s.verify(public, digest, p.SignatureData) == nil {
			out.ValidityIndicator = kmip.ValidityIndicatorValid
		}
		return nil
	})
	return out, err
}

// options returns those of PSS, with a salt of unset bytes if none is given.
func (s scheme) options(unset int) *rsa.PSSOptions {
	if s.salt != nil {
		unset = *s.salt
	}
	return &rsa.PSSOptions{SaltLength: unset, Hash: s.hash}
}

var errSignature = errors.New("the signature is not of this key and digest")

func (s scheme) verify(public crypto.PublicKey, digest, signature []byte) error {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if s.pss {
			return rsa.VerifyPSS(key, s.hash, digest, signature, s.options(rsa.PSSSaltLengthAuto))
		}
		return rsa.VerifyPKCS1v15(key, s.hash, digest, signature)
	case *ecdsa.PublicKey:
		if ecdsa.VerifyASN1(key, digest, signature) {
			return nil
		}
	}
	return errSignature
}
