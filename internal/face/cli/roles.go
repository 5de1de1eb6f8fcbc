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
	// RunKMS runs a key management server until ctx ends; RunKMSDev one with all
	// state in a folder, reached at listen ("host:port").
	RunKMS    func(ctx context.Context, configFile string) error
	RunKMSDev func(ctx context.Context, dir, listen, apiListen string) error
	// JoinKMS makes this machine a node of a key management server of several.
	JoinKMS func(ctx context.Context, join KMSJoin) error
	// MakeKMSBackupKey makes the private key of a recipient of backups in a file and
	// returns the public key and its id. KMSBackupRecipient tells by whose private key
	// a backup opens: "" for a passphrase.
	MakeKMSBackupKey   func(file string) (public []byte, id string, err error)
	KMSBackupRecipient func(ctx context.Context, file string) (id string, err error)
	// VerifyKMSBackup and DrillKMSBackup check a backup; the latter restores it in a
	// new folder below dir, which it removes. RestoreKMS makes a server from one.
	VerifyKMSBackup func(ctx context.Context, b KMSBackupFile) (KMSBackupReport, error)
	DrillKMSBackup  func(ctx context.Context, b KMSBackupFile, dir string) (KMSDrillReport, error)
	RestoreKMS      func(ctx context.Context, r KMSRestore) (KMSRestoreReport, error)
	// JoinHost makes this machine a host of a cluster.
	JoinHost func(ctx context.Context, join HostJoin) error

	// The operations on one volume without a controller. Progress functions
	// get bytes; they may be nil.
	FormatVolume  func(ctx context.Context, v VolumeFormat) (VolumeInfo, error)
	InspectVolume func(ctx context.Context, v VolumeStorage) (VolumeInfo, error)
	// ServeVolume serves until ctx ends and calls ready with each address when it
	// can be used.
	ServeVolume   func(ctx context.Context, v VolumeServe, ready func(address string)) error
	EncryptVolume func(ctx context.Context, v VolumeEncrypt, progress func(done, total int64)) (VolumeInfo, error)
	RekeyVolume   func(ctx context.Context, v VolumeRekey, progress func(done, total int64)) error
	DecryptVolume func(ctx context.Context, v VolumeDecrypt, progress func(done, total int64)) error
	FillVolume    func(ctx context.Context, v VolumeFill, progress func(done, total int64)) error
	// AdoptVolume wipes the passphrase.
	AdoptVolume func(ctx context.Context, v VolumeAdopt, passphrase []byte, progress func(done, total int64)) (VolumeInfo, error)

	// VerifyAudit checks an audit log without its controller.
	VerifyAudit func(ctx context.Context, v AuditVerify) (AuditReport, error)

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

// KMSJoin says how a machine becomes a node of a key management server.
type KMSJoin struct {
	ConfigFile string // the node's configuration
	Server     string // a node that there is, "HOST:PORT"
	Token      string // the join token
}

// VolumeFormat says how to make a volume.
type VolumeFormat struct {
	File       string
	KeyFile    string
	Size       int64 // of the data, bytes
	SectorSize int   // of encryption, bytes: 512 or 4096
}

// VolumeStorage says where a volume is.
type VolumeStorage struct {
	File   string // file or block device with its data
	Header string // file with its header, if that is detached
}

// VolumeServe says how to serve a volume.
type VolumeServe struct {
	VolumeStorage
	KeyFile   string
	Socket    string // path of the NBD unix socket; "" for none
	TCP       VolumeTCP
	VhostUser string // path of the vhost-user unix socket; "" for none
	Mount     string // path of the file to show it as; "" for none
	ReadOnly  bool
	Direct    bool // past the page cache
}

// VolumeTCP says how NBD is served on TCP, with TLS.
type VolumeTCP struct {
	Address   string // "host:port" to listen on; "" for none
	Cert      string // file with the server's certificate
	Key       string // file with its private key
	ClientCAs string // file with the authorities of the clients' certificates
}

// VolumeEncrypt says which plain disk is encrypted in place.
type VolumeEncrypt struct {
	VolumeStorage
	KeyFile string
	Rate    int64 // bytes a second; 0: any number
}

// VolumeRekey says how to give a volume another key.
type VolumeRekey struct {
	VolumeStorage
	KeyFile    string
	NewKeyFile string
	InPlace    bool  // without a second copy
	Rate       int64 // in place, bytes a second; 0: any number
}

// VolumeDecrypt says how to write a volume's data to a plain file.
type VolumeDecrypt struct {
	VolumeStorage
	KeyFile string
	Out     string
}

// VolumeFill says which volume is made safe for dm-crypt.
type VolumeFill struct {
	VolumeStorage
	KeyFile string
}

// VolumeAdopt says which LUKS volume of another program becomes a volume.
type VolumeAdopt struct {
	VolumeStorage
	Out     string // the new volume
	KeyFile string // where its key is written
}

// VolumeInfo is what a volume's header tells without a key.
type VolumeInfo struct {
	File          string       `json:"file"`
	Header        string       `json:"header,omitempty"` // the file with the header, if it is detached
	Format        string       `json:"format"`
	UUID          string       `json:"uuid"`
	Label         string       `json:"label"`
	Cipher        string       `json:"cipher"`
	SizeBytes     int64        `json:"sizeBytes"`
	SectorSize    int          `json:"sectorSize"`
	DataOffset    int64        `json:"dataOffset"`
	AllowDiscards bool         `json:"allowDiscards"`
	Thin          bool         `json:"thin"` // it must be filled before dm-crypt opens it
	KeySafes      []VolumeSafe `json:"keySafes"`
	Damage        []string     `json:"damage"` // what is wrong with a copy of the header
	// Rekey is how far a deep rekey is; nil if none is under way.
	Rekey *VolumeProgress `json:"rekey,omitempty"`
	// Encryption is how far the encryption of a plain disk in place has come; nil: none is
	// under way.
	Encryption *VolumeProgress `json:"encryption,omitempty"`
}

// VolumeProgress is how far a rekey is.
type VolumeProgress struct {
	DoneBytes  int64 `json:"doneBytes"`
	TotalBytes int64 `json:"totalBytes"`
}

// VolumeSafe names the key that one of a volume's key safes needs.
type VolumeSafe struct {
	Provider   string `json:"provider"`
	KeyID      string `json:"keyId"`
	Generation uint64 `json:"generation"`
}

// Measurement is one speed of the cipher on one core.
type Measurement struct {
	Implementation string  `json:"implementation"`
	Bytes          int     `json:"bytes"`    // in one call
	Op             string  `json:"op"`       // "encrypt" or "decrypt"
	GBPerS         float64 `json:"gb_per_s"` // 10^9 bytes a second
}
