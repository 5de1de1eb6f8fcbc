package standard

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/leaktest"
)

func secret(t testing.TB, b []byte) *keymem.Key {
	t.Helper()
	if len(b) == 0 {
		return nil
	}
	k, err := keymem.Take(bytes.Clone(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	in := map[string]Credentials{
		"kms-2": {},
		"kms-1": {Password: secret(t, []byte("a password of the KMS")), ClientKey: secret(t, bytes.Repeat([]byte{7}, 138)), Requested: secret(t, []byte{1})},
	}
	blob, err := MarshalCredentials(in)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	out, err := UnmarshalCredentials(blob)
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != 2 || out["kms-2"] != (Credentials{}) {
		t.Errorf("read %v", out)
	}
	for i, want := range in["kms-1"].all() {
		got := out["kms-1"].all()[i]
		if got == nil || !got.Equal(want) {
			t.Errorf("secret %d differs", i)
		}
	}
	leaktest.Refute(t, leaktest.Print(in, out), in["kms-1"].Password, in["kms-1"].ClientKey)
	for _, c := range out {
		c.Close()
	}
	for _, bad := range []map[string]Credentials{{"No Name": {}}, {"kms-1": {Password: secret(t, make([]byte, SecretMax+1))}}} {
		if _, err := MarshalCredentials(bad); err == nil {
			t.Errorf("stored %v", bad)
		}
	}
}

// TestCredentialsVectors holds the vectors that the specification names.
func TestCredentialsVectors(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/credentials.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Name      string
		Blob      string
		Invalid   bool
		Providers []struct{ Name, Password, ClientKey, Requested string }
	}
	if err := json.Unmarshal(text, &vectors); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			all, err := UnmarshalCredentials(secret(t, unhex(v.Blob)))
			if v.Invalid {
				if !errors.Is(err, ErrInvalidCredentials) {
					t.Errorf("read %v, %v; want ErrInvalidCredentials", all, err)
				}
				return
			}
			if err != nil || len(all) != len(v.Providers) {
				t.Fatalf("%d providers, %v", len(all), err)
			}
			for _, p := range v.Providers {
				got := all[p.Name]
				defer got.Close()
				for i, want := range []string{p.Password, p.ClientKey, p.Requested} {
					k := got.all()[i]
					if (k == nil) != (want == "") || k != nil && !bytes.Equal(k.Bytes(), unhex(want)) {
						t.Errorf("%s: secret %d differs", p.Name, i)
					}
				}
			}
		})
	}
}

// FuzzCredentials: what is read is written as the same bytes.
func FuzzCredentials(f *testing.F) {
	f.Add([]byte("SRkmscrd\x00\x00\x00\x01\x00"))
	f.Add([]byte("SRkmscrd\x00\x00\x00\x01\x01\x05kms-1\x00\x02pw\x00\x00\x00\x01k"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 1<<16 {
			return
		}
		blob := secret(t, data)
		all, err := UnmarshalCredentials(blob)
		if err != nil {
			if !errors.Is(err, ErrInvalidCredentials) {
				t.Error(err)
			}
			return
		}
		again, err := MarshalCredentials(all)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if !again.Equal(blob) {
			t.Error("what was read is written as other bytes")
		}
		for _, c := range all {
			c.Close()
		}
	})
}
