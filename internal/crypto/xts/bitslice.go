package xts

// AES without tables and without branches on data, for processors without AES
// instructions: four blocks are turned into eight words, word i holding bit i
// of all 64 bytes, and the cipher is computed as a circuit on these words.
//
// The S-box is the circuit of Boyar and Peralta, "A depth-16 circuit for the
// AES S-box" (IACR ePrint 2011/332); the representation is that of Käsper and
// Schwabe, "Faster and Timing-Attack Resistant AES-GCM" (IACR ePrint 2009/129),
// cut down to 64-bit words as in Thomas Pornin's BearSSL.

// planes is four AES blocks, bit by bit: bit i of a byte is in word i. In every
// word, 16 bits belong to a row of the state and 4 of them to a column, one for
// each block.
type planes [8]uint64

// blocks is four AES blocks, each as two little-endian words.
type blocks [4][2]uint64

// spread puts the bytes of two 32-bit words at the even and odd bytes of a
// 64-bit one.
func spread(even, odd uint64) uint64 { return gap(even) | gap(odd)<<8 }

func gap(x uint64) uint64 {
	x &= 0xFFFFFFFF
	x = (x | x<<16) & 0x0000FFFF0000FFFF
	return (x | x<<8) & 0x00FF00FF00FF00FF
}

func ungap(x uint64) uint64 {
	x &= 0x00FF00FF00FF00FF
	x = (x | x>>8) & 0x0000FFFF0000FFFF
	return (x | x>>16) & 0xFFFFFFFF
}

func (q *planes) load(b *blocks) {
	for i := range b {
		lo, hi := b[i][0], b[i][1]
		q[i] = spread(lo, hi)
		q[i+4] = spread(lo>>32, hi>>32)
	}
	q.transpose()
}

func (q *planes) store(b *blocks) {
	q.transpose()
	for i := range b {
		b[i][0] = ungap(q[i]) | ungap(q[i+4])<<32
		b[i][1] = ungap(q[i]>>8) | ungap(q[i+4]>>8)<<32
	}
}

// transpose exchanges the place of a bit among the words with its place among
// eight bits of a word. It is its own inverse.
func (q *planes) transpose() {
	const m1, m2, m4 = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F
	for i := 0; i < 8; i += 2 {
		a, b := q[i], q[i+1]
		q[i], q[i+1] = a&m1|b&m1<<1, a>>1&m1|b&^m1
	}
	for _, i := range [...]int{0, 1, 4, 5} {
		a, b := q[i], q[i+2]
		q[i], q[i+2] = a&m2|b&m2<<2, a>>2&m2|b&^m2
	}
	for i := range 4 {
		a, b := q[i], q[i+4]
		q[i], q[i+4] = a&m4|b&m4<<4, a>>4&m4|b&^m4
	}
}

func (q *planes) addKey(k *planes) {
	for i := range q {
		q[i] ^= k[i]
	}
}

// subBytes is the S-box; the names are those of the paper.
func (q *planes) subBytes() {
	x0, x1, x2, x3, x4, x5, x6, x7 := q[7], q[6], q[5], q[4], q[3], q[2], q[1], q[0]

	// Top linear transformation.
	y14 := x3 ^ x5
	y13 := x0 ^ x6
	y9 := x0 ^ x3
	y8 := x0 ^ x5
	t0 := x1 ^ x2
	y1 := t0 ^ x7
	y4 := y1 ^ x3
	y12 := y13 ^ y14
	y2 := y1 ^ x0
	y5 := y1 ^ x6
	y3 := y5 ^ y8
	t1 := x4 ^ y12
	y15 := t1 ^ x5
	y20 := t1 ^ x1
	y6 := y15 ^ x7
	y10 := y15 ^ t0
	y11 := y20 ^ y9
	y7 := x7 ^ y11
	y17 := y10 ^ y11
	y19 := y10 ^ y8
	y16 := t0 ^ y11
	y21 := y13 ^ y16
	y18 := x0 ^ y16

	// Shared part: inversion in GF(2^8).
	t2 := y12 & y15
	t3 := y3 & y6
	t4 := t3 ^ t2
	t5 := y4 & x7
	t6 := t5 ^ t2
	t7 := y13 & y16
	t8 := y5 & y1
	t9 := t8 ^ t7
	t10 := y2 & y7
	t11 := t10 ^ t7
	t12 := y9 & y11
	t13 := y14 & y17
	t14 := t13 ^ t12
	t15 := y8 & y10
	t16 := t15 ^ t12
	t17 := t4 ^ t14
	t18 := t6 ^ t16
	t19 := t9 ^ t14
	t20 := t11 ^ t16
	t21 := t17 ^ y20
	t22 := t18 ^ y19
	t23 := t19 ^ y21
	t24 := t20 ^ y18
	t25 := t21 ^ t22
	t26 := t21 & t23
	t27 := t24 ^ t26
	t28 := t25 & t27
	t29 := t28 ^ t22
	t30 := t23 ^ t24
	t31 := t22 ^ t26
	t32 := t31 & t30
	t33 := t32 ^ t24
	t34 := t23 ^ t33
	t35 := t27 ^ t33
	t36 := t24 & t35
	t37 := t36 ^ t34
	t38 := t27 ^ t36
	t39 := t29 & t38
	t40 := t25 ^ t39
	t41 := t40 ^ t37
	t42 := t29 ^ t33
	t43 := t29 ^ t40
	t44 := t33 ^ t37
	t45 := t42 ^ t41
	z0 := t44 & y15
	z1 := t37 & y6
	z2 := t33 & x7
	z3 := t43 & y16
	z4 := t40 & y1
	z5 := t29 & y7
	z6 := t42 & y11
	z7 := t45 & y17
	z8 := t41 & y10
	z9 := t44 & y12
	z10 := t37 & y3
	z11 := t33 & y4
	z12 := t43 & y13
	z13 := t40 & y5
	z14 := t29 & y2
	z15 := t42 & y9
	z16 := t45 & y14
	z17 := t41 & y8

	// Bottom linear transformation.
	t46 := z15 ^ z16
	t47 := z10 ^ z11
	t48 := z5 ^ z13
	t49 := z9 ^ z10
	t50 := z2 ^ z12
	t51 := z2 ^ z5
	t52 := z7 ^ z8
	t53 := z0 ^ z3
	t54 := z6 ^ z7
	t55 := z16 ^ z17
	t56 := z12 ^ t48
	t57 := t50 ^ t53
	t58 := z4 ^ t46
	t59 := z3 ^ t54
	t60 := t46 ^ t57
	t61 := z14 ^ t57
	t62 := t52 ^ t58
	t63 := t49 ^ t58
	t64 := z4 ^ t59
	t65 := t61 ^ t62
	t66 := z1 ^ t63
	t67 := t64 ^ t65
	s3 := t53 ^ t66
	q[7] = t59 ^ t63
	q[6] = t64 ^ ^s3
	q[5] = t55 ^ ^t67
	q[4] = s3
	q[3] = t51 ^ t66
	q[2] = t47 ^ t65
	q[1] = t56 ^ ^t62
	q[0] = t48 ^ ^t60
}

// invSubBytes is the inverse S-box: S(x) = A(1/x), hence S'(x) = A'(S(A'(x)))
// with A' the inverse of the affine map A.
func (q *planes) invSubBytes() {
	q.invAffine()
	q.subBytes()
	q.invAffine()
}

func (q *planes) invAffine() {
	q0, q1, q2, q3, q4, q5, q6, q7 := ^q[0], ^q[1], q[2], q[3], q[4], ^q[5], ^q[6], q[7]
	q[7] = q1 ^ q4 ^ q6
	q[6] = q0 ^ q3 ^ q5
	q[5] = q7 ^ q2 ^ q4
	q[4] = q6 ^ q1 ^ q3
	q[3] = q5 ^ q0 ^ q2
	q[2] = q4 ^ q7 ^ q1
	q[1] = q3 ^ q6 ^ q0
	q[0] = q2 ^ q5 ^ q7
}

// shiftRows turns row r of the state (16 bits of each word) left by r columns
// (4 bits each).
func (q *planes) shiftRows() {
	for i, x := range q {
		q[i] = x&0x000000000000FFFF |
			x&0x00000000FFF00000>>4 | x&0x00000000000F0000<<12 |
			x&0x0000FF0000000000>>8 | x&0x000000FF00000000<<8 |
			x&0xF000000000000000>>12 | x&0x0FFF000000000000<<4
	}
}

func (q *planes) invShiftRows() {
	for i, x := range q {
		q[i] = x&0x000000000000FFFF |
			x&0x000000000FFF0000<<4 | x&0x00000000F0000000>>12 |
			x&0x0000FF0000000000>>8 | x&0x000000FF00000000<<8 |
			x&0x000F000000000000<<12 | x&0xFFF0000000000000>>4
	}
}

// mixColumns computes 2a + 3b + c + d as 2(a+b) + b + (c+d), where b, c and d
// are the next rows of a column: rotations by 16, 32 and 48 bits.
func (q *planes) mixColumns() {
	var s planes // a + b
	for i, a := range q {
		b := a>>16 | a<<48
		s[i] = a ^ b
		q[i] = b ^ (s[i]>>32 | s[i]<<32)
	}
	q.addDoubled(&s)
}

// invMixColumns uses that its matrix is mixColumns times (5, 0, 4, 0), that is
// a + 4(a+c).
func (q *planes) invMixColumns() {
	var s, d planes
	for i, a := range q {
		s[i] = a ^ (a>>32 | a<<32)
	}
	d.addDoubled(&s)
	q.addDoubled(&d)
	q.mixColumns()
}

// addDoubled adds 2s in GF(2^8) with the polynomial x^8+x^4+x^3+x+1.
func (q *planes) addDoubled(s *planes) {
	q[0] ^= s[7]
	q[1] ^= s[0] ^ s[7]
	q[2] ^= s[1]
	q[3] ^= s[2] ^ s[7]
	q[4] ^= s[3] ^ s[7]
	q[5] ^= s[4]
	q[6] ^= s[5]
	q[7] ^= s[6]
}

// encrypt encrypts four blocks with the round keys.
func (b *blocks) encrypt(keys []planes) {
	var q planes
	q.load(b)
	q.addKey(&keys[0])
	last := len(keys) - 1
	for i := 1; i < last; i++ {
		q.subBytes()
		q.shiftRows()
		q.mixColumns()
		q.addKey(&keys[i])
	}
	q.subBytes()
	q.shiftRows()
	q.addKey(&keys[last])
	q.store(b)
}

// decrypt is the inverse of encrypt.
func (b *blocks) decrypt(keys []planes) {
	var q planes
	q.load(b)
	last := len(keys) - 1
	q.addKey(&keys[last])
	for i := last - 1; i > 0; i-- {
		q.invShiftRows()
		q.invSubBytes()
		q.addKey(&keys[i])
		q.invMixColumns()
	}
	q.invShiftRows()
	q.invSubBytes()
	q.addKey(&keys[0])
	q.store(b)
}

// bitsliced is the expanded key of this implementation. The last fields are
// the working space of expand, so that no part of the key is computed in
// ordinary memory.
type bitsliced struct {
	data, tweak [maxRoundKeys]planes
	rounds      int

	words [4 * maxRoundKeys]uint32
	sub   planes
	block blocks
}

func (s *bitsliced) expand(key []byte) {
	half := len(key) / 2
	s.rounds = half/4 + 6
	s.expandOne(&s.data, key[:half])
	s.expandOne(&s.tweak, key[half:])
	clear(s.words[:])
	clear(s.sub[:])
	clear(s.block[:])
}

func (s *bitsliced) expandOne(keys *[maxRoundKeys]planes, key []byte) {
	w := s.words[:4*(s.rounds+1)]
	expandWords(w, key, s.subWord)
	for i := range s.rounds + 1 {
		for j := range s.block {
			s.block[j][0] = uint64(w[4*i]) | uint64(w[4*i+1])<<32
			s.block[j][1] = uint64(w[4*i+2]) | uint64(w[4*i+3])<<32
		}
		keys[i].load(&s.block)
	}
}

// subWord applies the S-box to the four bytes of w.
func (s *bitsliced) subWord(w *uint32) {
	clear(s.block[:])
	s.block[0][0] = uint64(*w)
	s.sub.load(&s.block)
	s.sub.subBytes()
	s.sub.store(&s.block)
	*w = uint32(s.block[0][0])
}
