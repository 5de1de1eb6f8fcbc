// Package standard is the standard key provider: KEKs that a key management
// server (KMS) makes and keeps, asked over KMIP 1.1 or newer.
//
// Formats: docs/spec/standard-provider.md (names and labels of keys at the KMS,
// the sealed credentials).
//
// Invariants: nothing is kept here but the connection: every KEK handed out came
// from the KMS for this call. A key is made under a Name that comes from the
// caller's object id, so an interrupted call never leaves a key that cannot be
// found again. Every call ends within the deadlines of [Config.Timeout].
//
// A [Provider] is safe for concurrent use.
package standard

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/kmip/kmipclient"
)

// DefaultTimeout is the deadline of connecting, of the TLS handshake, and of
// each request.
const DefaultTimeout = 5 * time.Second

// ErrNotActive is reported with [keyprovider.ErrLocked] for a key that the KMS
// has revoked or not activated: it is there, and must not be used.
var ErrNotActive = fmt.Errorf("%w: it is not active at the key server", keyprovider.ErrLocked)

// Reasons why a key server gives no key, with vSphere's names.
const (
	ReasonUnreachable  = "KeyStateClusterUnreachable"
	ReasonMissing      = "KeyStateMissingInKMS"
	ReasonNotActive    = "KeyStateNotActiveOrEnabled"
	ReasonNotPermitted = "NoPermissionToAccessKeyProvider"
)

// Explain returns vSphere's name for why a provider gives no key, and what to do
// about it; ok is false for an error that says nothing of the key or the KMS.
func Explain(provider string, err error) (reason, hint string, ok bool) {
	switch {
	case errors.Is(err, ErrNotActive):
		return ReasonNotActive, "activate the key at the key server, or restore the VM from a backup", true
	case errors.Is(err, keyprovider.ErrLocked):
		return ReasonNotPermitted, "let the controller's account at the key server use the key", true
	case errors.Is(err, keyprovider.ErrNotFound):
		return ReasonMissing, "restore the key at the key server from its backup", true
	case errors.Is(err, keyprovider.ErrUnavailable):
		return ReasonUnreachable, "strongroom provider check " + provider, true
	}
	return "", "", false
}

// Config is the way to a KMS and the credentials for it.
type Config struct {
	Name string // of the provider
	// Installation is written to the keys that are made, to know them again; empty
	// for one that makes none.
	Installation string
	Servers      []string // "host:port" in order of preference; all have the same keys
	// Pins are the certificates of the servers that were confirmed. If there are
	// none, Authorities must be set.
	Pins        []kmipclient.Fingerprint
	Authorities *x509.CertPool
	// Certificate returns ours, with its key, at each handshake; nil if there is
	// none.
	Certificate func() *tls.Certificate
	User        string        // empty: no user name and password
	Password    *keymem.Key   // cloned; may be nil
	Proxy       string        // "host:port"; empty for none
	LegacySuite bool          // as in kmipclient.Config
	Timeout     time.Duration // 0: [DefaultTimeout]
	Retry       time.Duration // how long a server that failed is passed over; 0: kmipclient's default
}

// Provider is a standard provider. Make it with [New] and close it.
type Provider struct {
	name         string
	installation string
	servers      []string
	client       *kmipclient.Client
	single       []*kmipclient.Client // one for each server

	life context.Context // ends at Close, and calls with it
	end  context.CancelFunc

	mu     sync.RWMutex // read-locked by each call, so that Close waits for it
	closed bool
}

var _ keyprovider.Provider = (*Provider)(nil)

// New returns a provider. It does not connect yet.
func New(c Config) (_ *Provider, err error) {
	if err := keysafe.ValidateProvider(c.Name); err != nil {
		return nil, fmt.Errorf("cannot make a standard key provider: %w", err)
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	config := kmipclient.Pinned(c.Pins...)
	if len(c.Pins) == 0 && c.Authorities != nil {
		config = &tls.Config{RootCAs: c.Authorities}
	}
	if c.Certificate != nil {
		// Sent whatever authorities the server names: it may not name any.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.Certificate(), nil }
	}
	p := &Provider{name: c.Name, installation: c.Installation, servers: c.Servers}
	p.life, p.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	of := func(servers ...string) (*kmipclient.Client, error) {
		return kmipclient.New(kmipclient.Config{
			Provider: c.Name, Servers: servers, TLS: config, LegacySuite: c.LegacySuite, User: c.User, Password: c.Password, Proxy: c.Proxy,
			Connect: c.Timeout, Handshake: c.Timeout, Request: c.Timeout, Retry: c.Retry,
		})
	}
	if p.client, err = of(c.Servers...); err != nil {
		return nil, err
	}
	for _, addr := range c.Servers {
		one, err := of(addr)
		if err != nil {
			return nil, err
		}
		p.single = append(p.single, one)
	}
	return p, nil
}

// Name implements [keyprovider.Provider].
func (p *Provider) Name() string { return p.name }

// Kind implements [keyprovider.Provider].
func (p *Provider) Kind() keyprovider.Kind { return keyprovider.KindStandard }

// Close implements [keyprovider.Provider]: calls under way end early.
func (p *Provider) Close() error {
	p.end()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, client := range append(p.single, p.client) {
		if client != nil {
			client.Close()
		}
	}
	return nil
}

// begin starts a call: its context ends with the provider's. done must be
// called.
func (p *Provider) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	p.mu.RLock()
	if p.closed {
		p.mu.RUnlock()
		return nil, nil, keyprovider.ErrClosed
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.life, cancel)
	return ctx, func() { stop(); cancel(); p.mu.RUnlock() }, nil
}

// nameOf is the Name at the KMS of the key made for an object.
func nameOf(objectID uuid.UUID) string { return NameOf(objectID.String()) }

// NameOf is the Name at the KMS of the key made for the object of that UUID, in
// lower case.
func NameOf(objectID string) string { return "strongroom-" + objectID }

// NewKEK implements [keyprovider.Provider]: it makes the key at the KMS, unless
// one is there that was made for this object, activates it and gets it. The
// reference's key id is the KMS's identifier.
func (p *Provider) NewKEK(ctx context.Context, objectID uuid.UUID) (keysafe.Ref, *keymem.Key, error) {
	ref, kek, err := p.newKEK(ctx, objectID)
	if err != nil {
		return keysafe.Ref{}, nil, fmt.Errorf("cannot make KEK at key provider %s: %w", p.name, err)
	}
	return ref, kek, nil
}

func (p *Provider) newKEK(caller context.Context, objectID uuid.UUID) (keysafe.Ref, *keymem.Key, error) {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return keysafe.Ref{}, nil, err
	}
	defer done()
	found, err := p.client.Find(ctx, nameOf(objectID))
	var id string
	if err == nil && len(found) > 0 {
		id = found[0]
	} else if err == nil {
		id, err = p.client.CreateNamed(ctx, nameOf(objectID))
	}
	if err != nil {
		return keysafe.Ref{}, nil, p.outcome(caller, err)
	}
	ref := keysafe.Ref{Provider: p.name, KeyID: id}
	if err := ref.Validate(); err != nil {
		return keysafe.Ref{}, nil, fmt.Errorf("%w: its key server gave a key an identifier that cannot be stored: %w", keyprovider.ErrUnavailable, err)
	}
	kek, err := p.get(ctx, id, kmip.StateActive, kmip.StatePreActive)
	return ref, kek, p.outcome(caller, err)
}

// KEK implements [keyprovider.Provider].
func (p *Provider) KEK(caller context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	return p.kek(caller, ref, false)
}

// SupersededKEK is [Provider.KEK] of a wrapping key that was replaced: also when
// its use was ended, to open what it wrapped before.
func (p *Provider) SupersededKEK(caller context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	return p.kek(caller, ref, true)
}

func (p *Provider) kek(caller context.Context, ref keysafe.Ref, ended bool) (*keymem.Key, error) {
	if ref.Provider != p.name {
		return nil, fmt.Errorf("cannot get KEK %s from key provider %s: %w", ref, p.name, keyprovider.ErrWrongProvider)
	}
	ctx, done, err := p.begin(caller)
	if err != nil {
		return nil, fmt.Errorf("cannot get KEK %s: %w", ref, err)
	}
	defer done()
	usable := []kmip.State{kmip.StateActive}
	if ended {
		usable = append(usable, kmip.StateDeactivated)
	}
	kek, err := p.get(ctx, ref.KeyID, usable...)
	if err != nil {
		return nil, fmt.Errorf("cannot get KEK %s: %w", ref, p.outcome(caller, err))
	}
	return kek, nil
}

// get returns a key that is in one of those states. One that is Pre-Active is
// activated.
func (p *Provider) get(ctx context.Context, id string, usable ...kmip.State) (*keymem.Key, error) {
	state, err := p.client.State(ctx, id)
	if err != nil {
		return nil, err
	}
	switch {
	case slices.Contains(usable, state):
	case state == kmip.StateDestroyed, state == kmip.StateDestroyedCompromised:
		return nil, keyprovider.ErrNotFound
	default:
		return nil, fmt.Errorf("%w: its state is %s", ErrNotActive, stateName(state))
	}
	if state == kmip.StatePreActive {
		if err := p.client.Activate(ctx, id); err != nil {
			return nil, err
		}
	}
	kek, err := p.client.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	if n := kek.Len(); n != keyprovider.KEKSize {
		kek.Close()
		return nil, fmt.Errorf("%w: it has %d bytes, not %d: it is none of ours", keyprovider.ErrNotFound, n, keyprovider.KEKSize)
	}
	return kek, nil
}

func stateName(s kmip.State) string {
	names := map[kmip.State]string{kmip.StatePreActive: "Pre-Active", kmip.StateDeactivated: "Deactivated", kmip.StateCompromised: "Compromised"}
	if name, ok := names[s]; ok {
		return name
	}
	return fmt.Sprintf("%#x", uint32(s))
}

// outcome gives an error of the client the meaning that the contract of
// keyprovider.Provider has for it.
func (p *Provider) outcome(caller context.Context, err error) error {
	var lost *kmipclient.UnknownOutcome
	switch {
	case err == nil, errors.Is(err, keyprovider.ErrLocked), errors.Is(err, keyprovider.ErrNotFound):
		return err
	case caller.Err() != nil:
		return errors.Join(caller.Err(), err)
	case p.life.Err() != nil:
		return keyprovider.ErrClosed
	case errors.As(err, &lost):
		return fmt.Errorf("%w: %w", keyprovider.ErrUnavailable, err)
	}
	var refused *kmipclient.KMIPError
	if errors.As(err, &refused) && refused.Reason == kmip.ResultReasonPermissionDenied {
		return fmt.Errorf("%w: %w", keyprovider.ErrLocked, err)
	}
	if errs.KindOf(err) == errs.NotFound {
		return fmt.Errorf("%w: %w", keyprovider.ErrNotFound, err)
	}
	return fmt.Errorf("%w: %w", keyprovider.ErrUnavailable, err)
}

// Discard destroys the key that [Provider.NewKEK] made, or may have made, for an
// object. The caller must know that nothing uses it. One that is not there, or
// is destroyed already, is no error.
func (p *Provider) Discard(caller context.Context, objectID uuid.UUID) error {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return err
	}
	defer done()
	found, err := p.client.Find(ctx, nameOf(objectID))
	if err != nil {
		return p.outcome(caller, err)
	}
	for _, id := range found {
		err := p.deactivate(ctx, id, kmip.RevocationReasonCodeCessationOfOperation)
		if err == nil {
			err = p.client.Destroy(ctx, id)
		}
		if err != nil && errs.KindOf(err) != errs.NotFound {
			return fmt.Errorf("cannot destroy key %s at key provider %s: %w", id, p.name, p.outcome(caller, err))
		}
	}
	return nil
}
