//go:build amd64 && !purego

package xts

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"fmt"
	"math/big"
	"math/bits"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	oracle "golang.org/x/crypto/xts"

	"strongroom/internal/crypto/keymem"
)

// emulator executes the few instructions of which the AVX-512 functions in
// amd64.s consist. Most machines have no AVX-512, and the code for it must be
// tested on all of them. It stops the test at anything it does not know.
type emulator struct {
	t      *testing.T
	code   []instruction
	labels map[string]int    // index into code
	consts map[string][]byte // the DATA of the file

	general map[string]uint64
	vector  [32]blocks // Z0 to Z31
	equal   bool       // the zero flag
	memory  [][]byte   // address = index+1 in the top half, offset in the lower
	args    map[string]uint64
}

type instruction struct {
	op   string
	args []string
}

// newEmulator loads the function of that name.
func newEmulator(t *testing.T, function string) *emulator {
	t.Helper()
	f, err := os.Open("amd64.s")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	e := &emulator{t: t, labels: map[string]int{}, consts: map[string][]byte{}, general: map[string]uint64{}, args: map[string]uint64{}}
	inside, frame := false, 0
	for s := bufio.NewScanner(f); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		op, rest, _ := strings.Cut(line, " ")
		operands := strings.Split(strings.TrimSpace(rest), ", ")
		switch {
		case line == "" || strings.HasPrefix(line, "//") || strings.HasPrefix(line, "#"):
		case op == "DATA":
			name, _, _ := strings.Cut(rest, "<")
			value, err := strconv.ParseUint(strings.TrimPrefix(operands[1], "$"), 0, 64)
			if err != nil {
				t.Fatal(line, err)
			}
			e.consts[name] = binary.LittleEndian.AppendUint64(e.consts[name], value)
		case op == "TEXT":
			inside = strings.HasPrefix(rest, "·"+function+"(")
			if inside {
				if _, err := fmt.Sscanf(operands[2], "$%d", &frame); err != nil {
					t.Fatal(line, err)
				}
			}
		case !inside:
		case strings.HasSuffix(op, ":"):
			e.labels[strings.TrimSuffix(op, ":")] = len(e.code)
		default:
			e.code = append(e.code, instruction{op, operands})
		}
	}
	if len(e.code) == 0 {
		t.Fatalf("there is no function %s", function)
	}
	e.general["SP"] = e.pointer(make([]byte, frame))
	return e
}

// pointer gives b an address.
func (e *emulator) pointer(b []byte) uint64 {
	e.memory = append(e.memory, b)
	return uint64(len(e.memory)) << 32
}

var reference = regexp.MustCompile(`^(-?\d*)\((\w+)\)(?:\((\w+)\*(\d+)\))?$`)

// address evaluates an operand in memory.
func (e *emulator) address(operand string) (uint64, bool) {
	m := reference.FindStringSubmatch(operand)
	if m == nil {
		return 0, false
	}
	offset, _ := strconv.ParseInt(m[1], 10, 64)
	at := e.general[m[2]] + uint64(offset)
	if m[3] != "" {
		scale, _ := strconv.ParseUint(m[4], 10, 64)
		at += e.general[m[3]] * scale
	}
	return at, true
}

// bytes returns n bytes of memory; outside of any buffer the test ends.
func (e *emulator) bytes(operand string, n int) []byte {
	if name, rest, ok := strings.Cut(operand, "<>+"); ok {
		offset, err := strconv.Atoi(strings.TrimSuffix(rest, "(SB)"))
		if err != nil {
			e.t.Fatal(operand, err)
		}
		return e.consts[name][offset : offset+n]
	}
	at, ok := e.address(operand)
	i, offset := int(at>>32)-1, int(uint32(at))
	if !ok || i < 0 || i >= len(e.memory) || offset+n > len(e.memory[i]) {
		e.t.Fatalf("%s (%#x) is outside of memory", operand, at)
	}
	return e.memory[i][offset : offset+n]
}

// number reads a general operand.
func (e *emulator) number(operand string) uint64 {
	if rest, ok := strings.CutPrefix(operand, "$"); ok {
		n, err := strconv.ParseUint(rest, 0, 64)
		if err != nil {
			e.t.Fatal(operand, err)
		}
		return n
	}
	if name, ok := strings.CutSuffix(operand, "(FP)"); ok {
		name, _, _ = strings.Cut(name, "+")
		return e.args[name]
	}
	if strings.Contains(operand, "(") {
		return binary.LittleEndian.Uint64(e.bytes(operand, 8))
	}
	if operand == "CL" {
		return e.general["CX"] & 63
	}
	n, ok := e.general[operand]
	if !ok {
		e.t.Fatalf("%s is read before it is written", operand)
	}
	return n
}

// register returns a vector register, by the name X, Y or Z.
func (e *emulator) register(operand string) *blocks {
	i, err := strconv.Atoi(operand[1:])
	if err != nil || i > 31 || operand[0] != 'Z' && operand[0] != 'X' {
		e.t.Fatalf("%s is not a vector register", operand)
	}
	return &e.vector[i]
}

// value reads a vector operand.
func (e *emulator) value(operand string) blocks {
	if !strings.Contains(operand, "(") {
		return *e.register(operand)
	}
	var v blocks
	b := e.bytes(operand, 64)
	for i := range v {
		v[i] = [2]uint64{binary.LittleEndian.Uint64(b[16*i:]), binary.LittleEndian.Uint64(b[16*i+8:])}
	}
	return v
}

// run executes the function from its start to its RET.
func (e *emulator) run() {
	for pc := 0; ; pc++ {
		in := e.code[pc]
		switch in.op {
		case "RET":
			return
		case "JMP":
			pc = e.labels[in.args[0]] - 1
		case "JEQ", "JZ":
			if e.equal {
				pc = e.labels[in.args[0]] - 1
			}
		case "JNE", "JNZ":
			if !e.equal {
				pc = e.labels[in.args[0]] - 1
			}
		default:
			if in.op[0] == 'V' {
				e.vectorStep(in.op, in.args)
			} else {
				e.generalStep(in.op, in.args)
			}
		}
	}
}

func (e *emulator) generalStep(op string, args []string) {
	to := args[len(args)-1]
	switch op {
	case "MOVQ":
		e.general[to] = e.number(args[0])
		return
	case "LEAQ":
		at, ok := e.address(args[0])
		if !ok {
			e.t.Fatal(op, args)
		}
		e.general[to] = at
		return
	case "CMPQ":
		e.equal = e.number(args[0]) == e.number(args[1])
		return
	case "ADDQ":
		e.general[to] = e.number(to) + e.number(args[0])
	case "SUBQ":
		e.general[to] = e.number(to) - e.number(args[0])
	case "SHLQ":
		e.general[to] = e.number(to) << e.number(args[0])
	case "DECQ":
		e.general[to] = e.number(to) - 1
	default:
		e.t.Fatalf("unknown instruction %s %v", op, args)
	}
	e.equal = e.general[to] == 0
}

func (e *emulator) vectorStep(op string, args []string) {
	to := args[len(args)-1]
	switch op {
	case "VZEROALL":
		clear(e.vector[:16])
	case "VMOVQ":
		*e.register(to) = blocks{{e.number(args[0])}}
	case "VBROADCASTI32X4":
		b := e.bytes(args[0], 16)
		block := [2]uint64{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
		*e.register(to) = blocks{block, block, block, block}
	case "VMOVDQU64", "VMOVDQA64":
		v := e.value(args[0])
		if !strings.Contains(to, "(") {
			*e.register(to) = v
			return
		}
		b := e.bytes(to, 64)
		for i := range v {
			binary.LittleEndian.PutUint64(b[16*i:], v[i][0])
			binary.LittleEndian.PutUint64(b[16*i+8:], v[i][1])
		}
	case "VSHUFI64X2":
		if args[0] != "$0x00" || args[1] != args[2] {
			e.t.Fatal(op, args)
		}
		block := e.value(args[1])[0]
		*e.register(to) = blocks{block, block, block, block}
	case "VPTERNLOGQ":
		if args[0] != "$0x96" { // the exclusive or of all three
			e.t.Fatal(op, args)
		}
		e.lanes(to, func(i, j int) uint64 {
			return e.value(args[1])[i][j] ^ e.value(args[2])[i][j] ^ e.value(to)[i][j]
		})
	case "VPXORQ":
		e.lanes(to, func(i, j int) uint64 { return e.value(args[0])[i][j] ^ e.value(args[1])[i][j] })
	case "VPADDQ":
		e.lanes(to, func(i, j int) uint64 { return e.value(args[0])[i][j] + e.value(args[1])[i][j] })
	case "VPSLLQ":
		e.lanes(to, func(i, j int) uint64 { return e.value(args[1])[i][j] << e.value(args[0])[0][0] })
	case "VPSLLVQ":
		e.lanes(to, func(i, j int) uint64 { return e.value(args[1])[i][j] << e.value(args[0])[i][j] })
	case "VPSRLVQ":
		e.lanes(to, func(i, j int) uint64 { return e.value(args[1])[i][j] >> e.value(args[0])[i][j] })
	case "VPSLLDQ", "VPSRLDQ":
		n := uint(8 * e.number(args[0]))
		e.blocks(to, e.value(args[1]), func(b *big.Int) *big.Int {
			if op == "VPSLLDQ" {
				return b.Lsh(b, n)
			}
			return b.Rsh(b, n)
		})
	case "VPCLMULQDQ":
		imm := e.number(args[0])
		second, first := e.value(args[1]), e.value(args[2])
		var v blocks
		for i := range v {
			v[i] = carrylessProduct(first[i][imm&1], second[i][imm>>4&1])
		}
		*e.register(to) = v
	case "VAESENC", "VAESENCLAST", "VAESDEC", "VAESDECLAST":
		var q planes
		key, v := e.value(args[0]), e.value(args[1])
		q.load(&v)
		switch op {
		case "VAESENC":
			q.subBytes()
			q.shiftRows()
			q.mixColumns()
		case "VAESENCLAST":
			q.subBytes()
			q.shiftRows()
		case "VAESDEC":
			q.invShiftRows()
			q.invSubBytes()
			q.invMixColumns()
		case "VAESDECLAST":
			q.invShiftRows()
			q.invSubBytes()
		}
		q.store(&v)
		for i := range v {
			v[i][0] ^= key[i][0]
			v[i][1] ^= key[i][1]
		}
		*e.register(to) = v
	default:
		e.t.Fatalf("unknown instruction %s %v", op, args)
	}
}

// lanes sets the eight quadwords of a register.
func (e *emulator) lanes(to string, f func(i, j int) uint64) {
	var v blocks
	for i := range v {
		for j := range v[i] {
			v[i][j] = f(i, j)
		}
	}
	*e.register(to) = v
}

// blocks sets the four blocks of a register.
func (e *emulator) blocks(to string, from blocks, f func(*big.Int) *big.Int) {
	var v blocks
	for i := range v {
		b := new(big.Int).SetUint64(from[i][1])
		b.Or(b.Lsh(b, 64), new(big.Int).SetUint64(from[i][0]))
		b = f(b)
		low := new(big.Int).SetUint64(1<<64 - 1)
		v[i][0] = new(big.Int).And(b, low).Uint64()
		v[i][1] = new(big.Int).And(b.Rsh(b, 64), low).Uint64()
	}
	*e.register(to) = v
}

func carrylessProduct(a, b uint64) [2]uint64 {
	var p [2]uint64
	for ; b != 0; b &= b - 1 {
		n := bits.TrailingZeros64(b)
		p[0] ^= a << n
		p[1] ^= a >> (64 - n)
	}
	return p
}

// TestEmulated runs the AVX-512 functions, as they are in amd64.s, against the
// oracle, on machines with and without AVX-512.
func TestEmulated(t *testing.T) {
	t.Parallel()
	for _, half := range []int{16, 32} {
		key := make([]byte, 2*half)
		for i := range key {
			key[i] = byte(i*i + 7*i + half)
		}
		o, err := oracle.NewCipher(aes.NewCipher, key)
		if err != nil {
			t.Fatal(err)
		}
		s := emulatedSchedule(key)
		if slices.Contains(Implementations(), "aesni") {
			if real := realSchedule(t, key); !bytes.Equal(real, s) {
				t.Errorf("the schedule is\n%x, and the emulator's\n%x", real, s)
			}
		}
		for _, shape := range []struct{ sectors, shift int }{
			{1, 0}, {2, 0}, {8, 0}, {9, 0}, {17, 0}, {1, 1}, {3, 1}, {9, 1}, {2, 3}, {9, 3}, {1, 7},
		} {
			for _, function := range []string{"encryptVAES512", "decryptVAES512"} {
				sectorSize := TweakUnit << shape.shift
				n := shape.sectors * sectorSize
				src, dst, want := make([]byte, n), make([]byte, n), make([]byte, n)
				for i := range src {
					src[i] = byte(i ^ i>>8*29)
				}
				iv := uint64(1)<<63 - 3
				for at := 0; at < n; at += sectorSize {
					unit := iv + uint64(at/TweakUnit)
					if function == "encryptVAES512" {
						o.Encrypt(want[at:at+sectorSize], src[at:at+sectorSize], unit)
					} else {
						o.Decrypt(want[at:at+sectorSize], src[at:at+sectorSize], unit)
					}
				}
				e := newEmulator(t, function)
				e.args = map[string]uint64{
					"s": e.pointer(s), "dst": e.pointer(dst), "src": e.pointer(src),
					"n": uint64(n), "iv": iv, "shift": uint64(shape.shift),
				}
				e.run()
				if !bytes.Equal(dst, want) {
					t.Errorf("%s, key of %d bytes, %d sectors of %d: wrong", function, len(key), shape.sectors, sectorSize)
				}
				if e.vector != [32]blocks{} {
					t.Errorf("%s leaves something in vector registers", function)
				}
				if !bytes.Equal(e.memory[0], make([]byte, len(e.memory[0]))) {
					t.Errorf("%s leaves something in its frame", function)
				}
			}
		}
	}
}

// realSchedule is the schedule that the assembly makes.
func realSchedule(t *testing.T, key []byte) []byte {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(key))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c, err := NewWith("aesni", k)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return bytes.Clone(c.key.Bytes())
}

// emulatedSchedule makes the schedule without assembly, for machines without
// AES-NI.
func emulatedSchedule(key []byte) []byte {
	half := len(key) / 2
	var b bitsliced
	expanded := func(key []byte) (list [maxRoundKeys][blockSize]byte) {
		b.rounds = half/4 + 6
		var unused [maxRoundKeys]planes
		b.expandOne(&unused, key)
		for i := range b.rounds + 1 {
			at := i
			if i > 0 {
				at += maxRoundKeys - 1 - b.rounds
			}
			for j := range 4 {
				binary.LittleEndian.PutUint32(list[at][4*j:], b.words[4*i+j])
			}
		}
		return list
	}
	var s schedule
	s.encrypt, s.tweak = expanded(key[:half]), expanded(key[half:])
	s.rounds = uint64(b.rounds)
	last := maxRoundKeys - 1
	s.decrypt[0], s.decrypt[last] = s.encrypt[last], s.encrypt[0]
	for i := 1; i < b.rounds; i++ {
		from, to := s.encrypt[last-i], &s.decrypt[last-b.rounds+i]
		v := blocks{{binary.LittleEndian.Uint64(from[:]), binary.LittleEndian.Uint64(from[8:])}}
		var q planes
		q.load(&v)
		q.invMixColumns()
		q.store(&v)
		binary.LittleEndian.PutUint64(to[:], v[0][0])
		binary.LittleEndian.PutUint64(to[8:], v[0][1])
	}
	var out bytes.Buffer
	if err := binary.Write(&out, binary.LittleEndian, s); err != nil {
		panic(err)
	}
	return out.Bytes()
}
