package host

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/vault"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
)

// The sealed host configuration: docs/spec/vault.md.
const (
	vaultName    = "host.vault"
	vaultContext = "strongroom/host-configuration/v1"

	secretIdentity   = "identity"
	secretInventory  = "inventory"
	secretKeyServers = "key-servers"
	secretParcelKey  = "parcel-key"
	secretProviders  = "providers"
	secretTLSKey     = "tls-key"
)

// identity is who the host is. It holds no key.
type identity struct {
	HostID     string `json:"host_id"`
	Name       string `json:"name"`
	ClusterID  string `json:"cluster_id"`
	Cluster    string `json:"cluster"`
	Controller string `json:"controller"` // host:port
	// ControllerIdentity is what the controller's certificate must say.
	ControllerIdentity string `json:"controller_identity"`
	Certificate        []byte `json:"certificate"` // DER
	CA                 []byte `json:"ca"`          // DER
}

// registry is what the host knows without its controller.
type registry struct {
	Datastores []datastore  `json:"datastores"`
	VMs        []registered `json:"vms"`
	// Standard are the names of standard providers, so that a host that lacks
	// their keys can say so.
	Standard []string `json:"standard,omitempty"`
	// KeyServers are those of standard providers that this host may ask itself.
	KeyServers []keyServers `json:"key_servers,omitempty"`
}

type datastore struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Path string `json:"path"`
}

// registered says where a VM's folder is.
type registered struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Datastore string `json:"datastore"`
	Folder    string `json:"folder"`
}

// secrets is the sealed host configuration and what was unpacked from it. It is
// safe for concurrent use.
type secrets struct {
	vault     *vault.Vault
	identity  identity
	ca        *x509.Certificate
	parcel    *parcel.Recipient
	providers *keyprovider.Set
	cache     *keyprovider.Cache // of standard providers' KEKs: in memory, never in the vault
	servers   standard.Set       // the standard providers that this host may ask itself

	mu       sync.Mutex // guards what follows, and updates of the vault
	registry registry
	unsaved  bool // providers has changed since it was last stored
}

// createVault makes the sealed configuration of a host that has joined. A host
// that is a member of a cluster is not made another one by mistake.
func createVault(cfg Config, id identity, tlsKey *keymem.Key, recipient *parcel.Recipient) error {
	path := filepath.Join(cfg.DataDir, vaultName)
	key, err := keyfile.Create(cfg.KeyFile, sealed.KeySize)
	if errors.Is(err, fs.ErrExist) {
		key, err = keyfile.Read(cfg.KeyFile, sealed.KeySize) // of a join that was cut short
	}
	if err != nil {
		return err
	}
	defer key.Close()
	v, err := vault.New(path, key, vaultContext)
	if err != nil {
		return err
	}
	defer v.Close()
	parcelKey, err := recipient.Secret()
	if err != nil {
		return err
	}
	defer parcelKey.Close()
	identityText, err := plain(id)
	if err != nil {
		return err
	}
	defer identityText.Close()
	return v.Update(map[string]*keymem.Key{secretIdentity: identityText, secretTLSKey: tlsKey, secretParcelKey: parcelKey})
}

// joined reports whether there is a sealed configuration.
func joined(cfg Config) bool {
	_, err := os.Lstat(filepath.Join(cfg.DataDir, vaultName))
	return err == nil
}

// openSecrets opens the sealed configuration.
func openSecrets(cfg Config) (_ *secrets, err error) {
	if !joined(cfg) {
		return nil, errs.New(errs.NotFound, "cannot start host: it is in no cluster").
			WithHint("strongroom host join --config FILE --controller HOST:PORT --token-file FILE")
	}
	v, err := openVault(cfg)
	if err != nil {
		return nil, errs.Wrap(err, "cannot open the sealed host configuration")
	}
	s := &secrets{vault: v, providers: keyprovider.NewSet(), cache: keyprovider.NewCache(nil)}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if err := s.unpack(); err != nil {
		return nil, fmt.Errorf("cannot read the sealed host configuration: %w", err)
	}
	return s, nil
}

func openVault(cfg Config) (*vault.Vault, error) {
	key, err := keyfile.Read(cfg.KeyFile, sealed.KeySize)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	v, err := vault.Open(filepath.Join(cfg.DataDir, vaultName), key, vaultContext)
	switch {
	case errors.Is(err, sealed.ErrWrongKey):
		return nil, errs.New(errs.Denied, "%w", err).WithHint("name the key file that was made with it as key_file; %s holds another key", cfg.KeyFile)
	case errors.Is(err, sealed.ErrCorrupt), errors.Is(err, vault.ErrCorrupt):
		return nil, errs.New(errs.Corrupt, "%w", err).WithHint("restore %s from a backup, or move it away and join the host again", cfg.DataDir)
	}
	return v, err
}

func (s *secrets) unpack() error {
	if err := s.decode(secretIdentity, &s.identity); err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(s.identity.CA)
	if err != nil {
		return err
	}
	s.ca = ca
	if err := s.decode(secretInventory, &s.registry); err != nil && errs.KindOf(err) != errs.NotFound {
		return err
	}
	s.cache = keyprovider.NewCache(s.registry.Standard)
	ways, stored, err := s.keyServers()
	if err != nil {
		return err
	}
	defer stored.Close() // nil is good
	credentials, err := credentialsIn(stored)
	if err != nil {
		return err
	}
	err = s.connectKeyServers(nil, ways, credentials)
	closeCredentials(credentials)
	if err != nil {
		return err
	}
	parcelKey, err := s.vault.Get(secretParcelKey)
	if err != nil {
		return err
	}
	defer parcelKey.Close()
	if s.parcel, err = parcel.RestoreRecipient(parcelKey); err != nil {
		return err
	}
	blob, err := s.vault.Get(secretProviders)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	set, err := keyprovider.UnmarshalSecrets(blob)
	if err != nil {
		return err
	}
	s.providers.Close()
	s.providers = set
	return nil
}

func (s *secrets) decode(name string, into any) error {
	text, err := s.vault.Get(name)
	if err != nil {
		return err
	}
	defer text.Close()
	return json.Unmarshal(text.Bytes(), into)
}

// plain returns the JSON of a value that holds no key, in the form that a vault
// takes.
func plain(v any) (*keymem.Key, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return keymem.Take(text)
}

// Close wipes everything from memory.
func (s *secrets) Close() {
	if s.parcel != nil {
		s.parcel.Close()
	}
	s.providers.Close()
	s.cache.Close()
	s.servers.Close()
	s.vault.Close()
}

// saveProviders makes the set of providers durable, if it has changed or a
// change could not be stored before.
func (s *secrets) saveProviders(changed bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unsaved = s.unsaved || changed
	if !s.unsaved {
		return nil
	}
	blob, err := keyprovider.MarshalSecrets(s.providers)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := s.vault.Update(map[string]*keymem.Key{secretProviders: blob}); err != nil {
		return err
	}
	s.unsaved = false
	return nil
}

// snapshot returns a copy of the registry.
func (s *secrets) snapshot() registry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.registry.clone()
}

func (r registry) clone() registry {
	return registry{Datastores: slices.Clone(r.Datastores), VMs: slices.Clone(r.VMs), Standard: slices.Clone(r.Standard), KeyServers: slices.Clone(r.KeyServers)}
}

// updateRegistry changes the registry and makes it durable, or changes nothing.
func (s *secrets) updateRegistry(change func(*registry) error) error {
	return s.updateRegistryAnd(nil, change)
}

// updateRegistryAnd is updateRegistry together with other secrets of the vault,
// as in [vault.Vault.Update].
func (s *secrets) updateRegistryAnd(others map[string]*keymem.Key, change func(*registry) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.registry.clone()
	if err := change(&next); err != nil {
		return err
	}
	text, err := plain(next)
	if err != nil {
		return err
	}
	defer text.Close()
	all := map[string]*keymem.Key{secretInventory: text}
	maps.Copy(all, others)
	if err := s.vault.Update(all); err != nil {
		return fmt.Errorf("cannot update the sealed host configuration: %w", err)
	}
	s.registry = next
	return nil
}

// datastorePath returns the path of a datastore.
func (s *secrets) datastorePath(name string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.registry.Datastores {
		if d.Name == name {
			return d.Path, nil
		}
	}
	return "", errs.New(errs.NotFound, "host %s has no datastore %q", s.identity.Name, name).
		WithHint("strongroom datastore ls")
}

// errNoVM is what asking for an unknown VM returns.
func (s *secrets) errNoVM(what string) error {
	return errs.New(errs.NotFound, "host %s has no VM %q", s.identity.Name, what).WithHint("strongroom vm ls")
}

// find returns the registration of the VM with that id, or else with that name:
// a name may look like an id.
func (s *secrets) find(what string) (registered, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.registry.VMs, func(r registered) bool { return r.ID == what })
	if i < 0 {
		i = slices.IndexFunc(s.registry.VMs, func(r registered) bool { return r.Name == what })
	}
	if i < 0 {
		return registered{}, s.errNoVM(what)
	}
	return s.registry.VMs[i], nil
}

var errBusy = errors.New("another operation on the VM is running")
