package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Constants of the wide implementations.
var (
	wrap2   Mem // 0x87 in every block
	sector2 Mem // tweak numbers of eight sectors, two in a row
)

func vaesData() {
	wrap2 = GLOBL("wrap2", RODATA|NOPTR)
	for i := range 4 {
		DATA(16*i, U64(0x87))
		DATA(16*i+8, U64(0x87))
	}
	sector2 = GLOBL("ordinal", RODATA|NOPTR)
	for i := range batch {
		DATA(16*i, U64(i))
		DATA(16*i+8, U64(0))
	}
}

// vaes256 writes the implementation for VAES and AVX2: eight vectors of two
// blocks at a time.
func vaes256(inverse bool) {
	round, last := VAESENC, VAESENCLAST
	if inverse {
		round, last = VAESDEC, VAESDECLAST
	}
	TEXT(name(inverse, "VAES256"), NOSPLIT, signature)
	Pragma("noescape")
	a := loadArgs()
	keys := dataKeys(inverse)
	const vector = 2 * block

	var (
		data     [batch]reg.VecPhysical // Y0 to Y7
		tweak    = reg.Y8               // of the next two blocks: T, T x
		carry    = reg.Y9
		wrapped  = reg.Y10
		wrap     = reg.Y11 // wrap2
		first    = reg.Y12 // first round key, twice
		final    = reg.Y13 // last round key, twice
		roundKey = reg.Y14
		masked   = reg.Y15

		sector = reg.R11 // first tweak of the current sector
		groups = reg.R12 // of eight vectors, left in the sector
		perSec = reg.R13 // of eight vectors, in a sector
	)
	for i := range data {
		data[i] = ymm(i)
	}
	frame := AllocLocal(batch*block + batch*vector)
	sectors := func(i int) Mem { return frame.Offset(vector * i) }           // first tweaks, two in a row
	masks := func(i int) Mem { return frame.Offset(batch*block + vector*i) } // tweak + final

	MOVQ(a.unit, perSec)
	ADDQ(perSec, perSec)
	VMOVDQU(wrap2, wrap)
	VBROADCASTI128(a.key(keys, 0), first)
	VBROADCASTI128(a.key(keys, lastKey), final)

	Label("tweaks")
	VMOVQ(a.iv, reg.X8)
	VINSERTI128(U8(1), reg.X8, tweak, tweak)
	VMOVQ(reg.RCX, reg.X9)
	VBROADCASTI128(a.key(tweakKeys, 0), roundKey)
	for i, d := range data[:batch/2] {
		VMOVDQU(sector2.Offset(vector*i), d)
		VPSLLQ(reg.X9, d, d)
		VPADDQ(tweak, d, d)
		VPXOR(roundKey, d, d)
	}
	LEAQ(Mem{Base: a.iv, Index: a.unit, Scale: batch}, a.iv)
	avxRounds(a, tweakKeys, data[:batch/2], roundKey, VAESENC, "tweaks")
	VBROADCASTI128(a.key(tweakKeys, lastKey), roundKey)
	for i, d := range data[:batch/2] {
		VAESENCLAST(roundKey, d, d)
		VMOVDQU(d, sectors(i))
	}
	LEAQ(sectors(0), sector)

	Label("sector")
	// T and T x.
	VMOVDQU(Mem{Base: sector}, reg.X8)
	VPSHUFD(U8(0x13), reg.X8, reg.X9)
	VPSRAD(U8(31), reg.X9, reg.X9)
	VPAND(poly, reg.X9, reg.X9)
	VPADDQ(reg.X8, reg.X8, reg.X10)
	VPXOR(reg.X9, reg.X10, reg.X10)
	VINSERTI128(U8(1), reg.X10, tweak, tweak)
	MOVQ(perSec, groups)

	Label("group")
	for i, d := range data {
		VPXOR(Mem{Base: a.src, Disp: vector * i}, tweak, d)
		VPXOR(final, tweak, masked)
		VPXOR(first, d, d)
		VMOVDQU(masked, masks(i))
		// tweak times x^2.
		VPSRLQ(U8(62), tweak, carry)
		VPSLLQ(U8(2), tweak, tweak)
		VPCLMULQDQ(U8(0x01), wrap, carry, wrapped)
		VPSLLDQ(U8(8), carry, carry)
		VPXOR(wrapped, tweak, tweak)
		VPXOR(carry, tweak, tweak)
	}
	avxRounds(a, keys, data[:], roundKey, round, "data")
	for i, d := range data {
		last(masks(i), d, d)
		VMOVDQU(d, Mem{Base: a.dst, Disp: vector * i})
	}
	ADDQ(U32(batch*vector), a.src)
	ADDQ(U32(batch*vector), a.dst)
	SUBQ(U32(batch*vector), a.left)
	DECQ(groups)
	JNZ(LabelRef("group"))

	TESTQ(a.left, a.left)
	JZ(LabelRef("done"))
	ADDQ(U8(block), sector)
	LEAQ(masks(0), reg.R10)
	CMPQ(sector, reg.R10)
	JNE(LabelRef("sector"))
	JMP(LabelRef("tweaks"))

	Label("done")
	VPXOR(data[0], data[0], data[0])
	for i := range batch/2 + batch {
		VMOVDQU(data[0], frame.Offset(vector*i))
	}
	VZEROALL()
	RET()
}

// avxRounds applies the rounds between the first and the last to all of data.
func avxRounds(a args, keys int, data []reg.VecPhysical, roundKey reg.VecPhysical, round func(k, from, to Op), label string) {
	a.fewRounds(label + "128")
	for i := 1; i < lastKey; i++ {
		if i == skipped+1 {
			Label(label + "128")
		}
		VBROADCASTI128(a.key(keys, i), roundKey)
		for _, d := range data {
			round(roundKey, d, d)
		}
	}
}
