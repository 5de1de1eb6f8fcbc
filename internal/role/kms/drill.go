package kms

import (
	"context"
	"crypto/hmac"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/rootkey"
	"strongroom/internal/role/kms/backup"
)

// Drilled is what a restore drill has found.
type Drilled struct {
	Verified
	// What the restored KMS has. Every object was read and every key opened, and
	// together they are those of the backup.
	Groups, Applications int
	Objects, Keys        int64
	// How long it took to restore, to open the KMS, and to read all keys.
	Restore, Open, Read time.Duration
}

// Drill restores a backup into a new folder below dir, opens the KMS there as after
// a start, without clients, reads every key, compares all with what was backed up,
// and removes the folder. The root key of that KMS is in memory only, so what a
// crash leaves of the folder opens to nobody.
func Drill(ctx context.Context, file string, key backup.Key, dir string, log *slog.Logger) (Drilled, error) {
	d, err := drill(ctx, file, key, dir, log)
	return d, errs.Wrap(err, "the drill with %s failed", file)
}

func drill(ctx context.Context, file string, key backup.Key, dir string, log *slog.Logger) (_ Drilled, err error) {
	f, size, err := backup.Open(file)
	if err != nil {
		return Drilled{}, err
	}
	defer f.Close()
	d := Drilled{}
	if d.Verified, err = verifyBackup(ctx, f, size, key); err != nil {
		return Drilled{}, err
	}
	if dir != "" { // else it is the system's
		if dir, err = filepath.Abs(dir); err != nil {
			return Drilled{}, err
		}
	}
	temporary, err := os.MkdirTemp(dir, "strongroom-drill-*")
	if err != nil {
		return Drilled{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temporary)) }()
	cfg, err := Config{DataDir: filepath.Join(temporary, "kms"), Listen: "127.0.0.1:0", Advertise: d.About.Address}.withDefaults()
	if err != nil {
		return Drilled{}, err
	}
	if err := os.Mkdir(cfg.DataDir, 0o700); err != nil {
		return Drilled{}, err
	}
	root, err := keymem.Random(rootkey.Size)
	if err != nil {
		return Drilled{}, err
	}
	defer root.Close()
	began := time.Now()
	if _, err := install(ctx, cfg, root, f, size, key, later{}, func(string) {}); err != nil {
		return Drilled{}, err
	}
	d.Restore, began = time.Since(began), time.Now()
	lock, err := rootkey.Load(filepath.Join(cfg.DataDir, rootName), rootkey.Source{KeyFile: &rootkey.KeyFile{Path: cfg.KeyFile}}, func(*keymem.Key) error { return nil })
	if err != nil {
		return Drilled{}, err
	}
	k, err := open(ctx, cfg, &unlocked{lock: lock, root: root}, log)
	if err != nil {
		return Drilled{}, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	d.Open, began = time.Since(began), time.Now()
	if id := clusterID(k.ca); id != d.Header.Cluster {
		return Drilled{}, errs.New(errs.Corrupt, "the restored KMS is %s, not %s", id, d.Header.Cluster)
	}
	d.Groups, d.Applications = len(k.directory.Groups()), len(k.directory.Applications())
	if err := d.read(ctx, k, f, size, key); err != nil {
		return Drilled{}, err
	}
	d.Read = time.Since(began)
	return d, nil
}

// read reads every key of the restored KMS.
func (d *Drilled) read(ctx context.Context, k *KMS, f *os.File, size int64, key backup.Key) error {
	b, err := backup.NewReader(ctx, f, size, key) // for the key of its digest
	if err != nil {
		return err
	}
	defer b.Close()
	if d.Objects, d.Keys, err = k.objects.Digest(ctx, b.Digest()); err != nil {
		return err
	}
	if d.Objects != d.End.Objects || d.Keys != d.End.Keys || !hmac.Equal(b.Digest().Sum(nil), d.End.Digest) {
		return errs.New(errs.Corrupt, "the restored KMS has %d objects and %d keys that are not the %d and %d that were backed up", d.Objects, d.Keys, d.End.Objects, d.End.Keys)
	}
	return nil
}
