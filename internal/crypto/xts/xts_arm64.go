//go:build !purego

package xts

import (
	"encoding/binary"

	"golang.org/x/sys/cpu"
)

// schedule is the expanded key of the assembly, in arm64.s.
type schedule struct {
	roundKeys
	words [4 * maxRoundKeys]uint32 // working space of expand
}

func implementations() []implementation {
	if cpu.ARM64.HasAES {
		return []implementation{armv8CE, portable}
	}
	return []implementation{portable}
}

func (c *Cipher) expandAssembly(key []byte) {
	s, half := c.schedule(), len(key)/2
	s.rounds = uint64(half/4 + 6)
	s.expand(&s.encrypt, key[:half])
	s.expand(&s.tweak, key[half:])
	clear(s.words[:])
	// The equivalent inverse cipher has the round keys in reverse, those between
	// the first and the last with inverse mix columns.
	first := maxRoundKeys - int(s.rounds) // of those between
	s.decrypt[0], s.decrypt[maxRoundKeys-1] = s.encrypt[maxRoundKeys-1], s.encrypt[0]
	for i := first; i < maxRoundKeys-1; i++ {
		invMixColumnsCE(&s.decrypt[i], &s.encrypt[first+maxRoundKeys-2-i])
	}
}

func (s *schedule) expand(keys *[maxRoundKeys][blockSize]byte, key []byte) {
	w := s.words[:4*(s.rounds+1)]
	expandWords(w, key, subWordCE)
	for i := range int(s.rounds) + 1 {
		at := i
		if i > 0 {
			at += maxRoundKeys - 1 - int(s.rounds)
		}
		for j := range 4 {
			binary.LittleEndian.PutUint32(keys[at][4*j:], w[4*i+j])
		}
	}
}

func (implementation) encryptCall(s, dst, src *byte, n int, iv uint64, shift int) {
	encryptCE(s, dst, src, n, iv, shift)
}

func (implementation) decryptCall(s, dst, src *byte, n int, iv uint64, shift int) {
	decryptCE(s, dst, src, n, iv, shift)
}

// encryptCE encrypts n bytes, a whole number of sectors of 512<<shift bytes.
//
//go:noescape
func encryptCE(s, dst, src *byte, n int, iv uint64, shift int)

//go:noescape
func decryptCE(s, dst, src *byte, n int, iv uint64, shift int)

// subWordCE applies the S-box to the four bytes of w.
//
//go:noescape
func subWordCE(w *uint32)

//go:noescape
func invMixColumnsCE(dst, src *[blockSize]byte)
