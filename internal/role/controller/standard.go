package controller

import (
	"cmp"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
)

// clientName is how key servers know the controller. Some make it the owner of
// the keys, so it is the same after a renewal and on another controller.
const clientName = "strongroom"

const (
	timeoutMax = 60 // seconds
	userMax    = 256
)

func (c providers) InspectKeyServers(ctx context.Context, req *connect.Request[strongroomv1.InspectKeyServersRequest]) (*connect.Response[strongroomv1.InspectKeyServersResponse], error) {
	s := inventory.Standard{Proxy: req.Msg.GetProxy(), TimeoutSeconds: req.Msg.GetTimeoutSeconds()}
	for _, address := range req.Msg.GetServers() {
		s.Servers = append(s.Servers, inventory.KeyServer{Address: address})
	}
	if err := checkStandard(&s); err != nil {
		return nil, err
	}
	addresses := make([]string, len(s.Servers))
	for i, server := range s.Servers {
		addresses[i] = server.Address
	}
	// Nobody is trusted, so no more than a greeting is exchanged.
	p, err := standard.New(standard.Config{Name: "inspect", Servers: addresses, Proxy: s.Proxy, Timeout: time.Duration(s.TimeoutSeconds) * time.Second})
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	defer p.Close()
	found, err := p.Status(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.InspectKeyServersResponse{}
	for _, server := range withStatus(s, found).Servers {
		if server.Certificate != nil && server.Problem == string(kmipclient.ServerUntrusted) {
			server.Problem, server.Message = "", ""
		}
		res.Servers = append(res.Servers, keyServerToAPI(server))
	}
	return connect.NewResponse(res), nil
}

// checkStandard checks addresses and limits, and fills in the timeout.
func checkStandard(s *inventory.Standard) error {
	if n := len(s.Servers); n < 1 || n > inventory.KeyServersMax {
		return errs.New(errs.Invalid, "%d key servers are not 1 to %d", n, inventory.KeyServersMax)
	}
	seen := map[string]bool{}
	for _, server := range s.Servers {
		if err := checkAddress("key server", server.Address); err != nil {
			return err
		}
		if seen[server.Address] {
			return errs.New(errs.Invalid, "key server %s is there twice", server.Address)
		}
		seen[server.Address] = true
	}
	if s.Proxy != "" {
		if err := checkAddress("proxy", s.Proxy); err != nil {
			return err
		}
	}
	if s.TimeoutSeconds == 0 {
		s.TimeoutSeconds = uint32(standard.DefaultTimeout / time.Second)
	}
	if s.TimeoutSeconds > timeoutMax {
		return errs.New(errs.Invalid, "a timeout of %d s is not 1 to %d s", s.TimeoutSeconds, timeoutMax)
	}
	if len(s.User) > userMax || slices.ContainsFunc([]byte(s.User), func(b byte) bool { return b < ' ' || b == 0x7f }) {
		return errs.New(errs.Invalid, "the user name has over %d bytes or holds control characters", userMax)
	}
	return nil
}

func checkAddress(what, address string) error {
	host, port, err := net.SplitHostPort(address)
	n, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || n == 0 || host == "" || len(address) > factMax {
		return errs.New(errs.Invalid, "%s %.128q is not HOST:PORT", what, address).WithHint("KMIP's usual port is 5696")
	}
	return nil
}

func (c providers) AddStandardProvider(ctx context.Context, req *connect.Request[strongroomv1.AddStandardProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	settings := req.Msg.GetSettings()
	defer wipeSettings(settings)
	name := req.Msg.GetName()
	if settings == nil {
		return nil, errs.New(errs.Invalid, "key provider %s needs settings", name)
	}
	if settings.GetClientMethod() == "" {
		settings.ClientMethod = inventory.ClientSelfSigned
	}
	p, err := c.addStandard(ctx, name, settings)
	if err != nil {
		return nil, errs.Wrap(err, "cannot add key provider %s", name)
	}
	c.post(ctx, event.New{Type: event.ProviderCreated, Target: "provider/" + name, Args: map[string]string{"key_id": "none"}})
	if err := c.events.Evaluate(ctx, c.inv); err != nil {
		return nil, err
	}
	ring(c.look)
	c.poke()
	return connect.NewResponse(providerToAPI(p, false)), nil
}

func wipeSettings(s *strongroomv1.StandardSettings) {
	keymem.Wipe(s.GetPassword())
	keymem.Wipe(s.GetClientKey())
}

// addStandard stores the secrets before the inventory names the provider: those
// that nobody names, which an interrupted call leaves, do no harm.
func (c *Controller) addStandard(ctx context.Context, name string, settings *strongroomv1.StandardSettings) (inventory.Provider, error) {
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	if _, err := c.inv.Provider(ctx, name); err == nil {
		return inventory.Provider{}, errs.New(errs.Exists, "there is a provider %s already", name).WithHint("strongroom provider show %s", name)
	}
	if err := inventory.CheckName("key provider", name); err != nil {
		return inventory.Provider{}, err
	}
	if err := c.keys.setCredentials(name, nil); err != nil { // what an interrupted call left
		return inventory.Provider{}, err
	}
	var s inventory.Standard
	if err := checkKeys(nil, settings); err != nil {
		return inventory.Provider{}, err
	}
	if err := applyPlain(name, &s, settings); err != nil {
		return inventory.Provider{}, err
	}
	if err := c.applySecrets(name, &s, settings); err != nil {
		return inventory.Provider{}, err
	}
	if err := c.applyKeys(&s, settings); err != nil {
		return inventory.Provider{}, err
	}
	p, err := c.inv.CreateProvider(ctx, inventory.Provider{Name: name, Type: inventory.StandardType, Standard: &s})
	if errs.KindOf(err) == errs.Exists { // refused; after another error it may be there
		err = errors.Join(err, c.keys.setCredentials(name, nil))
	}
	if err != nil {
		return p, err
	}
	return p, c.finishSettings(name, p)
}

func (c providers) UpdateStandardProvider(ctx context.Context, req *connect.Request[strongroomv1.UpdateStandardProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	defer wipeSettings(req.Msg.GetSettings())
	name := req.Msg.GetName()
	if err := c.updateSettings(ctx, name, req.Msg.GetSettings(), req.Msg.GetAllowCircular()); err != nil {
		return nil, errs.Wrap(err, "cannot change key provider %s", name)
	}
	c.post(ctx, event.New{Type: event.ProviderUpdated, Target: "provider/" + name})
	c.poke() // hosts with direct access have to know
	c.lookAt(ctx, name)
	return c.GetProvider(ctx, connect.NewRequest(&strongroomv1.GetProviderRequest{Name: name}))
}

func (c *Controller) updateSettings(ctx context.Context, name string, settings *strongroomv1.StandardSettings, allowCircular bool) error {
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	p, err := c.inv.Provider(ctx, name)
	if err != nil {
		return err
	}
	if p.Standard == nil {
		return errs.New(errs.InvalidState, "it is a %s provider: only standard ones have key servers", p.Type)
	}
	s := *p.Standard
	if err := checkKeys(s.Wrapping, settings); err != nil {
		return err
	}
	if err := applyPlain(name, &s, settings); err != nil {
		return err
	}
	if err := c.refuseNewCircle(ctx, name, s, allowCircular); err != nil {
		return err
	}
	if err := c.applySecrets(name, &s, settings); err != nil {
		return err
	}
	if p, err = c.updateStandard(ctx, name, func(old *inventory.Standard) error {
		settle(old, s, settings)
		return c.applyKeys(old, settings)
	}); err != nil {
		return err
	}
	ring(c.due)
	ring(c.stray)
	return c.finishSettings(name, p)
}

// settle makes s, a record as it is now, what settings made of an earlier one:
// next. What was found out of servers and done with keys meanwhile stays.
func settle(s *inventory.Standard, next inventory.Standard, settings *strongroomv1.StandardSettings) {
	next.Wrapping, next.Established = s.Wrapping, s.Established
	if len(settings.GetServers()) == 0 {
		next.Servers = s.Servers
	}
	if len(settings.GetServers()) > 0 || settings.GetUser() != "" || len(settings.GetPassword()) > 0 || settings.GetClientMethod() != "" {
		next.Established = time.Time{} // what was seen was seen with others
	}
	*s = next
}

// applyPlain changes s as settings say, as far as that is no secret, and refuses what
// is not right.
func applyPlain(name string, s *inventory.Standard, settings *strongroomv1.StandardSettings) error {
	if len(settings.GetServers()) > 0 {
		s.Servers = nil
		for _, server := range settings.GetServers() {
			pin, err := kmipclient.ParseFingerprint(server.GetFingerprint())
			if err != nil {
				return errs.Wrap(err, "key server %.128s", server.GetAddress())
			}
			s.Servers = append(s.Servers, inventory.KeyServer{Address: server.GetAddress(), Fingerprint: pin.String()})
		}
	}
	if settings.GetProxy() != "" {
		s.Proxy = settings.GetProxy()
	}
	if s.Proxy == "none" {
		s.Proxy = ""
	}
	if settings.GetTimeoutSeconds() != 0 {
		s.TimeoutSeconds = settings.GetTimeoutSeconds()
	}
	if newUser(settings) {
		s.User = settings.GetUser()
		if s.User == "" || len(settings.GetPassword()) > standard.PasswordMax {
			return errs.New(errs.Invalid, "the credential needs a user name, and a password of at most %d bytes", standard.PasswordMax)
		}
	}
	if settings.GetHostAccess() != "" {
		s.HostAccess = settings.GetHostAccess()
	}
	if err := checkStandard(s); err != nil {
		return err
	}
	return checkHostAccess(s.HostAccess, cmp.Or(settings.GetClientMethod(), s.ClientMethod), name)
}

// newUser reports whether settings have a user name or a password.
func newUser(settings *strongroomv1.StandardSettings) bool {
	return settings.GetUser() != "" || len(settings.GetPassword()) > 0
}

// applySecrets stores the new secrets of settings beside those in use: a private key
// takes its place when the record, s, has its certificate.
func (c *Controller) applySecrets(name string, s *inventory.Standard, settings *strongroomv1.StandardSettings) error {
	return c.keys.setCredentials(name, func(secrets *standard.Credentials) error {
		if newUser(settings) {
			secrets.Password.Close()
			secrets.Password = nil
			if len(settings.GetPassword()) > 0 {
				var err error
				if secrets.Password, err = keymem.Take(settings.GetPassword()); err != nil {
					return err
				}
			}
		}
		return applyClient(s, secrets, settings)
	})
}

// applyClient changes how the key server knows us.
func applyClient(s *inventory.Standard, secrets *standard.Credentials, settings *strongroomv1.StandardSettings) error {
	method := settings.GetClientMethod()
	if method == "" {
		return nil
	}
	if method == inventory.ClientRequested && len(settings.GetClientCertificate()) > 0 {
		if secrets.Requested == nil {
			return errs.New(errs.InvalidState, "no certificate was requested").WithHint("make the request first: strongroom provider set-client NAME --method csr")
		}
		return useCertificate(s, secrets.Requested, method, settings.GetClientCertificate())
	}
	fresh, err := newClientKey(method, settings)
	if err != nil {
		return err
	}
	secrets.Requested.Close()
	secrets.Requested = fresh
	switch method {
	case inventory.ClientOfCA:
		s.ClientMethod, s.Client, s.Certificate, s.Request = method, nil, nil, nil
		return nil
	case inventory.ClientSelfSigned:
		der, err := standard.SelfSigned(clientName, fresh, time.Now())
		if err != nil {
			return err
		}
		return useCertificate(s, fresh, method, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	case inventory.ClientUploaded:
		return useCertificate(s, fresh, method, settings.GetClientCertificate())
	}
	// The certificate in use, if there is one, stays until the new one has come.
	s.ClientMethod = method
	s.Request, err = standard.Request(clientName, fresh)
	return err
}

// newClientKey returns the private key of a method, or nil if it has none here.
func newClientKey(method string, settings *strongroomv1.StandardSettings) (*keymem.Key, error) {
	switch method {
	case inventory.ClientOfCA:
		return nil, nil
	case inventory.ClientSelfSigned, inventory.ClientRequested:
		return standard.NewClientKey()
	case inventory.ClientUploaded:
		return standard.ParseKey(settings.GetClientKey())
	}
	return nil, errs.New(errs.Invalid, "%.32q is no way of being known to a key server", method).
		WithHint("it is one of self-signed, controller-ca, csr and upload")
}

// useCertificate makes a chain (PEM) with its key the ones in use.
func useCertificate(s *inventory.Standard, key *keymem.Key, method string, text []byte) error {
	chain, err := standard.ParseChain(text)
	if err != nil {
		return err
	}
	pair, err := standard.Pair(chain, key)
	if err != nil {
		return err
	}
	s.ClientMethod, s.Client, s.Request = method, chain, nil
	s.Certificate = &inventory.Certificate{
		Fingerprint: kmipclient.FingerprintOf(pair.Leaf).String(), Subject: pair.Leaf.Subject.String(), Issuer: pair.Leaf.Issuer.String(),
		NotBefore: pair.Leaf.NotBefore.UTC(), NotAfter: pair.Leaf.NotAfter.UTC(),
	}
	return nil
}

// finishSettings puts the private key of the record's certificate in its place
// and connects anew.
func (c *Controller) finishSettings(name string, p inventory.Provider) error {
	if err := c.keys.setCredentials(name, func(secrets *standard.Credentials) error {
		if secrets.Requested == nil || len(p.Standard.Client) == 0 {
			return nil
		}
		if _, err := standard.Pair(p.Standard.Client, secrets.Requested); err == nil {
			secrets.ClientKey.Close()
			secrets.ClientKey, secrets.Requested = secrets.Requested, nil
		}
		return nil
	}); err != nil {
		return err
	}
	return c.openKeyServer(p)
}

func (c providers) GetClientIdentity(ctx context.Context, req *connect.Request[strongroomv1.GetClientIdentityRequest]) (*connect.Response[strongroomv1.ClientIdentity], error) {
	p, err := c.inv.Provider(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	if p.Standard == nil {
		return nil, errs.New(errs.InvalidState, "key provider %s is a %s one: it has no key server", p.Name, p.Type)
	}
	out := &strongroomv1.ClientIdentity{Method: p.Standard.ClientMethod}
	for _, der := range p.Standard.Client {
		out.Certificate = append(out.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	if len(p.Standard.Request) > 0 {
		out.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: p.Standard.Request})
	}
	if p.Standard.ClientMethod == inventory.ClientOfCA {
		out.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.credential.Leaf().Raw})
		out.Authority = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.ca.Certificate().Raw})
	}
	return connect.NewResponse(out), nil
}

func (c providers) CheckProvider(ctx context.Context, req *connect.Request[strongroomv1.CheckProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	name := req.Msg.GetName()
	p, err := c.inv.Provider(ctx, name)
	if err != nil {
		return nil, err
	}
	if p.Standard != nil {
		if err := c.establish(ctx, name); err != nil {
			return nil, errs.Wrap(err, "key provider %s", name)
		}
	} else if err := c.remediateOnce(ctx); err != nil {
		return nil, err
	}
	return c.GetProvider(ctx, connect.NewRequest(&strongroomv1.GetProviderRequest{Name: name}))
}

// establish looks at a provider's servers and has one make, give and destroy a
// key.
func (c *Controller) establish(ctx context.Context, name string) error {
	c.lookAt(ctx, name)
	p, err := c.inv.Provider(ctx, name)
	if err != nil {
		return err
	}
	usable := slices.ContainsFunc(p.Standard.Servers, func(s inventory.KeyServer) bool { return s.Checked && s.Problem == "" })
	if !usable {
		first := p.Standard.Servers[0]
		return errs.New(errs.Unavailable, "key server %s: %s", first.Address, first.Message).WithReason(first.Problem).
			WithHint("%s", problemHint(first.Problem, name))
	}
	open, err := c.servers.Lookup(name)
	if err != nil {
		return err
	}
	switch err := open.Probe(ctx); {
	case errors.Is(err, standard.ErrProbe):
		return errs.New(errs.InvalidState, "%w", err).WithReason("ProbeFailed").WithHint("see that address, user and certificate belong to the account and region that have the keys")
	case err != nil:
		return keyError("make a key", name, "", err)
	}
	_, err = c.updateStandard(ctx, name, func(s *inventory.Standard) error {
		s.Established = time.Now().UTC()
		return nil
	})
	ring(c.due)
	c.poke()
	return err
}

// problemHint is the next command after a problem.
func problemHint(problem, provider string) string {
	switch kmipclient.Problem(problem) {
	case kmipclient.ServerUntrusted, kmipclient.ServerCertExpired:
		return fmt.Sprintf("if its certificate was renewed: strongroom provider trust %s", provider)
	case kmipclient.ClientRefused:
		return fmt.Sprintf("give it the certificate that this writes: strongroom provider client-cert %s --out FILE", provider)
	case kmipclient.WrongCredentials:
		return fmt.Sprintf("give it the certificate that \"strongroom provider client-cert %s --out FILE\" writes, or: strongroom provider update %s --user NAME --password-file FILE", provider, provider)
	case kmipclient.AddressUnknown, kmipclient.Unreachable, kmipclient.NotTLS, kmipclient.NotKMIP:
		return fmt.Sprintf("to change the address: strongroom provider trust %s --server HOST:PORT", provider)
	}
	return "strongroom provider show " + provider
}
