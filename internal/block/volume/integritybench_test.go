package volume_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/xts"
)

// The prototype behind docs/adr/0012-no-sector-integrity.md: what it costs to
// authenticate what lies below a volume. It serves one request at a time and keeps all
// tags in memory, which is the best that an implementation could hope for.

const (
	authSector = 4096
	tagSize    = 16
	nonceSize  = 12
	entrySize  = 64                     // of a sector: tag and nonce, now and before
	groupSize  = authSector / entrySize // sectors whose entries are one block
	groupBytes = (groupSize + 1) * authSector
)

// mac puts the tag of a sector of ciphertext, bound to its place, into its entry; if
// fresh, with a new nonce, if it uses one.
type mac func(entry, sector []byte, place uint64, fresh bool)

func hashMAC(h hash.Hash) mac {
	sum := make([]byte, 0, 64)
	var at [8]byte
	return func(entry, sector []byte, place uint64, fresh bool) {
		h.Reset()
		binary.LittleEndian.PutUint64(at[:], place)
		h.Write(at[:])
		h.Write(sector)
		copy(entry[:tagSize], h.Sum(sum))
	}
}

// gmac draws nonces from a counter, which a real one could not, because it
// would go back with a copy of the file: the figure leaves random nonces out.
func gmac(b testing.TB) mac {
	block, err := aes.NewCipher(make([]byte, 32))
	check(b, err)
	gcm, err := cipher.NewGCM(block)
	check(b, err)
	out := make([]byte, 0, 2*tagSize)
	var count uint64
	return func(entry, sector []byte, place uint64, fresh bool) {
		nonce := entry[tagSize : tagSize+nonceSize]
		if fresh {
			count++
			binary.LittleEndian.PutUint64(nonce, count)
			binary.LittleEndian.PutUint32(nonce[8:], uint32(place))
		}
		copy(entry[:tagSize], gcm.Seal(out, nonce, nil, sector))
	}
}

func macs(b testing.TB) map[string]mac {
	blake, err := blake2b.New256(make([]byte, 32))
	check(b, err)
	return map[string]mac{
		"hmac-sha256": hashMAC(hmac.New(sha256.New, make([]byte, 32))),
		"blake2b":     hashMAC(blake), "aes-gmac": gmac(b),
	}
}

// BenchmarkIntegrityCPU is 4 KiB of XTS alone, with each MAC, and AES-GCM, which
// encrypts and authenticates at once.
func BenchmarkIntegrityCPU(b *testing.B) {
	c, err := xts.New(keymemtest.Random(b, 64))
	check(b, err)
	defer c.Close()
	p, entry := pattern(authSector, 1), make([]byte, entrySize)
	run := func(name string, f func()) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(authSector)
			begin := processorTime(b)
			for b.Loop() {
				f()
			}
			b.ReportMetric(float64(processorTime(b)-begin)/float64(b.N), "cpu-ns/op")
		})
	}
	encrypt := func() { c.Encrypt(p, p, 0, 512) }
	run("xts", encrypt)
	for name, m := range macs(b) {
		run("xts+"+name, func() { encrypt(); m(entry, p, 1, true) })
	}
	block, err := aes.NewCipher(make([]byte, 32))
	check(b, err)
	gcm, err := cipher.NewGCM(block)
	check(b, err)
	out, nonce := make([]byte, 0, authSector+tagSize), make([]byte, nonceSize)
	run("aes-gcm", func() { gcm.Seal(out, nonce, p, nil) })
	run("aes-gcm, random nonce", func() { rand.Read(nonce); gcm.Seal(out, nonce, p, nil) })
}

// processorTime returns the process's, in nanoseconds: other work on the machine does
// not count.
func processorTime(b *testing.B) int64 {
	var u unix.Rusage
	check(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return u.Utime.Nano() + u.Stime.Nano()
}

// traffic is a Device that counts what is written.
type traffic struct {
	*blockdev.File

	bytes, flushes int64
}

func (t *traffic) WriteAt(p []byte, off int64) (int, error) {
	t.bytes += int64(len(p))
	return t.File.WriteAt(p, off)
}

func (t *traffic) Flush() error {
	t.flushes++
	return t.File.Flush()
}

// The ways to keep tag and data together over a power loss.
const (
	together  = "unordered" // data, then tags; a crash between is an alarm, or a hole
	versioned = "versioned" // tags old and new, flush, then data
	journaled = "journal"   // data and tags in a journal; in place after each flush
)

// authenticated is a Device of sectors with tags: after groupSize sectors one
// block with their entries. Requests must be whole sectors.
type authenticated struct {
	blockdev.Device

	mac     mac
	way     string
	entries []byte // of all sectors
	pending map[int64][]byte
	journal int64 // where the journal is
	written int64 // bytes in it
	scratch [entrySize]byte
}

func (a *authenticated) Size() int64 { return int64(len(a.entries) / entrySize * authSector) }

func place(sector int64) (off, tags int64) {
	group := sector / groupSize * groupBytes
	return group + sector%groupSize*authSector, group + groupSize*authSector
}

func (a *authenticated) entry(sector int64) []byte {
	return a.entries[sector*entrySize:][:entrySize]
}

// perGroup calls f for each run of sectors of one group.
func perGroup(n int, off int64, f func(from, to int, sector int64) error) error {
	for at := 0; at < n; {
		sector := (off + int64(at)) / authSector
		end := min(n, at+int(groupSize-sector%groupSize)*authSector)
		if err := f(at, end, sector); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func (a *authenticated) ReadAt(p []byte, off int64) (int, error) {
	return len(p), perGroup(len(p), off, func(from, to int, sector int64) error {
		at, _ := place(sector)
		if _, err := a.Device.ReadAt(p[from:to], at); err != nil {
			return err
		}
		for i := from; i < to; i += authSector {
			data, n := p[i:i+authSector], sector+int64(i-from)/authSector
			if later, ok := a.pending[n]; ok {
				copy(data, later)
			}
			copy(a.scratch[:], a.entry(n))
			a.mac(a.scratch[:], data, uint64(n), false)
			if !hmac.Equal(a.scratch[:tagSize], a.entry(n)[:tagSize]) {
				return fmt.Errorf("sector %d is not what was written", n)
			}
		}
		return nil
	})
}

func (a *authenticated) WriteAt(p []byte, off int64) (int, error) {
	for i := 0; i < len(p); i += authSector {
		n := (off + int64(i)) / authSector
		e := a.entry(n)
		copy(e[entrySize/2:], e[:entrySize/2])
		a.mac(e, p[i:i+authSector], uint64(n), true)
	}
	switch a.way {
	case journaled:
		for i := 0; i < len(p); i += authSector {
			n := (off + int64(i)) / authSector
			later, ok := a.pending[n]
			if !ok {
				later = make([]byte, authSector)
				a.pending[n] = later
			}
			copy(later, p[i:])
		}
		// A block of tags and places goes with each request.
		if _, err := a.Device.WriteAt(p, a.journal+a.written); err != nil {
			return 0, err
		}
		if _, err := a.Device.WriteAt(a.entries[:authSector], a.journal+a.written+int64(len(p))); err != nil {
			return 0, err
		}
		if a.written += int64(len(p)) + authSector; a.written > 16<<20 {
			return len(p), a.Flush()
		}
		return len(p), nil
	case versioned:
		if err := a.writeTags(len(p), off); err != nil {
			return 0, err
		}
		if err := a.Device.Flush(); err != nil {
			return 0, err
		}
		return len(p), a.writeData(p, off)
	default:
		if err := a.writeData(p, off); err != nil {
			return 0, err
		}
		return len(p), a.writeTags(len(p), off)
	}
}

func (a *authenticated) writeData(p []byte, off int64) error {
	return perGroup(len(p), off, func(from, to int, sector int64) error {
		at, _ := place(sector)
		_, err := a.Device.WriteAt(p[from:to], at)
		return err
	})
}

func (a *authenticated) writeTags(n int, off int64) error {
	return perGroup(n, off, func(_, _ int, sector int64) error {
		_, at := place(sector)
		_, err := a.Device.WriteAt(a.entries[sector/groupSize*authSector:][:authSector], at)
		return err
	})
}

// Flush makes the journal durable and then writes in place what is in it.
func (a *authenticated) Flush() error {
	if err := a.Device.Flush(); err != nil || a.way != journaled || len(a.pending) == 0 {
		return err
	}
	for n, data := range a.pending {
		if err := errors.Join(a.writeData(data, n*authSector), a.writeTags(authSector, n*authSector)); err != nil {
			return err
		}
	}
	clear(a.pending)
	a.written = 0
	return a.Device.Flush() // before the journal is used again
}

// BenchmarkIntegrity is a volume on a file, plain and above each way, with
// requests of 4 KiB at random places and of 1 MiB in order. Every 32nd write
// is followed by a flush where the name says so. The folder is the system's for
// temporary files, TMPDIR.
func BenchmarkIntegrity(b *testing.B) {
	const size = 256 << 20
	dek := keymemtest.Random(b, 64)
	for _, way := range []string{"plain", together, versioned, journaled} {
		file, err := blockdev.OpenFile(filepath.Join(b.TempDir(), "disk"), blockdev.FileOptions{Create: true})
		check(b, err)
		defer file.Close()
		below := &traffic{File: file}
		var dev blockdev.Device = below
		format(b, file, volume.FormatOptions{Size: size, SectorSize: 4096, DEK: dek})
		if way != "plain" {
			sectors := (size + testOffset) / authSector
			a := &authenticated{
				Device: below, mac: macs(b)["aes-gmac"], way: way, pending: map[int64][]byte{},
				entries: make([]byte, (sectors/groupSize+1)*authSector),
			}
			a.journal = int64(sectors/groupSize+1) * groupBytes
			check(b, file.Resize(a.journal+64<<20))
			header := make([]byte, testOffset)
			_, err := file.ReadAt(header, 0)
			check(b, err)
			_, err = a.WriteAt(header, 0)
			check(b, err)
			check(b, a.Flush())
			dev = a
		}
		v := openVolume(b, dev, dek)
		big := pattern(1<<20, 1)
		for off := int64(0); off < size; off += int64(len(big)) {
			_, err := v.WriteAt(big, off)
			check(b, err)
		}
		check(b, v.Flush())
		for _, load := range []struct {
			name         string
			request      int
			read, random bool
			flushEach    int
		}{
			{"read/4KiB", 4 << 10, true, true, 0},
			{"read/1MiB", 1 << 20, true, false, 0},
			{"write/4KiB", 4 << 10, false, true, 0},
			{"write/1MiB", 1 << 20, false, false, 0},
			{"write/4KiB/flush", 4 << 10, false, true, 32},
		} {
			b.Run(fmt.Sprintf("%s/%s", way, load.name), func(b *testing.B) {
				rng := mathrand.New(mathrand.NewPCG(1, 2))
				b.SetBytes(int64(load.request))
				p := big[:load.request]
				done := 0
				begin, bytes, flushes := processorTime(b), below.bytes, below.flushes
				for b.Loop() {
					off := int64(done*load.request) % size
					if load.random {
						off = rng.Int64N(size/int64(load.request)) * int64(load.request)
					}
					var err error
					if load.read {
						_, err = v.ReadAt(p, off)
					} else {
						_, err = v.WriteAt(p, off)
					}
					if done++; err == nil && load.flushEach > 0 && done%load.flushEach == 0 {
						err = v.Flush()
					}
					check(b, err)
				}
				if !load.read { // what a load leaves to be written belongs to it
					check(b, v.Flush())
				}
				n := float64(b.N)
				b.ReportMetric(float64(processorTime(b)-begin)/n, "cpu-ns/op")
				b.ReportMetric(float64(below.bytes-bytes)/n/float64(load.request), "written/byte")
				b.ReportMetric(float64(below.flushes-flushes)/n, "flushes/op")
			})
		}
		check(b, os.Remove(file.Name()))
	}
}
