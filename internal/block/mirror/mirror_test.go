package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/mirror"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func contents(t testing.TB, dev blockdev.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	_, err := dev.ReadAt(p, 0)
	check(t, err)
	return p
}

func newMirror(t testing.TB, from, to blockdev.Device) *mirror.Mirror {
	t.Helper()
	m, err := mirror.New(from, to)
	check(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// TestConformance: a Mirror is a device, before, during and after the copy.
func TestConformance(t *testing.T) {
	for _, copied := range []bool{false, true} {
		t.Run(fmt.Sprintf("copied=%v", copied), func(t *testing.T) {
			blockdevtest.Run(t, blockdevtest.Suite{New: func(t testing.TB, size int64) blockdev.Device {
				m := newMirror(t, blockdev.NewMemory(size, 512), blockdev.NewMemory(size, 512))
				if copied {
					check(t, m.Copy(t.Context(), mirror.CopyOptions{}))
					check(t, m.Hold())
				}
				return m
			}})
		})
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	if _, err := mirror.New(blockdev.NewMemory(1024, 512), blockdev.NewMemory(512, 512)); !errors.Is(err, blockdev.ErrBadSize) {
		t.Errorf("devices of two sizes: %v", err)
	}
	m := newMirror(t, blockdev.NewMemory(1024, 512), blockdev.NewMemory(1024, 512))
	if err := m.Hold(); !errors.Is(err, mirror.ErrParted) {
		t.Errorf("Hold before Copy: %v", err)
	}
	check(t, m.Copy(t.Context(), mirror.CopyOptions{}))
	if err := m.Copy(t.Context(), mirror.CopyOptions{}); !errors.Is(err, mirror.ErrParted) {
		t.Errorf("a second Copy: %v", err)
	}
	check(t, m.Hold())
}

// TestCancel: a copy that is stopped gives the new device up, and nothing else.
func TestCancel(t *testing.T) {
	t.Parallel()
	from, to := blockdev.NewMemory(4<<20, 512), blockdev.NewMemory(4<<20, 512)
	m := newMirror(t, from, to)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("somebody said so")
	if err := m.Copy(ctx, mirror.CopyOptions{Rate: 1 << 20, Progress: func(int64, int64) { cancel(why) }}); !errors.Is(err, why) {
		t.Errorf("Copy reports %v", err)
	}
	if err := m.Hold(); !errors.Is(err, mirror.ErrParted) {
		t.Errorf("Hold: %v", err)
	}
	_, err := m.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
	check(t, err)
	if got := contents(t, to)[0]; got != 0 {
		t.Error("a device that was given up is written to")
	}
}

// liar is a device that loses a byte of each write.
type liar struct{ *blockdev.Memory }

func (l liar) WriteAt(p []byte, off int64) (int, error) {
	q := bytes.Clone(p)
	q[len(q)-1] ^= 1
	return l.Memory.WriteAt(q, off)
}

func TestVerifies(t *testing.T) {
	t.Parallel()
	m := newMirror(t, blockdev.NewMemory(2<<20, 512), liar{blockdev.NewMemory(2<<20, 512)})
	if err := m.Copy(t.Context(), mirror.CopyOptions{}); !errors.Is(err, mirror.ErrVerify) {
		t.Errorf("Copy to a device that lies: %v", err)
	}
	if err := m.Hold(); !errors.Is(err, mirror.ErrParted) {
		t.Errorf("Hold: %v", err)
	}
}

// TestHoles: kept, they stay holes of the new device; else zeros are written.
func TestHoles(t *testing.T) {
	t.Parallel()
	const size = 70 << 20
	for _, keep := range []bool{false, true} {
		from, to := blockdev.NewMemory(size, 512), blockdev.NewMemory(size, 512)
		for _, off := range []int64{5 << 20, 68<<20 + 512, size - 4096} {
			_, err := from.WriteAt(bytes.Repeat([]byte{7}, 4096), off)
			check(t, err)
		}
		m := newMirror(t, from, to)
		var last int64
		check(t, m.Copy(t.Context(), mirror.CopyOptions{KeepHoles: keep, Progress: func(done, total int64) {
			if done <= last || total != 2*size {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}}))
		if last != 2*size {
			t.Errorf("progress ended at %d", last)
		}
		e, err := to.NextExtent(8 << 20)
		check(t, err)
		if e.Hole != keep {
			t.Errorf("keep %v: the new device has %+v", keep, e)
		}
		if !bytes.Equal(contents(t, to), contents(t, from)) {
			t.Error("the copy differs")
		}
	}
}

// TestInUse has many users at work, each on stripes of its own which lie in each
// other, while the disk moves and after: they see what they wrote, and in the end
// both devices hold it.
func TestInUse(t *testing.T) {
	t.Parallel()
	const size, users, stripe = 8 << 20, 4, 1536
	seed := blockdevtest.Seed(t)
	from, to := blockdev.NewMemory(size, 512), blockdev.NewMemory(size, 512)
	m := newMirror(t, from, to)
	stop := make(chan struct{})
	var group sync.WaitGroup
	want := make([]byte, size)
	for user := range users {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(user)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				at := (rng.Int64N(size/stripe/users)*users + int64(user)) * stripe
				span := want[at : at+stripe]
				var err error
				switch rng.IntN(8) {
				case 0:
					clear(span)
					err = m.WriteZeroes(at, stripe, true)
				case 1:
					err = m.Flush()
				case 2, 3:
					got := make([]byte, stripe)
					if _, err = m.ReadAt(got, at); err == nil && !bytes.Equal(got, span) {
						err = fmt.Errorf("%d bytes at %d differ", stripe, at)
					}
				default:
					part := span[rng.IntN(stripe):]
					for i := range part {
						part[i] = byte(rng.Uint32())
					}
					_, err = m.WriteAt(part, at+stripe-int64(len(part)))
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	err := m.Copy(t.Context(), mirror.CopyOptions{Rate: 64 << 20})
	held := m.Hold()
	close(stop)
	group.Wait()
	check(t, errors.Join(err, held))
	if !bytes.Equal(contents(t, from), want) {
		t.Error("the old device differs from what was written")
	}
	if !bytes.Equal(contents(t, to), want) {
		t.Error("the new device differs from what was written")
	}
}

// TestFaults: each operation of each device fails in turn, in each way, while a
// user writes between the chunks. The user loses nothing.
func TestFaults(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	const size = 1<<20 + 65536
	start := blockdev.NewMemory(size, 512)
	first := make([]byte, size)
	for i := range first[:1<<19] {
		first[i] = byte(i / 512)
	}
	_, err := start.WriteAt(first, 0)
	check(t, err)
	for _, newFails := range []bool{false, true} {
		for _, mode := range faultdev.Modes() {
			for _, dead := range []bool{false, true} {
				for op := 0; ; op += blockdevtest.FaultStep {
					fault := &faultdev.Fault{Op: op, Mode: mode, Dead: dead}
					from, to := faultdev.New(start.Clone(), nil), faultdev.New(blockdev.NewMemory(size, 512), nil)
					faulty := from
					if newFails {
						faulty = to
					}
					faulty.Inject(fault)
					ok := t.Run(fmt.Sprintf("new=%v/%s/dead=%v/%d", newFails, mode, dead, op), func(t *testing.T) {
						move(t, from, to, newFails, bytes.Clone(first), rng)
					})
					if !ok {
						return
					}
					if faulty.Injected() == faultdev.None {
						break
					}
				}
			}
		}
	}
}

// move moves a disk that a user writes to, of which one device may fail.
func move(t *testing.T, from, to *faultdev.Device, newFails bool, want []byte, rng *rand.Rand) {
	m := newMirror(t, from, to)
	held, turn := false, 0
	var userErr error
	use := func(int64, int64) {
		if userErr != nil {
			return
		}
		turn++
		off, n := rng.IntN(len(want)-40<<10), 1+rng.IntN(40<<10)
		next := bytes.Repeat([]byte{byte(turn)}, n)
		var err error
		switch turn % 4 {
		case 1:
			err = m.WriteZeroes(int64(off), int64(n), true)
			clear(next)
		case 3:
			if err = m.Flush(); err != nil {
				userErr = err
				return
			}
			fallthrough
		default:
			_, err = m.WriteAt(next, int64(off))
		}
		if userErr = err; err == nil {
			copy(want[off:], next)
		}
	}
	same := func(what string, dev blockdev.Device) {
		t.Helper()
		if !bytes.Equal(contents(t, dev), want) {
			t.Errorf("%s does not hold what was written", what)
		}
	}
	err := m.Copy(t.Context(), mirror.CopyOptions{Progress: use})
	if err == nil && userErr == nil {
		same("the new device, after a power loss,", to.PowerLoss(rng))
	}
	for range 4 {
		use(0, 0)
	}
	if err == nil {
		err = m.Hold()
		held = err == nil
	}
	var late error
	for range 4 {
		use(0, 0)
	}
	if userErr == nil {
		userErr = m.Flush()
	}
	late = userErr
	switch {
	case newFails && !held:
		if userErr != nil {
			t.Fatalf("the user sees what fails on the new device: %v", userErr)
		}
		if !errors.Is(err, faultdev.ErrInjected) {
			t.Errorf("Copy or Hold reports %v", err)
		}
		same("the old device", from.Contents())
	case held && late == nil:
		for what, dev := range map[string]*faultdev.Device{"the old device": from, "the new device": to} {
			same(what, dev.Contents())
			same(what+", after a power loss,", dev.PowerLoss(rng))
		}
		// A read of the copy is the one thing that may fail unseen.
		if from.Injected() != faultdev.None || to.Injected() != faultdev.None {
			t.Error("a fault was swallowed")
		}
	case held && !errors.Is(late, faultdev.ErrInjected):
		t.Errorf("the user sees %v", late)
	case !held && !errors.Is(errors.Join(err, userErr), faultdev.ErrInjected):
		t.Errorf("an error without a fault: %v, %v", err, userErr)
	}
}
