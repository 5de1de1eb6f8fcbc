package controller

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
)

// lookAgainAfter is how soon a key server that cannot be used is looked at again: an
// outage should end for us when it ends.
const lookAgainAfter = 10 * time.Second

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
		pin, err := kmipclient.ParseFingerprint(s.Fingerprint)
		if err != nil {
			return err
		}
		config.Servers, config.Pins = append(config.Servers, s.Address), append(config.Pins, pin)
	}
	switch {
	case p.Standard.ClientMethod == inventory.ClientOfCA:
		config.Certificate = c.credential.Certificate
	case len(p.Standard.Client) > 0:
		key, err := keyOf(p.Standard.Client, secrets)
		if err != nil {
			return err
		}
		pair, err := standard.Pair(p.Standard.Client, key)
		if err != nil {
			return err
		}
		config.Certificate = func() *tls.Certificate { return &pair }
	}
	provider, err := standard.New(config)
	if err != nil {
		return err
	}
	c.servers.Put(p.Name, provider)
	return nil
}

// keyOf finds the key of a certificate, which stays that of secrets: a change
// that was interrupted may have left the new certificate with its key still among
// the requested ones.
func keyOf(chain [][]byte, secrets standard.Credentials) (*keymem.Key, error) {
	for _, key := range []*keymem.Key{secrets.ClientKey, secrets.Requested} {
		if key == nil {
			continue
		}
		if _, err := standard.Pair(chain, key); err == nil {
			return key, nil
		}
	}
	return nil, errs.New(errs.Corrupt, "the private key of the client certificate is missing").WithHint("strongroom provider set-client NAME --method self-signed")
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
	p, err := c.servers.Lookup(name)
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
		return "it does not know the client certificate, or does not accept the user name and password"
	case kmipclient.NotKMIP:
		return "what it answers is not KMIP; is the port right?"
	}
	return string(f.Problem)
}
