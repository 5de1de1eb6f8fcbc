package controller

import (
	"fmt"
	"path/filepath"
	"time"

	"strongroom/internal/daemon"
)

// Config is the configuration file of a controller, in TOML. Unknown fields
// are refused. It holds no secret.
type Config struct {
	// DataDir is the folder of the inventory (etcd), the sealed key store, the
	// certificates and the audit log. It must be readable by the controller
	// only. Needed.
	DataDir string `toml:"data_dir"`

	// Listen is the address of the API, "host:port". Needed.
	Listen string `toml:"listen"`

	// Advertise is the address under which users and hosts reach the API,
	// "host:port". It stands in the certificate. Default: Listen, which must then
	// name an address.
	Advertise string `toml:"advertise"`

	// KeyFile holds the 32 bytes that open the sealed key store. Whoever has both
	// can read the KDKs of all native providers. Default: "controller.key" in
	// DataDir. It may lie on another medium.
	KeyFile string `toml:"key_file"`

	// MaxConnections and MaxConnectionsPerAddress bound the connections to the API,
	// those of hosts included, together and from one network address; an IPv6
	// network (/64) has at most three quarters of all. From 1 to 65536. Default: 4096
	// and 64.
	MaxConnections           int `toml:"max_connections"`
	MaxConnectionsPerAddress int `toml:"max_connections_per_address"`

	// MaxRequestsPerSecond is how many requests of clients without a certificate
	// from one network address, of IPv6 from one network (/64), are answered in a
	// second; more are refused, as HTTP's 429. From 1 to 65536. Default: 100.
	MaxRequestsPerSecond int `toml:"max_requests_per_second"`

	KMS KMSConfig `toml:"kms"`
}

// KMSConfig is the section [kms]: the upkeep of key providers.
type KMSConfig struct {
	// RemediationInterval is how often providers and keys on the hosts are put
	// right, as a duration such as "5m". From 1s to 24h. Default: 5m. In vSphere
	// it is vpxd.KMS.remediationInterval.
	RemediationInterval Duration `toml:"remediation_interval"`

	// StatusInterval is how often the key servers of standard providers are
	// looked at, as a duration. From 1s to 24h. One that cannot be used is looked
	// at more often. No key is made or used for it. Default: 5m. In vSphere it is
	// vpxd.KMS.status.
	StatusInterval Duration `toml:"status_interval"`
}

// Duration is a time.Duration in the notation of [time.ParseDuration].
type Duration time.Duration

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// MarshalText implements [encoding.TextMarshaler].
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// LoadConfig reads and checks the configuration file at path.
func LoadConfig(path string) (Config, error) {
	return daemon.LoadConfig(path, "controller", ParseConfig)
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
	if !filepath.IsAbs(c.DataDir) {
		return Config{}, fmt.Errorf("data_dir %q is not an absolute path", c.DataDir)
	}
	if c.KeyFile == "" {
		c.KeyFile = filepath.Join(c.DataDir, "controller.key")
	}
	if !filepath.IsAbs(c.KeyFile) {
		return Config{}, fmt.Errorf("key_file %q is not an absolute path", c.KeyFile)
	}
	for _, s := range []struct {
		name  string
		limit *int
		usual int
	}{
		{"max_connections", &c.MaxConnections, 4096},
		{"max_connections_per_address", &c.MaxConnectionsPerAddress, 64},
		{"max_requests_per_second", &c.MaxRequestsPerSecond, 100},
	} {
		if *s.limit == 0 {
			*s.limit = s.usual
		}
		if *s.limit < 1 || *s.limit > 65536 {
			return Config{}, fmt.Errorf("%s %d is not 1 to 65536", s.name, *s.limit)
		}
	}
	if c.KMS.RemediationInterval == 0 {
		c.KMS.RemediationInterval = Duration(5 * time.Minute)
	}
	if d := time.Duration(c.KMS.RemediationInterval); d < time.Second || d > 24*time.Hour {
		return Config{}, fmt.Errorf("kms.remediation_interval %v is not 1s to 24h", d)
	}
	if c.KMS.StatusInterval == 0 {
		c.KMS.StatusInterval = Duration(5 * time.Minute)
	}
	if d := time.Duration(c.KMS.StatusInterval); d < time.Second || d > 24*time.Hour {
		return Config{}, fmt.Errorf("kms.status_interval %v is not 1s to 24h", d)
	}
	var err error
	if c.Advertise, err = daemon.CheckAddresses(c.Listen, c.Advertise); err != nil {
		return Config{}, err
	}
	return c, nil
}
