package cli

import (
	"context"
	"time"
)

// Roles is what the commands do in this very process rather than through the
// API. Main fills it in; this package imports no role.
type Roles struct {
	// RunController and RunHost run a role until ctx ends.
	RunController func(ctx context.Context, configFile string) error
	RunHost       func(ctx context.Context, configFile string) error
	// RunDev runs a controller and one host, all state in dir.
	RunDev func(ctx context.Context, dir string) error
	// JoinHost makes this machine a host of a cluster.
	JoinHost func(ctx context.Context, join HostJoin) error
	// RunVolumed runs the volume process of one VM; the host starts it.
	RunVolumed func(ctx context.Context, args []string) error

	// The operations on one volume without a controller. Progress functions
	// get bytes; they may be nil.
	FormatVolume  func(ctx context.Context, v VolumeFormat) (VolumeInfo, error)
	InspectVolume func(ctx context.Context, file string) (VolumeInfo, error)
	// ServeVolume serves until ctx ends and calls ready once, when clients can
	// connect.
	ServeVolume   func(ctx context.Context, v VolumeServe, ready func(uri string)) error
	RekeyVolume   func(ctx context.Context, v VolumeRekey, progress func(done, total int64)) error
	DecryptVolume func(ctx context.Context, v VolumeDecrypt, progress func(done, total int64)) error

	// Benchmark measures the cipher, each measurement for about the duration.
	Benchmark func(ctx context.Context, each time.Duration) ([]Measurement, error)
}

// HostJoin says how a machine joins a cluster.
type HostJoin struct {
	ConfigFile string // the host's configuration, which says where its state is kept
	Controller string // "https://HOST:PORT"
	Token      string // the join token
	Name       string // the host's name; empty: the machine's
}

// VolumeFormat says how to make a volume.
type VolumeFormat struct {
	File       string
	KeyFile    string
	Size       int64 // of the data, bytes
	SectorSize int   // of encryption, bytes: 512 or 4096
}

// VolumeServe says how to serve a volume.
type VolumeServe struct {
	File     string
	KeyFile  string
	Socket   string // path of the NBD unix socket
	ReadOnly bool
}

// VolumeRekey says how to give a volume another key.
type VolumeRekey struct {
	File       string
	KeyFile    string
	NewKeyFile string
}

// VolumeDecrypt says how to write a volume's data to a plain file.
type VolumeDecrypt struct {
	File    string
	KeyFile string
	Out     string
}

// VolumeInfo is what a volume's header tells without a key.
type VolumeInfo struct {
	File       string       `json:"file"`
	Format     string       `json:"format"`
	UUID       string       `json:"uuid"`
	Label      string       `json:"label"`
	Cipher     string       `json:"cipher"`
	SizeBytes  int64        `json:"sizeBytes"`
	SectorSize int          `json:"sectorSize"`
	DataOffset int64        `json:"dataOffset"`
	Generation uint64       `json:"generation"` // of the header: +1 with each change
	Headers    []VolumeCopy `json:"headers"`    // the copies of the header
	KeySafe    *VolumeKey   `json:"keySafe"`    // nil if the volume has none
}

// VolumeCopy is the state of one header copy.
type VolumeCopy struct {
	Offset int64  `json:"offset"`
	State  string `json:"state"` // "ok", or what is wrong with it
}

// VolumeKey names the key that a volume's key safe needs.
type VolumeKey struct {
	Provider   string `json:"provider"`
	KeyID      string `json:"keyId"`
	Generation uint64 `json:"generation"`
}

// Measurement is one speed of the cipher.
type Measurement struct {
	Name           string  `json:"name"`
	Implementation string  `json:"implementation"`
	BlockBytes     int     `json:"blockBytes"`
	BytesPerSecond float64 `json:"bytesPerSecond"`
}
