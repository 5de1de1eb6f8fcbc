package backup_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/rootkey"
	"strongroom/internal/role/kms/backup"
)

var cheap = rootkey.Cost{Time: 1, MemoryKiB: 64, Threads: 1}

func secretOf(t testing.TB, text string) *keymem.Key {
	t.Helper()
	k, err := keymem.Take([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

const passphrase = "correct horse battery staple"

// record is one that a test puts in a backup; those of objects count as such.
type record struct {
	name, value string
}

func (r record) object() bool { return strings.HasPrefix(r.name, "kms-object/") }

// write makes a backup with a secret and some records.
func write(t testing.TB, protect backup.Protection, secret string, records []record) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := backup.NewWriter(&out, "0123456789abcdef", backup.About{Program: "0.1.0", Address: "kms.example:5696", Revision: 7, CA: []byte{1, 2}}, protect, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.Secret(backup.SecretRing, secretOf(t, secret)); err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.object() {
			w.Digest().Write([]byte(r.value))
		}
		if err := w.Record(backup.Record{Name: r.name, Value: []byte(r.value)}, r.object(), r.object()); err != nil {
			t.Fatal(err)
		}
	}
	written, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if written.Bytes != int64(out.Len()) {
		t.Errorf("%d bytes are said to be written, and %d are", written.Bytes, out.Len())
	}
	return out.Bytes()
}

// read reads a backup to its end.
func read(ctx context.Context, file []byte, key backup.Key) (secret string, records []record, err error) {
	r, err := backup.NewReader(ctx, bytes.NewReader(file), int64(len(file)), key)
	if err != nil {
		return "", nil, err
	}
	defer r.Close()
	for {
		item, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			if _, again := r.Next(); !errors.Is(again, io.EOF) {
				return "", nil, fmt.Errorf("behind its end: %w", again)
			}
			return secret, records, nil
		case err != nil:
			return "", nil, err
		case item.Secret != "":
			secret += item.Secret + "=" + string(item.Key.Bytes())
			item.Key.Close()
		default:
			one := record{item.Record.Name, string(item.Record.Value)}
			if records = append(records, one); one.object() {
				r.Digest().Write(item.Record.Value)
				r.Count(true)
			}
		}
	}
}

func some(n, size int) (records []record) {
	for i := range n {
		records = append(records, record{fmt.Sprintf("kms-object/a/%04d", i), strings.Repeat(fmt.Sprint(i%10), size)})
	}
	return append(records, record{"kms-usage/x", "{}"})
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	recipient, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer recipient.Close()
	for name, c := range map[string]struct {
		protect backup.Protection
		key     backup.Key
	}{
		"passphrase": {backup.ForPassphrase(secretOf(t, passphrase), cheap), backup.Key{Passphrase: secretOf(t, passphrase)}},
		"recipient":  {backup.ForRecipient(recipient.PublicKey()), backup.Key{Recipient: recipient}},
	} {
		for _, records := range [][]record{nil, some(1, 0), some(700, 400)} {
			file := write(t, c.protect, "the ring", records)
			secret, got, err := read(t.Context(), file, c.key)
			if err != nil || secret != "keyring=the ring" || fmt.Sprint(got) != fmt.Sprint(records) {
				t.Errorf("%s, %d records: %q, %d records, %v", name, len(records), secret, len(got), err)
			}
			for _, r := range records {
				if len(r.value) > 8 && bytes.Contains(file, []byte(r.value)) {
					t.Fatalf("%s lies in the file in the clear", r.name)
				}
			}
		}
	}
}

func TestWrongKeys(t *testing.T) {
	t.Parallel()
	mine, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	other, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	byPassphrase := write(t, backup.ForPassphrase(secretOf(t, passphrase), cheap), "ring", some(3, 10))
	byRecipient := write(t, backup.ForRecipient(mine.PublicKey()), "ring", some(3, 10))
	for name, c := range map[string]struct {
		file []byte
		key  backup.Key
	}{
		"another passphrase":         {byPassphrase, backup.Key{Passphrase: secretOf(t, passphrase+"!")}},
		"nothing":                    {byPassphrase, backup.Key{}},
		"a recipient's private key":  {byPassphrase, backup.Key{Recipient: mine}},
		"another's private key":      {byRecipient, backup.Key{Recipient: other}},
		"nothing, of a recipient's":  {byRecipient, backup.Key{}},
		"a passphrase, of recipient": {byRecipient, backup.Key{Passphrase: secretOf(t, passphrase)}},
	} {
		if _, _, err := read(t.Context(), c.file, c.key); errs.KindOf(err) != errs.Denied {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDamage alters a backup of several segments in every way that a medium or an
// attacker without its key can: nothing of it passes for a backup.
func TestDamage(t *testing.T) {
	t.Parallel()
	const segment = 64<<10 + 16
	recipient, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer recipient.Close()
	key := backup.Key{Recipient: recipient}
	file := write(t, backup.ForRecipient(recipient.PublicKey()), "ring", some(500, 600))
	begin := 16 + int(binary.BigEndian.Uint32(file[12:])) + 80 // the first segment
	segments := (len(file) - begin + segment - 1) / segment
	if segments < 4 {
		t.Fatalf("only %d segments", segments)
	}
	refused := func(what string, damaged []byte) {
		t.Helper()
		if _, _, err := read(t.Context(), damaged, key); err == nil {
			t.Errorf("%s is not noticed", what)
		} else if k := errs.KindOf(err); k != errs.Corrupt && k != errs.Invalid && k != errs.InvalidState && k != errs.Denied {
			t.Errorf("%s: kind %v: %v", what, k, err)
		}
	}
	flip := func(at int) []byte {
		b := bytes.Clone(file)
		b[at] ^= 1
		return b
	}
	for at := 0; at < begin; at += 5 { // through both headers
		refused(fmt.Sprintf("byte %d", at), flip(at))
	}
	for s := range segments {
		from := begin + s*segment
		to := min(from+segment, len(file))
		for _, at := range []int{from, (from + to) / 2, to - 1} {
			refused(fmt.Sprintf("byte %d of segment %d", at-from, s), flip(at))
		}
		refused(fmt.Sprintf("a cut before segment %d", s), file[:from])
		refused(fmt.Sprintf("a cut in segment %d", s), file[:to-1])
		refused(fmt.Sprintf("segment %d left out", s), append(bytes.Clone(file[:from]), file[to:]...))
		if s+2 < segments {
			b := bytes.Clone(file)
			copy(b[from:], file[to:to+segment])
			copy(b[to:], file[from:to])
			refused(fmt.Sprintf("segments %d and %d exchanged", s, s+1), b)
			copy(b[to:], file[to:to+segment])
			refused(fmt.Sprintf("segment %d twice", s+1), b)
		}
	}
	refused("something behind the end", append(bytes.Clone(file), 0))
	other := write(t, backup.ForRecipient(recipient.PublicKey()), "ring", some(500, 600))
	refused("the content of another backup", append(bytes.Clone(file[:begin-80]), other[begin-80:]...))
	if _, _, err := read(t.Context(), file, key); err != nil {
		t.Error(err)
	}
}

// TestOrder has a writer refuse what a reader would.
func TestOrder(t *testing.T) {
	t.Parallel()
	w, err := backup.NewWriter(io.Discard, "c", backup.About{}, backup.ForPassphrase(secretOf(t, passphrase), cheap), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.Record(backup.Record{Name: "b/1"}, false, false); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []backup.Record{{Name: "b/1"}, {Name: "a/1"}, {Name: strings.Repeat("x", 2000)}, {Name: "c", Value: make([]byte, 2<<20)}} {
		if err := w.Record(bad, false, false); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%.20s: %v", bad.Name, err)
		}
	}
	if _, err := backup.NewWriter(io.Discard, "c", backup.About{}, backup.ForPassphrase(secretOf(t, "short"), cheap), nil); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a short passphrase: %v", err)
	}
	if _, err := backup.NewWriter(io.Discard, "c", backup.About{}, backup.ForRecipient(make([]byte, 3)), nil); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a public key of 3 bytes: %v", err)
	}
}

// TestObjectsAreCompared: a backup whose objects are not those that were there is
// refused, even if all of it is authentic.
func TestObjectsAreCompared(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w, err := backup.NewWriter(&out, "c", backup.About{}, backup.ForPassphrase(secretOf(t, passphrase), cheap), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	w.Digest().Write([]byte("what was there"))
	if err := w.Record(backup.Record{Name: "kms-object/a/1", Value: []byte("something else")}, true, true); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := read(t.Context(), out.Bytes(), backup.Key{Passphrase: secretOf(t, passphrase)}); !errors.Is(err, backup.ErrCorrupt) {
		t.Error(err)
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, _, err := backup.Open(filepath.Join(dir, "none")); errs.KindOf(err) != errs.NotFound {
		t.Error(err)
	}
	if _, _, err := backup.Open(dir); errs.KindOf(err) != errs.Invalid {
		t.Error(err)
	}
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, size, err := backup.Open(file)
	if err != nil || size != 14 {
		t.Fatal(size, err)
	}
	defer f.Close()
	if _, err := backup.ReadHeader(f); !errors.Is(err, backup.ErrNotBackup) {
		t.Error(err)
	}
}

// FuzzHeader has whatever bytes read as a header: nothing but an error comes of it,
// or a header that is inside its limits.
func FuzzHeader(f *testing.F) {
	f.Add(write(f, backup.ForPassphrase(secretOf(f, passphrase), cheap), "ring", nil)[:500])
	f.Add([]byte("SRkmsbak\x00\x00\x00\x01\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := backup.ReadHeader(bytes.NewReader(b))
		if err == nil && (h.ID == "" || (h.Passphrase == nil) == (h.Recipient == nil)) {
			t.Errorf("header %+v", h)
		}
	})
}

// TestVector reads the file in docs/spec/kms-backup.md.
func TestVector(t *testing.T) {
	t.Parallel()
	spec, err := os.ReadFile("../../../../docs/spec/kms-backup.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(spec), "## Test vector")
	section, _, _ := strings.Cut(rest, "## Rationale")
	var text strings.Builder
	for line := range strings.Lines(section) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			text.WriteString(strings.TrimSpace(code))
		}
	}
	file, err := base64.StdEncoding.DecodeString(text.String())
	if err != nil {
		t.Fatal(err)
	}
	secret, records, err := read(t.Context(), file, backup.Key{Passphrase: secretOf(t, passphrase)})
	if want := []record{{"kms-group/g", "{}"}, {"kms-object/g/1", "object"}}; err != nil || secret != "keyring=ring" || fmt.Sprint(records) != fmt.Sprint(want) {
		t.Errorf("%q, %v, %v", secret, records, err)
	}
}
