package kms

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// A key from elsewhere comes sealed to an import key of the KMS. That is a managed
// object of an account that no group is: so it is kept as all keys are, under the root
// key, on all nodes and in backups, and its end is final. It notes which parcels were
// taken, each of which is taken once.
const (
	importAccount = "!import" // no name of a group has "!"
	// importOffered is how long an import key is given out, and importTaken how long
	// parcels to it are taken: who got one has the difference at least.
	importOffered = 24 * time.Hour
	importTaken   = 48 * time.Hour
	// importParcels is after how many parcels a key is not given out any more, and twice
	// that after how many it takes none: they are noted in its record.
	importParcels = 2048
	// takenAttribute is a digest of a parcel that was taken.
	takenAttribute kmip.AttributeName = "x-taken"
	// endImportKeysEvery is the time between two looks for import keys that are over.
	endImportKeysEvery = time.Hour
)

// importKeys are the import keys in a store. It is safe for concurrent use.
type importKeys struct {
	store  kmipserver.Store
	making sync.Mutex // held while a key is looked for and made
}

// offer returns the import key that is given out now, made if there is none.
func (i *importKeys) offer(ctx context.Context, now time.Time) (*strongroomv1.KMSImportKey, error) {
	i.making.Lock() // of this node one makes a new one, however many come at once
	defer i.making.Unlock()
	if out, err := i.offered(ctx, now); err != nil || out != nil {
		return out, err
	}
	if err := i.end(ctx, now); err != nil {
		return nil, err
	}
	return i.make(ctx, now)
}

func (i *importKeys) offered(ctx context.Context, now time.Time) (out *strongroomv1.KMSImportKey, err error) {
	err = i.store.View(ctx, importAccount, func(v kmipserver.Reader) error {
		out = nil
		for o, err := range v.Find(kmipserver.Query{Newest: true}) {
			if err != nil {
				return err
			}
			made := importKeyMade(o)
			if o.Destroyed() || now.Sub(made) >= importOffered || parcelsOf(o) >= importParcels {
				return nil
			}
			full, err := v.Get(o.ID)
			if err != nil {
				return err
			}
			r, err := parcel.RestoreRecipient(full.Material)
			if err != nil {
				return err
			}
			defer r.Close()
			out = importKeyToAPI(o.ID, r, made)
			return nil
		}
		return nil
	})
	return out, err
}

// make makes an import key. Two nodes may make one each at a time, and both are good.
func (i *importKeys) make(ctx context.Context, now time.Time) (*strongroomv1.KMSImportKey, error) {
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
	err = i.store.Update(ctx, importAccount, func(tx kmipserver.Tx) error {
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

// end destroys the import keys to which no parcels are taken any more.
func (i *importKeys) end(ctx context.Context, now time.Time) error {
	return i.store.Update(ctx, importAccount, func(tx kmipserver.Tx) error {
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
		return nil
	})
}

// open returns the key in a parcel, which the caller closes, and notes that the parcel
// was taken.
func (i *importKeys) open(ctx context.Context, id string, sealed []byte, bound string, now time.Time) (key *keymem.Key, err error) {
	sum := sha256.Sum256(sealed)
	digest := attributeOf(takenAttribute, ttlv.Value{Tag: kmip.TagAttributeValue, Value: hex.EncodeToString(sum[:])})
	err = i.store.Update(ctx, importAccount, func(tx kmipserver.Tx) error {
		key.Close() // of a run before
		key = nil
		o, err := tx.Get(id)
		if errors.Is(err, kmipserver.ErrNoObject) || err == nil && (o.Destroyed() || now.Sub(importKeyMade(o)) >= importTaken || parcelsOf(o) >= 2*importParcels) {
			return errs.New(errs.Invalid, "import_key %.64q is none that is taken (any more)", id).WithHint("GetKMSImportKey, and seal the key anew")
		}
		if err != nil {
			return err
		}
		taken := func(a kmip.Attribute) bool {
			return a.AttributeName == takenAttribute && a.AttributeValue == digest.AttributeValue
		}
		if slices.ContainsFunc(o.Attributes, taken) {
			return errs.New(errs.Exists, "this parcel was taken already").WithHint("seal the key anew")
		}
		r, err := parcel.RestoreRecipient(o.Material)
		if err != nil {
			return err
		}
		defer r.Close()
		if key, err = r.Open(sealed, bound); err != nil {
			return errs.New(errs.Invalid, "%w", err).WithHint("it must be sealed to import_key, for the context %s", bound)
		}
		index := int32(parcelsOf(o))
		digest.AttributeIndex = &index
		o.Attributes = append(slices.Clone(o.Attributes), digest)
		return tx.Put(o)
	})
	if err != nil {
		key.Close()
		return nil, err
	}
	return key, nil
}

// parcelsOf returns how many parcels to an import key were taken.
func parcelsOf(o *kmipserver.Object) (n int) {
	for _, a := range o.Attributes {
		if a.AttributeName == takenAttribute {
			n++
		}
	}
	return n
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

// keepImportKeys ends import keys in time until ctx ends.
func (k *KMS) keepImportKeys(ctx context.Context) error {
	keys := importKeys{store: k.objects}
	for {
		if err := keys.end(ctx, time.Now()); err != nil && ctx.Err() == nil {
			k.log.LogAttrs(ctx, slog.LevelError, "old import keys not destroyed", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(endImportKeysEvery):
		}
	}
}

func (a *keyAPI) GetKMSImportKey(ctx context.Context, _ *connect.Request[strongroomv1.GetKMSImportKeyRequest]) (*connect.Response[strongroomv1.KMSImportKey], error) {
	out, err := a.imports.offer(ctx, time.Now().UTC())
	if err != nil {
		return nil, errs.Wrap(err, "import key")
	}
	return connect.NewResponse(out), nil
}

func (a *keyAPI) ImportKMSKey(ctx context.Context, req *connect.Request[strongroomv1.ImportKMSKeyRequest]) (*connect.Response[strongroomv1.ImportKMSKeyResponse], error) {
	id, err := a.importKey(ctx, req.Msg)
	if err != nil {
		return nil, errs.Wrap(err, "cannot import key %.64q", req.Msg.GetKey().GetName())
	}
	return connect.NewResponse(&strongroomv1.ImportKMSKeyResponse{Id: id}), nil
}

func (a *keyAPI) importKey(ctx context.Context, m *strongroomv1.ImportKMSKeyRequest) (id string, err error) {
	want := m.GetKey()
	if want.GetName() == "" {
		return "", errs.New(errs.Invalid, "it has no name")
	}
	t, err := restType(want.GetType())
	if err != nil {
		return "", err
	}
	list, err := attributesOf(want, time.Now())
	if err != nil {
		return "", err
	}
	bound := parcel.ImportContext{Application: applicationOf(ctx), Name: want.GetName(), Type: want.GetType()}.String()
	var key *keymem.Key
	defer func() { key.Close() }()
	// The parcel is opened once the operation is allowed, and on record then.
	return a.operations.Import(ctx, callerOf(ctx), func() (*payloads.RegisterRequestPayload, error) {
		if key, err = a.imports.open(ctx, m.GetImportKey(), m.GetParcel(), bound, time.Now()); err != nil {
			return nil, err
		}
		bits, err := importBits(t, key.Len())
		if err != nil {
			return nil, errs.Wrap(err, "type %s", want.GetType())
		}
		t.Bits = bits
		return importPayload(t, key, want.GetUsages(), list)
	})
}

// importBits returns the length of a key of so many bytes, if that is one of the type.
func importBits(t kmipserver.KeyType, size int) (bits int32, err error) {
	bits = int32(8 * size)
	fits := bits >= 80 && bits <= 4096 // HMAC
	switch t.Algorithm {
	case 0:
		fits = bits >= secretMinBits && bits <= secretMaxBits
	case kmip.CryptographicAlgorithmAES:
		fits = bits == 128 || bits == 192 || bits == 256
	case kmip.CryptographicAlgorithm3DES:
		fits = size == 16 || size == 24
		bits = int32(7 * size) // without the parity
	}
	if !fits || t.Bits != 0 && t.Bits != bits {
		return 0, errs.New(errs.Invalid, "the parcel holds %d bytes", size)
	}
	return bits, nil
}

// importPayload makes the request that registers key, whose bytes it wipes.
func importPayload(t kmipserver.KeyType, key *keymem.Key, usages []string, list []kmip.Attribute) (*payloads.RegisterRequestPayload, error) {
	bytes := key.Bytes()
	block := kmip.KeyBlock{
		KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &bytes}}}, CryptographicLength: t.Bits,
	}
	p := &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey}
	if t.Algorithm == 0 {
		if len(usages) > 0 {
			return nil, errs.New(errs.Invalid, "a secret has no usages")
		}
		block.KeyFormatType = kmip.KeyFormatTypeOpaque
		p.ObjectType, p.Object = kmip.ObjectTypeSecretData, &kmip.SecretData{SecretDataType: kmip.SecretDataTypeSeed, KeyBlock: block}
	} else {
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
