package keyprovider

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"software.sslmate.com/src/go-pkcs12"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

var (
	testCreated  = time.Date(2026, 11, 23, 3, 22, 28, 0, time.UTC)
	testExported = time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	testObject   = uuid.MustParse("0f9d5f5e-93a8-4d0e-8d63-7c1f1d8f2b11")
	testInfo     = NativeInfo{
		Name: "kp-1", KeyID: uuid.MustParse("5f0c7c9e-3f5b-4a8e-8a6b-1f1f6a2d9f10"), TPMRequired: true, Created: testCreated,
	}
)

// testIterations keeps tests fast; production's count is in one test only.
const testIterations = 10

// password returns nil for "".
func password(t testing.TB, s string) *keymem.Key {
	t.Helper()
	if s == "" {
		return nil
	}
	return keymemtest.Of(t, []byte(s))
}

func newTestNative(t testing.TB, name string) *Native {
	t.Helper()
	n, err := CreateNative(name, false, testCreated)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func mustExport(t testing.TB, n *Native, pw string) []byte {
	t.Helper()
	data, err := n.export(password(t, pw), testExported, testIterations)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestBackupRoundTrip(t *testing.T) {
	t.Parallel()
	longest := strings.Repeat("n", 63)
	for _, tt := range []struct{ name, password string }{
		{"kp-1", ""},
		{"k", "secret"},
		{longest, strings.Repeat("p", BackupPasswordMax)},
		{"kp.1", "pässwörd \U0001f510"},
		{"kp-2", "31 characters, one UTF-16 block"},
	} {
		n := newTestNative(t, tt.name)
		data := mustExport(t, n, tt.password)
		if len(data) > BackupMax {
			t.Errorf("%s: backup has %d bytes", tt.name, len(data))
		}
		got, info, err := Import(data, password(t, tt.password))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		defer got.Close()
		want := BackupInfo{NativeInfo: n.Info(), Exported: testExported, PasswordProtected: tt.password != ""}
		if diff := cmp.Diff(want, info); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
		if !got.SameKeys(n) || got.Info() != n.Info() {
			t.Errorf("%s: imported provider differs", tt.name)
		}
	}
}

// What users get costs an attacker as much as the spec says.
func TestBackupProductionStrength(t *testing.T) {
	t.Parallel()
	data, err := newTestNative(t, "kp-1").Export(password(t, "secret"), testExported)
	if err != nil {
		t.Fatal(err)
	}
	f, err := parseP12(data)
	if err != nil {
		t.Fatal(err)
	}
	if f.iterations != 600_000 || f.macIterations != 600_000 {
		t.Errorf("%d and %d iterations", f.iterations, f.macIterations)
	}
}

func TestBackupPasswords(t *testing.T) {
	t.Parallel()
	n := newTestNative(t, "kp-1")
	protected, open := mustExport(t, n, "secret"), mustExport(t, n, "")
	for _, tt := range []struct {
		name string
		data []byte
		pw   string
		want error
		text string
	}{
		{"none given", protected, "", ErrPasswordNeeded, "kp-1: backup is protected by a password"},
		{"wrong", protected, "Secret", ErrWrongPassword, "kp-1: wrong password"},
		{"given but there is none", open, "secret", ErrWrongPassword, "it has none"},
		{"too long", protected, strings.Repeat("p", BackupPasswordMax+1), ErrInvalidPassword, ""},
		{"not UTF-8", protected, "\xff", ErrInvalidPassword, ""},
		{"with NUL", protected, "a\x00b", ErrInvalidPassword, ""},
	} {
		got, info, err := Import(tt.data, password(t, tt.pw))
		if got != nil || info != (BackupInfo{}) || !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, %v, %v; want %v", tt.name, got, info, err, tt.want)
			continue
		}
		if !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %q does not say %q", tt.name, err, tt.text)
		}
	}
	if data, err := n.Export(keymemtest.Of(t, []byte("\xff")), testExported); data != nil || !errors.Is(err, ErrInvalidPassword) {
		t.Errorf("export: %v; want ErrInvalidPassword", err)
	}
	if data, err := n.Export(nil, time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)); data != nil || !errors.Is(err, ErrInvalidNative) {
		t.Errorf("export in the year 10000: %v; want ErrInvalidNative", err)
	}
	n.Close()
	if data, err := n.Export(nil, testExported); data != nil || !errors.Is(err, ErrClosed) {
		t.Errorf("export after Close: %v; want ErrClosed", err)
	}
}

// A flipped bit in any byte is noticed, and is not called a missing password.
func TestBackupAltered(t *testing.T) {
	t.Parallel()
	n := newTestNative(t, "kp-1")
	data := mustExport(t, n, "secret")
	pw := password(t, "secret")
	for i := range data {
		altered := bytes.Clone(data)
		altered[i] ^= 1 << (i % 8)
		// A flip in the iteration count may ask for millions.
		if f, err := parseP12(altered); err == nil && max(f.iterations, f.macIterations) > 10*testIterations {
			continue
		}
		got, _, err := Import(altered, pw)
		if got != nil || !errors.Is(err, ErrCorruptBackup) && !errors.Is(err, ErrWrongPassword) {
			t.Fatalf("byte %d: %v, %v", i, got, err)
		}
	}
	for n := range len(data) {
		if got, _, err := Import(data[:n], pw); got != nil || !errors.Is(err, ErrCorruptBackup) {
			t.Fatalf("cut to %d bytes: %v, %v; want ErrCorruptBackup", n, got, err)
		}
	}
	for name, extended := range map[string][]byte{
		"a byte more": append(bytes.Clone(data), 0), "far too long": make([]byte, 1<<20), "nothing": nil,
	} {
		if got, _, err := Import(extended, pw); got != nil || !errors.Is(err, ErrCorruptBackup) {
			t.Errorf("%s: %v, %v; want ErrCorruptBackup", name, got, err)
		}
	}
}

// With the right password, damage behind what it is checked with is called
// damage.
func TestBackupDamageIsNotAWrongPassword(t *testing.T) {
	t.Parallel()
	n := newTestNative(t, "kp-1")
	pw := password(t, "secret")
	for name, alter := range map[string]func(*p12File){
		"name":        func(f *p12File) { f.name = "kp-2" },
		"constraint":  func(f *p12File) { f.description = strings.Replace(f.description, "required=no", "required=yes", 1) },
		"KDK":         func(f *p12File) { f.ciphertext[20] ^= 1 },
		"padding":     func(f *p12File) { f.ciphertext[40] ^= 1 },
		"MAC":         func(f *p12File) { f.mac[0] ^= 1 },
		"MAC salt":    func(f *p12File) { f.macSalt[0] ^= 1 },
		"description": func(f *p12File) { f.description += " " },
		"export time": func(f *p12File) { f.description = strings.Replace(f.description, "2026-11-24", "2026-11-25", 1) },
	} {
		f, err := parseP12(mustExport(t, n, "secret"))
		if err != nil {
			t.Fatal(err)
		}
		alter(f)
		if got, _, err := Import(f.encode(), pw); got != nil || !errors.Is(err, ErrCorruptBackup) {
			t.Errorf("%s: %v, %v; want ErrCorruptBackup", name, got, err)
		}
	}
}

// A description that is well authenticated and yet not canonical is refused.
func TestBackupDescription(t *testing.T) {
	t.Parallel()
	good := describe(testInfo, testExported)
	if info, exported, err := parseDescription("kp-1", good); err != nil || info != testInfo || !exported.Equal(testExported) {
		t.Fatalf("%v, %v, %v", info, exported, err)
	}
	for name, text := range map[string]string{
		"empty":              "",
		"version 2":          strings.Replace(good, "v1", "v2", 1),
		"no key id":          strings.Replace(good, testInfo.KeyID.String(), "", 1),
		"nil key id":         strings.Replace(good, testInfo.KeyID.String(), uuid.Nil.String(), 1),
		"upper-case key id":  strings.Replace(good, testInfo.KeyID.String(), strings.ToUpper(testInfo.KeyID.String()), 1),
		"time zone":          strings.Replace(good, "10:00:00Z", "11:00:00+01:00", 1),
		"fraction":           strings.Replace(good, "10:00:00Z", "10:00:00.5Z", 1),
		"before 1970":        strings.Replace(good, "2026-11-23", "1969-11-23", 1),
		"other constraint":   strings.Replace(good, "required=yes", "required=maybe", 1),
		"a part more":        good + "; x=y",
		"another part name":  strings.Replace(good, "created", "Created", 1),
		"parts in disorder":  strings.Replace(strings.Replace(strings.Replace(good, "created", "x", 1), "exported", "created", 1), "; x=", "; exported=", 1),
		"not a backup of us": "some other key",
	} {
		if info, _, err := parseDescription("kp-1", text); info != (NativeInfo{}) || !errors.Is(err, ErrCorruptBackup) {
			t.Errorf("%s: %v, %v; want ErrCorruptBackup", name, info, err)
		}
	}
	if _, _, err := parseDescription("KP", good); !errors.Is(err, ErrCorruptBackup) {
		t.Errorf("invalid name: %v; want ErrCorruptBackup", err)
	}
}

// A hostile file must not keep us busy.
func TestBackupIterationsAreBounded(t *testing.T) {
	t.Parallel()
	n := newTestNative(t, "kp-1")
	for name, set := range map[string]func(*p12File){
		"PBKDF2":          func(f *p12File) { f.iterations = backupIterationsMax + 1 },
		"MAC":             func(f *p12File) { f.macIterations = 1<<62 - 1 },
		"zero for PBKDF2": func(f *p12File) { f.iterations = 0 },
		"zero for MAC":    func(f *p12File) { f.macIterations = 0 },
		"negative":        func(f *p12File) { f.iterations = -1 },
	} {
		f, err := parseP12(mustExport(t, n, ""))
		if err != nil {
			t.Fatal(err)
		}
		set(f)
		if got, _, err := Import(f.encode(), nil); got != nil || !errors.Is(err, ErrCorruptBackup) {
			t.Errorf("%s: %v, %v; want ErrCorruptBackup", name, got, err)
		}
	}
}

// The commands of docs/spec/native-backup.md, run by the shell as they stand
// there.
func TestBackupRecoveryByHand(t *testing.T) {
	t.Parallel()
	spec, err := os.ReadFile("../../../docs/spec/native-backup.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(spec), "```sh\n")
	commands, _, found := strings.Cut(rest, "```")
	if !found || !strings.Contains(commands, "openssl") {
		t.Fatal("docs/spec/native-backup.md has no commands")
	}
	for _, pw := range []string{"", "pässwörd \U0001f510"} {
		n := newTestNative(t, "kp-1")
		dir := t.TempDir()
		data := mustExport(t, n, pw)
		if err := os.WriteFile(filepath.Join(dir, "kp-1.p12"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		ref, kek, err := n.NewKEK(context.Background(), testObject)
		if err != nil {
			t.Fatal(err)
		}
		defer kek.Close()
		cmd := exec.Command("sh", "-eu", "-c", commands)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PASSWORD="+pw, "KEY_ID="+ref.KeyID, "LC_ALL=C.UTF-8")
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Run(); err != nil {
			t.Fatalf("%v\n%s\n%s", err, out.Bytes(), errOut.Bytes())
		}
		kdk, err := n.KDK()
		if err != nil {
			t.Fatal(err)
		}
		defer kdk.Close()
		for name, want := range map[string]string{
			"the name":        "friendlyName: kp-1",
			"the description": describe(n.Info(), testExported),
			"the KDK":         "KDK " + hex.EncodeToString(kdk.Bytes()),
			"the KEK":         "KEK " + hex.EncodeToString(kek.Bytes()),
		} {
			if !strings.Contains(out.String()+errOut.String(), want) {
				t.Errorf("password %q: the output does not show %s", pw, name)
			}
		}
	}
}

// Another implementation agrees with our MAC and our encryption: it gets as far
// as missing a certificate, which a backup does not have.
func TestBackupAgainstLibrary(t *testing.T) {
	t.Parallel()
	n := newTestNative(t, "kp-1")
	data := mustExport(t, n, "secret")
	if _, _, _, err := pkcs12.DecodeChain(data, "secret"); err == nil || err.Error() != "pkcs12: certificate missing" {
		t.Errorf("right password: %v", err)
	}
	if _, _, _, err := pkcs12.DecodeChain(data, "Secret"); !errors.Is(err, pkcs12.ErrIncorrectPassword) {
		t.Errorf("wrong password: %v", err)
	}
}

func TestBackupVectors(t *testing.T) {
	t.Parallel()
	want := map[string]error{
		"corrupt": ErrCorruptBackup, "wrong password": ErrWrongPassword, "password needed": ErrPasswordNeeded,
	}
	kdk := keymemtest.Hex(t, "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	counts := map[string]int{}
	for _, v := range loadVectors[struct{ Name, P12, Password, Expect string }](t, "backups.json") {
		counts[v.Expect]++
		data, err := hex.DecodeString(v.P12)
		if err != nil {
			t.Fatal(err)
		}
		n, info, err := Import(data, password(t, v.Password))
		if v.Expect != "ok" {
			if n != nil || info != (BackupInfo{}) || want[v.Expect] == nil || !errors.Is(err, want[v.Expect]) {
				t.Errorf("%s: %v, want %q", v.Name, err, v.Expect)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		defer n.Close()
		wantInfo := BackupInfo{NativeInfo: testInfo, Exported: testExported, PasswordProtected: v.Password != ""}
		if v.Name == "longest name" {
			wantInfo.Name = strings.Repeat("n", 63)
		}
		if diff := cmp.Diff(wantInfo, info); diff != "" {
			t.Errorf("%s: %s", v.Name, diff)
		}
		if got, err := n.KDK(); err != nil || !got.Equal(kdk) {
			t.Errorf("%s: another KDK (%v)", v.Name, err)
		}
	}
	for _, expect := range []string{"ok", "corrupt", "wrong password", "password needed"} {
		if counts[expect] == 0 {
			t.Errorf("no vector expects %q", expect)
		}
	}
}

// loadVectors reads a file that testdata/gen.py makes without this package.
func loadVectors[T any](t testing.TB, name string) []T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var vectors []T
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

func FuzzImport(f *testing.F) {
	kdk := keymemtest.Of(f, bytes.Repeat([]byte{7}, KDKSize))
	n, err := RestoreNative(testInfo, kdk)
	if err != nil {
		f.Fatal(err)
	}
	defer n.Close()
	for _, pw := range []string{"", "secret"} {
		data, err := n.export(password(f, pw), testExported, 1)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, v := range loadVectors[struct{ P12 string }](f, "backups.json") {
		data, err := hex.DecodeString(v.P12)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	pw := password(f, "secret")
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parseP12(data)
		if err != nil {
			if p != nil {
				t.Error("a file together with an error")
			}
			return
		}
		if !bytes.Equal(p.encode(), data) {
			t.Error("encoding differs from what was parsed")
		}
		if max(p.iterations, p.macIterations) > 1000 {
			return // bounded, but too slow to fuzz
		}
		got, info, err := Import(data, pw)
		if (got == nil) == (err == nil) || err != nil && info != (BackupInfo{}) {
			t.Errorf("%v, %v, %v", got, info, err)
		}
		if got != nil {
			got.Close()
		}
	})
}
