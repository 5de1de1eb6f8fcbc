package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
	"strongroom/internal/role/kms"
	"strongroom/internal/role/kms/backup"
)

// makeKMSBackupKey makes the private key of a recipient of backups in a file, and
// returns the public key and its id.
func makeKMSBackupKey(file string) (public []byte, id string, err error) {
	secret, err := keyfile.Create(file, parcel.SecretSize)
	if err != nil {
		return nil, "", err
	}
	defer secret.Close()
	r, err := parcel.RestoreRecipient(secret)
	if err != nil {
		return nil, "", errors.Join(err, os.Remove(file))
	}
	defer r.Close()
	return r.PublicKey(), backup.KeyID(r.PublicKey()), nil
}

// kmsBackupRecipient returns the id of who opens a backup, or "" if a passphrase
// does.
func kmsBackupRecipient(_ context.Context, file string) (string, error) {
	f, _, err := backup.Open(file)
	if err != nil {
		return "", errs.Wrap(err, "cannot open %s", file)
	}
	defer f.Close()
	h, err := backup.ReadHeader(f)
	if err != nil {
		return "", errs.Wrap(err, "cannot open %s", file)
	}
	if h.Recipient != nil {
		return h.Recipient.KeyID, nil
	}
	return "", nil
}

// withBackupKey calls f with what opens a backup.
func withBackupKey(b cli.KMSBackupFile, f func(backup.Key) error) error {
	if b.KeyFile == "" {
		passphrase, err := keymem.Take(b.Passphrase)
		if err != nil {
			return err
		}
		defer passphrase.Close()
		return f(backup.Key{Passphrase: passphrase})
	}
	secret, err := keyfile.Read(b.KeyFile, parcel.SecretSize)
	if err != nil {
		return err
	}
	defer secret.Close()
	r, err := parcel.RestoreRecipient(secret)
	if err != nil {
		return err
	}
	defer r.Close()
	return f(backup.Key{Recipient: r})
}

func kmsBackupReport(h backup.Header, about backup.About, end backup.End) cli.KMSBackupReport {
	r := cli.KMSBackupReport{
		ID: h.ID, Cluster: h.Cluster, Created: h.Created, OpensWith: h.OpensWith(), Program: about.Program, Address: about.Address, Revision: about.Revision,
		Records: end.Records, Objects: end.Objects, Keys: end.Keys,
	}
	return r
}

func verifyKMSBackup(ctx context.Context, b cli.KMSBackupFile) (r cli.KMSBackupReport, err error) {
	err = withBackupKey(b, func(key backup.Key) error {
		v, err := kms.VerifyBackup(ctx, b.File, key)
		r = kmsBackupReport(v.Header, v.About, v.End)
		return err
	})
	return r, err
}

func drillKMSBackup(ctx context.Context, b cli.KMSBackupFile, dir string) (r cli.KMSDrillReport, err error) {
	err = withBackupKey(b, func(key backup.Key) error {
		d, err := kms.Drill(ctx, b.File, key, dir, slog.New(slog.DiscardHandler))
		r = cli.KMSDrillReport{
			Backup: kmsBackupReport(d.Header, d.About, d.End), Groups: d.Groups, Applications: d.Applications, ObjectsRead: d.Objects, KeysRead: d.Keys,
			RestoreMs: d.Restore.Milliseconds(), OpenMs: d.Open.Milliseconds(), ReadMs: d.Read.Milliseconds(),
		}
		return err
	})
	return r, err
}

func restoreKMS(ctx context.Context, c cli.KMSRestore) (r cli.KMSRestoreReport, err error) {
	cfg, err := restoreConfig(c)
	if err != nil {
		return r, err
	}
	err = withBackupKey(c.Backup, func(key backup.Key) error {
		d, err := kms.Restore(ctx, cfg, c.Backup.File, key, kms.Since{AuditLogs: c.AuditLogs, Lists: c.Lists, BringBack: c.BringBackDestroyed})
		r = cli.KMSRestoreReport{Backup: kmsBackupReport(d.Header, d.About, d.End), Dir: cfg.DataDir, KeyFile: cfg.KeyFile, Destroyed: append([]string{}, d.Destroyed...), Revoked: append([]string{}, d.Revoked...)}
		return err
	})
	return r, err
}

func restoreConfig(c cli.KMSRestore) (kms.Config, error) {
	if c.Dir == "" {
		return kms.LoadConfig(c.ConfigFile)
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return kms.Config{}, err
	}
	// Where it listens is of no matter here.
	return kms.ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = \"127.0.0.1:5696\"\n", dir))
}
