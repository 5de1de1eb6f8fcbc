package luks_test

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestLastSeqid: after the highest number of a commit comes none that counts as later.
// Whoever makes such a header could have a commit that was durable undone by a power
// loss: then it is written no more.
func TestLastSeqid(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	b := firstGeneration(t, dek)
	numbered(b, math.MaxUint64)
	dev := faultdev.New(memory(t, b), nil)
	h, err := luks.Read(dev, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.SetSafe(newSafe(t, dek, 2)); err != nil {
		t.Fatal(err)
	}
	if err := h.CommitEarly(dev); err != nil {
		if !errors.Is(err, luks.ErrUnsupported) {
			t.Fatal(err)
		}
		return
	}
	for seed := range uint64(32) {
		mem := dev.PowerLoss(rand.New(rand.NewPCG(seed, 0)))
		h, err := luks.Read(mem, mem.Size())
		if err != nil {
			t.Fatal(err)
		}
		if safes, err := h.Safes(); err != nil || safes[0].Generation != 2 {
			t.Fatalf("a commit that was durable is undone by a power loss: %v, %v", safes, err)
		}
	}
}

// TestSeqidOfReencryption: a rekey does not begin that could run out of numbers.
func TestSeqidOfReencryption(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := memory(t, make([]byte, luks.DataOffsetDefault+4096))
	h := newHeader(t, luks.Options{UUID: testUUID, DEK: dek})
	commit(t, h, mem)
	for seqid, want := range map[uint64]error{math.MaxUint64 / 2: nil, math.MaxUint64/2 + 1: luks.ErrUnsupported} {
		b := contents(t, mem)
		numbered(b, seqid)
		h, err := luks.Read(memory(t, b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		err = h.BeginReencryption(luks.ReencryptionOptions{OldDEK: dek, NewDEK: keymemtest.Random(t, 64), JournalMin: 4096, JournalMax: 4096})
		if !errors.Is(err, want) {
			t.Errorf("after commit %d: %v", seqid, err)
		}
	}
}

// numbered gives both header copies of b the number of a commit.
func numbered(b []byte, seqid uint64) {
	for _, c := range [][]byte{b[:headerSize], b[headerSize : 2*headerSize]} {
		binary.BigEndian.PutUint64(c[0x10:], seqid)
		reseal(c)
	}
}
