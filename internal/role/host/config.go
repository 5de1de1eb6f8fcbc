package host

import (
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"strongroom/internal/daemon"
)

const (
	// socketPathMax is what fits in a unix socket's address, in bytes.
	socketPathMax = 107
	// runDirMax leaves room for "/", what a VM's folder there is called, and the
	// longest name of a socket in it, "/disk-63.vhost".
	runDirMax = socketPathMax - 1 - runNameLen - len("/disk-63.vhost")
)

// Config is the configuration file of a host, in TOML. Unknown fields are
// refused. It holds no secret: those are in the sealed host configuration.
type Config struct {
	// DataDir is the folder of the sealed host configuration and its key file.
	// It must be readable by the host only. Needed.
	DataDir string `toml:"data_dir"`

	// RunDir is the folder of sockets and state of running VMs. It is lost with a
	// reboot, as they are. Its path must be short: a unix socket's path has at
	// most 107 bytes. Default: "run" below DataDir.
	RunDir string `toml:"run_dir"`

	// Listen is the address on which the host's agent serves its controller,
	// "host:port". Needed.
	Listen string `toml:"listen"`

	// Advertise is the address under which the controller reaches the agent,
	// "host:port". Default: Listen, which must then name an address.
	Advertise string `toml:"advertise"`

	// LocalSocket is the unix socket on which the host serves its own
	// administrators (root, and the user it runs as) while the controller is
	// away. Default: "host.sock" in RunDir.
	LocalSocket string `toml:"local_socket"`

	// KeyFile holds the 32 bytes that open the sealed host configuration.
	// Whoever has both can read this host's provider keys: without a TPM that is
	// whoever steals the host. Default: "host.key" in DataDir. It may lie on
	// another medium.
	KeyFile string `toml:"key_file"`

	// DirectIO makes VMs' disks be read and written past the host's page cache
	// (O_DIRECT). Default: through it. A VM follows it from its next power on.
	DirectIO bool `toml:"direct_io"`
}

// LoadConfig reads and checks the configuration file at path.
func LoadConfig(path string) (Config, error) {
	return daemon.LoadConfig(path, "host", ParseConfig)
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
	if !filepath.IsAbs(c.DataDir) || strings.ContainsRune(c.DataDir, 0) {
		return Config{}, fmt.Errorf("data_dir %.128q is not an absolute path", c.DataDir)
	}
	fill := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	fill(&c.RunDir, filepath.Join(c.DataDir, "run"))
	fill(&c.LocalSocket, filepath.Join(c.RunDir, "host.sock"))
	fill(&c.KeyFile, filepath.Join(c.DataDir, "host.key"))
	for _, f := range []struct {
		name, path string
		max        int // bytes
	}{{"run_dir", c.RunDir, runDirMax}, {"local_socket", c.LocalSocket, socketPathMax}, {"key_file", c.KeyFile, unix.PathMax}} {
		if !filepath.IsAbs(f.path) || strings.ContainsRune(f.path, 0) || len(f.path) > f.max {
			return Config{}, fmt.Errorf("%s %.128q is not an absolute path of at most %d bytes", f.name, f.path, f.max)
		}
	}
	var err error
	if c.Advertise, err = daemon.CheckAddresses(c.Listen, c.Advertise); err != nil {
		return Config{}, err
	}
	return c, nil
}
