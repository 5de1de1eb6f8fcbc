package luks_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// beginRekey returns a committed header with a rekey begun, on a storage of 2 MiB
// with the data at 1 MiB, and its keys.
func beginRekey(t *testing.T) (*luks.Header, image, *keymem.Key, *keymem.Key) {
	t.Helper()
	oldDEK, newDEK := keymemtest.Random(t, luks.KeySize), keymemtest.Random(t, luks.KeySize)
	h, err := luks.New(luks.Options{UUID: testUUID, DEK: oldDEK, Safe: newSafe(t, oldDEK, 1), DataOffset: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.BeginReencryption(luks.ReencryptionOptions{
		OldDEK: oldDEK, NewDEK: newDEK, Safe: newSafe(t, newDEK, 7), JournalMin: 4096, JournalMax: 256 << 10,
	}); err != nil {
		t.Fatal(err)
	}
	f := newImage(t, 2<<20)
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	return h, f, oldDEK, newDEK
}

// state reads the header and returns where its rekey is.
func state(t *testing.T, f image) (luks.Reencryption, bool) {
	t.Helper()
	h, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	s, underWay, err := h.Reencryption()
	if err != nil {
		t.Fatal(err)
	}
	return s, underWay
}

func generations(t *testing.T, h *luks.Header) (list []uint64) {
	t.Helper()
	safes, err := h.Safes()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range safes {
		list = append(list, s.Generation)
	}
	return list
}

// TestReencryption goes through all states, reading each back.
func TestReencryption(t *testing.T) {
	t.Parallel()
	h, f, oldDEK, newDEK := beginRekey(t)
	want := luks.Reencryption{
		Segment: luks.Segment{Offset: 1 << 20, SectorSize: 512},
		Journal: luks.Area{Offset: luks.DataOffsetMin, Size: 256 << 10},
	}
	commit := func(err error) {
		t.Helper()
		if err == nil {
			err = h.Commit(f)
		}
		if err != nil {
			t.Fatal(err)
		}
		got, underWay := state(t, f)
		if diff := cmp.Diff(want, got); diff != "" || !underWay {
			t.Fatalf("state (-want +got), under way %v:\n%s", underWay, diff)
		}
		again, err := f.read()
		if err != nil {
			t.Fatal(err)
		}
		if err := again.VerifyReencryption(oldDEK, newDEK); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]uint64{1, 7}, generations(t, again)); diff != "" {
			t.Fatalf("generations of the key safes (-want +got):\n%s", diff)
		}
	}
	commit(nil)
	for _, keys := range [][2]*keymem.Key{{newDEK, oldDEK}, {oldDEK, oldDEK}, {oldDEK, keymemtest.Random(t, luks.KeySize)}} {
		if err := h.VerifyReencryption(keys[0], keys[1]); !errors.Is(err, luks.ErrWrongKey) {
			t.Errorf("wrong keys: %v", err)
		}
	}
	if _, err := h.Segment(); !errors.Is(err, luks.ErrReencrypting) || !errors.Is(err, luks.ErrUnsupported) {
		t.Errorf("Segment() reports %v", err)
	}
	if err := h.SetSafe(nil); !errors.Is(err, luks.ErrReencrypting) {
		t.Errorf("SetSafe() reports %v", err)
	}
	want.Hot = 64 << 10
	commit(h.MarkHot(64<<10, false))
	want.Hot, want.Boundary = 0, 64<<10
	commit(h.MarkClean(64 << 10))
	want.Hot = 512
	commit(h.MarkHot(512, false))
	want.HotIsLast = true
	commit(h.MarkHot(512, true))
	if err := h.CancelReencryption(); err == nil {
		t.Error("cancelled in the middle")
	}
	for name, err := range map[string]error{
		"longer than the journal": h.MarkHot(257<<10, false), "part of a sector": h.MarkHot(700, false),
		"negative": h.MarkHot(-512, false), "boundary inside a sector": h.MarkClean(700), "negative boundary": h.MarkClean(-512),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if superseded, err := h.Superseded(f); superseded || err != nil {
		t.Errorf("superseded %v, %v", superseded, err)
	}
	other, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Commit(f); err != nil {
		t.Fatal(err)
	}
	if superseded, err := h.Superseded(f); !superseded || err != nil {
		t.Errorf("after another commit: superseded %v, %v", superseded, err)
	}

	if err := other.FinishReencryption(); err != nil {
		t.Fatal(err)
	}
	if err := other.Commit(f); err != nil {
		t.Fatal(err)
	}
	if _, underWay := state(t, f); underWay {
		t.Error("still under way")
	}
	final, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if s, err := final.Segment(); err != nil || s != want.Segment {
		t.Errorf("Segment() = %+v, %v", s, err)
	}
	if err := final.VerifyKey(newDEK); err != nil {
		t.Error(err)
	}
	if err := final.VerifyKey(oldDEK); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("old key: %v", err)
	}
	if diff := cmp.Diff([]uint64{7}, generations(t, final)); diff != "" {
		t.Errorf("generations of the key safes (-want +got):\n%s", diff)
	}
	if free := final.FreeAreas(); len(free) != 1 || free[0] != (luks.Area{Offset: luks.DataOffsetMin, Size: 1<<20 - luks.DataOffsetMin}) {
		t.Errorf("free areas %+v", free)
	}
	if err := final.MarkClean(0); err == nil {
		t.Error("a finished re-encryption was advanced")
	}
}

// TestReencryptionCancel begins, gives up, and has the header of before but for
// its numbers.
func TestReencryptionCancel(t *testing.T) {
	t.Parallel()
	dek, passphrase := keymemtest.Random(t, luks.KeySize), newKey(t, "correct horse")
	h, err := luks.New(luks.Options{UUID: testUUID, DEK: dek, Safe: newSafe(t, dek, 1), DataOffset: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	f := newImage(t, 3<<20)
	if err := h.AddPassphrase(f, dek, passphrase, quick); err != nil {
		t.Fatal(err)
	}
	metadata := func() map[string]any {
		b := make([]byte, headerSize)
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		text, _, _ := bytes.Cut(b[4096:], []byte{0})
		doc := map[string]any{}
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		return doc
	}
	before := metadata()
	newDEK := keymemtest.Random(t, luks.KeySize)
	opts := luks.ReencryptionOptions{OldDEK: dek, NewDEK: newDEK, Safe: newSafe(t, newDEK, 2), JournalMin: 4096, JournalMax: 1 << 20}
	if err := h.BeginReencryption(opts); err != nil {
		t.Fatal(err)
	}
	if err := h.BeginReencryption(opts); !errors.Is(err, luks.ErrReencrypting) {
		t.Errorf("begun twice: %v", err)
	}
	if err := h.AddPassphrase(f, newDEK, passphrase, quick); err != nil {
		t.Fatal(err)
	}
	if err := h.AddPassphrase(f, keymemtest.Random(t, luks.KeySize), passphrase, quick); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("passphrase for a third key: %v", err)
	}
	if diff := cmp.Diff(before, metadata()); diff == "" {
		t.Error("nothing was written")
	}
	if err := h.CancelReencryption(); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, metadata()); diff != "" {
		t.Errorf("metadata (-before +after):\n%s", diff)
	}
}

// TestReencryptionRefuses metadata of other kinds, and altered ones.
func TestReencryptionRefuses(t *testing.T) {
	t.Parallel()
	h, f, oldDEK, newDEK := beginRekey(t)
	if err := h.MarkClean(64 << 10); err != nil {
		t.Fatal(err)
	}
	if err := h.MarkHot(4096, false); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	primary := make([]byte, headerSize)
	if _, err := f.ReadAt(primary, 0); err != nil {
		t.Fatal(err)
	}
	_, text := disassemble(primary)
	for _, c := range []struct{ old, new string }{
		{`"online-reencrypt-v2"`, `"online-reencrypt-v3"`},
		{`"online-reencrypt-v2"`, `"online-reencrypt-v2","other"`},
		{`"mode":"reencrypt"`, `"mode":"encrypt"`},
		{`"direction":"forward"`, `"direction":"backward"`},
		{`"type":"journal"`, `"type":"checksum"`},
		{`"type":"reencrypt"`, `"type":"other"`},
		{`"backup-final"`, `"backup-other"`},
		{`"backup-previous"`, `"backup-moved-segment"`},
		{`"in-reencryption"`, `"in-something"`},
		{`"iv_tweak":"136"`, `"iv_tweak":"137"`},
		{`"size":"4096"`, `"size":"8192"`},
		{`"size":"65536"`, `"size":"dynamic"`},
		{`"segments":["0","1","4"]`, `"segments":["0","1","3","4"]`},
		{`"segments":["1","2","3"]`, `"segments":["1","2"]`},
		{`"keyslots":["0"],"salt"`, `"keyslots":[],"salt"`},
	} {
		if !bytes.Contains(text, []byte(c.old)) {
			t.Fatalf("no %s in %s", c.old, text)
		}
		altered := bytes.Replace(text, []byte(c.old), []byte(c.new), 1)
		storage := newImage(t, 2<<20)
		b := assemble(primary[:512], altered)
		if _, err := storage.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		h, err := storage.read()
		if err != nil {
			continue // not even a header
		}
		if _, underWay, err := h.Reencryption(); !errors.Is(err, luks.ErrUnsupported) || underWay {
			t.Errorf("%s: under way %v, error %v", c.new, underWay, err)
		}
		if err := h.Commit(storage); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("%s: Commit reports %v", c.new, err)
		}
	}
	// A seal that is another one's.
	resized := bytes.Replace(text, []byte(`"size":"262144"`), []byte(`"size":"258048"`), 1)
	storage := newImage(t, 2<<20)
	if _, err := storage.WriteAt(assemble(primary[:512], resized), 0); err != nil {
		t.Fatal(err)
	}
	h, err := storage.read()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.VerifyReencryption(oldDEK, newDEK); !errors.Is(err, luks.ErrCorrupt) {
		t.Errorf("broken seal: %v", err)
	}

	fresh, err := luks.New(luks.Options{DEK: oldDEK, DataOffset: luks.DataOffsetMin})
	if err != nil {
		t.Fatal(err)
	}
	opts := luks.ReencryptionOptions{OldDEK: oldDEK, NewDEK: newDEK, JournalMin: 4096, JournalMax: 1 << 20}
	if err := fresh.BeginReencryption(opts); !errors.Is(err, luks.ErrNoSpace) {
		t.Errorf("no space for a journal: %v", err)
	}
	opts.OldDEK = newDEK
	if err := fresh.BeginReencryption(opts); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("wrong old key: %v", err)
	}
}

// TestReadsCryptsetupsSeal verifies what cryptsetup sealed, with a journal.
func TestReadsCryptsetupsSeal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, secret := filepath.Join(dir, "disk"), filepath.Join(dir, "passphrase")
	if err := errors.Join(os.WriteFile(secret, []byte("correct horse"), 0o600), os.WriteFile(path, nil, 0o600), os.Truncate(path, 20<<20)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"luksFormat", "--batch-mode", "--type", "luks2", "--key-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", secret, path},
		{"reencrypt", "--batch-mode", "--init-only", "--resilience", "journal", "--key-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", secret, path},
	} {
		program, err := exec.LookPath("cryptsetup")
		if err != nil {
			program = "/usr/sbin/cryptsetup" // not in an ordinary user's PATH
		}
		if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
			t.Fatalf("cryptsetup %v: %v\n%s", args, err, out)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := luks.Read(f, 20<<20)
	if err != nil {
		t.Fatal(err)
	}
	s, underWay, err := h.Reencryption()
	if err != nil || !underWay || s.Boundary != 0 || s.Hot != 0 || s.Journal.Size == 0 || s.Segment.Offset != 16<<20 {
		t.Fatalf("Reencryption() = %+v, %v, %v", s, underWay, err)
	}
	passphrase := newKey(t, "correct horse")
	oldDEK, err := h.UnlockPassphrase(f, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer oldDEK.Close()
	newDEK, err := h.UnlockNextPassphrase(f, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer newDEK.Close()
	if err := h.VerifyReencryption(oldDEK, newDEK); err != nil {
		t.Error(err)
	}
	if err := h.VerifyReencryption(newDEK, oldDEK); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("keys in the wrong order: %v", err)
	}
}

// FuzzReencryption parses metadata of a rekey; what it takes, it writes the same
// way again, also after the state has changed and changed back.
func FuzzReencryption(f *testing.F) {
	dek, err := keymem.Random(luks.KeySize)
	if err != nil {
		f.Fatal(err)
	}
	defer dek.Close()
	next, err := keymem.Random(luks.KeySize)
	if err != nil {
		f.Fatal(err)
	}
	defer next.Close()
	for i := range 4 {
		h, err := luks.New(luks.Options{UUID: testUUID, DEK: dek, DataOffset: 1 << 20})
		if err == nil {
			err = h.BeginReencryption(luks.ReencryptionOptions{OldDEK: dek, NewDEK: next, JournalMin: 4096, JournalMax: 1 << 20})
		}
		if err == nil && i > 0 {
			err = h.MarkClean(8192)
		}
		if err == nil && i > 1 {
			err = h.MarkHot(4096, i > 2)
		}
		var out copies
		if err == nil {
			err = h.Commit(&out)
		}
		if err != nil {
			f.Fatal(err)
		}
		_, text := disassemble(out.written[0])
		f.Add(text)
	}
	for _, b := range headerSeeds(f) {
		_, text := disassemble(b)
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := luks.RewriteReencryption(text); err != nil && !strings.HasPrefix(err.Error(), "refused") {
			t.Error(err)
		}
	})
}
