package controller

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
)

// lookAgainAfter is how soon a key server that cannot be used is looked at again: an
// outage should end for us when it ends.
const lookAgainAfter = 10 * time.Second

// keyServers are the connections to the key servers of the standard providers.
// It is safe for concurrent use.
type keyServers struct {
	mu     sync.Mutex
	open   map[string]*standard.Provider // by name
	closed bool
}

func newKeyServers() *keyServers { return &keyServers{open: map[string]*standard.Provider{}} }

// get returns the provider of that name, which may be closed at any time.
func (k *keyServers) get(name string) (*standard.Provider, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.open[name]
	if !ok {
		return nil, fmt.Errorf("%w: %s", keyprovider.ErrUnknownProvider, name)
	}
	return p, nil
}

// any reports whether there is a standard provider.
func (k *keyServers) any() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.open) > 0
}

// put takes p over; another of that name is closed. A nil p leaves none.
func (k *keyServers) put(name string, p *standard.Provider) {
	k.mu.Lock()
	old := k.open[name]
	delete(k.open, name)
	if p != nil && !k.closed {
		k.open[name], p = p, nil
	}
	k.mu.Unlock()
	for _, p := range []*standard.Provider{old, p} {
		if p != nil {
			p.Close()
		}
	}
}

func (k *keyServers) close() {
	k.mu.Lock()
	k.closed = true
	names := slices.Collect(maps.Keys(k.open))
	k.mu.Unlock()
	for _, name := range names {
		k.put(name, nil)
	}
}

// openKeyServers makes ready what the inventory has. A provider whose secrets
// cannot be read stays, and its status says so: it can be changed or removed.
func (c *Controller) openKeyServers(ctx context.Context) error {
	all, err := c.inv.Providers(ctx)
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.Standard == nil {
			continue
		}
		if err := c.openKeyServer(p); err != nil {
			c.log.LogAttrs(ctx, slog.LevelError, "key provider not ready", slog.String("provider", p.Name), slog.Any("err", err))
		}
	}
	return nil
}

// openKeyServer makes the connection of a provider by its record and secrets.
func (c *Controller) openKeyServer(p inventory.Provider) error {
	secrets, err := c.keys.credentials(p.Name)
	if err != nil {
		return err
	}
	defer secrets.Close()
	config := standard.Config{
		Name: p.Name, Installation: c.identity().Cluster, User: p.Standard.User, Password: secrets.Password, Proxy: p.Standard.Proxy,
		Timeout: time.Duration(p.Standard.TimeoutSeconds) * time.Second,
	}
	for _, s := range p.Standard.Servers {
		pin, err := parseFingerprint(s.Fingerprint)
		if err != nil {
			return err
		}
		config.Servers, config.Pins = append(config.Servers, s.Address), append(config.Pins, pin)
	}
	switch {
	case p.Standard.ClientMethod == inventory.ClientOfCA:
		config.Certificate = c.credential.Certificate
	case len(p.Standard.Client) > 0:
		pair, err := pairOf(p.Standard.Client, secrets)
		if err != nil {
			return err
		}
		config.Certificate = func() *tls.Certificate { return &pair }
	}
	provider, err := standard.New(config)
	if err != nil {
		return err
	}
	c.servers.put(p.Name, provider)
	return nil
}

// pairOf finds the key of a certificate: a change that was interrupted may have
// left the new certificate with its key still among the requested ones.
func pairOf(chain [][]byte, secrets standard.Credentials) (tls.Certificate, error) {
	err := errs.New(errs.Corrupt, "the private key of the client certificate is missing").WithHint("strongroom provider set-client NAME --method self-signed")
	if secrets.ClientKey != nil {
		if pair, err := standard.Pair(chain, secrets.ClientKey); err == nil {
			return pair, nil
		}
	}
	if secrets.Requested != nil {
		return standard.Pair(chain, secrets.Requested)
	}
	return tls.Certificate{}, err
}

// parseFingerprint is the reverse of kmipclient.Fingerprint.String; it also
// takes capital letters and colons, as other programs print them.
func parseFingerprint(text string) (kmipclient.Fingerprint, error) {
	var f kmipclient.Fingerprint
	digits, ok := strings.CutPrefix(strings.ToLower(text), "sha256:")
	digits = strings.ReplaceAll(digits, ":", "")
	ok = ok && len(digits) == 2*len(f)
	for i := range f {
		if !ok {
			break
		}
		b, err := strconv.ParseUint(digits[2*i:2*i+2], 16, 8)
		f[i], ok = byte(b), err == nil
	}
	if !ok {
		return f, errs.New(errs.Invalid, "%.100q is no fingerprint of a certificate: it is sha256: and 64 hexadecimal digits", text)
	}
	return f, nil
}

// watchKeyServers looks at the key servers from time to time, in the background:
// no call of a user waits for it.
func (c *Controller) watchKeyServers(ctx context.Context) error {
	for {
		wait := time.Duration(c.cfg.KMS.StatusInterval)
		all, err := c.inv.Providers(ctx)
		if err == nil {
			var wg sync.WaitGroup
			for _, p := range all {
				if p.Standard != nil {
					wg.Go(func() { c.lookAt(ctx, p.Name) })
				}
			}
			wg.Wait()
			all, err = c.inv.Providers(ctx)
		}
		if err != nil && ctx.Err() == nil {
			c.log.LogAttrs(ctx, slog.LevelError, "cannot list key servers", slog.Any("err", err))
		}
		for _, p := range all {
			if p.Standard != nil && slices.ContainsFunc(p.Standard.Servers, func(s inventory.KeyServer) bool { return s.Problem != "" }) {
				wait = min(wait, lookAgainAfter)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-c.look:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// lookAt checks the servers of a provider and notes what it found.
func (c *Controller) lookAt(ctx context.Context, name string) {
	p, err := c.servers.get(name)
	var found []kmipclient.Condition
	if err == nil {
		found, err = p.Status(ctx)
	}
	if ctx.Err() != nil || errors.Is(err, keyprovider.ErrClosed) {
		return // the controller ends, or the provider was changed meanwhile
	}
	if err := c.noteStatus(ctx, name, found); err != nil && errs.KindOf(err) != errs.NotFound {
		c.log.LogAttrs(ctx, slog.LevelError, "status of key servers not noted", slog.String("provider", name), slog.Any("err", err))
	}
}

// noteStatus stores what has changed in the status of a provider's servers, and
// tells of it. Without any conditions the provider could not be made ready.
func (c *Controller) noteStatus(ctx context.Context, name string, found []kmipclient.Condition) error {
	before, err := c.inv.Provider(ctx, name)
	if err != nil || before.Standard == nil {
		return err
	}
	next := withStatus(*before.Standard, found)
	if reflect.DeepEqual(next.Servers, before.Standard.Servers) {
		return nil
	}
	for _, f := range found {
		if f.Problem != "" {
			c.log.LogAttrs(ctx, slog.LevelWarn, "key server cannot be used", slog.String("provider", name), slog.String("server", f.Server),
				slog.String("problem", string(f.Problem)), slog.Any("err", f.Err))
		}
	}
	_, err = c.updateStandard(ctx, name, func(s *inventory.Standard) error {
		s.Servers = withStatus(*s, found).Servers
		return nil
	})
	if slices.ContainsFunc(found, func(f kmipclient.Condition) bool { return f.Problem == "" }) {
		c.poke() // hosts may lack keys that can be had now
	}
	return err
}

// updateStandard changes a standard provider's record, and tells of a new state.
func (c *Controller) updateStandard(ctx context.Context, name string, change func(*inventory.Standard) error) (inventory.Provider, error) {
	p, was, err := c.inv.UpdateStandard(ctx, name, change)
	if err != nil {
		return p, err
	}
	if was != p.State {
		c.post(ctx, event.New{Type: event.ProviderStateChanged, Target: "provider/" + name, Args: map[string]string{"from": string(was), "to": string(p.State)}})
	}
	return p, c.events.Evaluate(ctx, c.inv)
}

// withStatus returns s with what was found of its servers.
func withStatus(s inventory.Standard, found []kmipclient.Condition) inventory.Standard {
	s.Servers = slices.Clone(s.Servers)
	for i, server := range s.Servers {
		next := inventory.KeyServer{Address: server.Address, Fingerprint: server.Fingerprint, Certificate: server.Certificate, Checked: true}
		at := slices.IndexFunc(found, func(f kmipclient.Condition) bool { return f.Server == server.Address })
		if at < 0 {
			next.Problem, next.Message = "NotReady", "the controller cannot use what it has of the credentials for it"
		} else {
			next = statusOf(next, found[at])
		}
		s.Servers[i] = next
	}
	return s
}

func statusOf(s inventory.KeyServer, f kmipclient.Condition) inventory.KeyServer {
	s.Connected, s.ClientTrustServer, s.ServerTrustClient = f.Connected, f.ClientTrustServer, f.ServerTrustClient
	s.Problem = string(f.Problem)
	if f.Certificate != nil {
		s.Certificate = &inventory.Certificate{
			Fingerprint: kmipclient.FingerprintOf(f.Certificate).String(), Subject: f.Certificate.Subject.String(), Issuer: f.Certificate.Issuer.String(),
			NotBefore: f.Certificate.NotBefore.UTC(), NotAfter: f.Certificate.NotAfter.UTC(),
		}
	}
	if f.Problem != "" {
		s.Message = problemText(f, s.Certificate)
	}
	return s
}

// problemText says what is wrong, in words that stay the same as long as it is.
func problemText(f kmipclient.Condition, cert *inventory.Certificate) string {
	switch f.Problem {
	case kmipclient.AddressUnknown:
		return "its name cannot be resolved; is the address right?"
	case kmipclient.Unreachable:
		return "no connection: it is down, the address or port is wrong, or a firewall is in the way"
	case kmipclient.ProxyFailed:
		return "the proxy gives no connection to it"
	case kmipclient.NoAnswer:
		return "it accepts connections and does not answer"
	case kmipclient.NotTLS:
		return "it does not speak TLS 1.2 or 1.3 with us; is the port right?"
	case kmipclient.ServerUntrusted:
		return "it shows another certificate than the one that was trusted, " + cert.Fingerprint
	case kmipclient.ServerCertExpired:
		return "its certificate is valid from " + cert.NotBefore.Format(time.DateOnly) + " to " + cert.NotAfter.Format(time.DateOnly) + " only"
	case kmipclient.ClientRefused:
		return "it does not trust the controller's client certificate"
	case kmipclient.WrongCredentials:
		return "it does not accept the user name and password"
	case kmipclient.NotKMIP:
		return "what it answers is not KMIP; is the port right?"
	}
	return string(f.Problem)
}
