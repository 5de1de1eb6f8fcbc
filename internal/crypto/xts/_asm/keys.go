package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// expand writes the key expansion (Gueron, figures 24 to 28). The round keys
// never leave registers but for the schedule.
func expand() {
	TEXT("expandKeyAESNI", NOSPLIT, "func(keys *[15][16]byte, key *byte, n int)")
	Pragma("noescape")
	Doc("expandKeyAESNI writes the round keys of the n bytes of key, 16 or 32.")
	keys, key := Load(Param("keys"), reg.RDI), Load(Param("key"), reg.RSI)
	Load(Param("n"), reg.RCX)
	var (
		even, odd = reg.X0, reg.X1 // the two halves that the last round keys came from
		assist    = reg.X2
		shifted   = reg.X3
	)
	slot := func(i int) Mem { return Mem{Base: keys, Disp: block * i} }
	// next replaces k by the round key that follows it, with the word at
	// position word of AESKEYGENASSIST's result on from.
	next := func(k, from reg.VecPhysical, rcon, word uint8) {
		AESKEYGENASSIST(U8(rcon), from, assist)
		PSHUFD(U8(word), assist, assist)
		MOVO(k, shifted)
		for range 3 {
			PSLLDQ(U8(4), shifted)
			PXOR(shifted, k)
		}
		PXOR(assist, k)
	}
	rcons := []uint8{0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1B, 0x36}

	MOVOU(Mem{Base: key}, even)
	MOVOU(even, slot(0))
	CMPQ(reg.RCX, U8(16))
	JEQ(LabelRef("aes128"))

	MOVOU(Mem{Base: key, Disp: block}, odd)
	MOVOU(odd, slot(1))
	for i := 2; i < roundKeys; i += 2 {
		next(even, odd, rcons[i/2-1], 0xFF)
		MOVOU(even, slot(i))
		if i+1 < roundKeys {
			next(odd, even, 0, 0xAA)
			MOVOU(odd, slot(i+1))
		}
	}
	JMP(LabelRef("wipe"))

	Label("aes128")
	for i, rcon := range rcons {
		next(even, even, rcon, 0xFF)
		MOVOU(even, slot(skipped+1+i))
	}

	Label("wipe")
	wipeX(4)
	RET()

	TEXT("invertKeyAESNI", NOSPLIT, "func(inverse, keys *[15][16]byte, n int)")
	Pragma("noescape")
	Doc("invertKeyAESNI writes the round keys of the equivalent inverse cipher, for a",
		"key of n bytes.")
	inv, keys := Load(Param("inverse"), reg.RDI), Load(Param("keys"), reg.RSI)
	Load(Param("n"), reg.RCX)
	move := func(to, from int, mix bool) {
		MOVOU(Mem{Base: keys, Disp: block * from}, reg.X0)
		if mix {
			AESIMC(reg.X0, reg.X0)
		}
		MOVOU(reg.X0, Mem{Base: inv, Disp: block * to})
	}
	move(0, lastKey, false)
	move(lastKey, 0, false)
	// The keys between are reversed among themselves.
	Comment("The nine middle keys of AES-128 are at 5 to 13, the thirteen of AES-256 at 1 to 13.")
	CMPQ(reg.RCX, U8(16))
	JEQ(LabelRef("aes128"))
	for i := 1; i < lastKey; i++ {
		move(i, lastKey-i, true)
	}
	JMP(LabelRef("wipe"))
	Label("aes128")
	for i := skipped + 1; i < lastKey; i++ {
		move(i, lastKey+skipped-i, true)
	}
	Label("wipe")
	wipeX(1)
	RET()
}

// wipeX zeroes the first n XMM registers.
func wipeX(n int) {
	for i := range n {
		PXOR(xmm(i), xmm(i))
	}
}

func xmm(i int) reg.VecPhysical {
	return []reg.VecPhysical{
		reg.X0, reg.X1, reg.X2, reg.X3, reg.X4, reg.X5, reg.X6, reg.X7,
		reg.X8, reg.X9, reg.X10, reg.X11, reg.X12, reg.X13, reg.X14, reg.X15,
	}[i]
}

func ymm(i int) reg.VecPhysical { return xmm(i).AsY().(reg.VecPhysical) }

func zmm(i int) reg.VecPhysical {
	return []reg.VecPhysical{
		reg.Z0, reg.Z1, reg.Z2, reg.Z3, reg.Z4, reg.Z5, reg.Z6, reg.Z7,
		reg.Z8, reg.Z9, reg.Z10, reg.Z11, reg.Z12, reg.Z13, reg.Z14, reg.Z15,
		reg.Z16, reg.Z17, reg.Z18, reg.Z19, reg.Z20, reg.Z21, reg.Z22, reg.Z23,
		reg.Z24, reg.Z25, reg.Z26, reg.Z27, reg.Z28, reg.Z29, reg.Z30, reg.Z31,
	}[i]
}
