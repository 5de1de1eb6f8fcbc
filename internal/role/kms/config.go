package kms

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"strongroom/internal/control/access"
	"strongroom/internal/control/pki"
	"strongroom/internal/daemon"
)

// Config is the configuration file of a KMS, in TOML. Unknown fields are
// refused. It holds no secret.
type Config struct {
	// DataDir is the folder of the database (etcd), the sealed vault, the
	// certificates and the audit log. It must be readable by the KMS only.
	// Needed.
	DataDir string `toml:"data_dir"`

	// Listen is the address of the KMIP server, "host:port". Default:
	// "0.0.0.0:5696", KMIP's port.
	Listen string `toml:"listen"`

	// Advertise is the address under which clients reach the KMIP server,
	// "host:port". It stands in the certificate. Default: Listen, which must then
	// name an address.
	Advertise string `toml:"advertise"`

	// LegacyTLS also offers TLS_RSA_WITH_AES_128_CBC_SHA256, without forward
	// secrecy, to clients that know nothing better.
	LegacyTLS bool `toml:"legacy_tls"`

	// KeyFile holds the root key, 32 bytes. Whoever has it and DataDir has all
	// keys. Default: "kms.key" in DataDir. It may lie on another medium.
	KeyFile string `toml:"key_file"`

	// LocalSocket is the unix socket on which root and the KMS's own user
	// administer it. Default: "kms.sock" in DataDir.
	LocalSocket string `toml:"local_socket"`

	// MaxConnections and MaxConnectionsPerAddress bound the connections of KMIP
	// clients, together and from one network address; an IPv6 network (/64) has at
	// most three quarters of all. From 1 to 65536. Default: 512 and 256.
	MaxConnections           int `toml:"max_connections"`
	MaxConnectionsPerAddress int `toml:"max_connections_per_address"`

	// MaxRequestsPerSecond is how many requests of one application are answered
	// in a second; more are made to wait. Default: 0, no limit.
	MaxRequestsPerSecond int `toml:"max_requests_per_second"`

	// MetricsListen is the address of Prometheus metrics (/metrics) and health
	// (/healthz), plain HTTP, "host:port". Default: none.
	MetricsListen string `toml:"metrics_listen"`

	// BackupMaxAgeHours is how old the last backup may be before the log and the
	// metrics say that one is overdue. Default: 168, a week; -1: any age.
	BackupMaxAgeHours int `toml:"backup_max_age_hours"`

	// APIListen is the address of the API for users, over TLS 1.3: "host:port".
	// Default: none; the KMS is then administered on its local socket only, and
	// nobody can approve anything.
	APIListen string `toml:"api_listen"`

	// APIAdvertise is the address under which users reach the API, "host:port".
	// It stands in the certificate. Default: APIListen, which must then name an
	// address.
	APIAdvertise string `toml:"api_advertise"`

	// APIMaxConnections and APIMaxConnectionsPerAddress bound the connections to the
	// API, as MaxConnections and MaxConnectionsPerAddress do to the KMIP server. From
	// 1 to 65536. Default: 512 and 64.
	APIMaxConnections           int `toml:"api_max_connections"`
	APIMaxConnectionsPerAddress int `toml:"api_max_connections_per_address"`

	// APIMaxRequestsPerSecond is how many requests to the API from one network
	// address, of IPv6 from one network (/64), are answered in a second; more are
	// refused, as HTTP's 429. Applications with REST come this way, too. From 1 to
	// 65536. Default: 1000.
	APIMaxRequestsPerSecond int `toml:"api_max_requests_per_second"`

	// format replaces [formatKnown] in tests, if it is set.
	format int
	// hashing is how passwords are hashed; tests want it cheap.
	hashing access.Hashing

	// Cluster makes this node one of several: docs/how-to/run-three-kms-nodes.md.
	// Default: none, a KMS of one node.
	Cluster *ClusterConfig `toml:"cluster"`
}

// ClusterConfig is how a node and the other nodes of its KMS reach each other,
// always over mutual TLS.
type ClusterConfig struct {
	// Name is this node's, unique in the KMS: letters, digits, '.', '_' and '-'.
	// Needed.
	Name string `toml:"name"`

	// Listen is the address for other nodes, "host:port". Default:
	// "0.0.0.0:5698".
	Listen string `toml:"listen"`

	// Advertise is the address under which other nodes reach this one,
	// "host:port". Default: Listen, which must then name an address.
	Advertise string `toml:"advertise"`

	// StoreListen is the address for other nodes' databases, an IP address and a
	// port. Default: "0.0.0.0:5699".
	StoreListen string `toml:"store_listen"`

	// StoreAdvertise is the address under which other nodes' databases reach this
	// one's, "host:port". Default: StoreListen, which must then name an address.
	StoreAdvertise string `toml:"store_advertise"`
}

func (c *ClusterConfig) withDefaults() (err error) {
	if c.Listen == "" {
		c.Listen = "0.0.0.0:5698"
	}
	if c.StoreListen == "" {
		c.StoreListen = "0.0.0.0:5699"
	}
	if (pki.Identity{Cluster: "kms", Role: pki.KMS, Name: c.Name}).Check() != nil || len(c.Name) > 64 {
		return fmt.Errorf("name %.80q must be 1 to 64 letters, digits, '.', '_' and '-'", c.Name)
	}
	if c.Advertise, err = daemon.CheckAddresses(c.Listen, c.Advertise); err != nil {
		return err
	}
	if c.StoreAdvertise, err = daemon.CheckAddresses(c.StoreListen, c.StoreAdvertise); err != nil {
		return fmt.Errorf("store_%w", err)
	}
	host, _, _ := net.SplitHostPort(c.StoreListen)
	if net.ParseIP(host) == nil {
		return fmt.Errorf("store_listen %q: %q is no IP address", c.StoreListen, host)
	}
	return nil
}

// LoadConfig reads and checks the configuration file at path.
func LoadConfig(path string) (Config, error) {
	return daemon.LoadConfig(path, "KMS", ParseConfig)
}

// ParseConfig reads a configuration file's text and fills in the defaults.
func ParseConfig(text []byte) (Config, error) {
	var c Config
	if err := daemon.DecodeConfig(text, &c); err != nil {
		return Config{}, err
	}
	return c.withDefaults()
}

func (c Config) withDefaults() (Config, error) {
	orElse := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	orElse(&c.Listen, "0.0.0.0:5696")
	orElse(&c.KeyFile, filepath.Join(c.DataDir, "kms.key"))
	orElse(&c.LocalSocket, filepath.Join(c.DataDir, "kms.sock"))
	for _, s := range []struct{ name, path string }{
		{"data_dir", c.DataDir}, {"key_file", c.KeyFile}, {"local_socket", c.LocalSocket},
	} {
		if !filepath.IsAbs(s.path) {
			return Config{}, fmt.Errorf("%s %q is not an absolute path", s.name, s.path)
		}
	}
	for _, s := range []struct {
		name  string
		limit *int
		usual int
	}{
		{"max_connections", &c.MaxConnections, 512},
		{"max_connections_per_address", &c.MaxConnectionsPerAddress, 256},
		{"api_max_connections", &c.APIMaxConnections, 512},
		{"api_max_connections_per_address", &c.APIMaxConnectionsPerAddress, 64},
		{"api_max_requests_per_second", &c.APIMaxRequestsPerSecond, 1000},
	} {
		if *s.limit == 0 {
			*s.limit = s.usual
		}
		if *s.limit < 1 || *s.limit > 65536 {
			return Config{}, fmt.Errorf("%s %d is not 1 to 65536", s.name, *s.limit)
		}
	}
	if c.MaxRequestsPerSecond < 0 {
		return Config{}, fmt.Errorf("max_requests_per_second %d is negative", c.MaxRequestsPerSecond)
	}
	switch {
	case c.BackupMaxAgeHours == 0:
		c.BackupMaxAgeHours = 168
	case c.BackupMaxAgeHours < -1 || c.BackupMaxAgeHours > 100000:
		return Config{}, fmt.Errorf("backup_max_age_hours %d is not 1 to 100000, or -1", c.BackupMaxAgeHours)
	}
	var err error
	if c.Advertise, err = daemon.CheckAddresses(c.Listen, c.Advertise); err != nil {
		return Config{}, err
	}
	if c.MetricsListen != "" {
		if _, err := daemon.CheckAddresses(c.MetricsListen, "any:1"); err != nil {
			return Config{}, fmt.Errorf("metrics_listen: %w", err)
		}
	}
	if c.APIListen != "" {
		if c.APIAdvertise, err = daemon.CheckAddresses(c.APIListen, c.APIAdvertise); err != nil {
			return Config{}, fmt.Errorf("api_%w", err)
		}
	} else if c.APIAdvertise != "" {
		return Config{}, errors.New("api_advertise without api_listen")
	}
	if c.Cluster != nil {
		if err := c.Cluster.withDefaults(); err != nil {
			return Config{}, fmt.Errorf("cluster: %w", err)
		}
	}
	return c, nil
}
