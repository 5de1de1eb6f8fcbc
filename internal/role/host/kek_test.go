package host

import (
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// TestKEKs: a KEK of a standard provider is there as long as it is wanted, is
// gone after a restart, and nothing of it is even sealed on disk: 21, 32, 162.
func TestKEKs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	vm := keysafe.Ref{Provider: "kms-1", KeyID: "4711"}
	kek, err := keymem.Random(keyprovider.KEKSize)
	check(t, err)
	defer kek.Close()
	sealed := func(recipient string, ref keysafe.Ref, key *keymem.Key) []byte {
		t.Helper()
		p, err := parcel.Seal(b.secrets.parcel.PublicKey(), keyprovider.KEKContext("controller", recipient, ref), key)
		check(t, err)
		return p
	}
	me := b.secrets.identity.HostID
	providers := []*strongroomv1.WantedProvider{{Name: "kms-1", Standard: true}}
	sync := func(h *Host, p []byte) []*strongroomv1.KeyRef {
		t.Helper()
		missing, err := h.syncKEKs(providers, []*strongroomv1.WantedKEK{{Key: keyRef(vm), Parcel: p}})
		check(t, err)
		return missing
	}
	wantReason := func(h *Host, reason string) {
		t.Helper()
		key, err := h.kek(t.Context(), vm)
		if key != nil || errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != reason || errs.HintOf(err) == "" {
			t.Errorf("%v, %v, reason %q, hint %q; want %q", key, err, errs.ReasonOf(err), errs.HintOf(err), reason)
		}
	}
	wantReason(b.Host, reasonProviderUnknown)
	if missing := sync(b.Host, nil); len(missing) != 1 {
		t.Errorf("missing %v", missing)
	}
	wantReason(b.Host, reasonKeyMissing)

	// For another host, another key, of another length, or altered: not taken.
	short, err := keymem.Random(16)
	check(t, err)
	defer short.Close()
	altered := sealed(me, vm, kek)
	altered[len(altered)-1] ^= 1
	for name, p := range map[string][]byte{
		"another host": sealed("esx-2", vm, kek), "another key": sealed(me, keysafe.Ref{Provider: "kms-1", KeyID: "4712"}, kek),
		"16 bytes": sealed(me, vm, short), "altered": altered, "no parcel": []byte("SRparcel"),
	} {
		if _, err := b.syncKEKs(providers, []*strongroomv1.WantedKEK{{Key: keyRef(vm), Parcel: p}}); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	wantReason(b.Host, reasonKeyMissing)

	if missing := sync(b.Host, sealed(me, vm, kek)); len(missing) != 0 {
		t.Errorf("missing %v", missing)
	}
	got, err := b.kek(t.Context(), vm)
	check(t, err)
	if !got.Equal(kek) {
		t.Error("another key")
	}
	got.Close()
	if missing := sync(b.Host, nil); len(missing) != 0 { // wanted again, it is here
		t.Errorf("missing %v", missing)
	}

	// Other changes are stored meanwhile, and the KEK with none of them.
	check(t, b.saveProviders())
	again := openHost(t, b.cfg)
	wantReason(again, reasonKeyMissing)

	if _, err := b.syncKEKs(providers, nil); err != nil { // not wanted any more
		t.Fatal(err)
	}
	wantReason(b.Host, reasonKeyMissing)
	if _, err := b.syncKEKs(nil, nil); err != nil {
		t.Fatal(err)
	}
	wantReason(b.Host, reasonProviderUnknown)
}

// saveProviders stores the set of providers as a change of them does.
func (b *bench) saveProviders() error { return b.secrets.saveProviders(true) }
