package localvolume

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"

	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
)

// TCP says how NBD is served on TCP: by TLS 1.3, to clients whose certificate the
// authority has signed. The files are PEM.
type TCP struct {
	Address   string // "host:port" to listen on; "" for none
	Cert      string // file with the server's certificate
	Key       string // file with its private key, for its owner only
	ClientCAs string // file with the authorities of the clients' certificates
}

// newNBDTLS serves the volume as the default export on TCP.
func newNBDTLS(v *volume.Volume, opts ServeOptions) (front, error) {
	config, err := opts.TCP.config()
	if err != nil {
		return front{}, err
	}
	l, err := net.Listen("tcp", opts.TCP.Address)
	if err != nil {
		return front{}, errs.New(errs.Invalid, "%w", err).WithHint("give an address of this machine and a free port, such as 127.0.0.1:10809")
	}
	return serveNBD(v, opts, l, nbd.Config{TLS: config}, "nbds://"+l.Addr().String())
}

func (t TCP) config() (*tls.Config, error) {
	info, err := os.Stat(t.Key)
	if err != nil {
		return nil, explain(err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, errs.New(errs.Denied, "others than its owner may use the TLS key %s (mode %04o)", t.Key, info.Mode().Perm()).
			WithHint("chmod 600 %s", t.Key)
	}
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, errs.New(errs.Invalid, "cannot use the TLS certificate %s with the key %s: %w", t.Cert, t.Key, err)
	}
	authorities, err := os.ReadFile(t.ClientCAs)
	if err != nil {
		return nil, explain(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authorities) {
		return nil, errs.New(errs.Invalid, "there is no certificate in %s", t.ClientCAs)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}, nil
}
