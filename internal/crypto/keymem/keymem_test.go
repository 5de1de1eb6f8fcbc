package keymem

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

const secret = "correct horse battery staple 123"

func take(t testing.TB, s string) *Key {
	t.Helper()
	k, err := Take([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// leaks returns the first form of secret that out shows, or "".
func leaks(out string) string {
	list := strings.Trim(fmt.Sprint([]byte(secret)), "[]")
	forms := []string{
		secret, secret[:16],
		hex.EncodeToString([]byte(secret[:16])),
		base64.StdEncoding.EncodeToString([]byte(secret[:15])),
		list[:30], strings.ReplaceAll(list, " ", ",")[:30],
		"0x63, 0x6f, 0x72", "0x630x6f", "63 6f 72 72",
	}
	for _, form := range forms {
		if strings.Contains(strings.ToLower(out), strings.ToLower(form)) {
			return form
		}
	}
	return ""
}

type holder struct {
	Name   string
	Key    *Key
	hidden *Key
}

// shapes are the ways in which a Key may reach code that prints.
func shapes(k *Key) map[string]any {
	return map[string]any{
		"pointer":        k,
		"value":          reflect.ValueOf(k).Elem().Interface(),
		"struct":         holder{"h", k, k},
		"struct pointer": &holder{"h", k, k},
		"slice":          []*Key{k},
		"map":            map[string]*Key{"k": k},
		"interface":      []any{k},
	}
}

func TestLeaksFindsSecret(t *testing.T) {
	for _, verb := range []string{"%v", "%s", "%x", "%X", "% x", "%d", "%#v"} {
		if leaks(fmt.Sprintf(verb, []byte(secret))) == "" {
			t.Errorf("the test would not notice a secret printed with %s", verb)
		}
	}
}

func TestNeverPrinted(t *testing.T) {
	k := take(t, secret)
	for name, v := range shapes(k) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%o", "%c", "%U", "%t", "%p", "%T"} {
			out := fmt.Sprintf(verb, v)
			if form := leaks(out); form != "" {
				t.Errorf("%s of %s shows the secret as %q: %s", verb, name, form, out)
			}
		}
		if out := fmt.Sprintln(v, fmt.Errorf("cannot use %v: %w", v, io.EOF)); leaks(out) != "" {
			t.Errorf("an error with %s shows the secret: %s", name, out)
		}
		var logged bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&logged, nil), slog.NewJSONHandler(&logged, nil)} {
			l := slog.New(h).With("bound", v).WithGroup("g")
			l.Info("message", "key", v, slog.Group("inner", "key", v), slog.Any("error", fmt.Errorf("x: %v", v)))
		}
		if form := leaks(logged.String()); form != "" {
			t.Errorf("slog of %s shows the secret as %q: %s", name, form, &logged)
		}
		if out, err := json.Marshal(v); leaks(string(out)) != "" {
			t.Errorf("JSON of %s shows the secret: %s, %v", name, out, err)
		}
		if out, err := xml.Marshal(v); leaks(string(out)) != "" {
			t.Errorf("XML of %s shows the secret: %s, %v", name, out, err)
		}
	}
}

func TestPrintsRedacted(t *testing.T) {
	k := take(t, secret)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(verb, k); got != Redacted {
			t.Errorf("%s prints %q", verb, got)
		}
	}
	if got, err := json.Marshal(map[string]any{"key": k}); err != nil || string(got) != `{"key":"[redacted]"}` {
		t.Errorf("JSON is %s, %v", got, err)
	}
	if k.String() != Redacted || k.GoString() != Redacted || k.LogValue().String() != Redacted {
		t.Error("a method of Key does not return Redacted")
	}
	if got, err := k.MarshalText(); err != nil || string(got) != Redacted {
		t.Errorf("MarshalText returns %s, %v", got, err)
	}
}

func TestSizes(t *testing.T) {
	for _, n := range []int{-1, 0, SizeMax + 1} {
		if k, err := New(n); err == nil || k != nil {
			t.Errorf("New(%d) = %v, %v; want an error", n, k, err)
		}
	}
	for _, n := range []int{1, 2, 31, 32, 63, 64, 65, 127, 128, 4095, 4096, 4097, slotMax - 1, slotMax, slotMax + 1, 100_000, SizeMax} {
		k, err := New(n)
		if err != nil {
			t.Fatalf("New(%d): %v", n, err)
		}
		b := k.Bytes()
		if len(b) != n || cap(b) != n || k.Len() != n {
			t.Errorf("New(%d) has length %d, capacity %d, Len %d", n, len(b), cap(b), k.Len())
		}
		if address(b)%64 != 0 {
			t.Errorf("New(%d) starts at %#x, which is not aligned to 64 bytes", n, address(b))
		}
		if !zero(b) {
			t.Errorf("New(%d) is not zero", n)
		}
		for i := range b {
			b[i] = 0xA5
		}
		k.Close()
	}
}

func TestWipedOnClose(t *testing.T) {
	// An arena of its own, so that no other test reuses the slots.
	for name, mapRegion := range mappings(t) {
		a := &arena{mapRegion: mapRegion}
		for _, n := range []int{1, 32, 64, 100, slotMax} {
			b, err := a.allocate(n)
			if err != nil {
				t.Fatal(name, err)
			}
			whole := b.slot()
			for i := range whole {
				whole[i] = 0xA5 // also past the length, where a misuse could reach
			}
			b.release()
			if !zero(whole) {
				t.Errorf("%s: %d bytes are not wiped on release", name, n)
			}
			again, err := a.allocate(n)
			if err != nil {
				t.Fatal(name, err)
			}
			if address(again.slot()) != address(whole) {
				t.Errorf("%s: a slot for %d bytes is not reused", name, n)
			}
			if !zero(again.slot()) {
				t.Errorf("%s: a reused slot for %d bytes is not zero", name, n)
			}
		}
	}
}

func TestClose(t *testing.T) {
	k := take(t, secret)
	b := k.Bytes()
	for range 2 {
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Contains(b, []byte(secret[:8])) {
		t.Error("secret is still there after Close")
	}
	var none *Key
	if err := none.Close(); err != nil {
		t.Error(err)
	}
	for name, use := range map[string]func(){
		"Bytes": func() { k.Bytes() },
		"Clone": func() { k.Clone() },
		"Equal": func() { k.Equal(k) },
	} {
		func() {
			defer func() {
				if got := recover(); got != ErrClosed {
					t.Errorf("%s of a closed key panics with %v, want ErrClosed", name, got)
				}
			}()
			use()
		}()
	}
	if got := fmt.Sprint(k); got != Redacted {
		t.Errorf("a closed key prints %q", got)
	}
}

func TestTakeWipesItsSource(t *testing.T) {
	src := []byte(secret)
	k, err := Take(src)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if string(k.Bytes()) != secret || !zero(src) {
		t.Error("Take does not move the secret")
	}
	large := bytes.Repeat([]byte{1}, SizeMax+1)
	if k, err := Take(large); err == nil || k != nil || !zero(large) {
		t.Error("Take of too much does not fail, or leaves its source")
	}
}

func TestRead(t *testing.T) {
	k, err := Read(iotest.OneByteReader(strings.NewReader(secret+"more")), len(secret))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if string(k.Bytes()) != secret {
		t.Error("Read has read something else")
	}
	failed := errors.New("failed")
	for _, test := range []struct {
		r    io.Reader
		want error
	}{
		{strings.NewReader(""), io.ErrUnexpectedEOF},
		{strings.NewReader(secret[:8]), io.ErrUnexpectedEOF},
		{iotest.ErrReader(failed), failed},
	} {
		if k, err := Read(test.r, len(secret)); !errors.Is(err, test.want) || k != nil {
			t.Errorf("Read = %v, %v; want %v", k, err, test.want)
		}
	}
}

func TestRandomCloneEqual(t *testing.T) {
	a, err := Random(32)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Random(32)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if zero(a.Bytes()) || a.Equal(b) {
		t.Error("Random is not random")
	}
	c, err := a.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !a.Equal(c) {
		t.Error("a clone is not equal")
	}
	a.Bytes()[31] ^= 1
	if a.Equal(c) {
		t.Error("a clone is not independent, or Equal ignores the last byte")
	}
	short := take(t, secret[:31])
	if a.Equal(short) {
		t.Error("keys of different lengths are equal")
	}
}

func TestForgottenKeyIsWiped(t *testing.T) {
	// Not a size that other tests use, or the slot could be taken again.
	const n = 1000
	forget := func() []byte {
		k, err := New(n)
		if err != nil {
			t.Fatal(err)
		}
		for i := range k.Bytes() {
			k.Bytes()[i] = 0xA5
		}
		return k.Bytes()
	}
	b := forget() // outside the heap: it does not keep the Key
	for deadline := time.Now().Add(time.Minute); !wiped(b); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("a forgotten key is not wiped")
		}
		runtime.GC()
	}
}

// wiped is zero, under the lock that is taken after wiping.
func wiped(b []byte) bool {
	process.mu.Lock()
	defer process.mu.Unlock()
	return zero(b)
}

func TestConcurrent(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(seed), uint64(g)))
			var keys []*Key
			for step := range 2000 {
				if len(keys) > 0 && (len(keys) > 50 || r.IntN(2) == 0) {
					i := r.IntN(len(keys))
					for _, c := range keys[i].Bytes() {
						if c != byte(g+1) {
							t.Errorf("step %d: a key holds another's bytes", step)
							return
						}
					}
					keys[i].Close()
					keys[i] = keys[len(keys)-1]
					keys = keys[:len(keys)-1]
					continue
				}
				k, err := New(1 + r.IntN(300))
				if err != nil {
					t.Error(err)
					return
				}
				b := k.Bytes()
				if !zero(b) {
					t.Errorf("step %d: a new key is not zero", step)
					return
				}
				for i := range b {
					b[i] = byte(g + 1)
				}
				keys = append(keys, k)
			}
			for _, k := range keys {
				k.Close()
			}
		})
	}
	wg.Wait()
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
