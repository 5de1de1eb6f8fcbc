//go:build arm64 && !purego

#include "textflag.h"

// AES-XTS with the ARMv8 cryptography extension: eight blocks in work at a
// time, since an AES instruction has a latency of several cycles and one or two
// can start in each. Written by hand: avo, which wrote amd64.s, knows no arm64.
//
// The round keys stay in V8 to V22 (schedule.go tells their order), the tweaks
// of the eight blocks are in V23 to V30. Tweaks are doubled in general
// registers, which leaves the vector units to AES.

#define EACH8(OP, k) \
	OP(k, V0); \
	OP(k, V1); \
	OP(k, V2); \
	OP(k, V3); \
	OP(k, V4); \
	OP(k, V5); \
	OP(k, V6); \
	OP(k, V7)

// One round of one block: AESE and AESD begin with the round key.
#define ENCROUND(k, b) AESE k.B16, b.B16; AESMC b.B16, b.B16
#define DECROUND(k, b) AESD k.B16, b.B16; AESIMC b.B16, b.B16
#define ENCLAST(k, b) AESE k.B16, b.B16
#define DECLAST(k, b) AESD k.B16, b.B16
#define XOR(k, b) VEOR k.B16, b.B16, b.B16

// Rounds 5 to the last, which keys of both sizes have.
#define TAIL8(ROUND, LAST) \
	EACH8(ROUND, V13); \
	EACH8(ROUND, V14); \
	EACH8(ROUND, V15); \
	EACH8(ROUND, V16); \
	EACH8(ROUND, V17); \
	EACH8(ROUND, V18); \
	EACH8(ROUND, V19); \
	EACH8(ROUND, V20); \
	EACH8(LAST, V21); \
	EACH8(XOR, V22)

// Rounds 1 to 4, which AES-128 has not.
#define HEAD8(ROUND) \
	EACH8(ROUND, V9); \
	EACH8(ROUND, V10); \
	EACH8(ROUND, V11); \
	EACH8(ROUND, V12)

#define LOADKEYS(offset) \
	ADD $offset, R0, R15; \
	VLD1.P 64(R15), [V8.B16, V9.B16, V10.B16, V11.B16]; \
	VLD1.P 64(R15), [V12.B16, V13.B16, V14.B16, V15.B16]; \
	VLD1.P 64(R15), [V16.B16, V17.B16, V18.B16, V19.B16]; \
	VLD1 (R15), [V20.B16, V21.B16, V22.B16]

// The first tweak of a sector before it is encrypted: its number.
#define NUMBER(b) \
	VEOR b.B16, b.B16, b.B16; \
	VMOV R4, b.D[0]; \
	ADD R8, R4

// Puts the tweak in R12 (low) and R13 into t, and doubles it.
#define TWEAK(t) \
	VMOV R12, t.D[0]; \
	VMOV R13, t.D[1]; \
	ASR $63, R13, R16; \
	EXTR $63, R12, R13, R13; \
	AND R6, R16, R16; \
	EOR R12<<1, R16, R12

#define TWEAKS8 \
	TWEAK(V23); \
	TWEAK(V24); \
	TWEAK(V25); \
	TWEAK(V26); \
	TWEAK(V27); \
	TWEAK(V28); \
	TWEAK(V29); \
	TWEAK(V30)

#define XORTWEAKS8 \
	XOR(V23, V0); \
	XOR(V24, V1); \
	XOR(V25, V2); \
	XOR(V26, V3); \
	XOR(V27, V4); \
	XOR(V28, V5); \
	XOR(V29, V6); \
	XOR(V30, V7)

#define CLEAR(r) VEOR r.B16, r.B16, r.B16

#define CLEARALL \
	CLEAR(V0); CLEAR(V1); CLEAR(V2); CLEAR(V3); CLEAR(V4); CLEAR(V5); CLEAR(V6); CLEAR(V7); \
	CLEAR(V8); CLEAR(V9); CLEAR(V10); CLEAR(V11); CLEAR(V12); CLEAR(V13); CLEAR(V14); CLEAR(V15); \
	CLEAR(V16); CLEAR(V17); CLEAR(V18); CLEAR(V19); CLEAR(V20); CLEAR(V21); CLEAR(V22); \
	CLEAR(V23); CLEAR(V24); CLEAR(V25); CLEAR(V26); CLEAR(V27); CLEAR(V28); CLEAR(V29); CLEAR(V30); \
	MOVD $tweaks-128(SP), R10; \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R10); \
	VST1 [V4.B16, V5.B16, V6.B16, V7.B16], (R10); \
	MOVD ZR, R12; \
	MOVD ZR, R13

// R0 schedule, R1 dst, R2 src, R3 bytes left, R4 number of the next sector,
// R6 the polynomial, R7 rounds, R8 tweak numbers in a sector, R9 groups of
// eight blocks in a sector, R11 sectors left of those whose first tweaks are on
// the stack at R10, R14 groups left, R17 bytes in a sector.
#define SETUP \
	MOVD s+0(FP), R0; \
	MOVD dst+8(FP), R1; \
	MOVD src+16(FP), R2; \
	MOVD n+24(FP), R3; \
	MOVD iv+32(FP), R4; \
	MOVD shift+40(FP), R5; \
	MOVD $0x87, R6; \
	MOVD 720(R0), R7; \
	MOVD $1, R8; \
	LSL R5, R8, R8; \
	LSL $2, R8, R9; \
	LSL $9, R8, R17

// Starts the encryption of the first tweaks of eight sectors together.
#define NUMBERS8 \
	LOADKEYS(480); \
	NUMBER(V0); \
	NUMBER(V1); \
	NUMBER(V2); \
	NUMBER(V3); \
	NUMBER(V4); \
	NUMBER(V5); \
	NUMBER(V6); \
	NUMBER(V7); \
	EACH8(ENCROUND, V8); \
	CMP $10, R7

#define STORETWEAKS \
	MOVD $tweaks-128(SP), R10; \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R10); \
	VST1 [V4.B16, V5.B16, V6.B16, V7.B16], (R10); \
	SUB $64, R10; \
	MOVD $8, R11

#define LOAD8 \
	VLD1.P 64(R2), [V0.B16, V1.B16, V2.B16, V3.B16]; \
	VLD1.P 64(R2), [V4.B16, V5.B16, V6.B16, V7.B16]

#define STORE8 \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R1); \
	VST1.P [V4.B16, V5.B16, V6.B16, V7.B16], 64(R1)

// func encryptCE(s *byte, dst *byte, src *byte, n int, iv uint64, shift int)
TEXT ·encryptCE(SB), NOSPLIT, $128-48
	SETUP

batch:
	NUMBERS8
	BEQ tweaks128
	HEAD8(ENCROUND)

tweaks128:
	TAIL8(ENCROUND, ENCLAST)
	STORETWEAKS
	LOADKEYS(0)

sector:
	LDP.P 16(R10), (R12, R13)
	MOVD R9, R14

group:
	TWEAKS8
	LOAD8
	XORTWEAKS8
	EACH8(ENCROUND, V8)
	CMP $10, R7
	BEQ data128
	HEAD8(ENCROUND)

data128:
	TAIL8(ENCROUND, ENCLAST)
	XORTWEAKS8
	STORE8
	SUBS $1, R14
	BNE group
	SUBS R17, R3
	BEQ done
	SUBS $1, R11
	BNE sector
	B batch

done:
	CLEARALL
	RET

// func decryptCE(s *byte, dst *byte, src *byte, n int, iv uint64, shift int)
TEXT ·decryptCE(SB), NOSPLIT, $128-48
	SETUP

batch:
	NUMBERS8
	BEQ tweaks128
	HEAD8(ENCROUND)

tweaks128:
	TAIL8(ENCROUND, ENCLAST)
	STORETWEAKS
	LOADKEYS(240)

sector:
	LDP.P 16(R10), (R12, R13)
	MOVD R9, R14

group:
	TWEAKS8
	LOAD8
	XORTWEAKS8
	EACH8(DECROUND, V8)
	CMP $10, R7
	BEQ data128
	HEAD8(DECROUND)

data128:
	TAIL8(DECROUND, DECLAST)
	XORTWEAKS8
	STORE8
	SUBS $1, R14
	BNE group
	SUBS R17, R3
	BEQ done
	SUBS $1, R11
	BNE sector
	B batch

done:
	CLEARALL
	RET

// func subWordCE(w *uint32)
//
// AESE with a key of zeros is SubBytes and ShiftRows; the latter changes
// nothing when all columns are equal.
TEXT ·subWordCE(SB), NOSPLIT, $0-8
	MOVD w+0(FP), R0
	MOVWU (R0), R1
	VDUP R1, V0.S4
	VEOR V1.B16, V1.B16, V1.B16
	AESE V1.B16, V0.B16
	VMOV V0.S[0], R1
	MOVW R1, (R0)
	VEOR V0.B16, V0.B16, V0.B16
	MOVD ZR, R1
	RET

// func invMixColumnsCE(dst, src *[16]byte)
TEXT ·invMixColumnsCE(SB), NOSPLIT, $0-16
	MOVD dst+0(FP), R0
	MOVD src+8(FP), R1
	VLD1 (R1), [V0.B16]
	AESIMC V0.B16, V0.B16
	VST1 [V0.B16], (R0)
	VEOR V0.B16, V0.B16, V0.B16
	RET
