package kms

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/approval"
	"strongroom/internal/role/kms/backup"
	"strongroom/internal/role/kms/objectstore"
)

const (
	// restoringName is a file in the data folder from a restore's first step until
	// after its last one: with it there is no KMS in the folder.
	restoringName = "restore.incomplete"
	// loadRecords and loadBytes bound what one transaction stores.
	loadRecords = 512
	loadBytes   = 1 << 20
)

// checkRestored refuses the rest of a restore that broke off.
func checkRestored(cfg Config) error {
	if _, err := os.Lstat(filepath.Join(cfg.DataDir, restoringName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errs.New(errs.InvalidState, "%s holds a restore that broke off", cfg.DataDir).
		WithHint("repeat strongroom kms restore: it begins anew")
}

// Restored is what a restore made.
type Restored struct {
	Header backup.Header
	About  backup.About
	End    backup.End
	// Destroyed are the keys of the backup that are not back, for they were destroyed
	// since.
	Destroyed []string
	// Revoked are the applications and credentials of the backup that are not back, as
	// "APPLICATION" or "APPLICATION CREDENTIAL": they were deleted or revoked since.
	Revoked []string
}

// Restore makes the data folder of a new KMS, of one node, from a backup: with the
// keys, the directory and the certificates of the one that was backed up, and a root
// key, an audit log and a database identity of its own. The folder must be empty, or
// hold the rest of a restore that broke off. Keys that were destroyed since are destroyed again.
//
// since must say which keys were destroyed after the backup was made. The
// backup is read to its end before anything is written. After an error nothing
// is left; after a crash the folder has no KMS, and Restore begins anew.
func Restore(ctx context.Context, cfg Config, file string, key backup.Key, since Since) (Restored, error) {
	r, err := restore(ctx, cfg, file, key, since, func(string) {})
	return r, errs.Wrap(err, "cannot restore %s into %s", file, cfg.DataDir)
}

// restore calls done behind each step that a crash may follow.
func restore(ctx context.Context, cfg Config, file string, key backup.Key, since Since, done func(step string)) (_ Restored, err error) {
	if err := since.check(); err != nil {
		return Restored{}, err
	}
	f, size, err := backup.Open(file)
	if err != nil {
		return Restored{}, err
	}
	defer f.Close()
	verified, err := verifyBackup(ctx, f, size, key)
	if err != nil {
		return Restored{}, err
	}
	after, err := since.read(verified.About)
	if err != nil {
		return Restored{}, err
	}
	_, noKey := os.Lstat(cfg.KeyFile)
	marker, err := beginRestore(cfg)
	if err != nil {
		return Restored{}, err
	}
	defer marker.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, emptyDir(cfg.DataDir), os.Remove(marker.Name()))
			if errors.Is(noKey, fs.ErrNotExist) { // it may lie elsewhere
				os.Remove(cfg.KeyFile)
			}
		}
	}()
	done("folder taken")
	u, err := unlock(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return Restored{}, err
	}
	defer u.lock.Close()
	defer u.root.Close()
	done("root key made")
	r, err := install(ctx, cfg, u.root, f, size, key, after, done)
	if err != nil {
		return Restored{}, err
	}
	if err := durable.SyncDir(cfg.DataDir); err != nil {
		return Restored{}, err
	}
	// Last: from here on there is a KMS.
	if err := os.Remove(marker.Name()); err != nil {
		return Restored{}, err
	}
	return r, durable.SyncDir(cfg.DataDir)
}

// beginRestore takes an empty data folder, and returns the locked file that says
// that it holds no KMS.
func beginRestore(cfg Config) (*os.File, error) {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(cfg.DataDir, restoringName)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(cfg.DataDir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if e.Name() != lostAndFound {
				return nil, errs.New(errs.Exists, "the folder is not empty: it has %s", e.Name()).WithHint("restore into a new folder; what is there stays as it is")
			}
		}
	}
	marker, err := mark(path)
	if err != nil {
		return nil, errs.Wrap(err, "restore")
	}
	if err := emptyDir(cfg.DataDir); err != nil {
		marker.Close()
		return nil, err
	}
	return marker, nil
}

// lostAndFound is in every new file system.
const lostAndFound = "lost+found"

// emptyDir removes what a restore that broke off has made.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != restoringName && e.Name() != lostAndFound {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// install makes everything in the data folder but the root key and what says where
// that comes from.
func install(ctx context.Context, cfg Config, root *keymem.Key, src io.ReaderAt, size int64, key backup.Key, after later, done func(step string)) (_ Restored, err error) {
	b, err := backup.NewReader(ctx, src, size, key)
	if err != nil {
		return Restored{}, err
	}
	defer b.Close()
	in := &installation{cfg: cfg, root: root, backup: b, after: after, done: done, out: Restored{Header: b.Header, About: b.About}}
	defer func() { err = errors.Join(err, in.close()) }()
	for {
		item, err := b.Next()
		switch {
		case errors.Is(err, io.EOF):
			return in.out, in.finish(ctx)
		case err != nil:
			return Restored{}, err
		case item.Secret != "":
			err = in.secret(item)
		default:
			err = in.record(ctx, item.Record)
		}
		if err != nil {
			return Restored{}, err
		}
	}
}

// installation is a data folder that is being made.
type installation struct {
	cfg    Config
	root   *keymem.Key
	backup *backup.Reader
	after  later
	done   func(step string)
	out    Restored

	secrets *secrets // nil until the key ring was there
	db      *store.DB
	pending []store.Record
	bytes   int
}

func (in *installation) close() error {
	if in.secrets != nil {
		in.secrets.Close()
	}
	if in.db != nil {
		return in.db.Close()
	}
	return nil
}

// secret puts a secret where it belongs. The key ring comes first: it makes the
// vault, under which the others are sealed.
func (in *installation) secret(item backup.Item) (err error) {
	defer item.Key.Close()
	if (item.Secret == backup.SecretRing) != (in.secrets == nil) {
		return errs.New(errs.Corrupt, "secret %.64q stands in the wrong place", item.Secret)
	}
	folder := filepath.Join(in.cfg.DataDir, pkiName)
	switch item.Secret {
	case backup.SecretRing:
		in.secrets, err = openSecrets(in.cfg, in.root, item.Key)
	case backup.SecretCA:
		_, err = pki.InstallCA(folder, in.backup.About.CA, item.Key.Bytes(), in.secrets)
	case backup.SecretServer:
		var text []byte
		if text, err = in.secrets.Seal(serverSealing, item.Key.Bytes()); err == nil {
			err = durable.WriteFile(filepath.Join(folder, serverName), text)
		}
	default:
		err = errs.New(errs.InvalidState, "secret %.64q of a newer release", item.Secret)
	}
	in.done("secret " + item.Secret)
	return err
}

// record has one record of the backup stored, soon.
func (in *installation) record(ctx context.Context, r backup.Record) (err error) {
	if in.secrets == nil {
		return errs.New(errs.Corrupt, "it has no key ring")
	}
	// What was approved of the KMS of that day is not approved of this one, and who was
	// logged in then may not be any more.
	if table, _, _ := strings.Cut(r.Name, "/"); approval.Keeps(table) || access.KeepsTokens(table) {
		return nil
	}
	stored := []store.Record{{Name: r.Name, Value: r.Value}}
	if key, ok := strings.CutPrefix(r.Name, objectstore.Objects+"/"); ok {
		_, id, _ := strings.Cut(key, "/")
		var had, has bool
		if stored, had, has, err = objectstore.Unpack(in.secrets.ring, key, r.Value, in.after.destroyed[id], in.backup.Digest()); err != nil {
			return err
		}
		in.backup.Count(had)
		if had && !has {
			in.out.Destroyed = append(in.out.Destroyed, id)
		}
	}
	for _, s := range stored {
		in.bytes += len(s.Name) + len(s.Value)
		in.pending = append(in.pending, s)
	}
	if len(in.pending) < loadRecords && in.bytes < loadBytes {
		return nil
	}
	return in.load(ctx)
}

func (in *installation) load(ctx context.Context) (err error) {
	if in.db == nil {
		// Another identity than the old database: its nodes must not meet this one.
		cfg := storeConfig(in.cfg, slog.New(slog.DiscardHandler))
		cfg.Token = uuid.NewString()
		if in.db, err = store.Open(ctx, cfg); err != nil {
			return err
		}
	}
	if len(in.pending) > 0 {
		err = in.db.Load(ctx, in.pending)
	}
	in.pending, in.bytes = in.pending[:0], 0
	in.done("records stored")
	return err
}

// finish comes when the backup was read to its end.
func (in *installation) finish(ctx context.Context) error {
	if in.secrets == nil {
		return errs.New(errs.Corrupt, "it has no key ring")
	}
	if err := in.load(ctx); err != nil {
		return err
	}
	in.out.End = in.backup.End()
	if err := in.revoke(ctx); err != nil {
		return errs.Wrap(err, "cannot revoke what was revoked since")
	}
	return in.note()
}

// revoke takes from the directory what was revoked since. An application that was made
// later than one of its name was deleted stays.
func (in *installation) revoke(ctx context.Context) error {
	d, err := directory.Open(ctx, in.db)
	if err != nil {
		return err
	}
	for _, r := range in.after.revoked {
		app, err := d.Application(r.application)
		if err != nil {
			continue
		}
		has := func(c directory.Credential) bool { return c.ID == r.credential }
		switch {
		case r.credential == "" && app.Created.Before(r.at):
			err = d.DeleteApplication(ctx, r.application)
		case slices.ContainsFunc(app.Credentials, has):
			err = d.Revoke(ctx, r.application, r.credential)
		default:
			continue
		}
		if err != nil {
			return err
		}
		in.out.Revoked = append(in.out.Revoked, r.String())
	}
	in.done("revoked")
	return nil
}

// note begins the audit log of the new KMS with where it comes from.
func (in *installation) note() (err error) {
	signer, err := in.secrets.auditSigner()
	if err != nil {
		return err
	}
	log, err := audit.Open(audit.Config{
		Dir: filepath.Join(in.cfg.DataDir, auditName), Signer: signer, Sync: audit.SyncCheckpoint, CheckpointRecords: checkpointRecords,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	h, about := in.out.Header, in.out.About
	record := func(action, object string, details map[string]string) error {
		_, err := log.Append(audit.Entry{Actor: "local administrator", Action: action, Object: object, Outcome: audit.Success, Details: details})
		return err
	}
	err = record("kms.restore", "kms", map[string]string{
		"backup": h.ID, "cluster": h.Cluster, "created": h.Created.Format(time.RFC3339), "revision": fmt.Sprint(about.Revision), "audit_head": about.AuditHead,
		"objects": fmt.Sprint(in.out.End.Objects), "keys": fmt.Sprint(in.out.End.Keys), "destroyed_since": fmt.Sprint(len(in.out.Destroyed)), "revoked_since": fmt.Sprint(len(in.out.Revoked)),
	})
	if err != nil {
		return err
	}
	for _, id := range in.out.Destroyed {
		if err := record(destroyAgain, "key/"+id, map[string]string{"backup": h.ID}); err != nil {
			return err
		}
	}
	for _, name := range in.out.Revoked {
		application, credential, _ := strings.Cut(name, " ")
		details := map[string]string{"backup": h.ID, "account": directory.AccountOf(application), credentialDetail: credential}
		if err := record(revokeAgain, applicationFolder+application, details); err != nil {
			return err
		}
	}
	if err := log.Flush(log.Head()); err != nil {
		return err
	}
	in.done("put on record")
	return nil
}
