// Command _asm writes the amd64 assembly of package xts.
//
// The function is AES-XTS of IEEE Std 1619-2018. Every implementation here is
// of one shape:
//
//  1. The tweaks of the next eight sectors are encrypted together, because one
//     alone would wait for the latency of every AES round.
//  2. A sector is done in groups of eight vectors: input, plus tweaks, plus the
//     first round key; then the rounds, eight AES instructions at a time, which
//     is as many as a core can have in flight; then the tweaks again. Between
//     the AES instructions of a group stand those that make the tweaks T x^i
//     of the next group: in general registers for the narrow implementations,
//     because vector instructions take the units that AES needs; in vector
//     registers for AVX-512, which would be waiting for them.
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
	vaesData()
	powersData()
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
	schedule, dst, src, left, iv reg.GPPhysical
	shift                        reg.GPPhysical // overwritten later
}

// signature of a function that crypts n > 0 bytes, n a multiple of the sector
// size, which is 512 << shift bytes.
const signature = "func(s, dst, src *byte, n int, iv uint64, shift int)"

func loadArgs() args {
	a := args{reg.RAX, reg.RDI, reg.RSI, reg.RDX, reg.R8, reg.RCX}
	Load(Param("s"), a.schedule)
	Load(Param("dst"), a.dst)
	Load(Param("src"), a.src)
	Load(Param("n"), a.left)
	Load(Param("iv"), a.iv)
	Load(Param("shift"), a.shift)
	return a
}

// walk is how a function goes through its sectors: in groups of eight vectors,
// of which the tweaks of one are made while the one before is in work.
type walk struct {
	sector  reg.GPPhysical // where the next sector's first tweak is
	end     reg.GPPhysical // sector, when the first tweaks are used up
	groups  reg.GPPhysical // left in the sector
	perSec  reg.GPPhysical // groups in a sector
	current reg.GPPhysical // tweaks of the group in work
	next    reg.GPPhysical // tweaks of the group after it
	chain   chain
}

func newWalk() walk {
	return walk{
		sector: reg.R11, end: reg.R9, groups: reg.R12, perSec: reg.R13, current: reg.RBX, next: reg.R15,
		chain: chain{lo: reg.RCX, hi: reg.R14, carry: reg.R10},
	}
}

// setPerSec computes perSec for vectors of so many bytes.
func (w walk) setPerSec(a args, vector int) {
	MOVQ(U32(512/batch/vector), w.perSec)
	SHLQ(reg.CL, w.perSec)
}

// start begins with the first sector of eight, whose first tweaks were stored.
func (w walk) start(prepare func(i int) []func(), n int) {
	LEAQ(Mem{Base: w.end, Disp: -batch * block}, w.sector)
	w.chain.load(Mem{Base: w.sector, Disp: -block})
	for i := range n {
		all(prepare(i))
	}
	MOVQ(w.perSec, w.groups)
}

// advance goes on to the next group and lets the chain begin at the next
// sector where it must.
func (w walk) advance() {
	XCHGQ(w.current, w.next)
	DECQ(w.groups)
	JNZ(LabelRef("same"))
	Comment("The group after this one is of the next sector, or is not used if this is the eighth.")
	w.chain.load(Mem{Base: w.sector})
	ADDQ(U8(block), w.sector)
	MOVQ(w.perSec, w.groups)
	Label("same")
}

// loop jumps back if bytes are left after a group of so many.
func (w walk) loop(a args, bytes int) {
	SUBQ(U32(bytes), a.left)
	JZ(LabelRef("done"))
	ADDQ(U32(bytes), a.src)
	ADDQ(U32(bytes), a.dst)
	CMPQ(w.sector, w.end)
	JNE(LabelRef("group"))
	JMP(LabelRef("tweaks"))
	Label("done")
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

// chain is the next tweak of a sector, in two general registers: doubling
// there leaves the vector units to AES.
type chain struct {
	lo, hi, carry reg.GPPhysical
}

// load makes the chain start at the tweak in m.
func (c chain) load(m Mem) {
	MOVQ(m, c.lo)
	MOVQ(m.Offset(8), c.hi)
}

// next gives the instructions that store the tweak to m and double it.
func (c chain) next(m Mem) []func() {
	return []func(){
		func() { MOVQ(c.lo, m) },
		func() { MOVQ(c.hi, m.Offset(8)) },
		func() { MOVQ(c.hi, c.carry) },
		func() { SARQ(U8(63), c.carry) },
		func() { ANDL(U32(0x87), c.carry.As32()) },
		func() {
			ADDQ(c.lo, c.lo)
			ADCQ(c.hi, c.hi)
		},
		func() { XORQ(c.carry, c.lo) },
	}
}

func (c chain) wipe() {
	XORQ(c.lo, c.lo)
	XORQ(c.hi, c.hi)
}

func all(instructions []func()) {
	for _, f := range instructions {
		f()
	}
}
