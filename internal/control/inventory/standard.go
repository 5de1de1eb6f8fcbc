package inventory

import (
	"context"
	"fmt"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// KeyServersMax is how many servers a standard provider may have.
const KeyServersMax = 16

// CertificateWarning is how long before a certificate's end it is warned of, as
// vpxd.kmscert.threshold in vSphere.
const CertificateWarning = 30 * 24 * time.Hour

// The ways in which a key server knows the controller.
const (
	ClientOfCA       = "controller-ca" // by the certificate of the controller's own CA
	ClientSelfSigned = "self-signed"   // by a certificate that it was given
	ClientRequested  = "csr"           // by a certificate that it issued on request
	ClientUploaded   = "upload"        // by a certificate and key that it made
)

// The ways in which hosts get the keys of a standard provider.
const (
	HostsBrokered = "brokered" // from the controller only
	HostsDirect   = "direct"   // a host that lacks one also asks the key servers itself
)

// Standard is what a standard provider has beyond others. Its password and
// private keys are in the controller's vault.
type Standard struct {
	Servers        []KeyServer `json:"servers"` // in order of preference
	User           string      `json:"user,omitempty"`
	Proxy          string      `json:"proxy,omitempty"` // "host:port"
	TimeoutSeconds uint32      `json:"timeout_seconds"`
	// ClientMethod is how the key server knows us: self-signed, controller-ca,
	// csr or upload.
	ClientMethod string   `json:"client_method"`
	Client       [][]byte `json:"client,omitempty"` // our certificate and its chain, DER
	// Certificate describes Client; nil while a request waits for it, and if the
	// controller shows the certificate of its own CA, which it renews itself.
	Certificate *Certificate `json:"certificate,omitempty"`
	Request     []byte       `json:"request,omitempty"` // PKCS #10, DER
	// HostAccess is how hosts get keys; empty: brokered.
	HostAccess string `json:"host_access,omitempty"`
	// Established is when a key was first made, got and destroyed; zero after
	// servers or credentials changed.
	Established time.Time `json:"established,omitzero"`
	// Wrapping is set once one key was to wrap those of all VMs; nil: each VM has
	// had its own ever since.
	Wrapping *Wrapping `json:"wrapping,omitempty"`
}

// KeyServer is a server of a standard provider and how it was found last.
type KeyServer struct {
	Address     string `json:"address"`     // "host:port"
	Fingerprint string `json:"fingerprint"` // of the certificate that was confirmed
	Checked     bool   `json:"checked,omitempty"`
	Problem     string `json:"problem,omitempty"` // a word of package kmipclient; empty if it can be used
	Message     string `json:"message,omitempty"` // the same for people
	// Connected, ClientTrustServer and ServerTrustClient are vSphere's three
	// green checks.
	Connected         bool `json:"connected,omitempty"`
	ClientTrustServer bool `json:"client_trust_server,omitempty"`
	ServerTrustClient bool `json:"server_trust_client,omitempty"`
	// Certificate is what it showed last.
	Certificate *Certificate `json:"certificate,omitempty"`
}

// Certificate is what people want to know of a certificate.
type Certificate struct {
	Fingerprint string    `json:"fingerprint"` // "sha256:" and hex
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
}

// Ending says that a certificate ends within [CertificateWarning], or ended;
// empty if neither.
func (c *Certificate) Ending(now time.Time) string {
	day := func() string { return c.NotAfter.UTC().Format(time.DateOnly) }
	switch {
	case c == nil || now.Before(c.NotAfter.Add(-CertificateWarning)):
		return ""
	case now.Before(c.NotAfter):
		return "ends on " + day()
	}
	return "ended on " + day()
}

// standardState returns what state a standard provider is in, and why it is
// not Active.
func standardState(s *Standard, now time.Time) (ProviderState, []string) {
	var details []string
	usable, checked := 0, 0
	for _, server := range s.Servers {
		switch {
		case !server.Checked:
			continue
		case server.Problem == "":
			usable++
			if ending := server.Certificate.Ending(now); ending != "" {
				details = append(details, fmt.Sprintf("The certificate of key server %s %s.", server.Address, ending))
			}
		default:
			details = append(details, fmt.Sprintf("Key server %s: %s.", server.Address, server.Message))
		}
		checked++
	}
	if s.Certificate == nil && s.ClientMethod != ClientOfCA {
		details = append(details, "It has no client certificate yet.")
	} else if ending := s.Certificate.Ending(now); ending != "" {
		details = append(details, "The controller's client certificate "+ending+".")
	}
	switch {
	case s.Established.IsZero():
		return NotEstablished, append([]string{"It gives no keys until the key server was seen to make, give and destroy one."}, details...)
	case checked > 0 && usable == 0:
		return NotConnected, details
	case len(details) > 0:
		return Warning, details
	}
	return Active, nil
}

// UpdateStandard has f change what a standard provider has; f may run more than
// once. It reports the state that the provider had before.
func (inv *Inventory) UpdateStandard(ctx context.Context, name string, f func(*Standard) error) (p Provider, was ProviderState, err error) {
	err = inv.db.Txn(ctx, func(tx *store.Tx) error {
		if p, err = inv.providers.In(tx).Get(ctx, name); err != nil {
			return missing(err, "provider", name)
		}
		if p.Standard == nil {
			return errs.New(errs.InvalidState, "key provider %s is not a standard one", name)
		}
		next := *p.Standard
		next.Servers, next.Wrapping = slices.Clone(next.Servers), next.Wrapping.clone()
		if err := f(&next); err != nil {
			return err
		}
		p.Standard, was = &next, p.State
		if err := inv.setState(ctx, tx, &p); err != nil {
			return err
		}
		return inv.providers.In(tx).Put(ctx, name, p)
	})
	if err != nil {
		return Provider{}, "", errs.Wrap(err, "cannot update key provider %s", name)
	}
	return p, was, nil
}
