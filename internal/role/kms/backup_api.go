package kms

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/rootkey"
	"strongroom/internal/role/kms/backup"
	"strongroom/internal/role/kms/objectstore"
)

// backupChunk bounds the bytes of one message of a backup.
const backupChunk = 256 << 10

// clusterID names the KMS: docs/spec/kms-cluster.md.
func clusterID(ca *pki.CA) string {
	sum := pki.FingerprintOf(ca.Certificate())
	return fmt.Sprintf("%x", sum[:8])
}

func (a *api) BackupKMS(ctx context.Context, req *connect.Request[strongroomv1.BackupKMSRequest], out *connect.ServerStream[strongroomv1.BackupKMSResponse]) error {
	protect, wipe, err := protectionOf(req.Msg)
	if err != nil {
		return apierr.To(err)
	}
	defer wipe()
	if !a.k.backups.making.TryLock() {
		return apierr.To(errs.New(errs.Unavailable, "a backup is being made").WithHint("try again when it is done"))
	}
	defer a.k.backups.making.Unlock()
	var made *strongroomv1.KMSBackup
	// On record before a byte of it is out, and again with how it ended.
	err = a.k.recordBackup("BackupKMS", nil, map[string]string{"step": "begun"})
	if err == nil {
		made, err = a.k.backUp(ctx, protect, out)
		if recordErr := a.k.recordBackup("BackupKMS", err, detailsOf(made)); err == nil {
			err = recordErr
		}
	}
	if err == nil {
		a.k.backups.offer(made)
		err = out.Send(&strongroomv1.BackupKMSResponse{Part: &strongroomv1.BackupKMSResponse_Done{Done: made}})
	}
	if err != nil {
		return apierr.To(errs.Wrap(err, "cannot back the KMS up"))
	}
	return nil
}

// protectionOf returns what a backup is to be opened with. The caller calls wipe
// when it is made.
func protectionOf(m *strongroomv1.BackupKMSRequest) (_ backup.Protection, wipe func(), err error) {
	switch p := m.GetProtection().(type) {
	case *strongroomv1.BackupKMSRequest_Passphrase:
		passphrase, err := takeSecret(p.Passphrase)
		if err != nil {
			return nil, nil, err
		}
		return backup.ForPassphrase(passphrase, rootkey.DefaultCost()), func() { passphrase.Close() }, nil
	case *strongroomv1.BackupKMSRequest_Recipient:
		if len(p.Recipient) != parcel.PublicKeySize {
			return nil, nil, errs.New(errs.Invalid, "a recipient's public key has %d bytes, not %d", parcel.PublicKeySize, len(p.Recipient))
		}
		return backup.ForRecipient(p.Recipient), func() {}, nil
	}
	return nil, nil, errs.New(errs.Invalid, "the request does not say what opens the backup").WithHint("give a passphrase or a recipient")
}

func detailsOf(b *strongroomv1.KMSBackup) map[string]string {
	if b == nil {
		return nil
	}
	return map[string]string{
		"backup": b.GetId(), "opens_with": b.GetOpensWith(), "revision": fmt.Sprint(b.GetRevision()), "objects": fmt.Sprint(b.GetObjects()),
		"keys": fmt.Sprint(b.GetKeys()), "sha256": b.GetSha256(),
	}
}

// recordBackup puts a step of a backup on record, durably.
func (k *KMS) recordBackup(method string, err error, details map[string]string) error {
	e := audit.Entry{Actor: "local administrator", Action: "KMSBackupService/" + method, Object: "kms", Outcome: audit.Success, Details: details}
	if err != nil {
		e.Outcome, e.Details = audit.Failed, map[string]string{"kind": errs.KindOf(err).String()}
	}
	return k.audit.AppendDurably(e)
}

// chunks sends what is written to it, in messages of some size.
type chunks struct {
	out *connect.ServerStream[strongroomv1.BackupKMSResponse]
	buf []byte
}

func (c *chunks) Write(p []byte) (int, error) {
	c.buf = append(c.buf, p...)
	if len(c.buf) < backupChunk {
		return len(p), nil
	}
	return len(p), c.flush()
}

func (c *chunks) flush() error {
	err := c.out.Send(&strongroomv1.BackupKMSResponse{Part: &strongroomv1.BackupKMSResponse_Data{Data: c.buf}})
	c.buf = c.buf[:0]
	return err
}

// backUp sends a backup.
func (k *KMS) backUp(ctx context.Context, protect backup.Protection, out *connect.ServerStream[strongroomv1.BackupKMSResponse]) (*strongroomv1.KMSBackup, error) {
	c := &chunks{out: out}
	made := &strongroomv1.KMSBackup{}
	written, err := k.writeBackup(ctx, c, protect, func(h backup.Header) error {
		made.Id, made.Cluster, made.Created, made.OpensWith = h.ID, h.Cluster, timestamppb.New(h.Created), h.OpensWith()
		return out.Send(&strongroomv1.BackupKMSResponse{Part: &strongroomv1.BackupKMSResponse_Begun{Begun: made}})
	}, func(revision int64) { made.Revision = revision })
	if err != nil {
		return nil, err
	}
	if len(c.buf) > 0 {
		if err := c.flush(); err != nil {
			return nil, err
		}
	}
	made.Objects, made.Keys, made.Bytes, made.Sha256 = written.End.Objects, written.End.Keys, written.Bytes, written.SHA256
	return made, nil
}

// writeBackup writes a backup of the whole KMS as it is at one revision of its
// database, while it serves.
func (k *KMS) writeBackup(ctx context.Context, w io.Writer, protect backup.Protection, header func(backup.Header) error, revision func(int64)) (_ backup.Written, err error) {
	dump, err := k.db.Dump(ctx)
	if err != nil {
		return backup.Written{}, err
	}
	revision(dump.Revision)
	objects, err := dump.Count(ctx, objectstore.Objects)
	if err != nil {
		return backup.Written{}, err
	}
	about, err := k.about(dump.Revision)
	if err != nil {
		return backup.Written{}, err
	}
	ring, encoded, err := newRing(objects)
	if err != nil {
		return backup.Written{}, err
	}
	defer ring.Close()
	defer encoded.Close()
	b, err := backup.NewWriter(w, clusterID(k.ca), about, protect, header)
	if err != nil {
		return backup.Written{}, err
	}
	defer b.Abort()
	if err := k.addSecrets(b, encoded); err != nil {
		return backup.Written{}, err
	}
	var keys int64
	err = dump.Each(ctx, func(name string, value []byte) error {
		table, key, _ := strings.Cut(name, "/")
		if table != objectstore.Objects {
			if ofThisKMS(table) {
				return nil
			}
			return b.Record(backup.Record{Name: name, Value: value}, false, false)
		}
		record, material, err := k.objects.Rewrap(ctx, key, value, ring, uint64(keys/objectstore.PerEpoch)+1, b.Digest())
		if err != nil {
			return err
		}
		if material {
			keys++
		}
		return b.Record(backup.Record{Name: name, Value: record}, true, material)
	})
	if err != nil {
		return backup.Written{}, err
	}
	return b.Finish()
}

// ofThisKMS tells the tables that a restored KMS has no use for: who its nodes are
// and what follows from others.
func ofThisKMS(table string) bool {
	return objectstore.Derived(table) || table == "kms-member" || table == "join-token"
}

// newRing returns a key ring for a backup with that many objects, and its encoding.
func newRing(objects int64) (_ *keyring.Ring, encoded *keymem.Key, err error) {
	epochs := (objects + objectstore.PerEpoch - 1) / objectstore.PerEpoch
	if epochs >= keyring.EpochsMax {
		return nil, nil, errs.New(errs.NoSpace, "%d objects are more than a backup can hold", objects)
	}
	var ring *keyring.Ring
	defer func() {
		if err != nil {
			encoded.Close()
			if ring != nil {
				ring.Close()
			}
		}
	}()
	save := func(e *keymem.Key) error {
		encoded.Close()
		encoded, err = e.Clone()
		return err
	}
	if ring, err = keyring.New(save); err != nil {
		return nil, nil, err
	}
	for range epochs {
		if _, err = ring.Begin(); err != nil {
			return nil, nil, err
		}
	}
	return ring, encoded, nil
}

func (k *KMS) about(revision int64) (backup.About, error) {
	public, err := os.ReadFile(filepath.Join(k.cfg.DataDir, auditKeyName))
	if err != nil {
		return backup.About{}, err
	}
	head := k.audit.Head()
	return backup.About{
		Program: Version, Address: k.cfg.Advertise, Revision: revision, CA: k.ca.Certificate().Raw,
		AuditKey: string(public), AuditHead: fmt.Sprintf("%d:%s", head.Seq, head.Hash),
	}, nil
}

// addSecrets adds what a restored KMS needs to be this one to its clients.
func (k *KMS) addSecrets(b *backup.Writer, ring *keymem.Key) error {
	if err := b.Secret(backup.SecretRing, ring); err != nil {
		return err
	}
	der, err := k.ca.PrivateKey()
	if err != nil {
		return err
	}
	ca, err := keymem.Take(der)
	if err != nil {
		return err
	}
	defer ca.Close()
	if err := b.Secret(backup.SecretCA, ca); err != nil {
		return err
	}
	if der, err = x509.MarshalPKCS8PrivateKey(k.certificate.PrivateKey); err != nil {
		return err
	}
	defer clear(der)
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.certificate.Leaf.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	server, err := keymem.Take(text)
	if err != nil {
		return err
	}
	defer server.Close()
	return b.Secret(backup.SecretServer, server)
}

// backups is what a KMS knows of its backups.
type backups struct {
	making sync.Mutex // one at a time: each reads every key

	mu    sync.Mutex
	made  map[string]*strongroomv1.KMSBackup // to be confirmed, by id
	order []string
}

// unconfirmedMax bounds how many backups wait to be confirmed.
const unconfirmedMax = 16

// offer has a backup wait to be confirmed.
func (s *backups) offer(b *strongroomv1.KMSBackup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made == nil {
		s.made = map[string]*strongroomv1.KMSBackup{}
	}
	s.made[b.GetId()] = b
	if s.order = append(s.order, b.GetId()); len(s.order) > unconfirmedMax {
		delete(s.made, s.order[0])
		s.order = s.order[1:]
	}
}

func (s *backups) get(id string) *strongroomv1.KMSBackup {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made[id]
}

func (a *api) ConfirmKMSBackup(ctx context.Context, req *connect.Request[strongroomv1.ConfirmKMSBackupRequest]) (*connect.Response[strongroomv1.KMSBackupStatus], error) {
	made := a.k.backups.get(req.Msg.GetId())
	if made == nil {
		return nil, errs.New(errs.NotFound, "this server made no backup %.64q since its start", req.Msg.GetId())
	}
	if made.GetSha256() != req.Msg.GetSha256() {
		return nil, errs.New(errs.Corrupt, "what was stored is not the backup that was made").WithHint("make another one: strongroom kms backup create")
	}
	last := lastBackup{
		ID: made.GetId(), Created: made.GetCreated().AsTime(), OpensWith: made.GetOpensWith(), Revision: made.GetRevision(), Objects: made.GetObjects(), Keys: made.GetKeys(),
		Bytes: made.GetBytes(), SHA256: made.GetSha256(),
	}
	if err := a.k.noteBackup(ctx, last); err != nil {
		return nil, err
	}
	return a.backupStatus(ctx)
}

func (a *api) GetKMSBackupStatus(ctx context.Context, _ *connect.Request[strongroomv1.GetKMSBackupStatusRequest]) (*connect.Response[strongroomv1.KMSBackupStatus], error) {
	return a.backupStatus(ctx)
}

func (a *api) backupStatus(ctx context.Context) (*connect.Response[strongroomv1.KMSBackupStatus], error) {
	last, err := a.k.lastBackup(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.KMSBackupStatus{MaxAgeSeconds: int64(a.k.cfg.backupMaxAge() / time.Second), Overdue: a.k.backupOverdue(last, time.Now())}
	if last != nil {
		out.Last = &strongroomv1.KMSBackup{
			Id: last.ID, Cluster: clusterID(a.k.ca), Created: timestamppb.New(last.Created), OpensWith: last.OpensWith, Revision: last.Revision, Objects: last.Objects, Keys: last.Keys,
			Bytes: last.Bytes, Sha256: last.SHA256,
		}
	}
	return connect.NewResponse(out), nil
}

var _ strongroomv1connect.KMSBackupServiceHandler = (*api)(nil)

// keepBackups warns while the last backup is too old, until ctx ends.
func (k *KMS) keepBackups(ctx context.Context) error {
	tick := time.NewTicker(backupLookEvery)
	defer tick.Stop()
	for {
		last, err := k.lastBackup(ctx)
		switch {
		case err != nil && !errors.Is(err, context.Canceled):
			k.log.LogAttrs(ctx, slog.LevelWarn, "cannot tell how old the last backup is", slog.Any("err", err))
		case err == nil && k.backupOverdue(last, time.Now()):
			k.log.LogAttrs(ctx, slog.LevelWarn, "the last backup is too old", slog.String("allowed", k.cfg.backupMaxAge().String()), slog.String("command", "strongroom kms backup create"))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
