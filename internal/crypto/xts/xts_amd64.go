//go:build amd64 && !purego

package xts

import (
	"math/bits"
	"unsafe"

	"golang.org/x/sys/cpu"
)

//go:generate sh -c "cd _asm && go run . -out ../amd64.s -stubs ../amd64_stubs.go -pkg xts"

// schedule is the expanded key of the assembly, which knows its layout
// (_asm/main.go). Of each list, the first round key is at index 0, the last at
// 14, and the others end at 13: AES-128 has none at 1 to 4.
type schedule struct {
	encrypt [maxRoundKeys][blockSize]byte // of the first half of the key
	decrypt [maxRoundKeys][blockSize]byte // the same, for the equivalent inverse cipher
	tweak   [maxRoundKeys][blockSize]byte // of the second half
	rounds  uint64                        // 10 or 14
}

const cpuidVAES = 1 << 9 // CPUID leaf 7, ECX

func implementations() []implementation {
	var list []implementation
	x := &cpu.X86
	if x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ && x.HasAVX512F && x.HasAVX512BW {
		list = append(list, vaesAVX512)
	}
	// HasAVX2 tells that there is a leaf 7 and that the system saves the wide
	// registers. x/sys/cpu reports VAES for processors with AVX-512 only.
	if x.HasAVX2 && cpuid7ECX()&cpuidVAES != 0 {
		list = append(list, vaesAVX2)
	}
	if x.HasAES {
		list = append(list, aesni)
	}
	return append(list, portable)
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
	s, half := c.schedule(), len(key)/2
	s.rounds = uint64(half/4 + 6)
	expandKeyAESNI(&s.encrypt, &key[0], half)
	invertKeyAESNI(&s.decrypt, &s.encrypt, half)
	expandKeyAESNI(&s.tweak, &key[half], half)
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
		switch c.impl {
		case vaesAVX512:
			encryptVAES512(s, &dst[0], &src[0], n, iv, shift)
		case vaesAVX2:
			encryptVAES256(s, &dst[0], &src[0], n, iv, shift)
		default:
			encryptAESNI(s, &dst[0], &src[0], n, iv, shift)
		}
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
		switch c.impl {
		case vaesAVX512:
			decryptVAES512(s, &dst[0], &src[0], n, iv, shift)
		case vaesAVX2:
			decryptVAES256(s, &dst[0], &src[0], n, iv, shift)
		default:
			decryptAESNI(s, &dst[0], &src[0], n, iv, shift)
		}
		iv += callMax / TweakUnit
		dst, src = dst[n:], src[n:]
	}
}
