package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Constants of the wide implementations.
var (
	wrap2    Mem // 0x87 in every quadword
	ordinals Mem // 0 to 7, each as a block
)

func vaesData() {
	wrap2 = GLOBL("wrap2", RODATA|NOPTR)
	for i := range 4 {
		DATA(16*i, U64(0x87))
		DATA(16*i+8, U64(0x87))
	}
	ordinals = GLOBL("ordinals", RODATA|NOPTR)
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
	a, w := loadArgs(), newWalk()
	keys := dataKeys(inverse)
	const vector = 2 * block

	var (
		data     [batch]reg.VecPhysical // Y0 to Y7
		first    = reg.Y8               // first round key, twice
		final    = reg.Y9               // last round key, twice
		roundKey = reg.Y10
		iv       = reg.Y11 // twice
		shift    = reg.X12
	)
	for i := range data {
		data[i] = ymm(i)
	}
	at := func(base reg.Register, i int) Mem { return Mem{Base: base, Disp: vector * i} }
	prepare := func(i int) []func() {
		m := at(w.next, i)
		return append(w.chain.next(m), w.chain.next(m.Offset(block))...)
	}

	// The frame: sectors' first tweaks, a ninth that is read and not used, room
	// to the next vector, and two groups of tweaks.
	const used = batch/2 + 1 + 2*batch
	frame := AllocLocal(used * vector)
	firstTweaks := func(i int) Mem { return frame.Offset(vector * i) }
	LEAQ(frame.Offset((batch+1)*block), w.end)
	LEAQ(firstTweaks(batch/2+1), w.current)
	LEAQ(firstTweaks(batch/2+1+batch), w.next)

	w.setPerSec(a, vector)
	VMOVQ(a.shift, shift)
	VBROADCASTI128(a.key(keys, 0), first)
	VBROADCASTI128(a.key(keys, lastKey), final)

	Label("tweaks")
	VMOVQ(a.iv, iv.AsX())
	VINSERTI128(U8(1), iv.AsX(), iv, iv)
	VBROADCASTI128(a.key(tweakKeys, 0), roundKey)
	for i, d := range data[:batch/2] {
		VMOVDQU(ordinals.Offset(vector*i), d)
		VPSLLQ(shift, d, d)
		VPADDQ(iv, d, d)
		VPXOR(roundKey, d, d)
	}
	// perSec is twice the tweak's step from sector to sector.
	LEAQ(Mem{Base: a.iv, Index: w.perSec, Scale: batch / 2}, a.iv)
	avxRounds(a, tweakKeys, data[:batch/2], roundKey, VAESENC, "tweaks", nil)
	VBROADCASTI128(a.key(tweakKeys, lastKey), roundKey)
	for i, d := range data[:batch/2] {
		VAESENCLAST(roundKey, d, d)
		VMOVDQU(d, firstTweaks(i))
	}
	w.start(prepare, batch)

	Label("group")
	w.advance()
	for i, d := range data {
		VPXOR(at(a.src, i), first, d)
		VPXOR(at(w.current, i), d, d)
	}
	avxRounds(a, keys, data[:], roundKey, round, "data", prepare)
	for i, d := range data {
		last(final, d, d)
		VPXOR(at(w.current, i), d, d)
		VMOVDQU(d, at(a.dst, i))
	}
	w.loop(a, batch*vector)

	w.chain.wipe()
	VPXOR(data[0], data[0], data[0])
	for i := range used {
		VMOVDQU(data[0], firstTweaks(i))
	}
	VZEROALL()
	RET()
}

// avxRounds is sseRounds for vectors of two blocks.
func avxRounds(a args, keys int, data []reg.VecPhysical, roundKey reg.VecPhysical, round func(k, from, to Op), label string, between func(i int) []func()) {
	a.fewRounds(label + "128")
	for i := 1; i < lastKey; i++ {
		if i == skipped+1 {
			Label(label + "128")
		}
		var others []func()
		if j := 2 * (i - skipped - 1); between != nil && 0 <= j && j < batch {
			others = append(between(j), between(j+1)...)
		}
		VBROADCASTI128(a.key(keys, i), roundKey)
		for _, d := range data {
			round(roundKey, d, d)
			if len(others) > 0 {
				k := min(4, len(others))
				all(others[:k])
				others = others[k:]
			}
		}
	}
}
