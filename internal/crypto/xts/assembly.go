//go:build (amd64 || arm64) && !purego

package xts

import (
	"math/bits"
	"unsafe"
)

// roundKeys are the round keys in the layout that the assembly knows
// (_asm/main.go, arm64.s). Of each list, the first round key is at index 0, the
// last at 14, and the others end at 13: AES-128 has none at 1 to 4.
type roundKeys struct {
	encrypt [maxRoundKeys][blockSize]byte // of the first half of the key
	decrypt [maxRoundKeys][blockSize]byte // the same, for the equivalent inverse cipher
	tweak   [maxRoundKeys][blockSize]byte // of the second half
	rounds  uint64                        // 10 or 14
}

func (i implementation) scheduleSize() int {
	if i == portable {
		return int(unsafe.Sizeof(bitsliced{}))
	}
	return int(unsafe.Sizeof(schedule{}))
}

func (c *Cipher) schedule() *schedule {
	return (*schedule)(unsafe.Pointer(unsafe.SliceData(c.key.Bytes())))
}

func (c *Cipher) expand(key []byte) {
	if c.impl == portable {
		c.bitsliced().expand(key)
		return
	}
	c.expandAssembly(key)
}

// callMax is the most bytes in one call of assembly, which the runtime cannot
// preempt. It is a whole number of sectors of every size.
const callMax = SectorSizeMax

func (c *Cipher) encrypt(dst, src []byte, iv uint64, sectorSize int) {
	if c.impl == portable {
		c.bitsliced().portableEncrypt(dst, src, iv, sectorSize)
		return
	}
	s := (*byte)(unsafe.Pointer(c.schedule()))
	shift := bits.TrailingZeros(uint(sectorSize / TweakUnit))
	for len(src) > 0 {
		n := min(len(src), callMax)
		c.impl.encryptCall(s, &dst[0], &src[0], n, iv, shift)
		iv += callMax / TweakUnit
		dst, src = dst[n:], src[n:]
	}
}

func (c *Cipher) decrypt(dst, src []byte, iv uint64, sectorSize int) {
	if c.impl == portable {
		c.bitsliced().portableDecrypt(dst, src, iv, sectorSize)
		return
	}
	s := (*byte)(unsafe.Pointer(c.schedule()))
	shift := bits.TrailingZeros(uint(sectorSize / TweakUnit))
	for len(src) > 0 {
		n := min(len(src), callMax)
		c.impl.decryptCall(s, &dst[0], &src[0], n, iv, shift)
		iv += callMax / TweakUnit
		dst, src = dst[n:], src[n:]
	}
}
