package host

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
)

// Direct access to key servers: docs/spec/standard-provider.md.
const (
	keyServersMax       = 16 // of a provider
	keyServerTimeoutMax = 60 // seconds
	clientChainMax      = 16 // certificates
	endedKeysMax        = 1000
	lackingMax          = 64 // keys that wait to be asked for
)

// keyServers is the way to the key servers of a standard provider with direct
// access. It holds no secret.
type keyServers struct {
	Provider       string      `json:"provider"`
	Servers        []keyServer `json:"servers"` // in order of preference
	User           string      `json:"user,omitempty"`
	Proxy          string      `json:"proxy,omitempty"` // "host:port"
	TimeoutSeconds uint32      `json:"timeout_seconds"`
	Client         [][]byte    `json:"client,omitempty"` // our certificate and its chain, DER
	// Ended are the key ids of wrapping keys whose use was ended: of a backup,
	// perhaps, which they still open.
	Ended []string `json:"ended,omitempty"`
}

type keyServer struct {
	Address     string `json:"address"`     // "host:port"
	Fingerprint string `json:"fingerprint"` // of its certificate
}

// connect makes the provider. It does not ask yet.
func (k keyServers) connect(secrets standard.Credentials) (*standard.Provider, error) {
	config := standard.Config{
		Name: k.Provider, User: k.User, Password: secrets.Password, Proxy: k.Proxy, Timeout: time.Duration(k.TimeoutSeconds) * time.Second,
	}
	for _, s := range k.Servers {
		pin, err := kmipclient.ParseFingerprint(s.Fingerprint)
		if err != nil {
			return nil, err
		}
		config.Servers, config.Pins = append(config.Servers, s.Address), append(config.Pins, pin)
	}
	if len(k.Client) > 0 {
		if secrets.ClientKey == nil {
			return nil, errs.New(errs.Invalid, "the private key of the client certificate is missing")
		}
		pair, err := standard.Pair(k.Client, secrets.ClientKey)
		if err != nil {
			return nil, err
		}
		config.Certificate = func() *tls.Certificate { return &pair }
	}
	return standard.New(config)
}

// keyServersFromAPI checks the limits of what a controller sent.
func keyServersFromAPI(provider string, a *strongroomv1.KeyServerAccess) (keyServers, error) {
	k := keyServers{Provider: provider, User: a.GetUser(), Proxy: a.GetProxy(), TimeoutSeconds: a.GetTimeoutSeconds(), Client: a.GetClient()}
	if n := len(a.GetServers()); n < 1 || n > keyServersMax {
		return k, errs.New(errs.Invalid, "%d key servers are not 1 to %d", n, keyServersMax)
	}
	if k.TimeoutSeconds < 1 || k.TimeoutSeconds > keyServerTimeoutMax {
		return k, errs.New(errs.Invalid, "a timeout of %d s is not 1 to %d s", k.TimeoutSeconds, keyServerTimeoutMax)
	}
	if len(k.Client) > clientChainMax {
		return k, errs.New(errs.Invalid, "a chain of %d certificates is over %d", len(k.Client), clientChainMax)
	}
	if len(a.GetEndedKeys()) > endedKeysMax {
		return k, errs.New(errs.Invalid, "%d keys whose use was ended are over %d", len(a.GetEndedKeys()), endedKeysMax)
	}
	for _, id := range a.GetEndedKeys() {
		if err := (keysafe.Ref{Provider: provider, KeyID: id}).Validate(); err != nil {
			return k, errs.New(errs.Invalid, "a key whose use was ended: %w", err)
		}
	}
	k.Ended = a.GetEndedKeys()
	for _, s := range a.GetServers() {
		k.Servers = append(k.Servers, keyServer{Address: s.GetAddress(), Fingerprint: s.GetFingerprint()})
	}
	return k, nil
}

// syncKeyServers makes the wanted ways to key servers the host's, in memory and
// in the sealed configuration, and wipes the credentials of all others.
func (h *Host) syncKeyServers(wanted []*strongroomv1.WantedProvider) error {
	before, stored, err := h.secrets.keyServers()
	if err != nil {
		return err
	}
	defer stored.Close() // nil is good
	credentials, err := credentialsIn(stored)
	if err != nil {
		return err
	}
	defer closeCredentials(credentials)
	next, fresh := []keyServers{}, map[string]standard.Credentials{}
	var failures []error // one bad provider does not keep the others away
	for _, w := range wanted {
		if w.GetKeyServers() == nil {
			continue
		}
		k, secrets, err := h.takeKeyServers(w)
		if err != nil {
			failures = append(failures, errs.Wrap(err, "cannot take over the key servers of provider %s", w.GetName()))
			// What it has of them stays.
			if i := slices.IndexFunc(before, func(k keyServers) bool { return k.Provider == w.GetName() }); i >= 0 {
				next, fresh[w.GetName()] = append(next, before[i]), credentials[w.GetName()]
				delete(credentials, w.GetName())
			}
			continue
		}
		next, fresh[w.GetName()] = append(next, k), secrets
	}
	defer closeCredentials(fresh)
	slices.SortFunc(next, func(a, b keyServers) int { return strings.Compare(a.Provider, b.Provider) })
	return errors.Join(append(failures, h.secrets.setKeyServers(before, stored, next, fresh))...)
}

// takeKeyServers opens the parcel of a provider's credentials, which the caller
// closes, and sees that they are of use.
func (h *Host) takeKeyServers(w *strongroomv1.WantedProvider) (k keyServers, own standard.Credentials, err error) {
	if k, err = keyServersFromAPI(w.GetName(), w.GetKeyServers()); err != nil {
		return k, own, err
	}
	blob, err := h.secrets.parcel.Open(w.GetKeyServers().GetParcel(), standard.AccessContext("controller", h.secrets.identity.HostID, w.GetName()))
	if errors.Is(err, parcel.ErrInvalid) {
		err = errs.New(errs.Invalid, "%w", err)
	}
	if err != nil {
		return k, own, err
	}
	defer blob.Close()
	all, err := standard.UnmarshalCredentials(blob)
	if err != nil {
		return k, own, errs.New(errs.Invalid, "%w", err)
	}
	own, ok := all[w.GetName()]
	if !ok || len(all) != 1 || own.Requested != nil {
		closeCredentials(all)
		return k, standard.Credentials{}, errs.New(errs.Invalid, "%w: not those of this provider", standard.ErrInvalidCredentials)
	}
	p, err := k.connect(own)
	if err != nil {
		own.Close()
		return k, standard.Credentials{}, errs.New(errs.Invalid, "%w", err)
	}
	return k, own, p.Close()
}

func closeCredentials(all map[string]standard.Credentials) {
	for _, c := range all {
		c.Close()
	}
}

// keyServers returns the ways to key servers, sorted, and the credentials for
// them as they are stored, which the caller closes; nil if there are none.
func (s *secrets) keyServers() ([]keyServers, *keymem.Key, error) {
	stored, err := s.vault.Get(secretKeyServers)
	if errs.KindOf(err) == errs.NotFound {
		return nil, nil, nil
	}
	return s.snapshot().KeyServers, stored, err
}

// credentialsIn returns what [secrets.keyServers] has stored, by provider. The
// caller closes it.
func credentialsIn(stored *keymem.Key) (map[string]standard.Credentials, error) {
	if stored == nil {
		return map[string]standard.Credentials{}, nil
	}
	return standard.UnmarshalCredentials(stored)
}

// setKeyServers makes next, sorted, with their credentials the ways to key
// servers, and stores them if that changes what [secrets.keyServers] returned.
func (s *secrets) setKeyServers(before []keyServers, stored *keymem.Key, next []keyServers, credentials map[string]standard.Credentials) error {
	blob, err := standard.MarshalCredentials(credentials)
	if err != nil {
		return err
	}
	defer blob.Close()
	if len(next) == len(before) && (len(next) == 0 || stored != nil && reflect.DeepEqual(next, before) && blob.Equal(stored)) {
		return nil
	}
	change := map[string]*keymem.Key{secretKeyServers: blob}
	if len(next) == 0 {
		next, change[secretKeyServers] = nil, nil
	}
	if err := s.updateRegistryAnd(change, func(r *registry) error {
		r.KeyServers = next
		return nil
	}); err != nil {
		return err
	}
	return s.connectKeyServers(before, next, credentials)
}

// connectKeyServers makes the providers of next, in place of those of before.
func (s *secrets) connectKeyServers(before, next []keyServers, credentials map[string]standard.Credentials) error {
	var failures []error
	for _, k := range next {
		p, err := k.connect(credentials[k.Provider])
		failures = append(failures, errs.Wrap(err, "cannot use the key servers of provider %s", k.Provider))
		s.servers.Put(k.Provider, p)
	}
	for _, k := range before {
		if !slices.ContainsFunc(next, func(n keyServers) bool { return n.Provider == k.Provider }) {
			s.servers.Put(k.Provider, nil)
		}
	}
	return errors.Join(failures...)
}

// ended reports whether ref is a wrapping key whose use was ended.
func (s *secrets) ended(ref keysafe.Ref) bool {
	return slices.ContainsFunc(s.snapshot().KeyServers, func(k keyServers) bool {
		return k.Provider == ref.Provider && slices.Contains(k.Ended, ref.KeyID)
	})
}

// fetchKEK gets a KEK that is not in memory from its key server, if this host
// may ask it, and keeps it as one that the controller sent.
func (h *Host) fetchKEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	p, err := h.secrets.servers.Lookup(ref.Provider)
	if err != nil {
		return nil, err
	}
	kek, err := p.KEK(ctx, ref)
	if errors.Is(err, standard.ErrNotActive) && h.secrets.ended(ref) {
		kek, err = p.SupersededKEK(ctx, ref) // to open what it wrapped before
	}
	if err != nil {
		return nil, err
	}
	kept, err := kek.Clone()
	if err == nil {
		err = h.secrets.cache.Put(ref, kept)
	}
	if err != nil {
		kek.Close()
		return nil, err
	}
	h.log.LogAttrs(ctx, slog.LevelInfo, "key got from its key server", slog.String("provider", ref.Provider), slog.String("key_id", ref.KeyID))
	h.notify()
	return kek, nil
}

// lack notes that a VM's key is not in memory.
func (h *Host) lack(ref keysafe.Ref) {
	if _, err := h.secrets.servers.Lookup(ref.Provider); err != nil {
		return // the controller has to send it
	}
	select {
	case h.lacking <- ref:
	default: // it is noted again when the VM is looked at next
	}
}

// fetchLacking gets the keys that VMs lack from key servers that this host may
// ask, until ctx ends. A VM that stays locked is looked at with each heartbeat,
// so that what fails is tried again.
func (h *Host) fetchLacking(ctx context.Context) error {
	failing := map[string]bool{} // by provider
	for {
		var ref keysafe.Ref
		select {
		case <-ctx.Done():
			return nil
		case ref = <-h.lacking:
		}
		key, err := h.heldKEK(ctx, ref)
		if errors.Is(err, keyprovider.ErrUnavailable) {
			key, err = h.fetchKEK(ctx, ref)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !failing[ref.Provider] { // said once, not at every attempt
			h.log.LogAttrs(ctx, slog.LevelWarn, "key not got from its key server; it is tried again", slog.String("provider", ref.Provider),
				slog.String("key_id", ref.KeyID), slog.Any("err", err))
		}
		failing[ref.Provider] = err != nil
		if key != nil {
			key.Close()
		}
	}
}
