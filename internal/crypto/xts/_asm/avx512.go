package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Shift counts that turn four copies of T into T x^n ... T x^(n+3), n = 0 and
// 4: to the left, and to the right for the bits that leave a quadword.
var powersLeft, powersRight [2]Mem

func powersData() {
	for h := range 2 {
		powersLeft[h] = GLOBL([]string{"left0", "left4"}[h], RODATA|NOPTR)
		for i := range 8 {
			DATA(8*i, U64(4*h+i/2))
		}
		powersRight[h] = GLOBL([]string{"right0", "right4"}[h], RODATA|NOPTR)
		for i := range 8 {
			DATA(8*i, U64(64-4*h-i/2))
		}
	}
}

// vaes512 writes the implementation for VAES and AVX-512: eight vectors of
// four blocks, which is 512 bytes, at a time. The tweaks of the next group are
// made in registers while the rounds of this one go on.
func vaes512(inverse bool) {
	round, last := VAESENC, VAESENCLAST
	if inverse {
		round, last = VAESDEC, VAESDECLAST
	}
	TEXT(name(inverse, "VAES512"), NOSPLIT, signature)
	Pragma("noescape")
	a, w := loadArgs(), newWalk()
	keys := dataKeys(inverse)
	const vector = 4 * block

	var (
		data, current, next [batch]reg.VecPhysical // Z0 to Z7, tweaks in Z8 to Z15 and Z16 to Z23

		roundKey = reg.Z24
		first    = reg.Z25 // first round key, four times
		final    = reg.Z26 // last round key, four times
		wrap     = reg.Z27 // wrap2
		carry    = reg.Z28
		wrapped  = reg.Z29
		shift    = reg.X30
		base     = reg.Z31 // T of the next group's first block, four times
	)
	for i := range batch {
		data[i], current[i], next[i] = zmm(i), zmm(batch+i), zmm(2*batch+i)
	}
	// prepare makes vector i of next, T x^4i ... T x^(4i+3), from base or from
	// the first two vectors.
	prepare := func(i int) []func() {
		if i < 2 {
			return []func(){
				func() { VPSRLVQ(powersRight[i], base, carry) },
				func() { VPSLLVQ(powersLeft[i], base, next[i]) },
				func() { VPCLMULQDQ(U8(0x01), wrap, carry, wrapped) },
				func() { VPSLLDQ(U8(8), carry, carry) },
				func() { VPTERNLOGQ(U8(0x96), carry, wrapped, next[i]) },
			}
		}
		return timesBytes(uint8(i/2), wrap, next[i%2], next[i], carry)
	}

	// The frame: sectors' first tweaks, and a ninth that is read and not used.
	const used = batch/4 + 1
	frame := AllocLocal(used * vector)
	firstTweaks := func(i int) Mem { return frame.Offset(vector * i) }

	w.setPerSec(a, vector)
	VMOVQ(a.shift, shift)
	VMOVDQU64(wrap2, wrap)
	VBROADCASTI32X4(a.key(keys, 0), first)
	VBROADCASTI32X4(a.key(keys, lastKey), final)
	LEAQ(frame.Offset((batch+1)*block), w.end)

	Label("tweaks")
	VMOVQ(a.iv, base.AsX())
	VSHUFI64X2(U8(0), base, base, base)
	VBROADCASTI32X4(a.key(tweakKeys, 0), roundKey)
	for i, d := range data[:batch/4] {
		VMOVDQU64(ordinals.Offset(vector*i), d)
		VPSLLQ(shift, d, d)
		VPADDQ(base, d, d)
		VPXORQ(roundKey, d, d)
	}
	// perSec is the tweak's step from sector to sector.
	LEAQ(Mem{Base: a.iv, Index: w.perSec, Scale: batch}, a.iv)
	zmmRounds(a, tweakKeys, data[:batch/4], roundKey, VAESENC, "tweaks", nil)
	VBROADCASTI32X4(a.key(tweakKeys, lastKey), roundKey)
	for i, d := range data[:batch/4] {
		VAESENCLAST(roundKey, d, d)
		VMOVDQU64(d, firstTweaks(i))
	}
	VSHUFI64X2(U8(0), data[0], data[0], base)
	for i := range batch {
		all(prepare(i))
	}
	LEAQ(frame.Offset(block), w.sector)
	MOVQ(w.perSec, w.groups)

	Label("group")
	for i, d := range data {
		VMOVDQA64(next[i], current[i])
		VMOVDQU64(Mem{Base: a.src, Disp: vector * i}, d)
		VPTERNLOGQ(U8(0x96), current[i], first, d)
	}
	DECQ(w.groups)
	JNZ(LabelRef("same"))
	Comment("The next group is of the next sector, or is not used if this is the eighth.")
	VBROADCASTI32X4(Mem{Base: w.sector}, base)
	ADDQ(U8(block), w.sector)
	MOVQ(w.perSec, w.groups)
	JMP(LabelRef("rounds"))
	Label("same")
	all(timesBytes(batch*vector/block/8, wrap, base, base, carry))
	Label("rounds")
	zmmRounds(a, keys, data[:], roundKey, round, "data", prepare)
	for i, d := range data {
		last(final, d, d)
		VPXORQ(current[i], d, d)
		VMOVDQU64(d, Mem{Base: a.dst, Disp: vector * i})
	}
	w.loop(a, batch*vector)

	VPXORQ(data[0], data[0], data[0])
	for i := range used {
		VMOVDQU64(data[0], firstTweaks(i))
	}
	for i := 16; i < 32; i++ {
		VPXORQ(zmm(i), zmm(i), zmm(i))
	}
	VZEROALL()
	RET()
}

// timesBytes gives the instructions for to = from x^(8n): a shift by n bytes.
func timesBytes(n uint8, wrap, from, to, carry reg.VecPhysical) []func() {
	return []func(){
		func() { VPSRLDQ(U8(block-n), from, carry) },
		func() { VPSLLDQ(U8(n), from, to) },
		func() { VPCLMULQDQ(U8(0x00), wrap, carry, carry) },
		func() { VPXORQ(carry, to, to) },
	}
}

// zmmRounds is sseRounds for vectors of four blocks.
func zmmRounds(a args, keys int, data []reg.VecPhysical, roundKey reg.VecPhysical, round func(k, from, to Op), label string, between func(i int) []func()) {
	a.fewRounds(label + "128")
	for i := 1; i < lastKey; i++ {
		if i == skipped+1 {
			Label(label + "128")
		}
		var others []func()
		if j := i - skipped - 1; between != nil && 0 <= j && j < batch {
			others = between(j)
		}
		VBROADCASTI32X4(a.key(keys, i), roundKey)
		for _, d := range data {
			round(roundKey, d, d)
			if len(others) > 0 {
				others[0]()
				others = others[1:]
			}
		}
	}
}
