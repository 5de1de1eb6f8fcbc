package audit_test

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
)

var update = flag.Bool("update", false, "write testdata anew")

// testKey is a key whose seed everybody knows.
func testKey() ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
}

func testPub() ed25519.PublicKey { return testKey().Public().(ed25519.PublicKey) }

func entry(n int) audit.Entry {
	return audit.Entry{
		Actor: "user:ann", Action: "provider.export", Object: fmt.Sprintf("provider/kp-%d", n), Outcome: audit.Success,
		Details: map[string]string{"n": fmt.Sprint(n), "address": "127.0.0.1"},
	}
}

// write makes a log of n records and closes it.
func write(t *testing.T, cfg audit.Config, n int) audit.Head {
	t.Helper()
	cfg.Signer = testKey()
	l, err := audit.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var head audit.Head
	for i := range n {
		if head, err = l.Append(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	if head != l.Head() {
		t.Errorf("Append returned %+v, Head %+v", head, l.Head())
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := l.Append(entry(0)); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("Append after Close: %v", err)
	}
	return head
}

// TestVector holds the format: the bytes of a log with fixed id, key and clock.
func TestVector(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l, err := audit.Open(audit.Config{Dir: dir, Signer: testKey(), CheckpointRecords: 2, CheckpointEvery: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 23, 3, 22, 27, 500_000_000, time.UTC)
	l.SetClock(func() time.Time { now = now.Add(time.Second); return now })
	if err := l.SetID("00000000-0000-4000-8000-000000000001"); err != nil {
		t.Fatal(err)
	}
	for _, e := range []audit.Entry{
		{Actor: "user:ann", Action: "user.login", Object: "user/ann", Outcome: audit.Success},
		{Actor: "user:bob", Action: "provider.delete", Object: "provider/kp-1", Outcome: audit.Denied, Details: map[string]string{"reason": "NoPermission", "<a>": "ü\xff\n\""}},
		{Actor: "internal:controller", Action: "vm.rekey", Object: "vm/web-1", Outcome: audit.Failed, Details: map[string]string{"error": strings.Repeat("ä", 600)}},
	} {
		if _, err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	const name = "audit-00000000000000000001.jsonl"
	got, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the log's bytes have changed:\n%s\nwant:\n%s", got, want)
	}
	rep, err := audit.Verify("testdata", audit.Expect{Key: testPub()}, nil)
	if err != nil || rep.Last != 3 || rep.Checkpoints != 2 || rep.Unsigned != 0 {
		t.Errorf("Verify of the vector: %+v, %v", rep, err)
	}
}

func TestAppendReopenRotateVerify(t *testing.T) {
	t.Parallel()
	cfg := audit.Config{Dir: t.TempDir(), MaxFileBytes: 2000, CheckpointRecords: 4}
	write(t, cfg, 10)
	head := write(t, cfg, 15)
	var seen []string
	rep, err := audit.Verify(cfg.Dir, audit.Expect{Key: testPub(), Head: head}, func(r audit.Record) error {
		seen = append(seen, r.Object)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if rep.First != 1 || rep.Last != 25 || rep.Files < 3 || rep.Checkpoints < 6 || rep.Unsigned != 0 || rep.Head != head || len(seen) != 25 || seen[10] != "provider/kp-0" {
		t.Errorf("%+v, %d records seen", rep, len(seen))
	}
	boom := errors.New("boom")
	if _, err := audit.Verify(cfg.Dir, audit.Expect{Key: testPub()}, func(audit.Record) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("visitor's error: %v", err)
	}
	// One writer at a time.
	cfg.Signer = testKey()
	l, err := audit.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Open(cfg); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("second writer: %v", err)
	}
	if _, err := l.Append(entry(1)); err != nil {
		t.Fatal(err)
	}
	if rep, err := audit.Verify(cfg.Dir, audit.Expect{Key: testPub()}, nil); err != nil || rep.Unsigned != 1 {
		t.Errorf("verification beside the writer: %+v, %v", rep, err)
	}
	for range 2 { // the second has nothing to sign
		if err := l.Checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// Files that were removed from the front must be allowed.
	if err := os.Remove(filepath.Join(cfg.Dir, "audit-00000000000000000001.jsonl")); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(cfg.Dir, audit.Expect{Key: testPub()}, nil); errs.KindOf(err) != errs.Corrupt {
		t.Errorf("without the first file: %v", err)
	}
	if rep, err := audit.Verify(cfg.Dir, audit.Expect{Key: testPub(), AllowPruned: true, Head: audit.Head{Seq: 1}}, nil); err != nil || rep.First < 2 {
		t.Errorf("pruned, allowed: %+v, %v", rep, err)
	}
}

func TestTamperingIsDetected(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	head := write(t, audit.Config{Dir: base, CheckpointRecords: 3, MaxFileBytes: 1200}, 12)
	type lines map[string][]string // by file
	for _, c := range []struct {
		name string
		do   func(files []string, l lines)
		key  ed25519.PublicKey
	}{
		{name: "record removed", do: func(f []string, l lines) { l[f[0]] = append(l[f[0]][:2:2], l[f[0]][3:]...) }},
		{name: "last record and checkpoint removed", do: func(f []string, l lines) { x := f[len(f)-1]; l[x] = l[x][:len(l[x])-2] }},
		{name: "first record removed", do: func(f []string, l lines) { l[f[0]] = append(l[f[0]][:1:1], l[f[0]][2:]...) }},
		{name: "records exchanged", do: func(f []string, l lines) { x := l[f[0]]; x[1], x[2] = x[2], x[1] }},
		{name: "record doubled", do: func(f []string, l lines) { x := l[f[0]]; l[f[0]] = append(x[:2:2], x[1:]...) }},
		{name: "actor changed", do: func(f []string, l lines) { l[f[0]][2] = strings.Replace(l[f[0]][2], "user:ann", "user:bob", 1) }},
		{name: "detail changed", do: func(f []string, l lines) { l[f[0]][2] = strings.Replace(l[f[0]][2], "127.0.0.1", "127.0.0.2", 1) }},
		{name: "time changed", do: func(f []string, l lines) {
			l[f[0]][2] = strings.Replace(l[f[0]][2], `"time":"20`, `"time":"19`, 1)
		}},
		{name: "space added", do: func(f []string, l lines) { l[f[0]][2] = strings.Replace(l[f[0]][2], ",", ", ", 1) }},
		{name: "key added", do: func(f []string, l lines) {
			l[f[0]][2] = strings.Replace(l[f[0]][2], `,"actor"`, `,"x":1,"actor"`, 1)
		}},
		{name: "checkpoint moved", do: func(f []string, l lines) { x := l[f[0]]; x[3], x[4] = x[4], x[3] }},
		{name: "signature changed", do: func(f []string, l lines) {
			x := l[f[0]]
			i := strings.Index(x[4], `"sig":"`) + len(`"sig":"`)
			b := []byte(x[4])
			b[i] ^= 1
			x[4] = string(b)
		}},
		{name: "other key", do: func([]string, lines) {}, key: ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)},
		{name: "file removed in the middle", do: func(f []string, l lines) { delete(l, f[1]) }},
		{name: "last file removed", do: func(f []string, l lines) { delete(l, f[len(f)-1]) }},
		{name: "file under another name", do: func(f []string, l lines) {
			l["audit-00000000000000000099.jsonl"] = l[f[1]]
			delete(l, f[1])
		}},
		{name: "header twice", do: func(f []string, l lines) { x := l[f[0]]; l[f[0]] = append(x[:1:1], x...) }},
		{name: "no header", do: func(f []string, l lines) { l[f[0]] = l[f[0]][1:] }},
		{name: "empty file", do: func(f []string, l lines) { l[f[0]] = nil }},
		{name: "torn in the middle of the log", do: func(f []string, l lines) { x := l[f[0]]; x[len(x)-1] = x[len(x)-1][:20] }},
		{name: "all gone", do: func(f []string, l lines) { clear(l) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := lines{}
			var files []string
			entries, err := os.ReadDir(base)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".jsonl") {
					b, err := os.ReadFile(filepath.Join(base, e.Name()))
					if err != nil {
						t.Fatal(err)
					}
					files = append(files, e.Name())
					l[e.Name()] = strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")
				}
			}
			if len(files) < 3 || len(l[files[0]]) < 5 {
				t.Fatalf("unexpected shape: %d files, %d lines", len(files), len(l[files[0]]))
			}
			c.do(files, l)
			dir := t.TempDir()
			for name, x := range l {
				s := strings.Join(x, "")
				if len(x) > 0 && (len(x[len(x)-1]) > 20 && !strings.HasSuffix(s, "\n")) {
					s += "\n"
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			key := c.key
			if key == nil {
				key = testPub()
			}
			rep, err := audit.Verify(dir, audit.Expect{Key: key, Head: head}, nil)
			if err == nil || rep != (audit.Report{}) {
				t.Errorf("not detected: %+v", rep)
			}
		})
	}
	if _, err := audit.Verify(base, audit.Expect{Key: testPub(), Head: audit.Head{Seq: 3, Hash: audit.Hash{1}}}, nil); errs.ReasonOf(err) != "Altered" {
		t.Errorf("another hash at a noted head: %v", err)
	}
	if _, err := audit.Verify(base, audit.Expect{Key: testPub(), Head: audit.Head{Seq: 13}}, nil); errs.ReasonOf(err) != "Truncated" {
		t.Errorf("a noted head beyond the end: %v", err)
	}
}

// TestTornAnywhere cuts the log at every length, as a crash may, and goes on
// writing.
func TestTornAnywhere(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	write(t, audit.Config{Dir: base, CheckpointRecords: 2}, 3)
	const name = "audit-00000000000000000001.jsonl"
	whole, err := os.ReadFile(filepath.Join(base, name))
	if err != nil {
		t.Fatal(err)
	}
	headerLen := bytes.IndexByte(whole, '\n') + 1
	dir := t.TempDir()
	for n := headerLen; n <= len(whole); n += 1 + n%7 {
		if err := os.WriteFile(filepath.Join(dir, name), whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		kept := bytes.Count(whole[:n], []byte("\n"+`{"seq":`)) // complete ones, or the torn one, too
		torn := whole[n-1] != '\n'
		if torn && bytes.HasPrefix(whole[bytes.LastIndexByte(whole[:n], '\n')+1:n], []byte(`{"seq":`)) {
			kept--
		}
		l, err := audit.Open(audit.Config{Dir: dir, Signer: testKey(), Sync: audit.SyncCheckpoint})
		if err != nil {
			t.Fatalf("cut at %d: %v", n, err)
		}
		want := kept + 1
		if torn {
			want++ // the note of the recovery
		}
		head, err := l.Append(entry(9))
		if err != nil || head.Seq != uint64(want) {
			t.Fatalf("cut at %d: appended %d, %v; want %d", n, head.Seq, err, want)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		recovered := false
		if _, err := audit.Verify(dir, audit.Expect{Key: testPub(), Head: head}, func(r audit.Record) error {
			recovered = recovered || r.Action == "audit.recover"
			return nil
		}); err != nil || recovered != torn {
			t.Fatalf("cut at %d: recovery noted %v, torn %v, %v", n, recovered, torn, err)
		}
	}
	// A damaged, not torn, file is not written on.
	if err := os.WriteFile(filepath.Join(dir, name), bytes.Replace(whole, []byte("ann"), []byte("bob"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Open(audit.Config{Dir: dir, Signer: testKey()}); errs.KindOf(err) != errs.Corrupt {
		t.Errorf("open of a damaged log: %v", err)
	}
}

// TestEveryFault fails each operation on the file in turn: what was acknowledged
// is in the log, and the log always verifies and can be gone on with.
func TestEveryFault(t *testing.T) {
	t.Parallel()
	for _, torn := range []bool{false, true} {
		for at := 1; ; at++ {
			dir := t.TempDir()
			cfg := audit.Config{Dir: dir, Signer: testKey(), CheckpointRecords: 3, MaxFileBytes: 1500}
			faults := &audit.Faults{At: at, Torn: torn}
			acked := map[string]bool{}
			l, err := audit.OpenFaulty(cfg, faults)
			failed := err != nil
			if err == nil {
				for i := range 10 {
					e := entry(i)
					if _, err := l.Append(e); err != nil {
						failed = true
						if !errors.Is(err, audit.ErrFault) {
							t.Errorf("fault %d: %v", at, err)
						}
					} else {
						acked[e.Object] = true
					}
				}
				if err := l.Close(); err != nil {
					failed = true
				}
			}
			reached := faults.N >= at
			if reached && !failed {
				t.Errorf("fault %d (torn %v) was swallowed", at, torn)
			}
			l, err = audit.Open(cfg)
			if err != nil {
				t.Fatalf("after fault %d (torn %v): %v", at, torn, err)
			}
			if _, err := l.Append(entry(99)); err != nil {
				t.Fatalf("after fault %d: %v", at, err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := audit.Verify(dir, audit.Expect{Key: testPub(), Head: l.Head()}, func(r audit.Record) error {
				delete(acked, r.Object)
				return nil
			}); err != nil || len(acked) > 0 {
				t.Fatalf("after fault %d (torn %v): %v, lost %v", at, torn, err, acked)
			}
			if !reached {
				t.Logf("torn %v: %d operations", torn, faults.N)
				break
			}
		}
	}
}

func FuzzParseLine(f *testing.F) {
	b, err := os.ReadFile("testdata/audit-00000000000000000001.jsonl")
	if err != nil {
		f.Fatal(err)
	}
	for _, l := range bytes.SplitAfter(b, []byte("\n")) {
		f.Add(l)
	}
	f.Add([]byte(`{"seq":1}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := audit.ParseLine(b)
		if err == nil && !bytes.Equal(again, b) {
			t.Errorf("%q became %q", b, again)
		}
		if err != nil && again != nil {
			t.Errorf("result with error: %q", again)
		}
	})
}

// FuzzVerify feeds a whole file: no panic, and what verifies has the records
// that it says.
func FuzzVerify(f *testing.F) {
	b, err := os.ReadFile("testdata/audit-00000000000000000001.jsonl")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-10])
	f.Add(bytes.Replace(b, []byte("ann"), []byte("bob"), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "audit-00000000000000000001.jsonl"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		n := 0
		rep, err := audit.Verify(dir, audit.Expect{Key: testPub()}, func(audit.Record) error { n++; return nil })
		if err != nil && rep != (audit.Report{}) {
			t.Errorf("result with error: %+v", rep)
		}
		if err == nil && uint64(n) != rep.Last {
			t.Errorf("%d records visited, %+v", n, rep)
		}
	})
}

// TestFlush has many append and flush at once, over several files.
func TestFlush(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l, err := audit.Open(audit.Config{Dir: dir, Signer: testKey(), Sync: audit.SyncCheckpoint, MaxFileBytes: 4096, CheckpointRecords: 50, CheckpointEvery: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for i := range 40 {
				head, err := l.Append(entry(i))
				if err == nil {
					err = l.Flush(head)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if err := l.Flush(l.Head()); err != nil {
		t.Errorf("with nothing to do: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := audit.Verify(dir, audit.Expect{Key: testPub()}, nil)
	if err != nil || r.Last != 320 || r.Files < 2 {
		t.Errorf("verify: %+v, %v", r, err)
	}
}

// TestFlushFails: what may not be on disk is not acknowledged, and nothing is
// written behind it.
func TestFlushFails(t *testing.T) {
	t.Parallel()
	faults := &audit.Faults{}
	l, err := audit.OpenFaulty(audit.Config{Dir: t.TempDir(), Signer: testKey(), Sync: audit.SyncCheckpoint, CheckpointEvery: time.Hour}, faults)
	if err != nil {
		t.Fatal(err)
	}
	head, err := l.Append(entry(1))
	if err != nil {
		t.Fatal(err)
	}
	faults.At = faults.N + 1
	if err := l.Flush(head); !errors.Is(err, audit.ErrFault) {
		t.Errorf("Flush: %v", err)
	}
	if _, err := l.Append(entry(2)); !errors.Is(err, audit.ErrFault) {
		t.Errorf("Append behind it: %v", err)
	}
	if err := l.Flush(head); !errors.Is(err, audit.ErrFault) {
		t.Errorf("Flush again: %v", err)
	}
	l.Close()
}
