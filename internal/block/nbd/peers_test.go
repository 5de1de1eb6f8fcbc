package nbd_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/nbd"
)

// tool runs a real client and returns what it prints.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), name, args...)
	cmd.Dir = t.TempDir() // fio leaves files behind
	// The system's Python has libnbd's module, another one may be in front.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sparse returns a device of 16 MiB with data and holes, and its contents.
func sparse(t *testing.T) (*blockdev.Memory, []byte) {
	mem := blockdev.NewMemory(16<<20, 4096)
	want := make([]byte, 16<<20)
	for _, r := range [][2]int{{0, 70_000}, {3 << 20, 1 << 20}, {9<<20 + 512, 5000}, {16<<20 - 4096, 4096}} {
		copy(want[r[0]:], pattern(r[1]))
		write(t, mem, want[r[0]:r[0]+r[1]], int64(r[0]))
	}
	return mem, want
}

func uri(path, name string) string { return fmt.Sprintf("nbd+unix:///%s?socket=%s", name, path) }

func contents(t *testing.T, dev blockdev.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestNbdfuse has libnbd show an export as a file, and copies from it and to it.
func TestNbdfuse(t *testing.T) {
	t.Parallel()
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Log("/dev/fuse cannot be opened: nbdfuse is not tested")
		return
	} else {
		f.Close()
	}
	mem, want := sparse(t)
	_, path := start(t, config(), nbd.Export{Name: "disk", Device: mem})
	dir, copied := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	file := filepath.Join(dir, "disk")
	cmd := exec.CommandContext(testContext(t), "nbdfuse", file, uri(path, "disk"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	check(t, cmd.Start())
	t.Cleanup(func() { _ = exec.Command("fusermount3", "-u", "-z", dir).Run() }) // for a test that fails midway
	blockdevtest.Eventually(t, "nbdfuse to show the export", func() bool {
		st, err := os.Stat(file)
		return err == nil && st.Size() == int64(len(want))
	})
	tool(t, "cp", file, copied)
	got, err := os.ReadFile(copied)
	check(t, err)
	changed := pattern(1 << 20)
	check(t, os.WriteFile(copied, changed, 0o600))
	tool(t, "dd", "if="+copied, "of="+file, "bs=64k", "seek=32", "conv=notrunc,fsync", "status=none")
	tool(t, "fusermount3", "-u", dir)
	if err := cmd.Wait(); err != nil {
		t.Errorf("nbdfuse: %v\n%s", err, out.String())
	}
	if !bytes.Equal(got, want) {
		t.Error("nbdfuse has read other data")
	}
	copy(want[2<<20:], changed)
	if !bytes.Equal(contents(t, mem), want) {
		t.Error("nbdfuse has written other data")
	}
}

func TestNbdinfo(t *testing.T) {
	t.Parallel()
	mem, _ := sparse(t)
	_, path := start(t, config(),
		nbd.Export{Name: "disk", Device: mem, Description: "a disk"},
		nbd.Export{Name: "ro", Device: mem, ReadOnly: true})
	var all struct {
		Exports []struct {
			Name        string `json:"export-name"`
			Description string `json:"description"`
			Size        int64  `json:"export-size"`
			ReadOnly    bool   `json:"is_read_only"`
			MultiConn   bool   `json:"can_multi_conn"`
			FUA         bool   `json:"can_fua"`
			Trim        bool   `json:"can_trim"`
			Zero        bool   `json:"can_zero"`
			FastZero    bool   `json:"can_fast_zero"`
			Cache       bool   `json:"can_cache"`
			DF          bool   `json:"can_df"`
			Minimum     int    `json:"block_size_minimum"`
			Preferred   int    `json:"block_size_preferred"`
			Maximum     int    `json:"block_size_maximum"`
			Contexts    []string
		}
	}
	out := tool(t, "nbdinfo", "--json", "--list", uri(path, ""))
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(all.Exports) != 2 {
		t.Fatalf("nbdinfo lists %d exports\n%s", len(all.Exports), out)
	}
	d, ro := all.Exports[0], all.Exports[1]
	if d.Name != "disk" || d.Description != "a disk" || d.Size != 16<<20 || d.ReadOnly ||
		!d.MultiConn || !d.FUA || !d.Trim || !d.Zero || d.FastZero || !d.Cache || !d.DF ||
		d.Minimum != 512 || d.Preferred != 4096 || d.Maximum != 32<<20 || len(d.Contexts) != 1 {
		t.Errorf("nbdinfo says %+v", d)
	}
	if ro.Name != "ro" || !ro.ReadOnly || ro.Trim || ro.Zero {
		t.Errorf("nbdinfo says %+v", ro)
	}
	var extents []struct {
		Offset, Length int64
		Type           int
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--map", uri(path, "disk"))), &extents); err != nil {
		t.Fatal(err)
	}
	end := int64(0)
	for i, e := range extents {
		if e.Offset != end || e.Type != []int{0, 3}[i%2] {
			t.Errorf("extent %d of the map is %+v", i, e)
		}
		end += e.Length
	}
	if end != 16<<20 || len(extents) != 7 {
		t.Errorf("the map has %d extents and %d bytes", len(extents), end)
	}
}

func TestNbdcopy(t *testing.T) {
	t.Parallel()
	mem, want := sparse(t)
	target := blockdev.NewMemory(16<<20, 4096)
	write(t, target, pattern(16<<20), 0)
	_, path := start(t, config(), nbd.Export{Name: "from", Device: mem}, nbd.Export{Name: "to", Device: target})
	for _, connections := range []string{"1", "4"} {
		file := filepath.Join(t.TempDir(), "copy")
		tool(t, "nbdcopy", "--connections="+connections, uri(path, "from"), file)
		got, err := os.ReadFile(file)
		check(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s connections: the copy differs", connections)
		}
		write(t, target, pattern(16<<20), 0)
		tool(t, "nbdcopy", "--flush", "--connections="+connections, file, uri(path, "to"))
		if !bytes.Equal(contents(t, target), want) {
			t.Errorf("%s connections: the copy back differs", connections)
		}
		write(t, target, pattern(16<<20), 0)
		tool(t, "nbdcopy", "--request-size=4194304", "--connections="+connections, uri(path, "from"), uri(path, "to"))
		if !bytes.Equal(contents(t, target), want) {
			t.Errorf("%s connections: the copy from export to export differs", connections)
		}
	}
	if e, err := target.NextExtent(5 << 20); err != nil || !e.Hole {
		t.Errorf("nbdcopy has not made a hole: %+v, %v", e, err)
	}
}

func TestQemuImg(t *testing.T) {
	t.Parallel()
	mem, want := sparse(t)
	target := blockdev.NewMemory(16<<20, 4096)
	_, path := start(t, config(), nbd.Export{Name: "from", Device: mem}, nbd.Export{Name: "to", Device: target})
	file := filepath.Join(t.TempDir(), "copy")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri(path, "from"), file)
	got, err := os.ReadFile(file)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the converted image differs")
	}
	tool(t, "qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", file, uri(path, "to"))
	if !bytes.Equal(contents(t, target), want) {
		t.Error("the image converted back differs")
	}
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri(path, "from"), uri(path, "to"))
	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri(path, "from"))), &extents); err != nil {
		t.Fatal(err)
	}
	if len(extents) != 7 || !extents[0].Data || extents[1].Data || !extents[1].Zero {
		t.Errorf("qemu-img map says %+v", extents)
	}
}

func TestQemuIO(t *testing.T) {
	t.Parallel()
	dev := &watched{Device: blockdev.NewMemory(16<<20, 4096)}
	_, path := start(t, config(), nbd.Export{Name: "disk", Device: dev})
	out := tool(t, "qemu-io", "-f", "raw", uri(path, "disk"),
		"-c", "write -P 5 1M 3M", "-c", "write -f -P 6 64k 1k", "-c", "read -P 5 1M 3M", "-c", "read -P 6 64k 1k",
		"-c", "write -z -u 1M 64k", "-c", "read -P 0 1M 64k", "-c", "write -z 2M 64k", "-c", "read -P 0 2M 64k",
		"-c", "discard 3M 64k", "-c", "flush", "-c", "aio_write -P 7 8M 512k", "-c", "aio_write -P 8 9M 512k", "-c", "aio_flush",
		"-c", "read -P 7 8M 512k", "-c", "read -P 8 9M 512k")
	if strings.Contains(out, "Pattern verification failed") {
		t.Error(out)
	}
	log := dev.took()
	for _, want := range []string{"zeroes(true)", "zeroes(false)", "discard", "write flush"} {
		if !strings.Contains(log, want) {
			t.Errorf("the device did not see %q but %s", want, log)
		}
	}
}

// TestFio writes with checksums at depth, on several connections, and reads
// them back.
func TestFio(t *testing.T) {
	t.Parallel()
	_, path := start(t, config(), nbd.Export{Name: "disk", Device: blockdev.NewMemory(32<<20, 4096)})
	out := tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri(path, "disk"), "--rw=randwrite",
		"--bsrange=512-512k", "--bs_unaligned=0", "--blockalign=512", "--iodepth=16", "--numjobs=2", "--size=16M", "--offset_increment=16M",
		"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--minimal")
	if out == "" {
		t.Error("fio prints nothing")
	}
}

// TestNbddump reads by a client that asks for the extents of each piece first.
func TestNbddump(t *testing.T) {
	t.Parallel()
	mem, want := sparse(t)
	_, path := start(t, config(), nbd.Export{Name: "disk", Device: mem})
	out := tool(t, "nbddump", "--length=8388608", uri(path, "disk"))
	// Lines of 16 bytes; one "*" stands for lines that repeat the one before.
	got := make([]byte, 0, 8<<20)
	for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
		text, _, _ := strings.Cut(line, "|")
		at, digits, _ := strings.Cut(strings.TrimSpace(text), ":")
		if at == "*" {
			continue
		}
		off, err := strconv.ParseInt(at, 16, 64)
		check(t, err)
		for len(got) > 0 && int64(len(got)) < off {
			got = append(got, got[len(got)-16:]...)
		}
		row, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
		check(t, err)
		got = append(got, row...)
	}
	for len(got) > 0 && len(got) < 8<<20 {
		got = append(got, got[len(got)-16:]...)
	}
	if !bytes.Equal(got, want[:8<<20]) {
		t.Error("nbddump has read other data")
	}
}

// TestNbdsh uses what the tools do not: libnbd's own checks of every reply, and
// commands in a mix. libnbd's own test programs are in its sources only, and
// most of them test libnbd against nbdkit: Debian packages its tools, which are
// all used here, and its Python module.
func TestNbdsh(t *testing.T) {
	t.Parallel()
	mem, _ := sparse(t)
	_, path := start(t, config(), nbd.Export{Name: "disk", Device: mem})
	out := tool(t, "nbdsh", "-c", fmt.Sprintf(`
h.set_request_block_size(True)
h.add_meta_context("base:allocation")
h.connect_uri(%q)
assert h.get_structured_replies_negotiated()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 512

def chunk(buf, offset, status, error):
    seen.append((offset, len(buf), status))
seen = []
b = h.pread_structured(1 << 20, 6 << 20, chunk)
assert b == bytearray(1 << 20), "hole"
assert all(s == nbd.READ_HOLE for _, _, s in seen), seen
seen = []
b = h.pread_structured(4096, 3 << 20, chunk, nbd.CMD_FLAG_DF)
assert seen == [(3 << 20, 4096, nbd.READ_DATA)], seen

bufs = [nbd.Buffer(1 << 20) for i in range(16)]
cookies = [h.aio_pread(bufs[i], i << 20) for i in range(16)]
while h.aio_in_flight() > 0:
    h.poll(-1)
whole = b"".join(bytes(x.to_bytearray()) for x in bufs)
assert whole == bytes(h.pread(16 << 20, 0))

h.pwrite(b"a" * 8192, 8192, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(4096, 12288, nbd.CMD_FLAG_FUA)
h.cache(16 << 20, 0)
h.flush()
assert h.pread(4096, 8192) == bytearray(4096)

h.set_strict_mode(0)
for bad in [lambda: h.pread(512, 16 << 20), lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO), lambda: h.pread(512, (1 << 63) - 512)]:
    try:
        bad()
    except nbd.Error as e:
        assert e.errno == "EINVAL", e
    else:
        raise SystemExit("not refused")
try:
    h.pwrite(b"x" * 1024, (16 << 20) - 512)
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
else:
    raise SystemExit("not refused")
h.shutdown()
print("good")
`, uri(path, "disk")))
	if strings.TrimSpace(out) != "good" {
		t.Error(out)
	}
}
