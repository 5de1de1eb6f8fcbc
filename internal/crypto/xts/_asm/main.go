// Command _asm writes the amd64 assembly of package xts.
//
// The function is AES-XTS of IEEE Std 1619-2018. Every implementation here is
// of one shape:
//
//  1. The tweaks of the next eight sectors are encrypted together, because one
//     alone would wait for the latency of every AES round.
//  2. A sector is done in batches of eight vectors: the tweaks T x^i of a batch
//     are derived from the one before, added to the input with the first round
//     key, then come the rounds, eight AES instructions at a time, which is as
//     many as a core can have in flight.
//
// Multiplication by x^k in GF(2^128) (k < 64) is a shift by k bits; the k bits
// shifted out at the top come back multiplied by the polynomial's low part,
// 0x87. Vectors of several blocks hold T, T x, T x^2, ... and are multiplied
// by x^(blocks in a vector).
//
// Sources: S. Gueron, "Intel Advanced Encryption Standard (AES) New
// Instructions Set", white paper, revision 3.01, 2012 (instructions, key
// expansion, equivalent inverse cipher); N. Drucker, S. Gueron, V. Krasnov,
// "Making AES great again: the forthcoming vectorized AES instruction", IACR
// ePrint 2018/392 (VAES); IEEE Std 1619-2018, section 5.2 (multiplication).
//
// All registers that held keys, tweaks or data are zeroed before the return,
// and so is the stack frame.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Layout of the Go type schedule. The first round key is at index 0, the last
// at 14, and those between end at 13, so that AES-128, which has four fewer,
// skips indices 1 to 4.
const (
	block     = 16
	roundKeys = 15
	lastKey   = roundKeys - 1
	skipped   = 4

	encryptKeys = 0
	decryptKeys = encryptKeys + roundKeys*block
	tweakKeys   = decryptKeys + roundKeys*block
	roundsField = tweakKeys + roundKeys*block
)

// batch is how many vectors, and how many sectors' first tweaks, are computed
// side by side.
const batch = 8

func main() {
	ConstraintExpr("amd64,!purego")
	polyData()
	vaesData()
	cpuid7()
	expand()
	for _, inverse := range []bool{false, true} {
		aesni(inverse)
		vaes256(inverse)
		vaes512(inverse)
	}
	Generate()
}

// args are the arguments of a function that crypts sectors, in registers.
type args struct {
	schedule, dst, src, left, iv, unit reg.GPPhysical
}

// signature of a function that crypts n > 0 bytes, n a multiple of the sector
// size, which is 512 << shift bytes.
const signature = "func(s, dst, src *byte, n int, iv uint64, shift int)"

// loadArgs loads what stays in registers: shift is turned into its unit, the
// step of the tweak from sector to sector.
func loadArgs() args {
	a := args{reg.RAX, reg.RDI, reg.RSI, reg.RDX, reg.R8, reg.R9}
	Load(Param("s"), a.schedule)
	Load(Param("dst"), a.dst)
	Load(Param("src"), a.src)
	Load(Param("n"), a.left)
	Load(Param("iv"), a.iv)
	Load(Param("shift"), reg.RCX)
	MOVQ(U32(1), a.unit)
	SHLQ(reg.CL, a.unit)
	return a
}

// name returns the name of the function for one direction.
func name(inverse bool, suffix string) string {
	if inverse {
		return "decrypt" + suffix
	}
	return "encrypt" + suffix
}

// dataKeys returns where the keys for one direction are.
func dataKeys(inverse bool) int {
	if inverse {
		return decryptKeys
	}
	return encryptKeys
}

// key is round key i of the expanded key at offset keys.
func (a args) key(keys, i int) Mem { return Mem{Base: a.schedule, Disp: keys + block*i} }

// fewRounds jumps to label if the key is of AES-128.
func (a args) fewRounds(label string) {
	CMPQ(Mem{Base: a.schedule, Disp: roundsField}, U8(10))
	JEQ(LabelRef(label))
}

// cpuid7 writes the one query that golang.org/x/sys/cpu has no answer for.
func cpuid7() {
	TEXT("cpuid7ECX", NOSPLIT, "func() uint32")
	Doc("cpuid7ECX returns ECX of CPUID leaf 7, subleaf 0.")
	MOVL(U32(7), reg.EAX)
	XORL(reg.ECX, reg.ECX)
	CPUID()
	Store(reg.ECX, ReturnIndex(0))
	RET()
}
