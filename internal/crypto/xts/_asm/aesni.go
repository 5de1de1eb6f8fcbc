package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// aesni writes the implementation for processors with AES-NI and SSE2, eight
// blocks at a time. It uses no AVX.
func aesni(inverse bool) {
	round, last := AESENC, AESENCLAST
	if inverse {
		round, last = AESDEC, AESDECLAST
	}
	TEXT(name(inverse, "AESNI"), NOSPLIT, signature)
	Pragma("noescape")
	a := loadArgs()
	keys := dataKeys(inverse)

	var (
		data     [batch]reg.VecPhysical // X0 to X7
		tweak    = reg.X8               // of the next block
		carry    = reg.X9
		wrap     = reg.X10 // poly
		first    = reg.X11 // first round key
		final    = reg.X12 // last round key
		roundKey = reg.X13
		masked   = reg.X14

		frame  = reg.R10 // aligned to 16 bytes
		sector = reg.R11 // first tweak of the current sector
		groups = reg.R12 // of eight blocks, left in the sector
		perSec = reg.R13 // of eight blocks, in a sector
	)
	for i := range data {
		data[i] = xmm(i)
	}
	AllocLocal(2*batch*block + 8)
	LEAQ(Mem{Base: reg.StackPointer, Disp: 8}, frame)
	ANDQ(I8(-block), frame)
	sectors := func(i int) Mem { return Mem{Base: frame, Disp: block * i} }         // first tweaks
	masks := func(i int) Mem { return Mem{Base: frame, Disp: block * (batch + i)} } // tweak + final

	MOVQ(a.unit, perSec)
	SHLQ(U8(2), perSec)
	MOVOU(poly, wrap)
	MOVO(a.key(keys, 0), first)
	MOVO(a.key(keys, lastKey), final)

	Label("tweaks")
	MOVO(a.key(tweakKeys, 0), roundKey)
	for _, d := range data {
		MOVQ(a.iv, d)
		ADDQ(a.unit, a.iv)
		PXOR(roundKey, d)
	}
	sseRounds(a, tweakKeys, data[:], roundKey, AESENC, "tweaks")
	MOVO(a.key(tweakKeys, lastKey), roundKey)
	for i, d := range data {
		AESENCLAST(roundKey, d)
		MOVO(d, sectors(i))
	}
	MOVQ(frame, sector)

	Label("sector")
	MOVO(Mem{Base: sector}, tweak)
	MOVQ(perSec, groups)

	Label("group")
	for i, d := range data {
		MOVOU(Mem{Base: a.src, Disp: block * i}, d)
		MOVO(tweak, masked)
		PXOR(tweak, d)
		PXOR(final, masked)
		PXOR(first, d)
		MOVO(masked, masks(i))
		// tweak times x: each quadword is doubled; the bit that left the
		// lower one enters the upper one, the bit that left that one is 0x87.
		PSHUFD(U8(0x13), tweak, carry)
		PADDQ(tweak, tweak)
		PSRAL(U8(31), carry)
		PAND(wrap, carry)
		PXOR(carry, tweak)
	}
	sseRounds(a, keys, data[:], roundKey, round, "data")
	for i, d := range data {
		last(masks(i), d)
		MOVOU(d, Mem{Base: a.dst, Disp: block * i})
	}
	ADDQ(U32(batch*block), a.src)
	ADDQ(U32(batch*block), a.dst)
	SUBQ(U32(batch*block), a.left)
	DECQ(groups)
	JNZ(LabelRef("group"))

	TESTQ(a.left, a.left)
	JZ(LabelRef("done"))
	ADDQ(U8(block), sector)
	LEAQ(Mem{Base: frame, Disp: batch * block}, reg.RCX)
	CMPQ(sector, reg.RCX)
	JNE(LabelRef("sector"))
	JMP(LabelRef("tweaks"))

	Label("done")
	wipeX(16)
	for i := range 2 * batch {
		MOVO(reg.X0, Mem{Base: frame, Disp: block * i})
	}
	RET()
}

// sseRounds applies the rounds between the first and the last to all of data.
func sseRounds(a args, keys int, data []reg.VecPhysical, roundKey reg.VecPhysical, round func(mx, x Op), label string) {
	a.fewRounds(label + "128")
	for i := 1; i < lastKey; i++ {
		if i == skipped+1 {
			Label(label + "128")
		}
		MOVO(a.key(keys, i), roundKey)
		for _, d := range data {
			round(roundKey, d)
		}
	}
}

// poly is 0x87, 1: what one bit that leaves the upper or the lower quadword
// adds to the other.
var poly Mem

func polyData() {
	poly = GLOBL("poly", RODATA|NOPTR)
	DATA(0, U64(0x87))
	DATA(8, U64(1))
}
