package luks_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
)

const (
	headerSize = 16384 // bytes of one copy
	smallDisk  = luks.DataOffsetMin + 4096
)

// powerLosses is how often the power goes at each place.
const powerLosses = 5

// damages are the states in which a commit may find the header copies, all of
// them with a good header of generation 1.
var damages = map[string]func(b []byte){
	"sound":             func([]byte) {},
	"primary damaged":   func(b []byte) { b[4096+100] ^= 1 },
	"secondary damaged": func(b []byte) { b[headerSize+4096+100] ^= 1 },
	"primary zeroed":    func(b []byte) { clear(b[:headerSize]) },
	"secondary zeroed":  func(b []byte) { clear(b[headerSize : 2*headerSize]) },
}

// firstGeneration returns the bytes of a disk with a key safe of generation 1
// that was committed twice.
func firstGeneration(t *testing.T, dek *keymem.Key) []byte {
	t.Helper()
	mem := memory(t, make([]byte, smallDisk))
	h := newHeader(t, luks.Options{UUID: testUUID, DataOffset: luks.DataOffsetMin, DEK: dek, Safe: newSafe(t, dek, 1)})
	commit(t, h, mem)
	commit(t, h, mem)
	return contents(t, mem)
}

func memory(t *testing.T, b []byte) *blockdev.Memory {
	t.Helper()
	mem := blockdev.NewMemory(int64(len(b)), 512)
	if _, err := mem.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return mem
}

func contents(t *testing.T, dev blockdev.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// generation reads a header and returns the generation of its key safe.
func generation(t *testing.T, dev blockdev.Device) uint64 {
	t.Helper()
	h, err := luks.Read(dev, dev.Size())
	if err != nil {
		t.Fatalf("header is lost: %v", err)
	}
	safes, err := h.Safes()
	if err != nil || len(safes) != 1 {
		t.Fatalf("key safes are lost: %v, %v", safes, err)
	}
	return safes[0].Generation
}

// TestCommitFaults fails every operation of a commit, in every way, from every
// state of the header copies; then the power goes.
func TestCommitFaults(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	if s := os.Getenv("LUKS_SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	t.Logf("replay with LUKS_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dek := keymemtest.Random(t, luks.KeySize)
	original := firstGeneration(t, dek)
	second, third := newSafe(t, dek, 2), newSafe(t, dek, 3)

	for _, state := range slices.Sorted(maps.Keys(damages)) { // in the same order for a seed
		before := append([]byte(nil), original...)
		damages[state](before)
		for _, mode := range faultdev.Modes() {
			for op := range 7 { // the seventh is never reached
				// The same Header tries again with something else, and fails too.
				for again := 0; again < 4; again++ {
					name := fmt.Sprintf("%s: operation %d %v, then operation %d torn", state, op, mode, again)
					h, err := luks.Read(memory(t, before), smallDisk)
					if err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					if err := h.SetSafe(second); err != nil {
						t.Fatal(err)
					}
					dev := faultdev.New(memory(t, before), &faultdev.Fault{Op: op, Mode: mode})
					err = h.Commit(dev)
					if dev.Injected() == faultdev.None {
						if err != nil || op != 6 {
							t.Fatalf("%s: commit without a fault, of %d operations: %v", name, op, err)
						}
						checkPowerLoss(t, dev, rng, name, 2)
						break
					}
					if !errors.Is(err, faultdev.ErrInjected) {
						t.Fatalf("%s: fault is not reported: %v", name, err)
					}
					checkPowerLoss(t, dev, rng, name, 1, 2)
					recommit(t, dev.Contents(), dek)
					if again == 0 {
						reread(t, rng, before, faultdev.Fault{Op: op, Mode: mode}, second, third)
					}

					if err := h.SetSafe(third); err != nil {
						t.Fatal(err)
					}
					dev.Inject(&faultdev.Fault{Op: again, Mode: faultdev.Torn})
					if err := h.Commit(dev); !errors.Is(err, faultdev.ErrInjected) {
						t.Fatalf("%s: second fault is not reported: %v", name, err)
					}
					checkPowerLoss(t, dev, rng, name, 1, 2, 3)
					dev.Heal()
					commit(t, h, dev)
					checkPowerLoss(t, dev, rng, name, 3)
				}
			}
		}
	}
}

// checkPowerLoss lets the power go, and checks that the header is of one of
// those generations.
func checkPowerLoss(t *testing.T, dev *faultdev.Device, rng *rand.Rand, name string, want ...uint64) {
	t.Helper()
	for range powerLosses {
		after := dev.PowerLoss(rng)
		if g := generation(t, after); !slices.Contains(want, g) {
			t.Fatalf("%s: generation %d, want %v", name, g, want)
		}
		h, err := luks.Read(after, smallDisk)
		if err != nil {
			t.Fatal(err)
		}
		b := contents(t, after)
		if len(h.Damaged()) == 0 && !bytes.Equal(b[4096:headerSize], b[headerSize+4096:2*headerSize]) {
			t.Fatalf("%s: two different copies, and neither is reported", name)
		}
	}
}

// reread lets a commit fail; another process reads what the first one wrote, as it
// is in the kernel's memory, and loses power at any operation of its own commit.
func reread(t *testing.T, rng *rand.Rand, before []byte, fault faultdev.Fault, second, third *keysafe.Safe) {
	t.Helper()
	for op, reached := 0, true; reached; op++ {
		name := fmt.Sprintf("operation %d %v, read again, power loss at operation %d", fault.Op, fault.Mode, op)
		dev := faultdev.New(memory(t, before), &fault)
		for i, f := range []*keysafe.Safe{second, third} {
			if i == 1 {
				dev.Inject(&faultdev.Fault{Op: op, Mode: faultdev.Done, Dead: true})
			}
			h, err := luks.Read(dev.Contents(), smallDisk)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := h.SetSafe(f); err != nil {
				t.Fatal(err)
			}
			if err := h.Commit(dev); err != nil && !errors.Is(err, faultdev.ErrInjected) {
				t.Fatalf("%s: %v", name, err)
			}
		}
		reached = dev.Injected() != faultdev.None
		checkPowerLoss(t, dev, rng, name, 1, 2, 3)
	}
}

// recommit reads what a crash left, commits it, and checks that both copies
// are good then.
func recommit(t *testing.T, dev blockdev.Device, dek *keymem.Key) {
	t.Helper()
	h, err := luks.Read(dev, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	was := generation(t, dev)
	commit(t, h, dev)
	if h, err = luks.Read(dev, dev.Size()); err != nil || len(h.Damaged()) != 0 {
		t.Fatalf("header is not repaired: %v, %v", h.Damaged(), err)
	}
	if err := h.VerifyKey(dek); err != nil {
		t.Fatal(err)
	}
	if is := generation(t, dev); is != was {
		t.Fatalf("repair changed the generation from %d to %d", was, is)
	}
}

// TestCommitHealsWithNewSalt checks which salts change: the specification
// wants a new one for a repaired copy only.
func TestCommitHealsWithNewSalt(t *testing.T) {
	t.Parallel()
	saltOf := func(b []byte, c luks.Copy) string { return string(b[int(c)*headerSize+0x68 : int(c)*headerSize+0xa8]) }
	before := firstGeneration(t, keymemtest.Random(t, luks.KeySize))
	if saltOf(before, luks.Primary) == saltOf(before, luks.Secondary) {
		t.Error("both copies have the same salt")
	}
	for state, damage := range damages {
		damaged := append([]byte(nil), before...)
		damage(damaged)
		mem := memory(t, damaged)
		h, err := luks.Read(mem, smallDisk)
		if err != nil {
			t.Fatal(err)
		}
		bad := map[luks.Copy]bool{}
		for _, d := range h.Damaged() {
			bad[d.Copy] = true
		}
		commit(t, h, mem)
		after := contents(t, mem)
		for _, c := range []luks.Copy{luks.Primary, luks.Secondary} {
			if changed := saltOf(before, c) != saltOf(after, c); changed != bad[c] {
				t.Errorf("%s: salt of the %s copy changed: %v, want %v", state, c, changed, bad[c])
			}
		}
	}
}

// TestCryptsetupAgreesOnTornHeaders cuts commits short and checks that
// cryptsetup takes the same header as we do and repairs what is torn.
func TestCryptsetupAgreesOnTornHeaders(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	original := firstGeneration(t, dek)
	for _, test := range []struct {
		name string
		op   int // the operation of the commit that is cut short; nothing follows
		mode faultdev.Mode
		want uint64 // generation
	}{
		{"torn primary", 2, faultdev.Torn, 1},
		{"primary only", 4, faultdev.Undone, 2},
		{"torn secondary", 4, faultdev.Torn, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h, err := luks.Read(memory(t, original), smallDisk)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.SetSafe(newSafe(t, dek, 2)); err != nil {
				t.Fatal(err)
			}
			dev := faultdev.New(memory(t, original), &faultdev.Fault{Op: test.op, Mode: test.mode})
			if err := h.Commit(dev); err == nil {
				t.Fatal("commit was not cut short")
			}
			crashed := dev.Contents()
			if g := generation(t, crashed); g != test.want {
				t.Errorf("generation %d, want %d", g, test.want)
			}
			damaged, err := luks.Read(crashed, smallDisk)
			if err != nil || len(damaged.Damaged()) != 1 {
				t.Fatalf("damage is not reported: %v, %v", damaged.Damaged(), err)
			}

			name := filepath.Join(t.TempDir(), "disk.img")
			if err := os.WriteFile(name, contents(t, crashed), 0o600); err != nil {
				t.Fatal(err)
			}
			mustCryptsetup(t, "luksDump", name)
			healed, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			mem := memory(t, healed)
			if g := generation(t, mem); g != test.want {
				t.Errorf("generation %d after cryptsetup, want %d", g, test.want)
			}
			if h, err := luks.Read(mem, smallDisk); err != nil || len(h.Damaged()) != 0 {
				t.Errorf("cryptsetup did not repair the header, or we do not see it: %v, %v", h.Damaged(), err)
			}
		})
	}
}

// TestCryptsetupAgreesOnLostHeaders zeroes one copy, and both.
func TestCryptsetupAgreesOnLostHeaders(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	for state, isLuks := range map[string]bool{"primary zeroed": true, "secondary zeroed": true, "both zeroed": false} {
		b := firstGeneration(t, dek)
		if isLuks {
			damages[state](b)
		} else {
			clear(b[:2*headerSize])
		}
		name := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		code, out := cryptsetup(t, "isLuks", "--type", "luks2", name)
		_, err := luks.Read(bytes.NewReader(b), int64(len(b)))
		if (code == 0) != isLuks || (err == nil) != isLuks {
			t.Errorf("%s: cryptsetup isLuks: exit code %d %s; Read: %v", state, code, out, err)
		}
		if !isLuks {
			continue
		}
		mustCryptsetup(t, "luksDump", name)
		healed, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if h, err := luks.Read(bytes.NewReader(healed), int64(len(healed))); err != nil || len(h.Damaged()) != 0 {
			t.Errorf("%s: cryptsetup did not repair the header, or we do not see it: %v", state, err)
		}
	}
}

// TestCommitEarly commits early again and again, fails every operation and lets
// the power go: what an early commit has returned is there.
func TestCommitEarly(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	dek := keymemtest.Random(t, luks.KeySize)
	original := firstGeneration(t, dek)
	var safes []*keysafe.Safe
	for g := range uint64(4) {
		safes = append(safes, newSafe(t, dek, g+2))
	}
	for _, mode := range faultdev.Modes() {
		for op := 0; ; op++ {
			name := fmt.Sprintf("operation %d %v", op, mode)
			dev := faultdev.New(memory(t, original), &faultdev.Fault{Op: op, Mode: mode, Dead: true})
			h, err := luks.Read(memory(t, original), smallDisk)
			if err != nil {
				t.Fatal(err)
			}
			last := uint64(1) // that is durable
			for i, safe := range safes {
				if err := h.SetSafe(safe); err != nil {
					t.Fatal(err)
				}
				if err = h.CommitEarly(dev); err != nil {
					break
				}
				last++
				checkPowerLoss(t, dev, rng, name, last)
				if i == 1 {
					continue // a commit that follows at once
				}
				if err = h.Flush(dev); err != nil {
					break
				}
				if len(h.Damaged()) != 0 {
					t.Fatalf("%s: damage after a flush: %v", name, h.Damaged())
				}
			}
			if dev.Injected() == faultdev.None {
				if err != nil || last != 5 {
					t.Fatalf("generation %d and error %v without a fault", last, err)
				}
				break
			}
			if !errors.Is(err, faultdev.ErrInjected) {
				t.Fatalf("%s: fault is not reported: %v", name, err)
			}
			checkPowerLoss(t, dev, rng, name, last, last+1)
			recommit(t, dev.Contents(), dek)
		}
	}
}

// TestCommitAfterKill commits a header whose earlier writer was killed before its
// last flush, and lets the power go at every operation.
func TestCommitAfterKill(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	dek := keymemtest.Random(t, luks.KeySize)
	original := firstGeneration(t, dek)
	second, third := newSafe(t, dek, 2), newSafe(t, dek, 3)
	for op := 0; ; op++ {
		dev := faultdev.New(memory(t, original), nil)
		killed, err := luks.Read(dev, smallDisk)
		if err != nil {
			t.Fatal(err)
		}
		if err := killed.SetSafe(second); err != nil {
			t.Fatal(err)
		}
		if err := killed.CommitEarly(dev); err != nil {
			t.Fatal(err)
		}
		h, err := luks.Read(dev, smallDisk)
		if err != nil || len(h.Damaged()) != 0 {
			t.Fatalf("who comes after finds %v, %v", h.Damaged(), err)
		}
		if err := h.SetSafe(third); err != nil {
			t.Fatal(err)
		}
		dev.Inject(&faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true})
		err = h.Commit(dev)
		if dev.Injected() == faultdev.None {
			if err != nil || op == 0 {
				t.Fatalf("commit without a fault: %v", err)
			}
			return
		}
		for range 10 {
			checkPowerLoss(t, dev, rng, fmt.Sprintf("operation %d", op), 2, 3)
		}
	}
}
