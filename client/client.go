// Package client is the Go client of Strongroom's API: typed service clients
// over HTTP/2 with TLS 1.3 to a controller or a key management server, or over a
// local unix socket to one, or to a host. The CLI and the tests use only this.
//
// Errors are [errs.Error] values with the server's text, kind, reason and hint
// (see package apierr).
//
// A [Client] is safe for concurrent use.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/errs"
)

const (
	// dialTimeout bounds finding and greeting the server; a controller answers
	// within milliseconds, so a longer silence is an outage.
	dialTimeout = 10 * time.Second
	// pingAfter and pingTimeout find a server that vanished while a long
	// answer (WatchTask, WatchEvents) is awaited.
	pingAfter   = 15 * time.Second
	pingTimeout = 15 * time.Second
	// messageMax bounds one answer, in bytes: 40,000 VMs with some disks each.
	messageMax = 256 << 20
)

// Config says which server to speak to, and as whom.
type Config struct {
	// Server is "https://HOST:PORT" or "unix:/PATH".
	Server string
	// CA is the PEM of the certificate authority that the server's certificate
	// must come from. Needed for https; nothing else is trusted.
	CA []byte
	// ServerName replaces HOST of Server when the certificate is checked.
	ServerName string
	// Token is a session or API token; empty where none is needed.
	Token string
}

// Client holds the connections to one server.
type Client struct {
	server    string
	transport *http.Transport
	http      *http.Client
	base      string
	options   []connect.ClientOption
}

// New returns a Client. It does not connect yet.
func New(cfg Config) (*Client, error) {
	c := &Client{server: cfg.Server}
	dialer := &net.Dialer{Timeout: dialTimeout}
	c.transport = &http.Transport{
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: dialTimeout,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		Protocols:           new(http.Protocols),
	}
	if path, ok := strings.CutPrefix(cfg.Server, "unix:"); ok {
		if !strings.HasPrefix(path, "/") {
			return nil, errs.New(errs.Invalid, "server %q: the path of a unix socket must be absolute", cfg.Server)
		}
		c.base = "http://localhost"
		c.transport.Protocols.SetHTTP1(true)
		c.transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
	} else {
		host, err := serverHost(cfg.Server)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(cfg.CA) {
			return nil, errs.New(errs.Denied, "server %s: its certificate authority is not known here", cfg.Server).
				WithHint("strongroom login --server %s --ca FILE", cfg.Server)
		}
		c.base = "https://" + host
		c.transport.Protocols.SetHTTP2(true)
		c.transport.TLSClientConfig = &tls.Config{
			MinVersion: tls.VersionTLS13,
			RootCAs:    roots,
			ServerName: cfg.ServerName,
			VerifyConnection: func(cs tls.ConnectionState) error {
				return errs.Wrap(checkRole(cs.PeerCertificates[0]), "cannot trust %s", cfg.Server)
			},
		}
	}
	c.http = &http.Client{
		Transport: c.transport,
		// A redirect could carry the token elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	c.options = []connect.ClientOption{
		connect.WithReadMaxBytes(messageMax),
		connect.WithInterceptors(&interceptor{server: cfg.Server, token: cfg.Token}),
	}
	return c, nil
}

// serverHost returns HOST:PORT of "https://HOST:PORT".
func serverHost(server string) (string, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return "", errs.New(errs.Invalid, `server %q: want "https://HOST:PORT" or "unix:/PATH"`, server)
	}
	return u.Host, nil
}

// Server returns the server's address, as it was given to [New].
func (c *Client) Server() string { return c.server }

// Close drops idle connections; calls that are running go on.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Session returns the client of SessionService.
func (c *Client) Session() strongroomv1connect.SessionServiceClient {
	return strongroomv1connect.NewSessionServiceClient(c.http, c.base, c.options...)
}

// Access returns the client of AccessService.
func (c *Client) Access() strongroomv1connect.AccessServiceClient {
	return strongroomv1connect.NewAccessServiceClient(c.http, c.base, c.options...)
}

// Cluster returns the client of ClusterService.
func (c *Client) Cluster() strongroomv1connect.ClusterServiceClient {
	return strongroomv1connect.NewClusterServiceClient(c.http, c.base, c.options...)
}

// Host returns the client of HostService.
func (c *Client) Host() strongroomv1connect.HostServiceClient {
	return strongroomv1connect.NewHostServiceClient(c.http, c.base, c.options...)
}

// Datastore returns the client of DatastoreService.
func (c *Client) Datastore() strongroomv1connect.DatastoreServiceClient {
	return strongroomv1connect.NewDatastoreServiceClient(c.http, c.base, c.options...)
}

// Provider returns the client of ProviderService.
func (c *Client) Provider() strongroomv1connect.ProviderServiceClient {
	return strongroomv1connect.NewProviderServiceClient(c.http, c.base, c.options...)
}

// VM returns the client of VMService.
func (c *Client) VM() strongroomv1connect.VMServiceClient {
	return strongroomv1connect.NewVMServiceClient(c.http, c.base, c.options...)
}

// KMS returns the client of a key management server's administration.
func (c *Client) KMS() strongroomv1connect.KMSServiceClient {
	return strongroomv1connect.NewKMSServiceClient(c.http, c.base, c.options...)
}

// KMSApproval returns the client of what a key management server's approvers
// decide on.
func (c *Client) KMSApproval() strongroomv1connect.KMSApprovalServiceClient {
	return strongroomv1connect.NewKMSApprovalServiceClient(c.http, c.base, c.options...)
}

// KMSAudit returns the client of a key management server's audit log.
func (c *Client) KMSAudit() strongroomv1connect.KMSAuditServiceClient {
	return strongroomv1connect.NewKMSAuditServiceClient(c.http, c.base, c.options...)
}

// KMSRoot returns the client of a key management server's root key.
func (c *Client) KMSRoot() strongroomv1connect.KMSRootServiceClient {
	return strongroomv1connect.NewKMSRootServiceClient(c.http, c.base, c.options...)
}

// KMSCluster returns the client of the local administration of a key management
// server's nodes.
func (c *Client) KMSCluster() strongroomv1connect.KMSClusterServiceClient {
	return strongroomv1connect.NewKMSClusterServiceClient(c.http, c.base, c.options...)
}

// KMSBackup returns the client of a key management server's backups.
func (c *Client) KMSBackup() strongroomv1connect.KMSBackupServiceClient {
	return strongroomv1connect.NewKMSBackupServiceClient(c.http, c.base, c.options...)
}

// Task returns the client of TaskService.
func (c *Client) Task() strongroomv1connect.TaskServiceClient {
	return strongroomv1connect.NewTaskServiceClient(c.http, c.base, c.options...)
}

// Event returns the client of EventService.
func (c *Client) Event() strongroomv1connect.EventServiceClient {
	return strongroomv1connect.NewEventServiceClient(c.http, c.base, c.options...)
}

// Call makes one call without the request and response wrappers:
//
//	vms, err := client.Call(ctx, c.VM().ListVMs, &strongroomv1.ListVMsRequest{})
func Call[Req, Res any](ctx context.Context, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}
