package xts

import "encoding/binary"

// portableEncrypt implements [Cipher.Encrypt] in plain Go.
func (s *bitsliced) portableEncrypt(dst, src []byte, iv uint64, sectorSize int) {
	s.sectors(dst, src, iv, sectorSize, false)
}

// portableDecrypt implements [Cipher.Decrypt] in plain Go.
func (s *bitsliced) portableDecrypt(dst, src []byte, iv uint64, sectorSize int) {
	s.sectors(dst, src, iv, sectorSize, true)
}

// sectors makes the first tweaks of four sectors together.
func (s *bitsliced) sectors(dst, src []byte, iv uint64, sectorSize int, inverse bool) {
	step := uint64(sectorSize / TweakUnit)
	for len(src) > 0 {
		var first blocks
		for i := range first {
			first[i][0] = iv
			iv += step
		}
		first.encrypt(s.tweak[:s.rounds+1])
		for i := 0; i < len(first) && len(src) > 0; i++ {
			s.sector(dst[:sectorSize], src[:sectorSize], first[i], inverse)
			dst, src = dst[sectorSize:], src[sectorSize:]
		}
	}
}

func (s *bitsliced) sector(dst, src []byte, tweak [2]uint64, inverse bool) {
	const n = len(blocks{}) * blockSize
	for ; len(src) >= n; dst, src = dst[n:], src[n:] {
		var t, b blocks
		for i := range b {
			t[i] = tweak
			tweak = double(tweak)
			b[i][0] = binary.LittleEndian.Uint64(src[blockSize*i:]) ^ t[i][0]
			b[i][1] = binary.LittleEndian.Uint64(src[blockSize*i+8:]) ^ t[i][1]
		}
		if inverse {
			b.decrypt(s.data[:s.rounds+1])
		} else {
			b.encrypt(s.data[:s.rounds+1])
		}
		for i := range b {
			binary.LittleEndian.PutUint64(dst[blockSize*i:], b[i][0]^t[i][0])
			binary.LittleEndian.PutUint64(dst[blockSize*i+8:], b[i][1]^t[i][1])
		}
	}
}

// double multiplies by x in GF(2^128) with the polynomial
// x^128 + x^7 + x^2 + x + 1.
func double(t [2]uint64) [2]uint64 {
	return [2]uint64{t[0]<<1 ^ -(t[1]>>63)&0x87, t[1]<<1 | t[0]>>63}
}
