package xts

// implementation is one way to compute the same function.
type implementation int

const (
	portable   implementation = iota // plain Go, bitsliced
	aesni                            // AES-NI and SSE4.1
	vaesAVX2                         // VAES on 256 bits
	vaesAVX512                       // VAES on 512 bits
	armv8CE                          // the ARMv8 cryptography extension
)

// String returns the name that [NewWith] takes.
func (i implementation) String() string {
	switch i {
	case aesni:
		return "aesni"
	case vaesAVX2:
		return "vaes-avx2"
	case vaesAVX512:
		return "vaes-avx512"
	case armv8CE:
		return "armv8-ce"
	default:
		return "portable"
	}
}
