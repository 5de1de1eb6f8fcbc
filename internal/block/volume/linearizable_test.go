package volume_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// A sector is a register of four parts: requests may be shorter than it, and
// must not lose what others write beside them.
const (
	sectorParts = 4
	partSize    = 512 / sectorParts // bytes
)

// sectorState is a value for each part: 0 is zeros.
type sectorState [sectorParts]uint16

// access is what a request does to one sector.
type access struct {
	sector   int
	from, to int    // parts
	write    bool   // else a read
	value    uint16 // written to each part
}

// sectors is the model: every sector is linearizable by itself.
var sectors = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		bySector := map[int][]porcupine.Operation{}
		for _, op := range history {
			n := op.Input.(access).sector
			bySector[n] = append(bySector[n], op)
		}
		var all [][]porcupine.Operation
		for _, ops := range bySector {
			all = append(all, ops)
		}
		return all
	},
	Init: func() any { return sectorState{} },
	Step: func(state, input, output any) (bool, any) {
		s, a := state.(sectorState), input.(access)
		if !a.write {
			seen := output.(sectorState)
			return [sectorParts]uint16(seen) == [sectorParts]uint16(a.only(s)), s
		}
		for i := a.from; i < a.to; i++ {
			s[i] = a.value
		}
		return true, s
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v: %v", input, output) },
}

// only returns the parts of s that a covers; the others are 0.
func (a access) only(s sectorState) sectorState {
	var seen sectorState
	copy(seen[a.from:a.to], s[a.from:a.to])
	return seen
}

// history records requests, cut into sectors. Time is a counter, so that the order
// does not depend on a clock.
type history struct {
	clock atomic.Int64

	mu  sync.Mutex
	ops []porcupine.Operation // guarded by mu
}

// add records a request of parts [from, to) of the disk that began at call; seen
// are the values that it read, nil if it wrote value.
func (h *history) add(client int, call int64, from, to int, value uint16, seen []uint16) {
	done := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	for at := from; at < to; {
		sector := at / sectorParts
		end := min(to, (sector+1)*sectorParts)
		a := access{sector: sector, from: at - sector*sectorParts, to: end - sector*sectorParts, write: seen == nil, value: value}
		var out sectorState
		if seen != nil {
			copy(out[a.from:a.to], seen[at-from:])
		}
		h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: a, Call: call, Output: out, Return: done})
		at = end
	}
}

// client makes requests of the disk, on few sectors, and records them.
type client struct {
	id      int
	v       *volume.Volume
	h       *history
	rng     *rand.Rand
	sectors []int // first sectors of its requests
	values  *atomic.Uint32
}

// request makes one request of up to three sectors.
func (c *client) request() error {
	from := c.sectors[c.rng.IntN(len(c.sectors))]*sectorParts + c.rng.IntN(sectorParts)
	to := min(from+1+c.rng.IntN(3*sectorParts), int(c.v.Size())/partSize)
	whole := c.rng.IntN(2) == 0
	if whole {
		from, to = from/sectorParts*sectorParts, (to+sectorParts-1)/sectorParts*sectorParts
	}
	off, n := int64(from)*partSize, int64(to-from)*partSize
	var err error
	var value uint16
	call := c.h.clock.Add(1)
	switch kind := c.rng.IntN(8); {
	case kind < 3:
		return c.read(call, from, to)
	case kind < 6:
		value = uint16(c.values.Add(1))
		_, err = c.v.WriteAt(bytes.Repeat(binary.LittleEndian.AppendUint16(nil, value), int(n)/2), off)
	case kind == 6 || !whole: // a discard leaves a sector that it does not cover
		err = c.v.WriteZeroes(off, n, c.rng.IntN(2) == 0)
	default:
		err = c.v.Discard(off, n)
	}
	if err == nil {
		c.h.add(c.id, call, from, to, value, nil)
	}
	return err
}

// read reads parts [from, to) of the disk.
func (c *client) read(call int64, from, to int) error {
	p := make([]byte, (to-from)*partSize)
	if _, err := c.v.ReadAt(p, int64(from)*partSize); err != nil {
		return err
	}
	seen := make([]uint16, to-from)
	for i := range seen {
		part := p[i*partSize : (i+1)*partSize]
		seen[i] = binary.LittleEndian.Uint16(part)
		if !bytes.Equal(part, bytes.Repeat(part[:2], partSize/2)) {
			return fmt.Errorf("part %d of the disk is torn: %x", from+i, part)
		}
	}
	c.h.add(c.id, call, from, to, 0, seen)
	return nil
}

// yielding lets others run in the middle of requests.
type yielding struct{ *blockdev.Memory }

func (y yielding) ReadAt(p []byte, off int64) (int, error) {
	runtime.Gosched()
	return y.Memory.ReadAt(p, off)
}

func (y yielding) WriteAt(p []byte, off int64) (int, error) {
	runtime.Gosched()
	defer runtime.Gosched()
	return y.Memory.WriteAt(p, off)
}

// TestLinearizable has clients that read, write, zero and discard the same few
// sectors, at the edges of the rekey's zones, while the key safe is replaced and the
// volume rekeyed, time and again; every sector behaves as if they came one by one.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	const (
		size, zone  = 64 << 10, 4096
		clients     = 4
		rounds      = 4
		requestsMax = 1000 // of a client in a round: the rest of a rekey may come alone
	)
	seed := blockdevtest.Seed(t)
	keys := []*keymem.Key{keymemtest.Random(t, 64), keymemtest.Random(t, 64)}
	mem := yielding{blockdev.NewMemory(0, 512)}
	format(t, mem, volume.FormatOptions{Size: size, DEK: keys[0], Safe: newSafe(t, keys[0], "0", 1), AllowDiscards: true})
	v := openVolume(t, mem, keys[0])
	h := &history{}
	var values atomic.Uint32
	var all []*client
	for i := range clients {
		all = append(all, &client{
			id: i, v: v, h: h, rng: rand.New(rand.NewPCG(seed, uint64(i))), values: &values,
			sectors: []int{zone/512 - 1, 5*zone/512 - 2, size/512 - 2},
		})
	}
	for round := range rounds {
		var guests sync.WaitGroup
		ctx, done := context.WithCancel(t.Context())
		var during atomic.Int64
		for _, c := range all {
			guests.Go(func() {
				for range requestsMax {
					if ctx.Err() != nil {
						return
					}
					if err := c.request(); err != nil {
						t.Error(err)
						return
					}
					during.Add(1)
				}
			})
		}
		old, next, generation := keys[round%2], keys[(round+1)%2], uint64(10*round+2)
		check(t, v.ReplaceSafe(newSafe(t, old, fmt.Sprint(generation), generation)))
		shallow := during.Load()
		check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next, NewSafe: newSafe(t, next, fmt.Sprint(generation+1), generation+1), Zone: zone}))
		done()
		guests.Wait()
		t.Logf("round %d: %d requests during a shallow, %d until the end of a deep rekey", round, shallow, during.Load())
	}
	check(t, all[0].read(h.clock.Add(1), 0, size/partSize))
	if len(h.ops) < clients*rounds*10 {
		t.Errorf("a history of %d accesses shows nothing", len(h.ops))
	}
	if result := porcupine.CheckOperationsTimeout(sectors, h.ops, 10*time.Minute); result != porcupine.Ok {
		t.Errorf("a history of %d accesses is %s", len(h.ops), result)
	}
}

// TestLinearizableModel: the model refuses what a volume must not do.
func TestLinearizableModel(t *testing.T) {
	t.Parallel()
	both := sectorState{1, 2, 2, 2}
	for name, c := range map[string]struct {
		seen     sectorState // by a read after two writes that ran together: 1 to the first part, 2 to the others
		possible bool
	}{
		"both":       {both, true},
		"lost write": {sectorState{0, 2, 2, 2}, false},
		"stale":      {sectorState{}, false},
		"torn":       {sectorState{1, 2, 2, 0}, false},
	} {
		h := &history{}
		first, second := h.clock.Add(1), h.clock.Add(1)
		h.add(0, first, 0, 1, 1, nil)
		h.add(1, second, 1, sectorParts, 2, nil)
		h.add(2, h.clock.Add(1), 0, sectorParts, 0, c.seen[:])
		if got := porcupine.CheckOperations(sectors, h.ops); got != c.possible {
			t.Errorf("%s: linearizable %v, want %v", name, got, c.possible)
		}
	}
}
