package xts

import "encoding/binary"

// expandWords is the key expansion of FIPS 197 section 5.2: it fills w, the
// little-endian words of all round keys, from a key of 16 or 32 bytes. subWord
// applies the S-box to the four bytes of a word.
func expandWords(w []uint32, key []byte, subWord func(*uint32)) {
	n := len(key) / 4
	for i := range n {
		w[i] = binary.LittleEndian.Uint32(key[4*i:])
	}
	rcon := uint32(1)
	for i := n; i < len(w); i++ {
		w[i] = w[i-1]
		switch {
		case i%n == 0:
			w[i] = w[i]>>8 | w[i]<<24
			subWord(&w[i])
			w[i] ^= rcon
			rcon = rcon<<1 ^ rcon>>7*0x11B
		case n > 6 && i%n == 4:
			subWord(&w[i])
		}
		w[i] ^= w[i-n]
	}
}
