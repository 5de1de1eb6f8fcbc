package objectstore

import (
	"encoding/binary"
	"math"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// code stands for the name of an attribute in a record (docs/spec/kms-object.md).
// The attributes that a KMS gives to each object, and dates, have one, for they are
// most of a record in TTLV: 640 bytes of a key's 700. The others are in TTLV.
type code byte

const (
	codeTTLV code = iota
	codeName
	codeAlgorithm
	codeLength
	codeUsageMask
	codeState
	codeLeaseTime
	codeFresh
	codeDigest
	codeObjectGroup
	// From here, dates: those of [dates].
	codeDates
)

// dates are the attributes whose codes begin at codeDates.
var dates = [...]kmip.AttributeName{
	kmip.AttributeNameInitialDate, kmip.AttributeNameActivationDate, kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate,
	kmip.AttributeNameDeactivationDate, kmip.AttributeNameDestroyDate, kmip.AttributeNameCompromiseOccurrenceDate, kmip.AttributeNameCompromiseDate,
	kmip.AttributeNameArchiveDate, kmip.AttributeNameLastChangeDate, kmip.AttributeNameOriginalCreationDate,
}

// dateCodes is the reverse of dates. It is read only.
var dateCodes = func() map[kmip.AttributeName]code {
	m := map[kmip.AttributeName]code{}
	for i, name := range dates {
		m[name] = codeDates + code(i)
	}
	return m
}()

// appendAttributes appends a list of attributes to b.
func appendAttributes(b []byte, list []kmip.Attribute) []byte {
	for _, a := range list {
		if a.AttributeIndex == nil {
			if more, ok := appendCoded(b, a); ok {
				b = more
				continue
			}
		}
		enc := ttlv.NewTTLVEncoder()
		enc.TagAny(kmip.TagAttribute, a)
		b = appendBytes(append(b, byte(codeTTLV)), enc.Bytes())
	}
	return b
}

// appendCoded appends a as a code and its value, if it has one.
func appendCoded(b []byte, a kmip.Attribute) ([]byte, bool) {
	number := func(c code, v uint64) ([]byte, bool) { return binary.AppendUvarint(append(b, byte(c)), v), true }
	switch v := a.AttributeValue.(type) {
	case time.Time:
		if c, ok := dateCodes[a.AttributeName]; ok {
			return number(c, uint64(v.Unix()))
		}
	case kmip.Name:
		if a.AttributeName == kmip.AttributeNameName {
			b, _ = number(codeName, uint64(v.NameType))
			return appendBytes(b, v.NameValue), true
		}
	case kmip.CryptographicAlgorithm:
		if a.AttributeName == kmip.AttributeNameCryptographicAlgorithm {
			return number(codeAlgorithm, uint64(v))
		}
	case int32:
		if a.AttributeName == kmip.AttributeNameCryptographicLength {
			return number(codeLength, uint64(uint32(v)))
		}
	case kmip.CryptographicUsageMask:
		if a.AttributeName == kmip.AttributeNameCryptographicUsageMask {
			return number(codeUsageMask, uint64(uint32(v)))
		}
	case kmip.State:
		if a.AttributeName == kmip.AttributeNameState {
			return number(codeState, uint64(v))
		}
	case time.Duration:
		if a.AttributeName == kmip.AttributeNameLeaseTime && v >= 0 && v/time.Second <= math.MaxUint32 {
			return number(codeLeaseTime, uint64(v/time.Second))
		}
	case bool:
		if a.AttributeName == kmip.AttributeNameFresh && v {
			return number(codeFresh, 1)
		} else if a.AttributeName == kmip.AttributeNameFresh {
			return number(codeFresh, 0)
		}
	case kmip.Digest:
		if a.AttributeName == kmip.AttributeNameDigest {
			b, _ = number(codeDigest, uint64(v.HashingAlgorithm))
			return appendBytes(binary.AppendUvarint(b, uint64(v.KeyFormatType)), v.DigestValue), true
		}
	case string:
		if a.AttributeName == kmip.AttributeNameObjectGroup {
			return appendBytes(append(b, byte(codeObjectGroup)), v), true
		}
	}
	return b, false
}

func appendBytes[T string | []byte](b []byte, v T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(v))), v...)
}

// parseAttributes is the reverse of appendAttributes.
func parseAttributes(b []byte) ([]kmip.Attribute, error) {
	if len(b) == 0 {
		return nil, nil
	}
	list := make([]kmip.Attribute, 0, 16)
	for r := (attributeReader{rest: b}); len(r.rest) > 0; {
		a, err := r.attribute()
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

// attributeReader reads one value after the other, until one is bad.
type attributeReader struct {
	rest []byte
	bad  bool
}

func (r *attributeReader) attribute() (a kmip.Attribute, err error) {
	c := code(r.rest[0])
	r.rest = r.rest[1:]
	set := func(name kmip.AttributeName, value any) { a.AttributeName, a.AttributeValue = name, value }
	switch c {
	case codeTTLV:
		one := r.bytes()
		list, err := decodeAttributes(one)
		if err != nil {
			return a, err
		}
		if len(list) != 1 {
			return a, errCorrupt
		}
		a = list[0]
	case codeName:
		kind := r.number(math.MaxUint32)
		set(kmip.AttributeNameName, kmip.Name{NameType: kmip.NameType(kind), NameValue: string(r.bytes())})
	case codeAlgorithm:
		set(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithm(r.number(math.MaxUint32)))
	case codeLength:
		set(kmip.AttributeNameCryptographicLength, int32(uint32(r.number(math.MaxUint32))))
	case codeUsageMask:
		set(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageMask(uint32(r.number(math.MaxUint32))))
	case codeState:
		set(kmip.AttributeNameState, kmip.State(r.number(math.MaxUint32)))
	case codeLeaseTime:
		set(kmip.AttributeNameLeaseTime, time.Duration(r.number(math.MaxUint32))*time.Second)
	case codeFresh:
		set(kmip.AttributeNameFresh, r.number(1) == 1)
	case codeDigest:
		algorithm, format := r.number(math.MaxUint32), r.number(math.MaxUint32)
		set(kmip.AttributeNameDigest, kmip.Digest{
			HashingAlgorithm: kmip.HashingAlgorithm(algorithm), KeyFormatType: kmip.KeyFormatType(format), DigestValue: append([]byte{}, r.bytes()...),
		})
	case codeObjectGroup:
		set(kmip.AttributeNameObjectGroup, string(r.bytes()))
	default:
		if c-codeDates >= code(len(dates)) {
			return a, errCorrupt
		}
		set(dates[c-codeDates], time.Unix(int64(r.number(math.MaxUint64)), 0))
	}
	if r.bad {
		return a, errCorrupt
	}
	return a, nil
}

// number reads a number of at most so much.
func (r *attributeReader) number(most uint64) uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 || v > most {
		r.bad, r.rest = true, nil
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

// bytes reads a length and as many bytes, which alias the record.
func (r *attributeReader) bytes() []byte {
	n := r.number(recordMax)
	if n > uint64(len(r.rest)) {
		r.bad, r.rest = true, nil
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}
