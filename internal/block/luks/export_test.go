package luks

import (
	"errors"
	"fmt"

	"strongroom/internal/crypto/keymem"
)

// DecodeAndEncode parses a header copy and encodes it again.
func DecodeAndEncode(b []byte, c Copy) ([]byte, error) {
	bin, s, doc, err := decodeCopy(b, c)
	if err != nil {
		if bin != (binaryHeader{}) || s != (salt{}) || doc != nil {
			panic("results are not zero after an error")
		}
		return nil, err
	}
	if _, err := decodeMetadata(doc, bin.size); err != nil {
		return nil, err
	}
	return encodeCopy(bin, s, doc, c), nil
}

// CanonicalJSON parses metadata and encodes it again.
func CanonicalJSON(text []byte) ([]byte, error) {
	doc, err := decodeJSON(text)
	if err != nil {
		if doc != nil {
			panic("results are not zero after an error")
		}
		return nil, err
	}
	return encodeJSON(doc), nil
}

// DecodeMetadata checks metadata as that of a header of 16 KiB.
func DecodeMetadata(text []byte) error {
	doc, err := decodeJSON(text)
	if err != nil {
		return err
	}
	m, err := decodeMetadata(doc, headerSizeDefault)
	if err != nil && m != nil {
		panic("results are not zero after an error")
	}
	return err
}

// PBKDF2 is pbkdf2 with a hash by name.
func PBKDF2(hashName string, out []byte, password *keymem.Key, salt []byte, iterations int) error {
	newHash, err := hashByName(hashName)
	if err != nil {
		return err
	}
	return pbkdf2(newHash, out, password, salt, iterations)
}

// The anti-forensic splitter.
var (
	AFSplit = afSplit
	AFMerge = afMerge
)

// AFStripes is the number of stripes.
const AFStripes = afStripes

// ExpensiveKDF reports whether a keyslot in metadata asks for more than a
// fuzzer should spend on one input.
func ExpensiveKDF(text []byte) bool {
	doc, err := decodeJSON(text)
	if err != nil {
		return true
	}
	m, err := decodeMetadata(doc, headerSizeDefault)
	if err != nil {
		return false
	}
	for _, k := range m.keyslots {
		d := new(decoder)
		f := k.fields
		f.d = d
		switch kdf := decodeKDF(f.get("kdf")).(type) {
		case argon2KDF:
			if kdf.cost.Memory <= argon2MemoryMax && kdf.cost.Passes <= argon2WorkMax/max(kdf.cost.Memory, 1) && kdf.cost.Passes*kdf.cost.Memory > 4096 {
				return true
			}
		case pbkdf2KDF:
			if kdf.iterations <= iterationsMax && kdf.iterations > 10_000 {
				return true
			}
		}
	}
	return false
}

// RewriteReencryption parses metadata, and if they are those of a rekey, writes
// its state again. Its error begins with "refused" if they are not.
func RewriteReencryption(text []byte) error {
	doc, err := decodeJSON(text)
	if err != nil {
		return fmt.Errorf("refused: %w", err)
	}
	m, err := decodeMetadata(doc, headerSizeDefault)
	if err != nil {
		return fmt.Errorf("refused: %w", err)
	}
	r, err := m.reencryption()
	if err != nil {
		if r.Reencryption != (Reencryption{}) {
			return errors.New("results are not zero after an error")
		}
		return fmt.Errorf("refused: %w", err)
	}
	again := cloneJSON(doc)
	r.place(again)
	m2, err := decodeMetadata(again, headerSizeDefault)
	if err != nil {
		return err
	}
	r2, err := m2.reencryption()
	if err != nil {
		return err
	}
	if r2.Reencryption != r.Reencryption {
		return fmt.Errorf("%+v became %+v", r.Reencryption, r2.Reencryption)
	}
	for _, keepNew := range []bool{false, true} {
		end := cloneJSON(doc)
		r.end(end, keepNew)
		if _, err := decodeMetadata(end, headerSizeDefault); err != nil {
			return err
		}
	}
	return nil
}
