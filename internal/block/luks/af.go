package luks

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"strongroom/internal/crypto/keymem"
)

// The anti-forensic splitter of LUKS1: it spreads a key over so much storage
// that destroying a small part of that destroys the key.
const (
	afStripes = 4000
	afHash    = "sha256" // of keyslots made here
)

// afSplit fills out, afStripes times as long as key, with random stripes and a
// last one from which, with all the others, the key follows.
func afSplit(out, key []byte, hashName string) error {
	rand.Read(out[:len(out)-len(key)])
	return afMix(out[len(out)-len(key):], key, out, hashName)
}

// afMerge is the reverse: it fills key from stripes.
func afMerge(key, stripes []byte, hashName string) error {
	return afMix(key, stripes[len(stripes)-len(key):], stripes, hashName)
}

// afMix sets out = in XOR d, where d is all stripes but the last, each added
// (XOR) and the sum diffused.
func afMix(out, in, stripes []byte, hashName string) error {
	newHash, err := hashByName(hashName)
	if err != nil {
		return err
	}
	sum, err := keymem.New(len(in))
	if err != nil {
		return err
	}
	defer sum.Close()
	d, h := sum.Bytes(), newHash()
	block, err := keymem.New(h.Size())
	if err != nil {
		return err
	}
	defer block.Close()

	var index [4]byte
	for ; len(stripes) > len(in); stripes = stripes[len(in):] {
		for i := range d {
			d[i] ^= stripes[i]
		}
		// Diffuse: every hash-sized piece becomes H(its number || piece).
		for i := 0; i*h.Size() < len(d); i++ {
			piece := d[i*h.Size() : min((i+1)*h.Size(), len(d))]
			binary.BigEndian.PutUint32(index[:], uint32(i))
			h.Reset()
			h.Write(index[:])
			h.Write(piece)
			copy(piece, h.Sum(block.Bytes()[:0]))
		}
	}
	if len(stripes) != len(in) {
		return fmt.Errorf("key material has not a whole number of stripes")
	}
	for i := range out {
		out[i] = in[i] ^ d[i]
	}
	return nil
}
