package kmipserver

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"hash"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// randomMax is how many bytes RNG Retrieve gives at a time.
const randomMax = 64 << 10

// errCrypto tells nothing of why a decryption failed.
var errCrypto = refuse(kmip.ResultReasonCryptographicFailure, "the data cannot be processed with this key and these parameters")

// keyFor refuses an object that cannot be used as a key for use now (KMIP 1.4
// section 3.22): protecting needs an active key within its dates, processing
// what was protected also goes on after its deactivation or compromise.
func (r *request) keyFor(o *Object, use kmip.CryptographicUsageMask, protect bool) error {
	return r.keyOf(kmip.ObjectTypeSymmetricKey, o, use, protect)
}

// keyOf is keyFor of a type of key.
func (r *request) keyOf(t kmip.ObjectType, o *Object, use kmip.CryptographicUsageMask, protect bool) error {
	if err := usable(o); err != nil {
		return err
	}
	if o.Type != t || o.Layout.Wrapping != nil {
		return refuse(kmip.ResultReasonInvalidField, "the object is not a key in the clear of the type that this needs")
	}
	if o.Material == nil {
		return errElsewhere
	}
	if o.usage()&use == 0 {
		return refuse(kmip.ResultReasonPermissionDenied, "the key's usage mask does not allow this")
	}
	state := o.state()
	if state != kmip.StateActive && (protect || state != kmip.StateDeactivated && state != kmip.StateCompromised) {
		return refuse(kmip.ResultReasonPermissionDenied, "the key's state does not allow this")
	}
	if stop, ok := o.date(kmip.AttributeNameProtectStopDate); ok && protect && !stop.After(r.now) {
		return refuse(kmip.ResultReasonPermissionDenied, "the key's Protect Stop Date has passed")
	}
	if start, ok := o.date(kmip.AttributeNameProcessStartDate); ok && !protect && start.After(r.now) {
		return refuse(kmip.ResultReasonPermissionDenied, "the key's Process Start Date has not come")
	}
	return nil
}

// parameters returns those of a request, or the object's own.
func parameters(o *Object, given *kmip.CryptographicParameters) kmip.CryptographicParameters {
	if given != nil {
		return *given
	}
	own, _ := attribute[kmip.CryptographicParameters](o, kmip.AttributeNameCryptographicParameters)
	return own
}

// whole refuses the parts of an operation in several messages.
func whole(correlation []byte, initial, final *bool) error {
	if len(correlation) > 0 || initial != nil && final != nil && *initial != *final {
		return refuse(kmip.ResultReasonFeatureNotSupported, "operations in parts are not supported")
	}
	return nil
}

func blockCipher(o *Object) (cipher.Block, error) {
	key := o.Material.Bytes()
	switch o.Layout.Algorithm {
	case kmip.CryptographicAlgorithmAES:
		return aes.NewCipher(key)
	case kmip.CryptographicAlgorithm3DES:
		if len(key) == 16 {
			two := append(append(make([]byte, 0, 24), key...), key[:8]...)
			defer clear(two)
			return des.NewTripleDESCipher(two)
		}
		return des.NewTripleDESCipher(key)
	}
	return nil, refuse(kmip.ResultReasonInvalidField, "keys of this algorithm cannot encrypt")
}

func (r *request) encrypt(p *payloads.EncryptRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.EncryptResponsePayload{}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.spend(p.UniqueIdentifier, len(p.Data), func(o *Object) (err error) {
		if err := r.keyFor(o, kmip.CryptographicUsageEncrypt, true); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		params := parameters(o, p.CryptographicParameters)
		iv := p.IVCounterNonce
		random := params.RandomIV != nil && *params.RandomIV
		b, err := blockCipher(o)
		if err != nil {
			return err
		}
		if len(iv) == 0 && (random || params.BlockCipherMode == kmip.BlockCipherModeGCM) {
			size := b.BlockSize()
			if params.BlockCipherMode == kmip.BlockCipherModeGCM {
				size = 12
			}
			iv = make([]byte, size)
			rand.Read(iv)
			out.IVCounterNonce = iv
		}
		if len(iv) == 0 && params.BlockCipherMode == kmip.BlockCipherModeCTR { // zeros twice would give both texts away
			return refuse(kmip.ResultReasonInvalidMessage, "the initial counter is missing")
		}
		if params.BlockCipherMode == kmip.BlockCipherModeGCM {
			g, tag, err := gcm(b, params, len(iv))
			if err != nil {
				return err
			}
			sealed := g.Seal(nil, iv, p.Data, p.AuthenticatedEncryptionAdditionalData)
			out.Data = sealed
			if r.atLeast(kmip.V1_4) {
				out.Data, out.AuthenticatedEncryptionTag = sealed[:len(sealed)-tag], sealed[len(sealed)-tag:]
			}
			return nil
		}
		out.Data, err = encryptBlocks(b, params, iv, p.Data)
		return err
	})
	return out, err
}

// spend protects size bytes with the key that an item is about, by use, at the cost
// of the key's usage limits if it has any.
func (r *request) spend(given string, size int, use func(*Object) error) error {
	id, err := r.id(given)
	if err != nil {
		return err
	}
	limited := false
	err = r.view(id, func(_ Reader, o *Object) error {
		if _, limited = attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits); limited {
			return nil
		}
		return use(o)
	})
	if err != nil || !limited {
		return err
	}
	return r.update(id, func(_ Tx, o *Object) error {
		if err := use(o); err != nil {
			return err
		}
		return allocate(o, uses(o, size))
	})
}

// uses counts what size bytes take of o's usage limits.
func uses(o *Object, size int) int64 {
	limits, _ := attribute[kmip.UsageLimits](o, kmip.AttributeNameUsageLimits)
	if limits.UsageLimitsUnit == kmip.UsageLimitsUnitByte {
		return int64(size)
	}
	return 1
}

func (r *request) decrypt(p *payloads.DecryptRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.DecryptResponsePayload{}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		if err := r.keyFor(o, kmip.CryptographicUsageDecrypt, false); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		params := parameters(o, p.CryptographicParameters)
		b, err := blockCipher(o)
		if err != nil {
			return err
		}
		if params.BlockCipherMode == kmip.BlockCipherModeGCM {
			g, _, err := gcm(b, params, len(p.IVCounterNonce))
			if err != nil {
				return err
			}
			sealed := append(bytes.Clone(p.Data), p.AuthenticatedEncryptionTag...)
			out.Data, err = g.Open(nil, p.IVCounterNonce, sealed, p.AuthenticatedEncryptionAdditionalData)
			if err != nil {
				return errCrypto
			}
		} else if len(p.IVCounterNonce) == 0 && (params.BlockCipherMode == kmip.BlockCipherModeCBC || params.BlockCipherMode == kmip.BlockCipherModeCTR) {
			return refuse(kmip.ResultReasonInvalidMessage, "the initialization vector is missing")
		} else if out.Data, err = decryptBlocks(b, params, p.IVCounterNonce, p.Data); err != nil {
			return err
		}
		r.conceal(out.Data)
		r.secretSize += len(out.Data)
		return nil
	})
	return out, err
}

// gcm returns AES-GCM with the nonce size and tag size that params ask for.
func gcm(b cipher.Block, params kmip.CryptographicParameters, nonce int) (g cipher.AEAD, tag int, err error) {
	tag = int(params.TagLength)
	if tag == 0 {
		tag = 16
	}
	switch {
	case b.BlockSize() != 16 || params.PaddingMethod > kmip.PaddingMethodNone:
		return nil, 0, refuse(kmip.ResultReasonInvalidField, "GCM is for AES, without padding")
	case nonce == 12 && tag >= 12 && tag <= 16:
		g, err = cipher.NewGCMWithTagSize(b, tag)
	case nonce > 0 && tag == 16:
		g, err = cipher.NewGCMWithNonceSize(b, nonce)
	default:
		return nil, 0, refuse(kmip.ResultReasonInvalidField, "GCM needs a nonce of 12 bytes and a tag of 12 to 16, or a tag of 16")
	}
	return g, tag, err
}

// checkIV returns the initialization vector of a mode: zeros if there is none.
func checkIV(b cipher.Block, iv []byte) ([]byte, error) {
	if len(iv) == 0 {
		return make([]byte, b.BlockSize()), nil
	}
	if len(iv) != b.BlockSize() {
		return nil, refuse(kmip.ResultReasonInvalidField, "an initialization vector of %d bytes", len(iv))
	}
	return iv, nil
}

func encryptBlocks(b cipher.Block, params kmip.CryptographicParameters, iv, data []byte) ([]byte, error) {
	size := b.BlockSize()
	out := append(make([]byte, 0, len(data)+size), data...) // with padding in the same place
	switch params.PaddingMethod {
	case 0, kmip.PaddingMethodNone:
	case kmip.PaddingMethodPKCS5:
		n := size - len(data)%size
		out = append(out, bytes.Repeat([]byte{byte(n)}, n)...)
	default:
		return nil, refuse(kmip.ResultReasonFeatureNotSupported, "this padding method is not supported")
	}
	if err := transform(b, params.BlockCipherMode, iv, out, true); err != nil {
		return nil, err
	}
	return out, nil
}

func decryptBlocks(b cipher.Block, params kmip.CryptographicParameters, iv, data []byte) ([]byte, error) {
	size := b.BlockSize()
	out := bytes.Clone(data)
	if err := transform(b, params.BlockCipherMode, iv, out, false); err != nil {
		return nil, err
	}
	switch params.PaddingMethod {
	case 0, kmip.PaddingMethodNone:
		return out, nil
	case kmip.PaddingMethodPKCS5:
		if len(out) == 0 {
			return nil, errCrypto
		}
		n := int(out[len(out)-1])
		if n < 1 || n > size || n > len(out) {
			clear(out)
			return nil, errCrypto
		}
		if subtle.ConstantTimeCompare(out[len(out)-n:], bytes.Repeat([]byte{byte(n)}, n)) != 1 {
			clear(out)
			return nil, errCrypto
		}
		return out[:len(out)-n], nil
	}
	return nil, refuse(kmip.ResultReasonFeatureNotSupported, "this padding method is not supported")
}

// transform runs a mode over data in place.
func transform(b cipher.Block, mode kmip.BlockCipherMode, iv, data []byte, encrypt bool) error {
	size := b.BlockSize()
	switch mode {
	case kmip.BlockCipherModeECB, kmip.BlockCipherModeCBC:
		if len(data)%size != 0 {
			return errCrypto
		}
	case kmip.BlockCipherModeCTR:
	case 0:
		return refuse(kmip.ResultReasonInvalidField, "Block Cipher Mode is missing")
	default:
		return refuse(kmip.ResultReasonFeatureNotSupported, "this block cipher mode is not supported")
	}
	if mode == kmip.BlockCipherModeECB {
		for i := 0; i < len(data); i += size {
			if encrypt {
				b.Encrypt(data[i:i+size], data[i:i+size])
			} else {
				b.Decrypt(data[i:i+size], data[i:i+size])
			}
		}
		return nil
	}
	iv, err := checkIV(b, iv)
	if err != nil {
		return err
	}
	switch {
	case mode == kmip.BlockCipherModeCTR:
		cipher.NewCTR(b, iv).XORKeyStream(data, data)
	case encrypt:
		cipher.NewCBCEncrypter(b, iv).CryptBlocks(data, data)
	default:
		cipher.NewCBCDecrypter(b, iv).CryptBlocks(data, data)
	}
	return nil
}

func hasher(a kmip.HashingAlgorithm) (func() hash.Hash, error) {
	switch a {
	case kmip.HashingAlgorithmMD5:
		return md5.New, nil
	case kmip.HashingAlgorithmSHA_1:
		return sha1.New, nil
	case kmip.HashingAlgorithmSHA_224:
		return sha256.New224, nil
	case kmip.HashingAlgorithmSHA_256:
		return sha256.New, nil
	case kmip.HashingAlgorithmSHA_384:
		return sha512.New384, nil
	case kmip.HashingAlgorithmSHA_512:
		return sha512.New, nil
	}
	return nil, refuse(kmip.ResultReasonFeatureNotSupported, "this hashing algorithm is not supported")
}

func (r *request) hash(p *payloads.HashRequestPayload) (kmip.OperationPayload, error) {
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	h, err := hasher(p.CryptographicParameters.HashingAlgorithm)
	if err != nil {
		return nil, err
	}
	sum := h()
	sum.Write(p.Data)
	return &payloads.HashResponsePayload{Data: sum.Sum(nil)}, nil
}

// hmacOf returns the HMAC of data under o.
func hmacOf(o *Object, given *kmip.CryptographicParameters, data []byte) ([]byte, error) {
	params := parameters(o, given)
	algorithm := params.CryptographicAlgorithm
	if algorithm == 0 {
		algorithm = o.Layout.Algorithm
	}
	hashing, ok := map[kmip.CryptographicAlgorithm]kmip.HashingAlgorithm{
		kmip.CryptographicAlgorithmHMACMD5:    kmip.HashingAlgorithmMD5,
		kmip.CryptographicAlgorithmHMACSHA1:   kmip.HashingAlgorithmSHA_1,
		kmip.CryptographicAlgorithmHMACSHA224: kmip.HashingAlgorithmSHA_224,
		kmip.CryptographicAlgorithmHMACSHA256: kmip.HashingAlgorithmSHA_256,
		kmip.CryptographicAlgorithmHMACSHA384: kmip.HashingAlgorithmSHA_384,
		kmip.CryptographicAlgorithmHMACSHA512: kmip.HashingAlgorithmSHA_512,
	}[algorithm]
	if !ok {
		return nil, refuse(kmip.ResultReasonInvalidField, "this algorithm makes no MAC")
	}
	h, err := hasher(hashing)
	if err != nil {
		return nil, err
	}
	m := hmac.New(h, o.Material.Bytes())
	m.Write(data)
	return m.Sum(nil), nil
}

func (r *request) mac(p *MACRequest) (kmip.OperationPayload, error) {
	out := &MACResponse{}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.spend(p.UniqueIdentifier, len(p.Data), func(o *Object) (err error) {
		if err := r.keyFor(o, kmip.CryptographicUsageMACGenerate, true); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		out.MACData, err = hmacOf(o, p.CryptographicParameters, p.Data)
		return err
	})
	return out, err
}

func (r *request) macVerify(p *MACVerifyRequest) (kmip.OperationPayload, error) {
	out := &MACVerifyResponse{ValidityIndicator: kmip.ValidityIndicatorInvalid}
	if err := whole(p.CorrelationValue, p.InitIndicator, p.FinalIndicator); err != nil {
		return nil, err
	}
	err := r.view(p.UniqueIdentifier, func(_ Reader, o *Object) error {
		if err := r.keyFor(o, kmip.CryptographicUsageMACVerify, false); err != nil {
			return err
		}
		out.UniqueIdentifier = o.ID
		sum, err := hmacOf(o, p.CryptographicParameters, p.Data)
		if err == nil && hmac.Equal(sum, p.MACData) {
			out.ValidityIndicator = kmip.ValidityIndicatorValid
		}
		return err
	})
	return out, err
}

func (r *request) rngRetrieve(p *rngRetrieveRequest) (kmip.OperationPayload, error) {
	if p.DataLength < 1 || p.DataLength > randomMax {
		return nil, refuse(kmip.ResultReasonInvalidField, "1 to %d random bytes can be had at a time", randomMax)
	}
	data := make([]byte, p.DataLength)
	rand.Read(data)
	r.conceal(data)
	r.secretSize += len(data)
	return &rngRetrieveResponse{Data: data}, nil
}

// rngSeed takes a client's seed and uses none of it: the system's random
// source needs none, and KMIP 1.4 section 4.36 lets a server ignore it.
func (r *request) rngSeed(*rngSeedRequest) (kmip.OperationPayload, error) {
	return &rngSeedResponse{}, nil
}
