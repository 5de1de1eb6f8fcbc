package host

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// joinTimeout bounds the whole of a join.
const joinTimeout = 30 * time.Second

// JoinRequest is what a machine needs to become a host.
type JoinRequest struct {
	Controller string // host:port
	Token      string // of `strongroom host join-token`; a secret, used up by the join
	Name       string // the host's name in the inventory
}

// Join makes this machine a host of the token's cluster: it makes a TLS key and
// a parcel key, has the controller certify the first, and stores both in the
// sealed host configuration. A machine that is a host already is refused.
func Join(ctx context.Context, cfg Config, req JoinRequest) error {
	if err := join(ctx, cfg, req); err != nil {
		return errs.Wrap(err, "cannot join the cluster of controller %s", req.Controller)
	}
	return nil
}

func join(ctx context.Context, cfg Config, req JoinRequest) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if joined(cfg) {
		return errs.New(errs.Exists, "this machine is a host already; its sealed configuration is in %s", cfg.DataDir).
			WithHint("strongroom host remove NAME, then move %s away", cfg.DataDir)
	}
	token, err := pki.ParseJoinToken(strings.TrimSpace(req.Token))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return err
	}
	tlsKey, csr, err := newTLSKey()
	if err != nil {
		return err
	}
	defer tlsKey.Close()
	recipient, err := parcel.NewRecipient()
	if err != nil {
		return err
	}
	defer recipient.Close()

	var peer tls.ConnectionState
	config := pki.JoinConfig(token.CA, pki.Controller)
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		peer = cs
		return verify(cs)
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	enroll := strongroomv1connect.NewEnrollServiceClient(&http.Client{Transport: transport}, "https://"+req.Controller)
	res, err := enroll.Join(ctx, connect.NewRequest(&strongroomv1.JoinRequest{
		Token: token.String(), Name: req.Name, Address: cfg.Advertise, Csr: csr, ParcelPublicKey: recipient.PublicKey(),
		Version: Version, Capabilities: capabilities(),
	}))
	if err != nil {
		return apierr.From(err)
	}
	ca, err := x509.ParseCertificate(res.Msg.GetCaCertificate())
	if err != nil {
		return err
	}
	if pki.FingerprintOf(ca) != token.CA {
		return errs.New(errs.Denied, "the controller's CA is not the one that the token names")
	}
	controller, err := pki.IdentityOf(peer.PeerCertificates[0])
	if err != nil {
		return err
	}
	if controller.Role != pki.Controller {
		return errs.New(errs.Denied, "%s is no controller, but %s", req.Controller, controller)
	}
	id := identity{
		HostID: res.Msg.GetHostId(), Name: req.Name, ClusterID: res.Msg.GetClusterId(), Cluster: res.Msg.GetCluster(),
		Controller: req.Controller, ControllerIdentity: controller.String(),
		Certificate: res.Msg.GetCertificate(), CA: res.Msg.GetCaCertificate(),
	}
	return createVault(cfg, id, tlsKey, recipient)
}

// newTLSKey returns a private key (PKCS #8) and a request to certify it.
func newTLSKey() (*keymem.Key, []byte, error) {
	private, err := pki.NewKey()
	if err != nil {
		return nil, nil, err
	}
	csr, err := pki.NewCSR(private)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	key, err := keymem.Take(der)
	return key, csr, err
}

// credential returns the host's certificate with its key, for mutual TLS.
func (s *secrets) credential() (*pki.Credential, error) {
	key, err := s.vault.Get(secretTLSKey)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	return newCredential(s.identity.Certificate, key, s.ca)
}

func newCredential(der []byte, key *keymem.Key, ca *x509.Certificate) (*pki.Credential, error) {
	cert, private, err := parsePair(der, key)
	if err != nil {
		return nil, err
	}
	return pki.NewCredential(cert, private, ca)
}

// renewCertificate replaces the host's certificate when it is due: the new one
// is stored before it is used.
func (h *Host) renewCertificate(ctx context.Context) error {
	if time.Now().Before(pki.RenewalDue(h.credential.Leaf())) {
		return nil
	}
	key, csr, err := newTLSKey()
	if err != nil {
		return err
	}
	defer key.Close()
	res, err := h.enroll.RenewCertificate(ctx, connect.NewRequest(&strongroomv1.RenewCertificateRequest{Csr: csr}))
	if err != nil {
		return fmt.Errorf("cannot renew certificate: %w", apierr.From(err))
	}
	cert, private, err := parsePair(res.Msg.GetCertificate(), key)
	if err != nil {
		return err
	}
	if _, err := pki.NewCredential(cert, private, h.secrets.ca); err != nil {
		return err // before the old one is given up
	}
	next := h.secrets.identity
	next.Certificate = res.Msg.GetCertificate()
	text, err := plain(next)
	if err != nil {
		return err
	}
	defer text.Close()
	if err := h.secrets.vault.Update(map[string]*keymem.Key{secretIdentity: text, secretTLSKey: key}); err != nil {
		return err
	}
	return h.credential.Replace(cert, private, h.secrets.ca)
}

// capabilities says what this host can do, by vSphere's names.
func capabilities() map[string]bool {
	return map[string]bool{
		"cryptoSupported": true, "encryptionWithSnapshotsSupported": false, "encryptionHotOperationSupported": false,
		"encryptionFaultToleranceSupported": false, "encryptionMemorySaveSupported": false, "encryptedVMotionSupported": false,
		"hostConfigEncryptionSupported": true, "tpmSupported": false,
	}
}

var errNoKey = errors.New("the host's TLS key is of an unknown kind")
