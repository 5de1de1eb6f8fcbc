package objectstore

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/kmipwire"
)

// The record of docs/spec/kms-object.md.
const (
	recordMagic = "SRKO"
	// recordVersion is that of what is written; 1 had attributes in TTLV.
	recordVersion = 2
	recordHeader  = 60 // bytes
	flagArchived  = 1
	aadDomain     = "strongroom/kms-object/v1"
	recordMax     = 1 << 20
)

var (
	errCorrupt  = errors.New("record of a managed object is damaged")
	errTooLarge = errors.New("managed object is too large")
	errVersion  = errors.New("record of a managed object was written by a newer release")
)

// recordLimits bounds the TTLV parts of a record.
var recordLimits = kmipwire.Limits{Message: recordMax, Depth: 16, Values: 8192}

// clearPart encodes all of o but its material, which will be sealed in epoch.
func clearPart(o *kmipserver.Object, epoch uint64) ([]byte, error) {
	attributes, template := appendAttributes(nil, o.Attributes), appendAttributes(nil, o.Template)
	var wrapping []byte
	if o.Layout.Wrapping != nil {
		enc := ttlv.NewTTLVEncoder()
		enc.TagAny(kmip.TagKeyWrappingData, o.Layout.Wrapping)
		wrapping = enc.Bytes()
	}
	flags := uint32(0)
	if o.Archived {
		flags = flagArchived
	}
	b := make([]byte, 0, recordHeader+len(attributes)+len(template)+len(wrapping))
	b = append(b, recordMagic...)
	b = binary.BigEndian.AppendUint32(b, recordVersion)
	b = binary.BigEndian.AppendUint64(b, epoch)
	l := o.Layout
	kind := uint32(l.SecretType)
	switch o.Type {
	case kmip.ObjectTypePGPKey:
		kind = uint32(l.PGPVersion)
	case kmip.ObjectTypeSplitKey:
		kind = binary.BigEndian.Uint32([]byte{l.Part.Parts, l.Part.ID, l.Part.Threshold, uint8(l.Part.Method)})
	}
	for _, v := range []uint32{
		uint32(o.Type), flags, uint32(l.Format), uint32(l.Compression), uint32(l.Algorithm), uint32(l.Length),
		kind, uint32(l.OpaqueType), uint32(len(attributes)), uint32(len(template)), uint32(len(wrapping)),
	} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	b = append(append(append(b, attributes...), template...), wrapping...)
	if len(b) > recordMax {
		return nil, errTooLarge
	}
	return b, nil
}

// split cuts a record into its clear and its sealed part and returns the epoch,
// without looking at what only authentication can vouch for.
func split(record []byte) (clear, sealed []byte, epoch uint64, err error) {
	if len(record) < recordHeader || len(record) > recordMax || string(record[:4]) != recordMagic {
		return nil, nil, 0, errCorrupt
	}
	if v := binary.BigEndian.Uint32(record[4:]); v == 0 {
		return nil, nil, 0, errCorrupt
	} else if v > recordVersion {
		return nil, nil, 0, fmt.Errorf("%w: version %d", errVersion, v)
	}
	end := uint64(recordHeader)
	for at := 48; at < recordHeader; at += 4 {
		end += uint64(binary.BigEndian.Uint32(record[at:]))
	}
	if end+keyring.Overhead > uint64(len(record)) {
		return nil, nil, 0, errCorrupt
	}
	clear, sealed, epoch = record[:end:end], record[end:], binary.BigEndian.Uint64(record[8:])
	if binary.BigEndian.Uint32(record[20:])&^flagArchived != 0 || (epoch == keyring.Metadata) != (len(sealed) == keyring.Overhead) {
		return nil, nil, 0, errCorrupt
	}
	return clear, sealed, epoch, nil
}

// parseClear is the reverse of clearPart. The object has no ID and no material.
func parseClear(b []byte) (*kmipserver.Object, error) {
	word := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	o := &kmipserver.Object{
		Type: kmip.ObjectType(word(16)), Archived: word(20)&flagArchived != 0,
		Layout: kmipserver.Layout{
			Format: kmip.KeyFormatType(word(24)), Compression: kmip.KeyCompressionType(word(28)),
			Algorithm: kmip.CryptographicAlgorithm(word(32)), Length: int32(word(36)),
			OpaqueType: kmip.OpaqueDataType(word(44)),
		},
	}
	if !kmipserver.Keeps(o.Type) {
		return nil, fmt.Errorf("%w: object type %d", errVersion, o.Type)
	}
	switch o.Type {
	case kmip.ObjectTypePGPKey:
		o.Layout.PGPVersion = int32(word(40))
	case kmip.ObjectTypeSplitKey:
		o.Layout.Part = kmipserver.Part{Parts: b[40], ID: b[41], Threshold: b[42], Method: kmip.SplitKeyMethod(b[43])}
	default:
		o.Layout.SecretType = kmip.SecretDataType(word(40))
	}
	attributes, rest := b[recordHeader:][:word(48)], b[recordHeader:][word(48):]
	template, wrapping := rest[:word(52)], rest[word(52):]
	decode := parseAttributes
	if word(4) == 1 {
		decode = decodeAttributes
	}
	var err error
	if o.Attributes, err = decode(attributes); err != nil {
		return nil, err
	}
	if o.Template, err = decode(template); err != nil {
		return nil, err
	}
	if len(wrapping) > 0 {
		if err := kmipwire.Check(wrapping, recordLimits); err != nil {
			return nil, fmt.Errorf("%w: %w", errCorrupt, err)
		}
		o.Layout.Wrapping = &kmip.KeyWrappingData{}
		if err := decodeTTLV(wrapping, func(d *ttlv.Decoder) error { return d.TagAny(kmip.TagKeyWrappingData, o.Layout.Wrapping) }); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// decodeAttributes parses a list of version 1: structures of TTLV.
func decodeAttributes(b []byte) (list []kmip.Attribute, err error) {
	if len(b) == 0 {
		return nil, nil
	}
	for rest := b; len(rest) > 0; {
		if len(rest) < 8 || uint64(binary.BigEndian.Uint32(rest[4:]))+8 > uint64(len(rest)) {
			return nil, errCorrupt
		}
		n := 8 + int(binary.BigEndian.Uint32(rest[4:]))
		if err := kmipwire.Check(rest[:n], recordLimits); err != nil {
			return nil, fmt.Errorf("%w: %w", errCorrupt, err)
		}
		rest = rest[n:]
	}
	err = decodeTTLV(b, func(d *ttlv.Decoder) error {
		for d.Tag() != 0 {
			var a kmip.Attribute
			if err := d.TagAny(kmip.TagAttribute, &a); err != nil {
				return err
			}
			list = append(list, a)
		}
		return nil
	})
	return list, err
}

// decodeTTLV guards f against the codec's panics on values of a wrong type.
func decodeTTLV(b []byte, f func(*ttlv.Decoder) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errCorrupt, p)
		}
	}()
	d, err := ttlv.NewTTLVDecoder(b)
	if err == nil {
		err = f(&d)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errCorrupt, err)
	}
	return nil
}

// aad is what a record's material is bound to.
func aad(account, id string, clear []byte) []byte {
	b := make([]byte, 0, len(aadDomain)+8+len(account)+len(id)+len(clear))
	b = append(b, aadDomain...)
	for _, s := range []string{account, id} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	return append(b, clear...)
}

// seal returns the record of o, its material wrapped in epoch.
func seal(ring *keyring.Ring, account string, o *kmipserver.Object, epoch uint64) ([]byte, error) {
	clear, err := clearPart(o, epoch)
	if err != nil {
		return nil, err
	}
	sealed, err := ring.Seal(epoch, aad(account, o.ID, clear), o.Material)
	if err != nil {
		return nil, err
	}
	return append(clear, sealed...), nil
}

// unseal is the reverse of seal. The caller closes the material.
func unseal(ring *keyring.Ring, account, id string, record []byte) (*kmipserver.Object, uint64, error) {
	clear, sealed, epoch, err := split(record)
	if err != nil {
		return nil, 0, err
	}
	material, err := ring.Unseal(epoch, aad(account, id, clear), sealed)
	if errors.Is(err, keyring.ErrDoesNotOpen) {
		err = fmt.Errorf("%w: %w", errCorrupt, err)
	}
	if err != nil {
		return nil, 0, err
	}
	o, err := parseClear(clear)
	if err != nil {
		material.Close()
		return nil, 0, err
	}
	o.ID, o.Material = id, material
	return o, epoch, nil
}
