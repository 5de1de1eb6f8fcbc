package kms

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// A key from elsewhere comes sealed to an import key of the KMS. That is a managed
// object of an account that no group is: so it is kept as all keys are, under the root
// key, on all nodes and in backups, and its end is final.
const (
	importAccount = "!import" // no name of a group has "!"
	// importOffered is how long an import key is given out, and importTaken how long
	// parcels to it are taken: who got one has the difference at least.
	importOffered = 24 * time.Hour
	importTaken   = 48 * time.Hour
)

func (a *keyAPI) GetKMSImportKey(ctx context.Context, _ *connect.Request[strongroomv1.GetKMSImportKeyRequest]) (*connect.Response[strongroomv1.KMSImportKey], error) {
	a.importing.Lock() // of this node one asks for a new one, however many come at once
	defer a.importing.Unlock()
	now := time.Now().UTC()
	out, err := a.k.offeredImportKey(ctx, now)
	if err == nil && out == nil {
		out, err = a.k.newImportKey(ctx, now)
	}
	if err != nil {
		return nil, errs.Wrap(err, "import key")
	}
	return connect.NewResponse(out), nil
}

// offeredImportKey returns the import key that is given out now, nil if there is none.
func (k *KMS) offeredImportKey(ctx context.Context, now time.Time) (out *strongroomv1.KMSImportKey, err error) {
	err = k.objects.View(ctx, importAccount, func(v kmipserver.Reader) error {
		for o, err := range v.Find(kmipserver.Query{Newest: true}) {
			if err != nil {
				return err
			}
			made := importKeyMade(o)
			if o.Destroyed() || now.Sub(made) >= importOffered {
				return nil
			}
			return withImportKey(v, o.ID, func(r *parcel.Recipient) error {
				out = importKeyToAPI(o.ID, r, made)
				return nil
			})
		}
		return nil
	})
	return out, err
}

// newImportKey makes an import key, and ends those that are not taken any more. Two
// nodes may make one each at a time, and both are good.
func (k *KMS) newImportKey(ctx context.Context, now time.Time) (*strongroomv1.KMSImportKey, error) {
	r, err := parcel.NewRecipient()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	secret, err := r.Secret()
	if err != nil {
		return nil, err
	}
	id := uuid.Must(uuid.NewV7()).String()
	err = k.objects.Update(ctx, importAccount, func(tx kmipserver.Tx) error {
		var over []string
		for o, err := range tx.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			if !o.Destroyed() && now.Sub(importKeyMade(o)) >= importTaken {
				over = append(over, o.ID)
			}
		}
		for _, id := range over {
			o, err := tx.Get(id)
			if err != nil {
				return err
			}
			o.Destroy(now)
			if err := tx.Put(o); err != nil {
				return err
			}
		}
		return tx.Put(&kmipserver.Object{
			ID: id, Type: kmip.ObjectTypeSecretData, Material: secret,
			Layout:     kmipserver.Layout{Format: kmip.KeyFormatTypeRaw, SecretType: kmip.SecretDataTypeSeed},
			Attributes: []kmip.Attribute{attributeOf(kmip.AttributeNameInitialDate, now.Truncate(time.Second)), attributeOf(kmip.AttributeNameState, kmip.StateActive)},
		})
	})
	if err != nil {
		secret.Close()
		return nil, err
	}
	return importKeyToAPI(id, r, now), nil
}

func importKeyToAPI(id string, r *parcel.Recipient, made time.Time) *strongroomv1.KMSImportKey {
	return &strongroomv1.KMSImportKey{Id: id, PublicKey: r.PublicKey(), Expires: timestamppb.New(made.Truncate(time.Second).Add(importTaken))}
}

// importKeyMade returns when an import key was made.
func importKeyMade(o *kmipserver.Object) time.Time {
	for _, a := range o.Attributes {
		if made, ok := a.AttributeValue.(time.Time); ok && a.AttributeName == kmip.AttributeNameInitialDate {
			return made
		}
	}
	return time.Time{}
}

// withImportKey calls f with the import key of that identifier. The recipient is
// closed after that.
func withImportKey(v kmipserver.Reader, id string, f func(*parcel.Recipient) error) error {
	o, err := v.Get(id)
	if err != nil {
		return err
	}
	if o.Material == nil {
		return kmipserver.ErrNoObject
	}
	r, err := parcel.RestoreRecipient(o.Material)
	if err != nil {
		return err
	}
	defer r.Close()
	return f(r)
}

func (a *keyAPI) ImportKMSKey(ctx context.Context, req *connect.Request[strongroomv1.ImportKMSKeyRequest]) (*connect.Response[strongroomv1.ImportKMSKeyResponse], error) {
	res, err := a.importKey(ctx, req.Msg)
	if err != nil {
		return nil, errs.Wrap(err, "cannot import key %.64q", req.Msg.GetKey().GetName())
	}
	return connect.NewResponse(res), nil
}

func (a *keyAPI) importKey(ctx context.Context, m *strongroomv1.ImportKMSKeyRequest) (*strongroomv1.ImportKMSKeyResponse, error) {
	want := m.GetKey()
	if want.GetName() == "" {
		return nil, errs.New(errs.Invalid, "it has no name: the name keeps a parcel from being taken twice")
	}
	t, err := restType(want.GetType())
	if err != nil {
		return nil, err
	}
	list, err := attributesOf(want, time.Now())
	if err != nil {
		return nil, err
	}
	key, err := a.openImport(ctx, m, time.Now())
	if err != nil {
		return nil, err
	}
	defer key.Close()
	if err := checkImport(t, int32(8*key.Len())); err != nil {
		return nil, errs.Wrap(err, "type %s", want.GetType())
	}
	p, err := importPayload(t, key, want.GetUsages(), list)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ImportKMSKeyResponse{}
	if err := call(ctx, a, p, func(p *payloads.RegisterResponsePayload) { res.Id = p.UniqueIdentifier }); err != nil {
		return nil, err
	}
	return res, nil
}

// openImport returns the key in a parcel, which the caller closes.
func (a *keyAPI) openImport(ctx context.Context, m *strongroomv1.ImportKMSKeyRequest, now time.Time) (key *keymem.Key, err error) {
	sealed := parcel.ImportContext{Application: applicationOf(ctx), Name: m.GetKey().GetName(), Type: m.GetKey().GetType()}.String()
	gone := errs.New(errs.Invalid, "import_key %.64q is none that is taken (any more)", m.GetImportKey()).WithHint("GetKMSImportKey, and seal the key anew")
	err = a.k.objects.View(ctx, importAccount, func(v kmipserver.Reader) error {
		key.Close() // of a run before
		key = nil
		o, err := v.Get(m.GetImportKey())
		if err == nil && (o.Destroyed() || now.Sub(importKeyMade(o)) >= importTaken) {
			err = kmipserver.ErrNoObject
		}
		if err != nil {
			return err
		}
		return withImportKey(v, o.ID, func(r *parcel.Recipient) (err error) {
			key, err = r.Open(m.GetParcel(), sealed)
			return err
		})
	})
	switch {
	case errors.Is(err, kmipserver.ErrNoObject):
		return nil, gone
	case errors.Is(err, parcel.ErrDoesNotOpen), errors.Is(err, parcel.ErrInvalid), errors.Is(err, parcel.ErrVersion):
		return nil, errs.New(errs.Invalid, "%w", err).WithHint("it must be sealed to import_key, for the context %s", sealed)
	}
	return key, err
}

// checkImport refuses a key that is not of the length which its type has.
func checkImport(t kmipserver.KeyType, bits int32) error {
	fits := bits >= 80 && bits <= 4096 // HMAC
	switch t.Algorithm {
	case 0:
		fits = bits >= secretMinBits && bits <= secretMaxBits
	case kmip.CryptographicAlgorithmAES:
		fits = bits == 128 || bits == 192 || bits == 256
	case kmip.CryptographicAlgorithm3DES:
		fits = bits == 128 || bits == 192
	}
	if !fits || t.Bits != 0 && t.Bits != bits {
		return errs.New(errs.Invalid, "the parcel holds %d bits", bits)
	}
	return nil
}

// importPayload makes the request that registers key, whose bytes it wipes.
func importPayload(t kmipserver.KeyType, key *keymem.Key, usages []string, list []kmip.Attribute) (*payloads.RegisterRequestPayload, error) {
	bytes, bits := key.Bytes(), int32(8*key.Len())
	block := kmip.KeyBlock{
		KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &bytes}}}, CryptographicLength: bits,
	}
	p := &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey}
	if t.Algorithm == 0 {
		if len(usages) > 0 {
			return nil, errs.New(errs.Invalid, "a secret has no usages")
		}
		block.KeyFormatType = kmip.KeyFormatTypeOpaque
		p.ObjectType, p.Object = kmip.ObjectTypeSecretData, &kmip.SecretData{SecretDataType: kmip.SecretDataTypeSeed, KeyBlock: block}
	} else {
		t.Bits = bits
		mask, err := usageMask(usages, t)
		if err != nil {
			return nil, err
		}
		block.CryptographicAlgorithm = t.Algorithm
		p.Object = &kmip.SymmetricKey{KeyBlock: block}
		list = append(list, attributeOf(kmip.AttributeNameCryptographicUsageMask, mask))
	}
	p.TemplateAttribute = kmip.TemplateAttribute{Attribute: list}
	return p, nil
}
