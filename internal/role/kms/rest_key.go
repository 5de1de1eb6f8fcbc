package kms

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

const (
	secretMinBits, secretMaxBits = 64, 65536
	labelsMax                    = 32
	labelNameMax                 = 64
	textMax                      = 256 // of a name, a description, a label's value, a reason; bytes
	pageMax                      = 1000
	pageUsual                    = 100

	labelPrefix = "x-" // of a custom attribute's name
	secretType  = "SECRET"
)

// call carries out an operation for the application that ctx is of.
func call[P kmip.OperationPayload](ctx context.Context, a *keyAPI, p kmip.OperationPayload, use func(P)) error {
	return a.operations.Do(ctx, callerOf(ctx), p, func(out kmip.OperationPayload) error {
		answer, ok := out.(P)
		if !ok {
			return fmt.Errorf("%T is the answer to %T", out, p)
		}
		use(answer)
		return nil
	})
}

// keyID returns the identifier of the key that a request is about, which is told
// by its id or its name.
func (a *keyAPI) keyID(ctx context.Context, m interface {
	GetId() string
	GetName() string
},
) (string, error) {
	switch id, name := m.GetId(), m.GetName(); {
	case len(id) > textMax || len(name) > textMax:
		return "", errs.New(errs.Invalid, "an id and a name have at most %d bytes", textMax)
	case id != "" && name != "":
		return "", errs.New(errs.Invalid, "a key is told by its id or by its name, not by both")
	case id != "":
		return id, nil
	case name == "":
		return "", errs.New(errs.Invalid, "which key is not said").WithHint(`{"id": "..."} or {"name": "..."}`)
	default:
		found, err := a.operations.List(ctx, callerOf(ctx), []kmip.Attribute{nameAttribute(name)}, "", 1)
		if err == nil && len(found) == 0 {
			err = errs.New(errs.NotFound, "there is no key named %.64q", name)
		}
		if err != nil {
			return "", err
		}
		return found[0].ID, nil
	}
}

func attributeOf(name kmip.AttributeName, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
}

func nameAttribute(name string) kmip.Attribute {
	return attributeOf(kmip.AttributeNameName, kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString})
}

// labelAttribute is the custom attribute that a label is.
func labelAttribute(name, value string) kmip.Attribute {
	return attributeOf(kmip.AttributeName(labelPrefix+name), ttlv.Value{Tag: kmip.TagAttributeValue, Value: value})
}

// labelsOf checks labels and returns the attributes that they are.
func labelsOf(labels map[string]string) (list []kmip.Attribute, err error) {
	if len(labels) > labelsMax {
		return nil, errs.New(errs.Invalid, "%d labels, and at most %d are possible", len(labels), labelsMax)
	}
	for name, value := range labels {
		bad := strings.ContainsFunc(name, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
		})
		if name == "" || len(name) > labelNameMax || bad || value == "" || len(value) > textMax {
			return nil, errs.New(errs.Invalid, "label %.80q: a name has 1 to %d lower-case letters, digits, '.', '_' and '-', a value 1 to %d bytes", name, labelNameMax, textMax)
		}
		list = append(list, labelAttribute(name, value))
	}
	return list, nil
}

// restType reads the type of a key or a secret. Of a secret the algorithm is 0;
// bits are 0 where none are told.
func restType(name string) (kmipserver.KeyType, error) {
	rest, ok := strings.CutPrefix(strings.ToUpper(name), secretType)
	if !ok {
		return keyTypeOf(name)
	}
	if rest == "" {
		return kmipserver.KeyType{}, nil
	}
	bits, err := strconv.ParseUint(strings.TrimPrefix(rest, "-"), 10, 31)
	if err != nil || rest[0] != '-' || bits < secretMinBits || bits > secretMaxBits || bits%8 != 0 {
		return kmipserver.KeyType{}, errs.New(errs.Invalid, "type %.64q: a secret has %d to %d bits, whole bytes, as in SECRET-256", name, secretMinBits, secretMaxBits)
	}
	return kmipserver.KeyType{Bits: int32(bits)}, nil
}

// usualBits are those of a key of whose length nothing is told.
func usualBits(a kmip.CryptographicAlgorithm) int32 {
	switch a {
	case kmip.CryptographicAlgorithm3DES:
		return 168
	case kmip.CryptographicAlgorithmHMACSHA384:
		return 384
	case kmip.CryptographicAlgorithmHMACSHA512:
		return 512
	}
	return 256
}

func usageMask(names []string, t kmipserver.KeyType) (mask kmip.CryptographicUsageMask, err error) {
	for _, name := range names {
		bit, err := ttlv.BitmaskByStr(kmip.TagCryptographicUsageMask, name)
		if err != nil {
			return 0, errs.New(errs.Invalid, "there is no usage %.64q; such as Encrypt and Decrypt are", name)
		}
		mask |= kmip.CryptographicUsageMask(bit)
	}
	if mask != 0 {
		return mask, nil
	}
	if t.Algorithm == kmip.CryptographicAlgorithmAES || t.Algorithm == kmip.CryptographicAlgorithm3DES {
		return kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt, nil
	}
	return kmip.CryptographicUsageMACGenerate | kmip.CryptographicUsageMACVerify, nil
}

func (a *keyAPI) CreateKMSKey(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSKeyRequest]) (*connect.Response[strongroomv1.CreateKMSKeyResponse], error) {
	m := req.Msg
	t, err := restType(m.GetType())
	if err != nil {
		return nil, errs.Wrap(err, "cannot create a key")
	}
	list, err := attributesOf(m, time.Now())
	if err != nil {
		return nil, errs.Wrap(err, "cannot create a key")
	}
	res := &strongroomv1.CreateKMSKeyResponse{}
	if t.Algorithm == 0 {
		if t.Bits == 0 || len(m.GetUsages()) > 0 {
			return nil, errs.New(errs.Invalid, "cannot create a secret: it has a number of bits, as in SECRET-256, and no usages")
		}
		err = call(ctx, a, newSecret(t.Bits, list), func(p *payloads.RegisterResponsePayload) { res.Id = p.UniqueIdentifier })
	} else {
		if t.Bits == 0 {
			t.Bits = usualBits(t.Algorithm)
		}
		mask, maskErr := usageMask(m.GetUsages(), t)
		if maskErr != nil {
			return nil, errs.Wrap(maskErr, "cannot create a key")
		}
		list = append(list, attributeOf(kmip.AttributeNameCryptographicAlgorithm, t.Algorithm), attributeOf(kmip.AttributeNameCryptographicLength, t.Bits),
			attributeOf(kmip.AttributeNameCryptographicUsageMask, mask))
		p := &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: list}}
		err = call(ctx, a, p, func(p *payloads.CreateResponsePayload) { res.Id = p.UniqueIdentifier })
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// newSecret registers random bits, which are wiped with the request.
func newSecret(bits int32, list []kmip.Attribute) *payloads.RegisterRequestPayload {
	bytes := make([]byte, bits/8)
	rand.Read(bytes)
	value := &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &bytes}}
	return &payloads.RegisterRequestPayload{
		ObjectType: kmip.ObjectTypeSecretData, TemplateAttribute: kmip.TemplateAttribute{Attribute: list},
		Object: &kmip.SecretData{SecretDataType: kmip.SecretDataTypeSeed, KeyBlock: kmip.KeyBlock{
			KeyFormatType: kmip.KeyFormatTypeOpaque, KeyValue: &kmip.KeyValue{Plain: value}, CryptographicLength: bits,
		}},
	}
}

// attributesOf are those of a new key, whatever its type.
func attributesOf(m *strongroomv1.CreateKMSKeyRequest, now time.Time) ([]kmip.Attribute, error) {
	if len(m.GetName()) > textMax || len(m.GetDescription()) > textMax {
		return nil, errs.New(errs.Invalid, "a name and a description have at most %d bytes", textMax)
	}
	list, err := labelsOf(m.GetLabels())
	if err != nil {
		return nil, err
	}
	if m.GetName() != "" {
		list = append(list, nameAttribute(m.GetName()))
	}
	if m.GetDescription() != "" {
		list = append(list, attributeOf(kmip.AttributeNameDescription, m.GetDescription()))
	}
	if m.GetNotExportable() {
		list = append(list, attributeOf(kmip.AttributeNameExtractable, false))
	}
	activation := now
	if m.GetActivationDate() != nil {
		if err := m.GetActivationDate().CheckValid(); err != nil || m.GetPreActive() {
			return nil, errs.New(errs.Invalid, "activation_date is no date, or pre_active is set as well")
		}
		activation = m.GetActivationDate().AsTime()
	}
	if !m.GetPreActive() {
		list = append(list, attributeOf(kmip.AttributeNameActivationDate, activation.UTC().Truncate(time.Second)))
	}
	if end := m.GetDeactivationDate(); end != nil {
		if err := end.CheckValid(); err != nil || !end.AsTime().After(activation) {
			return nil, errs.New(errs.Invalid, "deactivation_date is no date, or not after the activation")
		}
		list = append(list, attributeOf(kmip.AttributeNameDeactivationDate, end.AsTime().UTC().Truncate(time.Second)))
	}
	return list, nil
}

func (a *keyAPI) GetKMSKey(ctx context.Context, req *connect.Request[strongroomv1.GetKMSKeyRequest]) (*connect.Response[strongroomv1.KMSKey], error) {
	id, err := a.keyID(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	var out *strongroomv1.KMSKey
	err = call(ctx, a, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}, func(p *payloads.GetAttributesResponsePayload) {
		out = keyOf(p.UniqueIdentifier, p.Attribute)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// keyOf returns the form of the API of an object's attributes.
func keyOf(id string, attributes []kmip.Attribute) *strongroomv1.KMSKey {
	k := &strongroomv1.KMSKey{Id: id}
	var object kmip.ObjectType
	var algorithm kmip.CryptographicAlgorithm
	var bits int32
	for _, a := range attributes {
		switch v := a.AttributeValue.(type) {
		case kmip.ObjectType:
			object = v
		case kmip.CryptographicAlgorithm:
			algorithm = v
		case int32:
			if a.AttributeName == kmip.AttributeNameCryptographicLength {
				bits = v
			}
		case kmip.Name:
			if k.Name == "" {
				k.Name = v.NameValue
			}
		case kmip.State:
			k.State = ttlv.EnumStr(v)
		case kmip.CryptographicUsageMask:
			if v != 0 {
				k.Usages = strings.Split(ttlv.BitmaskStr(v, " "), " ")
			}
		case kmip.Link:
			switch v.LinkType {
			case kmip.LinkTypeReplacementObjectLink:
				k.ReplacedBy = v.LinkedObjectIdentifier
			case kmip.LinkTypeReplacedObjectLink:
				k.Replaces = v.LinkedObjectIdentifier
			}
		case ttlv.Value:
			name, custom := strings.CutPrefix(string(a.AttributeName), labelPrefix)
			if text, ok := v.Value.(string); ok && custom {
				if k.Labels == nil {
					k.Labels = map[string]string{}
				}
				k.Labels[name] = text
			}
		case string:
			if a.AttributeName == kmip.AttributeNameDescription {
				k.Description = v
			}
		case bool:
			if a.AttributeName == kmip.AttributeNameExtractable {
				k.NotExportable = !v
			}
		case time.Time:
			setDate(k, a.AttributeName, timestamppb.New(v))
		}
	}
	k.Type = typeName(object, algorithm, bits)
	return k
}

func setDate(k *strongroomv1.KMSKey, name kmip.AttributeName, at *timestamppb.Timestamp) {
	switch name {
	case kmip.AttributeNameInitialDate:
		k.Created = at
	case kmip.AttributeNameActivationDate:
		k.Activated = at
	case kmip.AttributeNameDeactivationDate:
		k.Deactivated = at
	case kmip.AttributeNameDestroyDate:
		k.Destroyed = at
	}
}

// typeName is the reverse of [restType] for what that knows.
func typeName(object kmip.ObjectType, algorithm kmip.CryptographicAlgorithm, bits int32) string {
	name := ""
	switch object {
	case 0:
		return ""
	case kmip.ObjectTypeSymmetricKey:
		name = ttlv.EnumStr(algorithm)
		for known, a := range keyAlgorithms {
			if a == algorithm {
				name = known
			}
		}
	case kmip.ObjectTypeSecretData:
		name = secretType
	default:
		return ttlv.EnumStr(object)
	}
	if bits == 0 {
		return name
	}
	return fmt.Sprintf("%s-%d", name, bits)
}

func (a *keyAPI) ListKMSKeys(ctx context.Context, req *connect.Request[strongroomv1.ListKMSKeysRequest]) (*connect.Response[strongroomv1.ListKMSKeysResponse], error) {
	m := req.Msg
	wanted, err := wantedOf(m)
	if err != nil {
		return nil, errs.Wrap(err, "cannot list keys")
	}
	size := int(m.GetPageSize())
	if size == 0 {
		size = pageUsual
	}
	if size < 1 || size > pageMax {
		return nil, errs.New(errs.Invalid, "cannot list keys: page_size %d is not 1 to %d", size, pageMax)
	}
	// A token is the id of the last key before it: it tells nothing new.
	if token := m.GetPageToken(); token != "" {
		if id, err := uuid.Parse(token); err != nil || id.String() != token {
			return nil, errs.New(errs.Invalid, "cannot list keys: page_token is none that was given")
		}
	}
	found, err := a.operations.List(ctx, callerOf(ctx), wanted, m.GetPageToken(), size+1)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListKMSKeysResponse{}
	if len(found) > size {
		found = found[:size]
		res.NextPageToken = found[size-1].ID
	}
	for _, f := range found {
		res.Keys = append(res.Keys, keyOf(f.ID, f.Attributes))
	}
	return connect.NewResponse(res), nil
}

// wantedOf returns the attributes that a list asks for.
func wantedOf(m *strongroomv1.ListKMSKeysRequest) ([]kmip.Attribute, error) {
	wanted, err := labelsOf(m.GetLabels())
	if err != nil {
		return nil, err
	}
	if m.GetName() != "" {
		wanted = append(wanted, nameAttribute(m.GetName()))
	}
	if m.GetState() != "" {
		state, err := ttlv.EnumByName(kmip.TagState, m.GetState())
		if err != nil {
			return nil, errs.New(errs.Invalid, "there is no state %.64q", m.GetState())
		}
		wanted = append(wanted, attributeOf(kmip.AttributeNameState, kmip.State(state)))
	}
	if m.GetType() == "" {
		return wanted, nil
	}
	t, err := restType(m.GetType())
	if err != nil {
		return nil, err
	}
	if t.Algorithm == 0 {
		wanted = append(wanted, attributeOf(kmip.AttributeNameObjectType, kmip.ObjectTypeSecretData))
	} else {
		wanted = append(wanted, attributeOf(kmip.AttributeNameCryptographicAlgorithm, t.Algorithm))
	}
	if t.Bits != 0 {
		wanted = append(wanted, attributeOf(kmip.AttributeNameCryptographicLength, t.Bits))
	}
	return wanted, nil
}

func (a *keyAPI) ActivateKMSKey(ctx context.Context, req *connect.Request[strongroomv1.ActivateKMSKeyRequest]) (*connect.Response[strongroomv1.ActivateKMSKeyResponse], error) {
	id, err := a.keyID(ctx, req.Msg)
	if err == nil {
		err = call(ctx, a, &payloads.ActivateRequestPayload{UniqueIdentifier: id}, func(*payloads.ActivateResponsePayload) {})
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.ActivateKMSKeyResponse{Id: id}), nil
}

func (a *keyAPI) RotateKMSKey(ctx context.Context, req *connect.Request[strongroomv1.RotateKMSKeyRequest]) (*connect.Response[strongroomv1.RotateKMSKeyResponse], error) {
	id, err := a.keyID(ctx, req.Msg)
	res := &strongroomv1.RotateKMSKeyResponse{ReplacedId: id}
	if err == nil {
		err = call(ctx, a, &payloads.RekeyRequestPayload{UniqueIdentifier: id}, func(p *payloads.RekeyResponsePayload) { res.Id = p.UniqueIdentifier })
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (a *keyAPI) RevokeKMSKey(ctx context.Context, req *connect.Request[strongroomv1.RevokeKMSKeyRequest]) (*connect.Response[strongroomv1.RevokeKMSKeyResponse], error) {
	if len(req.Msg.GetReason()) > textMax {
		return nil, errs.New(errs.Invalid, "a reason has at most %d bytes", textMax)
	}
	id, err := a.keyID(ctx, req.Msg)
	if err == nil {
		why := kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation, RevocationMessage: req.Msg.GetReason()}
		if req.Msg.GetCompromised() {
			why.RevocationReasonCode = kmip.RevocationReasonCodeKeyCompromise
		}
		err = call(ctx, a, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: why}, func(*payloads.RevokeResponsePayload) {})
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.RevokeKMSKeyResponse{Id: id}), nil
}

func (a *keyAPI) DestroyKMSKey(ctx context.Context, req *connect.Request[strongroomv1.DestroyKMSKeyRequest]) (*connect.Response[strongroomv1.DestroyKMSKeyResponse], error) {
	id, err := a.keyID(ctx, req.Msg)
	if err == nil {
		err = call(ctx, a, &payloads.DestroyRequestPayload{UniqueIdentifier: id}, func(*payloads.DestroyResponsePayload) {})
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.DestroyKMSKeyResponse{Id: id}), nil
}

func (a *keyAPI) ExportKMSKey(ctx context.Context, req *connect.Request[strongroomv1.ExportKMSKeyRequest]) (*connect.Response[strongroomv1.ExportKMSKeyResponse], error) {
	public := req.Msg.GetRecipientPublicKey()
	if err := parcel.CheckPublicKey(public); err != nil {
		return nil, errs.New(errs.Invalid, "recipient_public_key: %w", err).WithHint("strongroom kms parcel keygen")
	}
	id, err := a.keyID(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ExportKMSKeyResponse{Id: id, Context: parcel.ApplicationContext{Application: applicationOf(ctx), KeyID: id}.String()}
	err = a.operations.Export(ctx, callerOf(ctx), id, func(o *kmipserver.Object) (err error) {
		res.Parcel, err = parcel.Seal(public, res.Context, o.Material)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(res.Parcel) == 0 {
		return nil, errors.New("no parcel was made")
	}
	return connect.NewResponse(res), nil
}
