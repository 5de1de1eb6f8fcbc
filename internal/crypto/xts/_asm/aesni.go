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
	a, w := loadArgs(), newWalk()
	keys := dataKeys(inverse)

	var (
		data     [batch]reg.VecPhysical // X0 to X7
		first    = reg.X8               // first round key
		final    = reg.X9               // last round key
		roundKey = reg.X10
	)
	for i := range data {
		data[i] = xmm(i)
	}
	at := func(base reg.Register, i int) Mem { return Mem{Base: base, Disp: block * i} }
	prepare := func(i int) []func() { return w.chain.next(at(w.next, i)) }

	// The frame: sectors' first tweaks, a ninth that is read and not used, and
	// two groups of tweaks; all aligned to 16 bytes. SP is a multiple of 8.
	const used = batch + 1 + 2*batch
	AllocLocal(used*block + 8)
	LEAQ(Mem{Base: reg.StackPointer, Disp: 8 + (batch+1)*block}, w.end)
	ANDQ(I8(-block), w.end)
	firstTweak := func(i int) Mem { return at(w.end, i-batch-1) }
	MOVQ(w.end, w.current)
	LEAQ(at(w.end, batch), w.next)

	w.setPerSec(a, block)
	MOVO(a.key(keys, 0), first)
	MOVO(a.key(keys, lastKey), final)

	Label("tweaks")
	unit := w.chain.carry
	MOVQ(w.perSec, unit)
	SHRQ(U8(2), unit)
	MOVO(a.key(tweakKeys, 0), roundKey)
	for _, d := range data {
		MOVQ(a.iv, d)
		ADDQ(unit, a.iv)
		PXOR(roundKey, d)
	}
	sseRounds(a, tweakKeys, data[:], roundKey, AESENC, "tweaks", nil)
	MOVO(a.key(tweakKeys, lastKey), roundKey)
	for i, d := range data {
		AESENCLAST(roundKey, d)
		MOVO(d, firstTweak(i))
	}
	w.start(prepare, batch)

	Label("group")
	w.advance()
	for i, d := range data {
		MOVOU(at(a.src, i), d)
		PXOR(first, d)
		PXOR(at(w.current, i), d)
	}
	sseRounds(a, keys, data[:], roundKey, round, "data", prepare)
	for i, d := range data {
		last(final, d)
		PXOR(at(w.current, i), d)
		MOVOU(d, at(a.dst, i))
	}
	w.loop(a, batch*block)

	wipeX(11)
	w.chain.wipe()
	for i := range used {
		MOVO(reg.X0, firstTweak(i))
	}
	RET()
}

// sseRounds applies the rounds between the first and the last to all of data.
// The first four that every key has are interleaved with the instructions that
// between gives, if it is not nil: the core does them while AES instructions
// wait for one another. It is done early, so that the stores are complete when
// the next group loads from there.
func sseRounds(a args, keys int, data []reg.VecPhysical, roundKey reg.VecPhysical, round func(mx, x Op), label string, between func(i int) []func()) {
	a.fewRounds(label + "128")
	for i := 1; i < lastKey; i++ {
		if i == skipped+1 {
			Label(label + "128")
		}
		var others []func()
		if j := 2 * (i - skipped - 1); between != nil && 0 <= j && j < batch {
			others = append(between(j), between(j+1)...)
		}
		MOVO(a.key(keys, i), roundKey)
		for _, d := range data {
			round(roundKey, d)
			if len(others) > 0 {
				k := min(2, len(others))
				all(others[:k])
				others = others[k:]
			}
		}
	}
}
