package host

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/role/volumed"
)

// TestMain lets the test binary be a volume process.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "volumed" {
		os.Exit(volumed.Main(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, what string, err error, want errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(explain(err)) != want {
		t.Errorf("%s: error %v of kind %v, want %v", what, err, errs.KindOf(explain(err)), want)
	}
}

// sealer seals a CA's key for a test.
type sealer struct{ cipher.AEAD }

func (s sealer) Seal(name string, b []byte) ([]byte, error) {
	return s.AEAD.Seal(nil, nil, b, []byte(name)), nil
}

func (s sealer) Open(name string, b []byte) ([]byte, error) {
	return s.AEAD.Open(nil, nil, b, []byte(name))
}

// newCA makes the CA of an installation.
func newCA(t testing.TB) *pki.CA {
	t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	check(t, err)
	aead, err := cipher.NewGCMWithRandomNonce(block)
	check(t, err)
	ca, err := pki.OpenCA(t.TempDir(), "test", sealer{aead})
	check(t, err)
	return ca
}

var controllerIdentity = pki.Identity{Cluster: "installation", Role: pki.Controller, Name: "controller-1"}

// newConfig returns the configuration of a host that has not joined.
func newConfig(t testing.TB) Config {
	t.Helper()
	dir := t.TempDir()
	c, err := Config{DataDir: dir, Listen: "127.0.0.1:8444", RunDir: "/run/x"}.withDefaults()
	check(t, err)
	c.RunDir, c.LocalSocket = filepath.Join(dir, "run"), filepath.Join(dir, "host.sock")
	return c
}

// joinCA makes the sealed configuration that a join ends with.
func joinCA(t testing.TB, cfg Config, ca *pki.CA) identity {
	t.Helper()
	tlsKey, csr, err := newTLSKey()
	check(t, err)
	defer tlsKey.Close()
	recipient, err := parcel.NewRecipient()
	check(t, err)
	defer recipient.Close()
	id := identity{
		HostID: uuid.NewString(), Name: "esx-1", ClusterID: "cluster-1", Cluster: "lab", Controller: "127.0.0.1:1",
		ControllerIdentity: controllerIdentity.String(), CA: ca.Certificate().Raw,
	}
	cert, err := ca.IssueFromCSR(csr, pki.Identity{Cluster: id.ClusterID, Role: pki.Host, Name: id.HostID}, []string{"127.0.0.1"})
	check(t, err)
	id.Certificate = cert.Raw
	check(t, createVault(cfg, id, tlsKey, recipient))
	return id
}

// bench is a host with one datastore, "ds-1", and the keys of provider kp-1.
type bench struct {
	*Host
	ca       *pki.CA
	root     string // of the datastore
	provider *keyprovider.Native
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{ca: newCA(t), root: t.TempDir()}
	cfg := newConfig(t)
	joinCA(t, cfg, b.ca)
	b.Host = openHost(t, cfg)
	var err error
	b.provider, err = keyprovider.CreateNative("kp-1", false, time.Now())
	check(t, err)
	t.Cleanup(func() { b.provider.Close() })
	check(t, b.syncDatastores([]*strongroomv1.WantedDatastore{{Name: "ds-1", Type: "dir", Path: b.root}}))
	check(t, b.syncProviders([]*strongroomv1.WantedProvider{b.wanted(t, b.provider)}))
	return b
}

// openHost starts a host on what is in its sealed configuration, without the
// servers.
func openHost(t testing.TB, cfg Config) *Host {
	t.Helper()
	s, err := openSecrets(cfg)
	check(t, err)
	life, end := context.WithCancel(context.Background())
	h := &Host{
		cfg: cfg, log: slog.New(slog.DiscardHandler), secrets: s, machines: map[string]*machine{}, life: life, changed: make(chan struct{}, 1), unlocking: make(chan struct{}, 1),
		lacking: make(chan keysafe.Ref, lackingMax),
	}
	h.credential, err = s.credential()
	check(t, err)
	t.Cleanup(func() {
		end()
		h.watchers.Wait()
		s.Close()
	})
	return h
}

// wanted returns what the controller sends to b for it to hold a provider.
func (b *bench) wanted(t testing.TB, n *keyprovider.Native) *strongroomv1.WantedProvider {
	t.Helper()
	return wantedBy(t, n, b.secrets.identity.HostID, b.secrets.parcel.PublicKey())
}

func wantedBy(t testing.TB, n *keyprovider.Native, hostID string, publicKey []byte) *strongroomv1.WantedProvider {
	t.Helper()
	sealed, err := n.Seal("controller", hostID, publicKey)
	check(t, err)
	info := n.Info()
	return &strongroomv1.WantedProvider{
		Name: info.Name, KeyId: info.KeyID.String(), Parcel: sealed, TpmRequired: info.TPMRequired, Created: timestamppb.New(info.Created),
	}
}

// newRef returns the address of a new KEK of kp-1.
func (b *bench) newRef(t testing.TB) keysafe.Ref {
	t.Helper()
	ref, key, err := b.provider.NewKEK(t.Context(), uuid.New())
	check(t, err)
	check(t, key.Close())
	return ref
}

// quiet is a report that nobody looks at.
func quiet(string, int64, int64, string) {}

// request returns one for a VM with a plain and, if ref is not zero, an
// encrypted disk of 1 MiB.
func request(name string, ref keysafe.Ref) *strongroomv1.AgentCreateVMRequest {
	req := &strongroomv1.AgentCreateVMRequest{
		Id: uuid.NewString(), Name: name, Datastore: "ds-1",
		Disks: []*strongroomv1.NewDisk{{SizeBytes: 1 << 20, Plain: true}},
	}
	if !ref.IsZero() {
		req.Key = &strongroomv1.KeyRef{Provider: ref.Provider, KeyId: ref.KeyID}
		req.Disks = append(req.Disks, &strongroomv1.NewDisk{SizeBytes: 1 << 20})
	}
	return req
}

// create makes a VM and returns its id.
func (b *bench) create(t testing.TB, name string, ref keysafe.Ref) string {
	t.Helper()
	req := request(name, ref)
	check(t, b.createVM(t.Context(), req, quiet))
	return req.GetId()
}

// list returns the names in a folder.
func list(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err)
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestBusy(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	o, err := b.takeOffline(t.Context(), id, "a test")
	check(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if _, err := b.takeOffline(ctx, "web-1", "another"); err == nil || context.Cause(ctx) != err {
			t.Errorf("an operation beside another: %v", err)
		}
	})
	cancel(errs.New(errs.Canceled, "no more patience"))
	waiting.Wait()

	// Another process has the folder.
	other := openHostOn(t, b)
	_, err = other.takeOffline(t.Context(), id, "a test")
	wantKind(t, "a folder in use", err, errs.InvalidState)
	o.release()
	o, err = other.takeOffline(t.Context(), id, "a test")
	check(t, err)
	o.release()

	_, err = b.takeOffline(t.Context(), "web-2", "a test")
	wantKind(t, "an unknown VM", err, errs.NotFound)
}

// openHostOn returns another host that has the same VMs as b.
func openHostOn(t testing.TB, b *bench) *Host {
	t.Helper()
	cfg := newConfig(t)
	joinCA(t, cfg, b.ca)
	h := openHost(t, cfg)
	all := b.secrets.snapshot()
	check(t, h.secrets.updateRegistry(func(r *registry) error { *r = all; return nil }))
	return h
}
