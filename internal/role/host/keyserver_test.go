package host

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/keyscan"
	"strongroom/test/kms"
)

// keyServerBench is a host and a key server that knows its controller.
type keyServerBench struct {
	*bench
	server *kms.Server
	client tls.Certificate
	key    *keymem.Key        // of client
	admin  *standard.Provider // as the controller has it
	ref    keysafe.Ref        // of a key at the server
	kek    *keymem.Key
}

func newKeyServerBench(t *testing.T) *keyServerBench {
	t.Helper()
	ca := testca.New(t)
	k := &keyServerBench{bench: newBench(t), server: kms.NewServer(t, ca), client: ca.Client(t, "strongroom")}
	k.server.Start(t)
	der, err := x509.MarshalPKCS8PrivateKey(k.client.PrivateKey)
	check(t, err)
	k.key, err = keymem.Take(der)
	check(t, err)
	k.admin, err = standard.New(standard.Config{
		Name: "kms-1", Installation: "0123456789abcdef", Servers: []string{k.server.Addr}, Pins: []kmipclient.Fingerprint{kmipclient.FingerprintOf(k.server.Certificate.Leaf)},
		Certificate: func() *tls.Certificate { return &k.client }, Timeout: 30 * time.Second,
	})
	check(t, err)
	k.ref, k.kek, err = k.admin.NewKEK(t.Context(), uuid.New())
	check(t, err)
	t.Cleanup(func() { k.admin.Close(); k.kek.Close(); k.key.Close() })
	return k
}

// access returns what the controller sends to a host that may ask the server, as
// change makes it.
func (k *keyServerBench) access(t *testing.T, change func(*strongroomv1.KeyServerAccess, map[string]standard.Credentials)) *strongroomv1.WantedProvider {
	t.Helper()
	a := &strongroomv1.KeyServerAccess{
		Servers:        []*strongroomv1.TrustedServer{{Address: k.server.Addr, Fingerprint: kmipclient.FingerprintOf(k.server.Certificate.Leaf).String()}},
		TimeoutSeconds: 30, Client: k.client.Certificate,
	}
	credentials := map[string]standard.Credentials{"kms-1": {ClientKey: k.key}}
	if change != nil {
		change(a, credentials)
	}
	if a.Parcel == nil {
		a.Parcel = k.seal(t, k.secrets.identity.HostID, "kms-1", credentials)
	}
	return &strongroomv1.WantedProvider{Name: "kms-1", Standard: true, KeyServers: a}
}

func (k *keyServerBench) seal(t *testing.T, host, provider string, credentials map[string]standard.Credentials) []byte {
	t.Helper()
	blob, err := standard.MarshalCredentials(credentials)
	check(t, err)
	defer blob.Close()
	p, err := parcel.Seal(k.secrets.parcel.PublicKey(), standard.AccessContext("controller", host, provider), blob)
	check(t, err)
	return p
}

// sync is a SyncHost with these providers and the server's key, which the
// controller does not send.
func (k *keyServerBench) sync(h *Host, providers ...*strongroomv1.WantedProvider) error {
	if err := h.syncKeyServers(providers); err != nil {
		return err
	}
	_, err := h.syncKEKs(providers, []*strongroomv1.WantedKEK{{Key: keyRef(k.ref)}})
	return err
}

func (k *keyServerBench) wantKey(t *testing.T, h *Host) {
	t.Helper()
	key, err := h.kek(t.Context(), k.ref)
	check(t, err)
	defer key.Close()
	if !key.Equal(k.kek) {
		t.Error("another key")
	}
}

func (k *keyServerBench) wantReason(t *testing.T, h *Host, reason string) {
	t.Helper()
	key, err := h.kek(t.Context(), k.ref)
	if key != nil || errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != reason || errs.HintOf(err) == "" {
		t.Errorf("%v, %v, reason %q, hint %q; want %q", key, err, errs.ReasonOf(err), errs.HintOf(err), reason)
	}
}

// TestDirectAccess: a host that may asks the key server itself, after a restart
// without its controller too, and one that may not (any more) does not.
func TestDirectAccess(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	brokered := &strongroomv1.WantedProvider{Name: "kms-1", Standard: true}
	check(t, k.sync(k.Host, brokered))
	k.wantReason(t, k.Host, reasonKeyMissing)

	check(t, k.sync(k.Host, k.access(t, nil)))
	k.wantKey(t, k.Host)
	vault := filepath.Join(k.cfg.DataDir, vaultName)
	before, err := os.ReadFile(vault)
	check(t, err)
	check(t, k.sync(k.Host, k.access(t, nil)))
	if after, err := os.ReadFile(vault); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the vault is written anew without a change (%v)", err)
	}

	again := openHost(t, k.cfg)
	check(t, k.server.Stop())
	k.wantReason(t, again, standard.ReasonUnreachable)
	k.wantKey(t, k.Host) // it is in memory
	k.server.Start(t)
	k.wantKey(t, again)
	check(t, k.server.Stop())
	k.wantKey(t, again)
	k.server.Start(t)

	check(t, k.sync(again, brokered))
	third := openHost(t, k.cfg)
	k.wantReason(t, third, reasonKeyMissing)
	if _, err := third.secrets.vault.Get(secretKeyServers); errs.KindOf(err) != errs.NotFound {
		t.Errorf("the credentials are still in the vault: %v", err)
	}
	if got := third.secrets.snapshot().KeyServers; got != nil {
		t.Errorf("its configuration still has %v", got)
	}
}

// TestDirectAccessRefused: a key server's no is told with its reason.
func TestDirectAccessRefused(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	check(t, k.sync(k.Host, k.access(t, nil)))
	check(t, k.admin.Label(t.Context(), k.ref, standard.Labels{Component: standard.ComponentVM, Identifier: uuid.NewString(), Name: "web-1"}))
	check(t, k.admin.Deactivate(t.Context(), k.ref.KeyID))
	k.wantReason(t, k.Host, standard.ReasonNotActive)
	check(t, k.admin.Destroy(t.Context(), k.ref.KeyID))
	k.wantReason(t, k.Host, standard.ReasonMissing)
}

// TestDirectAccessEnded: a VM from a backup, whose wrapping key was replaced and
// ended since, opens without the controller too, while the key server has the key.
func TestDirectAccessEnded(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	check(t, k.sync(k.Host, k.access(t, nil)))
	id := k.create(t, "web-1", k.ref)
	check(t, k.admin.Label(t.Context(), k.ref, standard.Labels{Component: standard.ComponentWrapping, Name: "kms-1"}))
	check(t, k.admin.Deactivate(t.Context(), k.ref.KeyID))
	k.wantReason(t, openHost(t, k.cfg), standard.ReasonNotActive)
	ended := func(ids ...string) *strongroomv1.WantedProvider {
		return k.access(t, func(a *strongroomv1.KeyServerAccess, _ map[string]standard.Credentials) { a.EndedKeys = ids })
	}
	check(t, k.syncKeyServers([]*strongroomv1.WantedProvider{ended("another")}))
	k.wantReason(t, openHost(t, k.cfg), standard.ReasonNotActive)
	check(t, k.syncKeyServers([]*strongroomv1.WantedProvider{ended("another", k.ref.KeyID)}))
	again := openHost(t, k.cfg)
	k.wantKey(t, again)
	m, err := again.machine(id)
	check(t, err)
	if vm, err := again.describe(t.Context(), m); err != nil || vm.GetCryptoState() != "unlocked" {
		t.Errorf("the VM: %v, %v", vm, err)
	}
	check(t, k.admin.Destroy(t.Context(), k.ref.KeyID))
	k.wantReason(t, openHost(t, k.cfg), standard.ReasonMissing)
}

// TestKeyServersNotTaken: what is not for this host and provider, or of no use,
// changes nothing, and does not keep others away.
func TestKeyServersNotTaken(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	me := k.secrets.identity.HostID
	own := map[string]standard.Credentials{"kms-1": {ClientKey: k.key}}
	other, err := standard.NewClientKey()
	check(t, err)
	defer other.Close()
	type access = *strongroomv1.KeyServerAccess
	type credentials = map[string]standard.Credentials
	bad := map[string]*strongroomv1.WantedProvider{}
	for name, change := range map[string]func(access, credentials){
		"for another host":       func(a access, _ credentials) { a.Parcel = k.seal(t, uuid.NewString(), "kms-1", own) },
		"of another provider":    func(a access, _ credentials) { a.Parcel = k.seal(t, me, "kms-2", own) },
		"altered":                func(a access, _ credentials) { a.Parcel = k.seal(t, me, "kms-1", own); a.Parcel[len(a.Parcel)-1] ^= 1 },
		"no parcel":              func(a access, _ credentials) { a.Parcel = []byte("SRparcel") },
		"another's credentials":  func(_ access, c credentials) { c["kms-2"] = c["kms-1"]; delete(c, "kms-1") },
		"two providers'":         func(_ access, c credentials) { c["kms-2"] = c["kms-1"] },
		"a requested key":        func(_ access, c credentials) { c["kms-1"] = standard.Credentials{ClientKey: k.key, Requested: other} },
		"no key":                 func(_ access, c credentials) { c["kms-1"] = standard.Credentials{} },
		"a key of another":       func(_ access, c credentials) { c["kms-1"] = standard.Credentials{ClientKey: other} },
		"no servers":             func(a access, _ credentials) { a.Servers = nil },
		"too many servers":       func(a access, _ credentials) { a.Servers = make([]*strongroomv1.TrustedServer, keyServersMax+1) },
		"no fingerprint":         func(a access, _ credentials) { a.Servers[0].Fingerprint = "" },
		"no timeout":             func(a access, _ credentials) { a.TimeoutSeconds = 0 },
		"too long a timeout":     func(a access, _ credentials) { a.TimeoutSeconds = keyServerTimeoutMax + 1 },
		"too many certificates":  func(a access, _ credentials) { a.Client = make([][]byte, clientChainMax+1) },
		"too many ended keys":    func(a access, _ credentials) { a.EndedKeys = make([]string, endedKeysMax+1) },
		"an ended key of no id":  func(a access, _ credentials) { a.EndedKeys = []string{""} },
		"what is no certificate": func(a access, _ credentials) { a.Client = [][]byte{{1}} },
	} {
		bad[name] = k.access(t, change)
	}
	for name, w := range bad {
		if err := k.sync(k.Host, w); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	if got := openHost(t, k.cfg).secrets.snapshot().KeyServers; got != nil {
		t.Fatalf("stored is %v", got)
	}
	check(t, k.sync(k.Host, &strongroomv1.WantedProvider{Name: "kms-1", Standard: true}))
	k.wantReason(t, k.Host, reasonKeyMissing)

	// A bad one after a good one: what was taken stays, and the other comes.
	check(t, k.sync(k.Host, k.access(t, nil)))
	second := k.access(t, func(a access, c credentials) {
		c["kms-2"] = c["kms-1"]
		delete(c, "kms-1")
		a.Parcel = k.seal(t, me, "kms-2", c)
	})
	second.Name = "kms-2"
	for name, w := range bad {
		if err := k.syncKeyServers([]*strongroomv1.WantedProvider{w, second}); err == nil {
			t.Errorf("%s: it was taken", name)
		}
		again := openHost(t, k.cfg)
		if got := again.secrets.snapshot().KeyServers; len(got) != 2 || got[0].Provider != "kms-1" || got[1].Provider != "kms-2" {
			t.Fatalf("%s: stored is %v", name, got)
		}
	}
	check(t, k.sync(openHost(t, k.cfg), k.access(t, nil), second))
	k.wantKey(t, k.Host)
}

// TestSyncsAtTheSameTime: of two, the first of which its controller gave up, the
// host asks those key servers only that it has stored.
func TestSyncsAtTheSameTime(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	names := []string{"kms-1", "kms-2"}
	wanted := map[string]*strongroomv1.SyncHostRequest{}
	for _, name := range names {
		w := k.access(t, func(a *strongroomv1.KeyServerAccess, _ map[string]standard.Credentials) {
			a.Parcel = k.seal(t, k.secrets.identity.HostID, name, map[string]standard.Credentials{name: {ClientKey: k.key}})
		})
		w.Name = name
		wanted[name] = &strongroomv1.SyncHostRequest{Providers: []*strongroomv1.WantedProvider{w}}
	}
	a := &agent{k.Host}
	for range 20 {
		var group errgroup.Group
		for _, name := range names {
			group.Go(func() error {
				_, err := a.SyncHost(t.Context(), connect.NewRequest(wanted[name]))
				return err
			})
		}
		check(t, group.Wait())
		var stored, asked []string
		for _, s := range k.secrets.snapshot().KeyServers {
			stored = append(stored, s.Provider)
		}
		for _, name := range names {
			if _, err := k.secrets.servers.Lookup(name); err == nil {
				asked = append(asked, name)
			}
		}
		if len(stored) != 1 || !slices.Equal(stored, asked) {
			t.Fatalf("stored are the key servers of %v, asked those of %v", stored, asked)
		}
	}
}

// big returns a password as long as may be.
func big(t *testing.T) *keymem.Key {
	t.Helper()
	key, err := keymem.Random(standard.PasswordMax)
	check(t, err)
	t.Cleanup(func() { key.Close() })
	return key
}

// TestFetchLacking: a VM whose key is not in memory gets it in the background,
// when its key server can be had, and looking at the VM waits for nobody.
func TestFetchLacking(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	check(t, k.server.Stop())
	check(t, k.sync(k.Host, k.access(t, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.fetchLacking(ctx) }()
	defer func() { cancel(); check(t, <-done) }()
	for range 2 * lackingMax { // more than wait at a time
		if err := k.holdsKEK(t.Context(), k.ref); errs.ReasonOf(err) != reasonKeyMissing {
			t.Fatalf("without its server: %v", err)
		}
	}
	k.server.Start(t)
	for deadline := time.Now().Add(time.Minute); k.holdsKEK(t.Context(), k.ref) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the key was not fetched")
		}
	}
	select {
	case <-k.changed: // the controller hears of it
	case <-time.After(time.Minute):
		t.Error("nobody was told")
	}
}

// TestKeyServerSecrets: neither the credentials nor a key that was fetched is in a
// file of the host.
func TestKeyServerSecrets(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	password := big(t)
	check(t, k.sync(k.Host, k.access(t, func(a *strongroomv1.KeyServerAccess, c map[string]standard.Credentials) {
		a.User, c["kms-1"] = "vcenter", standard.Credentials{ClientKey: k.key, Password: password}
	})))
	k.wantKey(t, k.Host)
	check(t, k.saveProviders())
	var s keyscan.Scanner
	s.AddKey("KEK", k.kek.Bytes())
	s.AddKey("password", password.Bytes())
	s.AddKey("client key", k.key.Bytes())
	found, n, err := s.Tree(k.cfg.DataDir, 10)
	check(t, err)
	if len(found) > 0 || n == 0 {
		t.Errorf("of %d bytes: %v", n, found)
	}
}
