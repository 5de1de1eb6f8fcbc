package keyprovider_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/leaktest"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/providertest"
)

var created = time.Date(2026, 11, 23, 3, 22, 28, 0, time.UTC)

func newNative(t testing.TB, name string) *keyprovider.Native {
	t.Helper()
	n, err := keyprovider.CreateNative(name, false, created)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func kdkOf(t testing.TB, n *keyprovider.Native) *keymem.Key {
	t.Helper()
	kdk, err := n.KDK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kdk.Close() })
	return kdk
}

func restore(t testing.TB, info keyprovider.NativeInfo, kdk *keymem.Key) *keyprovider.Native {
	t.Helper()
	n, err := keyprovider.RestoreNative(info, kdk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestNativeConformance(t *testing.T) {
	t.Parallel()
	providertest.Run(t, func(t *testing.T) providertest.Fixture {
		n := newNative(t, "kp-1")
		kdk := kdkOf(t, n)
		ref, kek, err := n.NewKEK(t.Context(), uuid.New())
		if err != nil {
			t.Fatal(err)
		}
		kek.Close()
		kdkID, objectID, _ := strings.Cut(ref.KeyID, "/")
		var missing []keysafe.Ref
		for _, keyID := range []string{
			uuid.NewString() + "/" + objectID, // of another KDK
			kdkID,
			kdkID + "/",
			"/" + objectID,
			kdkID + objectID,
			ref.KeyID + "/",
			strings.ToUpper(ref.KeyID),
			kdkID + "/{" + objectID + "}",
			kdkID + "/" + uuid.Nil.String(),
			kdkID + "/" + strings.ReplaceAll(objectID, "-", ""),
			"",
		} {
			missing = append(missing, keysafe.Ref{Provider: "kp-1", KeyID: keyID})
		}
		return providertest.Fixture{
			Provider: n,
			Missing:  missing,
			Reopen: func(t *testing.T) keyprovider.Provider {
				return restore(t, n.Info(), kdk)
			},
		}
	})
}

func TestNativeVectors(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/keks.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		KDK   string
		KeyID string `json:"key_id"`
		KEK   string
	}
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) == 0 {
		t.Fatal("no vectors")
	}
	for _, v := range vectors {
		kdkID, objectID, _ := strings.Cut(v.KeyID, "/")
		n := restore(t, keyprovider.NativeInfo{Name: "kp-1", KeyID: uuid.MustParse(kdkID), Created: created}, keymemtest.Hex(t, v.KDK))
		ref, kek, err := n.NewKEK(t.Context(), uuid.MustParse(objectID))
		if err != nil {
			t.Fatal(err)
		}
		defer kek.Close()
		if ref.KeyID != v.KeyID || !kek.Equal(keymemtest.Hex(t, v.KEK)) {
			t.Errorf("%s: got another KEK, at %s", v.KeyID, ref)
		}
	}
}

func TestNativeLimits(t *testing.T) {
	t.Parallel()
	kdk, short := keymemtest.Random(t, 32), keymemtest.Random(t, 16)
	good := keyprovider.NativeInfo{Name: "kp-1", KeyID: uuid.New(), Created: created}
	for name, change := range map[string]func(*keyprovider.NativeInfo){
		"no name":         func(i *keyprovider.NativeInfo) { i.Name = "" },
		"invalid name":    func(i *keyprovider.NativeInfo) { i.Name = "Kp" },
		"nil key id":      func(i *keyprovider.NativeInfo) { i.KeyID = uuid.Nil },
		"before 1970":     func(i *keyprovider.NativeInfo) { i.Created = time.Unix(-1, 0) },
		"no time":         func(i *keyprovider.NativeInfo) { i.Created = time.Time{} },
		"after year 9999": func(i *keyprovider.NativeInfo) { i.Created = time.Unix(1<<62, 0) },
	} {
		info := good
		change(&info)
		if n, err := keyprovider.RestoreNative(info, kdk); n != nil || !errors.Is(err, keyprovider.ErrInvalidNative) {
			t.Errorf("%s: %v, %v; want ErrInvalidNative", name, n, err)
		}
	}
	if n, err := keyprovider.RestoreNative(good, short); n != nil || !errors.Is(err, keyprovider.ErrInvalidNative) {
		t.Errorf("short KDK: %v, %v; want ErrInvalidNative", n, err)
	}
	if n, err := keyprovider.CreateNative("-", true, created); n != nil || !errors.Is(err, keyprovider.ErrInvalidNative) {
		t.Errorf("create with an invalid name: %v, %v; want ErrInvalidNative", n, err)
	}
	n := newNative(t, "kp-1")
	if ref, kek, err := n.NewKEK(t.Context(), uuid.Nil); !ref.IsZero() || kek != nil || !errors.Is(err, keyprovider.ErrInvalidNative) {
		t.Errorf("nil object id: %v, %v, %v; want ErrInvalidNative", ref, kek, err)
	}
}

func TestNativeTimeIsStoredInSeconds(t *testing.T) {
	t.Parallel()
	local := time.Date(2026, 11, 23, 4, 22, 28, 999, time.FixedZone("CET", 3600))
	n, err := keyprovider.CreateNative("kp-1", true, local)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if got := n.Info(); got.Created != created || !got.TPMRequired || got.Name != "kp-1" {
		t.Errorf("Info() = %+v", got)
	}
}

func TestNativeSeal(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	host, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	sealed, err := n.Seal("controller", "host-1", host.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, kdkOf(t, n).Bytes()) {
		t.Error("the parcel shows the KDK")
	}
	got, err := keyprovider.OpenNative(n.Info(), host, "controller", "host-1", sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.SameKeys(n) {
		t.Error("the received provider differs")
	}

	renamed, otherKey := n.Info(), n.Info()
	renamed.Name, otherKey.KeyID = "kp-2", uuid.New()
	for name, open := range map[string]func() (*keyprovider.Native, error){
		"another name": func() (*keyprovider.Native, error) {
			return keyprovider.OpenNative(renamed, host, "controller", "host-1", sealed)
		},
		"another key id": func() (*keyprovider.Native, error) {
			return keyprovider.OpenNative(otherKey, host, "controller", "host-1", sealed)
		},
		"another sender": func() (*keyprovider.Native, error) {
			return keyprovider.OpenNative(n.Info(), host, "host-2", "host-1", sealed)
		},
		"another recipient": func() (*keyprovider.Native, error) {
			return keyprovider.OpenNative(n.Info(), host, "controller", "host-2", sealed)
		},
	} {
		if got, err := open(); got != nil || !errors.Is(err, parcel.ErrDoesNotOpen) {
			t.Errorf("%s: %v, %v; want ErrDoesNotOpen", name, got, err)
		}
	}
	if sealed, err := n.Seal("controller", "host-1", nil); sealed != nil || !errors.Is(err, parcel.ErrInvalid) {
		t.Errorf("no public key: %v; want ErrInvalid", err)
	}
	n.Close()
	if sealed, err := n.Seal("controller", "host-1", host.PublicKey()); sealed != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("after Close: %v; want ErrClosed", err)
	}
}

func TestSameKeys(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	kdk := kdkOf(t, n)
	withTPM, renamed, otherID := n.Info(), n.Info(), n.Info()
	withTPM.TPMRequired = true
	renamed.Name = "kp-2"
	otherID.KeyID = uuid.New()
	for _, tt := range []struct {
		name  string
		other *keyprovider.Native
		want  bool
	}{
		{"itself", n, true},
		{"a copy", restore(t, n.Info(), kdk), true},
		{"other constraints", restore(t, withTPM, kdk), true},
		{"another name", restore(t, renamed, kdk), false},
		{"another key id", restore(t, otherID, kdk), false},
		{"another KDK", restore(t, n.Info(), keymemtest.Random(t, 32)), false},
	} {
		if got := n.SameKeys(tt.other); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
	}
	closed := restore(t, n.Info(), kdk)
	closed.Close()
	if n.SameKeys(closed) || closed.SameKeys(n) {
		t.Error("a closed provider has the same keys")
	}
	if kdk, err := closed.KDK(); kdk != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("KDK after Close: %v, %v; want ErrClosed", kdk, err)
	}
}

// The outcomes cross role boundaries with the right kind, however deep they
// are wrapped.
func TestErrorKinds(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]errs.Kind{
		keyprovider.ErrWrongProvider:   errs.Invalid,
		keyprovider.ErrNotFound:        errs.NotFound,
		keyprovider.ErrLocked:          errs.Locked,
		keyprovider.ErrUnavailable:     errs.Unavailable,
		keyprovider.ErrUnknownProvider: errs.Locked,
		keyprovider.ErrNameCollision:   errs.Exists,
		keyprovider.ErrClosed:          errs.InvalidState,
	} {
		if got := errs.KindOf(fmt.Errorf("cannot power on web-1: %w", err)); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}

// Neither the KDK nor a KEK shows in anything that a native provider, its set
// or its errors print.
func TestNativeNoKeyIsPrinted(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	kdk := kdkOf(t, n)
	set := keyprovider.NewSet()
	defer set.Close()
	if err := set.Add(n); err != nil {
		t.Fatal(err)
	}
	blob, err := keyprovider.MarshalSecrets(set)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	data, err := n.ExportQuick(nil, created)
	if err != nil {
		t.Fatal(err)
	}
	imported, info, err := keyprovider.Import(data, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer imported.Close()
	_, _, corrupt := keyprovider.Import(data[1:], nil)
	collision := set.Add(restore(t, n.Info(), keymemtest.Random(t, 32)))
	ref, kek := newRef(t, n)
	unknown := second(set.KEK(t.Context(), keysafe.Ref{Provider: "kp-2", KeyID: ref.KeyID}))
	leaktest.Refute(t, leaktest.Print(n, set, blob, info, imported, corrupt, collision, unknown, n.Info()), kdk, kek)
}
