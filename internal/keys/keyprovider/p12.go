package keyprovider

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"strongroom/internal/crypto/keymem"
)

// Sizes in a p12File, in bytes.
const (
	p12SaltSize   = 16
	p12HeaderSize = 16                                      // of a PKCS#8 Ed25519 private key
	p12PlainSize  = p12HeaderSize + KDKSize + aes.BlockSize // with padding
)

// pkcs8Header is what stands before the 32 bytes of an Ed25519 private key in
// PKCS#8 (RFC 8410). It is the container of a KDK because every tool takes
// it; the KDK signs nothing.
var pkcs8Header = [p12HeaderSize]byte{0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20}

// The object identifiers of docs/spec/native-backup.md.
var (
	oidData             = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidShroudedKeyBag   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 2}
	oidPBES2            = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	oidHMACWithSHA256   = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}
	oidAES256CBC        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
	oidSHA256           = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidFriendlyName     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 20}
	oidUnstructuredName = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 2}
)

const tagBMPString = cbasn1.Tag(30)

// p12File is a PKCS#12 file (RFC 7292) of the one shape that
// docs/spec/native-backup.md allows: all that may differ between two backups.
//
// The PKCS#12 library is not used, because it takes passwords as strings, keeps
// keys in memory that it does not wipe, and runs as many iterations as a file
// asks for.
type p12File struct {
	name        string // friendlyName of the key
	description string // unstructuredName of the key

	// PBES2: PBKDF2-HMAC-SHA-256, AES-256-CBC.
	salt       [p12SaltSize]byte
	iterations int
	iv         [aes.BlockSize]byte
	ciphertext [p12PlainSize]byte

	macSalt       [p12SaltSize]byte
	macIterations int
	mac           [sha256.Size]byte
}

// encrypt sets the ciphertext: kdk in PKCS#8, padded.
func (f *p12File) encrypt(password, kdk *keymem.Key) error {
	plain, err := keymem.New(p12PlainSize)
	if err != nil {
		return err
	}
	defer plain.Close()
	b := plain.Bytes()
	copy(b, pkcs8Header[:])
	copy(b[p12HeaderSize:], kdk.Bytes())
	for i := p12HeaderSize + KDKSize; i < len(b); i++ {
		b[i] = aes.BlockSize
	}
	block, err := f.cipher(password)
	if err != nil {
		return err
	}
	cipher.NewCBCEncrypter(block, f.iv[:]).CryptBlocks(f.ciphertext[:], b)
	return nil
}

// open returns the KDK. It returns [ErrWrongPassword] if neither the MAC nor
// the begin of the plaintext is right, and [ErrCorruptBackup] if only one of
// them is: then the password is the right one.
func (f *p12File) open(password *keymem.Key) (*keymem.Key, error) {
	mac, err := f.computeMAC(password)
	if err != nil {
		return nil, err
	}
	macRight := hmac.Equal(mac[:], f.mac[:])

	plain, err := keymem.New(p12PlainSize)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	block, err := f.cipher(password)
	if err != nil {
		return nil, err
	}
	b := plain.Bytes()
	cipher.NewCBCDecrypter(block, f.iv[:]).CryptBlocks(b, f.ciphertext[:])
	headerRight := bytes.Equal(b[:p12HeaderSize], pkcs8Header[:])

	switch {
	case !macRight && !headerRight:
		return nil, ErrWrongPassword
	case !macRight || !headerRight:
		return nil, ErrCorruptBackup
	}
	for _, padding := range b[p12HeaderSize+KDKSize:] {
		if padding != aes.BlockSize {
			return nil, ErrCorruptBackup
		}
	}
	return keymem.Take(b[p12HeaderSize : p12HeaderSize+KDKSize])
}

// cipher returns the cipher of PBES2 (RFC 8018); the password is UTF-8.
func (f *p12File) cipher(password *keymem.Key) (cipher.Block, error) {
	var utf8Password []byte
	if password != nil {
		utf8Password = password.Bytes()
	}
	// The library wants the password as a string, which cannot be wiped.
	key, err := pbkdf2.Key(sha256.New, string(utf8Password), f.salt[:], f.iterations, 32)
	if err != nil {
		return nil, err
	}
	defer keymem.Wipe(key)
	return aes.NewCipher(key)
}

// computeMAC returns the MAC over the contents.
func (f *p12File) computeMAC(password *keymem.Key) ([sha256.Size]byte, error) {
	key, err := p12MACKey(password, f.macSalt[:], f.macIterations)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer key.Close()
	h := hmac.New(sha256.New, key.Bytes())
	h.Write(f.authenticatedSafe())
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// p12MACKey derives the key of the MAC: RFC 7292, appendix B.2, with SHA-256
// and ID 3. One block of output is enough.
func p12MACKey(password *keymem.Key, salt []byte, iterations int) (*keymem.Key, error) {
	const v = sha256.BlockSize
	// UTF-16 has at most two bytes for each byte of UTF-8, and two zero bytes
	// at the end.
	passwordMax := 2
	if password != nil {
		passwordMax += 2 * password.Len()
	}
	input, err := keymem.New(v + v + (passwordMax+v-1)/v*v)
	if err != nil {
		return nil, err
	}
	defer input.Close()
	b := input.Bytes()
	for i := range v {
		b[i] = 3
		b[v+i] = salt[i%len(salt)]
	}
	n := 0
	if password != nil {
		n = putUTF16(b[2*v:], password.Bytes())
	}
	n += 2 // the zero bytes
	filled := (n + v - 1) / v * v
	for i := n; i < filled; i++ {
		b[2*v+i] = b[2*v+i-n]
	}
	sum := sha256.Sum256(b[:2*v+filled])
	for range iterations - 1 {
		sum = sha256.Sum256(sum[:])
	}
	return keymem.Take(sum[:])
}

// putUTF16 writes UTF-8 as big-endian UTF-16 and returns its length in bytes.
func putUTF16(dst, text []byte) int {
	n := 0
	put := func(unit uint16) {
		dst[n], dst[n+1] = byte(unit>>8), byte(unit)
		n += 2
	}
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		text = text[size:]
		if r1, r2 := utf16.EncodeRune(r); r1 != utf8.RuneError {
			put(uint16(r1))
			put(uint16(r2))
			continue
		}
		put(uint16(r))
	}
	return n
}

// parseP12 reads a file. It takes the fields from where they must be and then
// compares the whole with what encode makes of them, so that exactly one
// encoding of a file is accepted.
func parseP12(data []byte) (*p12File, error) {
	if len(data) > BackupMax {
		return nil, fmt.Errorf("%w: %d bytes are too long", ErrCorruptBackup, len(data))
	}
	r := derReader{ok: true}
	pfx := r.enter(data, cbasn1.SEQUENCE)
	pfx = r.after(pfx) // version
	content, pfx := r.enterNext(pfx, cbasn1.SEQUENCE)
	safes := r.enter(r.enter(r.after(content), context0), cbasn1.OCTET_STRING)
	safe := r.enter(r.enter(safes, cbasn1.SEQUENCE), cbasn1.SEQUENCE)
	bags := r.enter(r.enter(r.after(safe), context0), cbasn1.OCTET_STRING)
	bag := r.enter(r.enter(bags, cbasn1.SEQUENCE), cbasn1.SEQUENCE)
	value, bag := r.enterNext(r.after(bag), context0)
	attributes := r.enter(bag, cbasn1.SET)

	f := new(p12File)
	encrypted := r.enter(value, cbasn1.SEQUENCE)
	algorithm, encrypted := r.enterNext(encrypted, cbasn1.SEQUENCE)
	r.fill(f.ciphertext[:], encrypted)
	kdf, scheme := r.enterNext(r.enter(r.after(algorithm), cbasn1.SEQUENCE), cbasn1.SEQUENCE)
	kdf = r.enter(r.after(kdf), cbasn1.SEQUENCE)
	r.fill(f.salt[:], kdf)
	f.iterations = r.count(r.after(kdf))
	r.fill(f.iv[:], r.after(r.enter(scheme, cbasn1.SEQUENCE)))

	// DER sorts the attributes by their encodings, so either may be first.
	for len(attributes) > 0 && r.ok {
		var attribute []byte
		attribute, attributes = r.enterNext(attributes, cbasn1.SEQUENCE)
		set := cryptobyte.String(r.enter(r.after(attribute), cbasn1.SET))
		switch {
		case set.PeekASN1Tag(tagBMPString):
			f.name = fromBMP(r.enter(set, tagBMPString))
		default:
			f.description = string(r.enter(set, cbasn1.UTF8String))
		}
	}

	macData := r.enter(pfx, cbasn1.SEQUENCE)
	digest, macData := r.enterNext(macData, cbasn1.SEQUENCE)
	r.fill(f.mac[:], r.after(digest))
	r.fill(f.macSalt[:], macData)
	f.macIterations = r.count(r.after(macData))

	if !r.ok || !bytes.Equal(f.encode(), data) {
		return nil, ErrCorruptBackup
	}
	return f, nil
}

// encode returns the file.
func (f *p12File) encode() []byte {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // PFX
		b.AddASN1Int64(3)
		addData(b, f.authenticatedSafe())
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // MacData
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // DigestInfo
				addAlgorithm(b, oidSHA256, func(b *cryptobyte.Builder) { b.AddASN1NULL() })
				b.AddASN1OctetString(f.mac[:])
			})
			b.AddASN1OctetString(f.macSalt[:])
			b.AddASN1Int64(int64(f.macIterations))
		})
	})
	return b.BytesOrPanic()
}

// authenticatedSafe returns what the MAC covers: one key, encrypted, with its
// attributes.
func (f *p12File) authenticatedSafe() []byte {
	var bags cryptobyte.Builder
	bags.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // SafeContents
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // SafeBag
			b.AddASN1ObjectIdentifier(oidShroudedKeyBag)
			b.AddASN1(context0, f.addEncryptedKey)
			b.AddASN1(cbasn1.SET, f.addAttributes)
		})
	})
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { addData(b, bags.BytesOrPanic()) })
	return b.BytesOrPanic()
}

// addEncryptedKey adds an EncryptedPrivateKeyInfo.
func (f *p12File) addEncryptedKey(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		addAlgorithm(b, oidPBES2, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				addAlgorithm(b, oidPBKDF2, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1OctetString(f.salt[:])
						b.AddASN1Int64(int64(f.iterations))
						addAlgorithm(b, oidHMACWithSHA256, func(b *cryptobyte.Builder) { b.AddASN1NULL() })
					})
				})
				addAlgorithm(b, oidAES256CBC, func(b *cryptobyte.Builder) { b.AddASN1OctetString(f.iv[:]) })
			})
		})
		b.AddASN1OctetString(f.ciphertext[:])
	})
}

// addAttributes adds both attributes in the order of their encodings, as DER
// wants.
func (f *p12File) addAttributes(b *cryptobyte.Builder) {
	name := encodeAttribute(oidFriendlyName, tagBMPString, toBMP(f.name))
	description := encodeAttribute(oidUnstructuredName, cbasn1.UTF8String, []byte(f.description))
	if bytes.Compare(name, description) > 0 {
		name, description = description, name
	}
	b.AddBytes(name)
	b.AddBytes(description)
}

func encodeAttribute(oid asn1.ObjectIdentifier, tag cbasn1.Tag, value []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
			b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes(value) })
		})
	})
	return b.BytesOrPanic()
}

func addAlgorithm(b *cryptobyte.Builder, oid asn1.ObjectIdentifier, addParameters cryptobyte.BuilderContinuation) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		addParameters(b)
	})
}

// addData adds a ContentInfo of type data.
func addData(b *cryptobyte.Builder, content []byte) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidData)
		b.AddASN1(context0, func(b *cryptobyte.Builder) { b.AddASN1OctetString(content) })
	})
}

// toBMP and fromBMP convert a provider's name, which is ASCII. A name that is
// not comes back changed, which parseP12 notices.
func toBMP(name string) []byte {
	b := make([]byte, 2*len(name))
	for i := range len(name) {
		b[2*i+1] = name[i]
	}
	return b
}

func fromBMP(b []byte) string {
	name := make([]byte, len(b)/2)
	for i := range name {
		name[i] = b[2*i+1]
	}
	return string(name)
}

var context0 = cbasn1.Tag(0).Constructed().ContextSpecific()

// derReader walks through DER and remembers the first failure; after it, every
// result is empty.
type derReader struct{ ok bool }

// enter returns the content of the element at the begin of der.
func (r *derReader) enter(der []byte, tag cbasn1.Tag) []byte {
	content, _ := r.enterNext(der, tag)
	return content
}

// enterNext also returns what follows the element.
func (r *derReader) enterNext(der []byte, tag cbasn1.Tag) (content, rest []byte) {
	s, c := cryptobyte.String(der), cryptobyte.String(nil)
	if !s.ReadASN1(&c, tag) {
		r.ok = false
		return nil, nil
	}
	return c, s
}

// after returns what follows the first element of der.
func (r *derReader) after(der []byte) []byte {
	s, c := cryptobyte.String(der), cryptobyte.String(nil)
	if !s.ReadAnyASN1Element(&c, new(cbasn1.Tag)) {
		r.ok = false
		return nil
	}
	return s
}

// fill copies the octet string at the begin of der, which has dst's length.
func (r *derReader) fill(dst, der []byte) {
	content := r.enter(der, cbasn1.OCTET_STRING)
	if len(content) != len(dst) {
		r.ok = false
		return
	}
	copy(dst, content)
}

// count returns the number of iterations at the begin of der.
func (r *derReader) count(der []byte) int {
	s, n := cryptobyte.String(der), int64(0)
	if !s.ReadASN1Integer(&n) || n < 1 || n > backupIterationsMax {
		r.ok = false
		return 0
	}
	return int(n)
}
