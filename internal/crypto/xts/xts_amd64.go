//go:build amd64 && !purego

package xts

import "golang.org/x/sys/cpu"

//go:generate sh -c "cd _asm && go run . -out ../amd64.s -stubs ../amd64_stubs.go -pkg xts"

// schedule is the expanded key of the assembly, in amd64.s.
type schedule struct{ roundKeys }

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

func (c *Cipher) expandAssembly(key []byte) {
	s, half := c.schedule(), len(key)/2
	s.rounds = uint64(half/4 + 6)
	expandKeyAESNI(&s.encrypt, &key[0], half)
	invertKeyAESNI(&s.decrypt, &s.encrypt, half)
	expandKeyAESNI(&s.tweak, &key[half], half)
}

func (i implementation) encryptCall(s, dst, src *byte, n int, iv uint64, shift int) {
	switch i {
	case vaesAVX512:
		encryptVAES512(s, dst, src, n, iv, shift)
	case vaesAVX2:
		encryptVAES256(s, dst, src, n, iv, shift)
	default:
		encryptAESNI(s, dst, src, n, iv, shift)
	}
}

func (i implementation) decryptCall(s, dst, src *byte, n int, iv uint64, shift int) {
	switch i {
	case vaesAVX512:
		decryptVAES512(s, dst, src, n, iv, shift)
	case vaesAVX2:
		decryptVAES256(s, dst, src, n, iv, shift)
	default:
		decryptAESNI(s, dst, src, n, iv, shift)
	}
}
