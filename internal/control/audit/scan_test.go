package audit_test

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
)

// TestScan reads a log of several files backwards, whole and by pages, while it is
// written on.
func TestScan(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Dir: dir, Signer: signer, Sync: audit.SyncCheckpoint, MaxFileBytes: 600 << 10, CheckpointRecords: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	const records = 1200
	for i := range records {
		details := map[string]string{}
		for j := range i % 32 { // lines of all lengths
			details[fmt.Sprint(j)] = strings.Repeat("x", i%1024)
		}
		if _, err := log.Append(audit.Entry{Actor: "a", Action: "b", Object: fmt.Sprint(i + 1), Outcome: audit.Success, Details: details}); err != nil {
			t.Fatal(err)
		}
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		for range 200 {
			log.Append(audit.Entry{Actor: "later", Action: "b", Object: "c", Outcome: audit.Success, Details: map[string]string{"x": strings.Repeat("y", 1000)}})
		}
	})
	defer writer.Wait()
	page := func(before uint64, limit int) (seqs []uint64) {
		t.Helper()
		err := audit.Scan(ctx, dir, before, func(r audit.Record) bool {
			if r.Seq <= records && r.Object != fmt.Sprint(r.Seq) {
				t.Errorf("record %d is of %s", r.Seq, r.Object)
			}
			seqs = append(seqs, r.Seq)
			return len(seqs) < limit
		})
		if err != nil {
			t.Fatal(err)
		}
		return seqs
	}
	for _, limit := range []int{1 << 30, 100, 30} {
		want := uint64(records)
		for before := uint64(records + 1); ; {
			seqs := page(before, limit)
			for _, seq := range seqs {
				if seq != want {
					t.Fatalf("pages of %d: record %d, want %d", limit, seq, want)
				}
				want--
			}
			if len(seqs) < limit {
				break
			}
			before = seqs[len(seqs)-1]
		}
		if want != 0 {
			t.Errorf("pages of %d: %d records are missing", limit, want)
		}
	}
	if seqs := page(0, 1); len(seqs) != 1 || seqs[0] < records {
		t.Errorf("the newest: %v", seqs)
	}
	if seqs := page(1, 1); len(seqs) != 0 {
		t.Errorf("before the first: %v", seqs)
	}
}

// TestScanDamage: a record that was changed is told, not shown; a line that is being
// written is left out.
func TestScanDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Dir: dir, Signer: signer})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := log.Append(audit.Entry{Actor: "ann", Action: "b", Object: "c", Outcome: audit.Success}); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	scan := func(text string) (n int, err error) {
		if err := os.WriteFile(names[0], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err = audit.Scan(t.Context(), dir, 0, func(audit.Record) bool { n++; return true })
		return n, err
	}
	if n, err := scan(string(text) + `{"seq":4,"time":`); n != 3 || err != nil {
		t.Errorf("a torn line: %d, %v", n, err)
	}
	if n, err := scan(strings.Replace(string(text), "ann", "eve", 1)); n != 2 || errs.KindOf(err) != errs.Corrupt || !strings.Contains(err.Error(), "record 1") {
		t.Errorf("a changed record: %d, %v", n, err)
	}
	if n, err := scan(string(text) + strings.Repeat("x", 10*audit.MaxLine) + "\n"); n != 0 || errs.KindOf(err) != errs.Corrupt {
		t.Errorf("a long line: %d, %v", n, err)
	}
	if n, err := scan(""); n != 0 || err != nil {
		t.Errorf("an empty file: %d, %v", n, err)
	}
}
