package kms

import (
	"bufio"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/backup"
)

// destroyAgain is the action under which a restored KMS has on record that a key of
// its backup was destroyed since, revokeAgain that an application was deleted or a
// credential revoked.
const (
	destroyAgain = "kms.destroyAgain"
	revokeAgain  = "kms.revokeAgain"
)

// Since says which keys were destroyed, and which credentials revoked, after a backup
// was made. What it does not tell comes back with the backup, so something of it must
// be set.
type Since struct {
	// AuditLogs are folders of audit logs of the KMS's nodes, each with the public
	// key that signs it, audit-key.pem, beside the folder.
	AuditLogs []string
	// Lists are files with one identifier of a destroyed key in each line.
	Lists []string
	// BringBack has keys come back that were destroyed since, as far as the above does
	// not name them.
	BringBack bool
}

func (s Since) check() error {
	if len(s.AuditLogs) > 0 || len(s.Lists) > 0 || s.BringBack {
		return nil
	}
	return errs.New(errs.Invalid, "nothing tells which keys were destroyed after the backup was made: they would come back").
		WithHint("give the audit logs of the old nodes (--audit-log DIR) or a list (--destroyed FILE); without either: --bring-back-destroyed")
}

// later is what was done after a backup was made.
type later struct {
	destroyed map[string]time.Time // keys, with the time as far as it is known
	revoked   []revocation
}

// revocation is that of a credential, or of a whole application, which was deleted.
type revocation struct {
	application, credential string // the credential is "" for all
	at                      time.Time
}

// String names what was revoked.
func (r revocation) String() string { return strings.TrimSuffix(r.application+" "+r.credential, " ") }

// read returns what Since tells.
func (s Since) read(about backup.About) (later, error) {
	all := later{destroyed: map[string]time.Time{}}
	for _, dir := range s.AuditLogs {
		if err := all.addLog(dir, about); err != nil {
			return later{}, err
		}
	}
	for _, file := range s.Lists {
		if err := listDestroyed(all.destroyed, file); err != nil {
			return later{}, errs.Wrap(err, "cannot read the list of destroyed keys %s", file)
		}
	}
	return all, nil
}

// addLog adds what an audit log tells, after it was verified. The log of the node that
// made the backup must reach back to where it was then.
func (l *later) addLog(dir string, about backup.About) error {
	path := filepath.Join(filepath.Dir(filepath.Clean(dir)), auditKeyName)
	text, err := os.ReadFile(path)
	if err != nil {
		return errs.New(errs.NotFound, "cannot read the public key of the audit log in %s: %w", dir, err).WithHint("put %s beside the folder", auditKeyName)
	}
	key, err := parseAuditKey(text)
	if err != nil {
		return errs.Wrap(err, "public key %s", path)
	}
	want := audit.Expect{Key: key, AllowPruned: true}
	if string(text) == about.AuditKey {
		if want.Head, err = parseHead(about.AuditHead); err != nil {
			return err
		}
	}
	_, err = audit.Verify(dir, want, func(r audit.Record) error {
		if r.Outcome == audit.Success {
			l.add(r)
		}
		return nil
	})
	return err
}

func (l *later) add(r audit.Record) {
	application, ofApplication := strings.CutPrefix(r.Object, applicationFolder)
	credential := r.Details[credentialDetail]
	switch {
	case r.Action == destroyAgain || strings.HasSuffix(r.Action, ".Destroy"):
		if i := strings.LastIndex(r.Object, "key/"); i >= 0 {
			l.destroyed[r.Object[i+len("key/"):]] = r.Time
		}
	case !ofApplication:
	case r.Action == revokeAgain, r.Action == "KMSService/RevokeKMSCredential" && credential != "":
		l.revoked = append(l.revoked, revocation{application, credential, r.Time})
	case r.Action == "KMSService/DeleteKMSApplication":
		l.revoked = append(l.revoked, revocation{application, "", r.Time})
	}
}

func parseAuditKey(text []byte) (ed25519.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errs.New(errs.Invalid, "it holds no PEM block")
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, errs.New(errs.Invalid, "it holds no public key: %w", err)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, errs.New(errs.Invalid, "it is no Ed25519 key")
	}
	return key, nil
}

func parseHead(text string) (audit.Head, error) {
	seq, hash, _ := strings.Cut(text, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	var h audit.Hash
	if err == nil {
		err = h.UnmarshalText([]byte(hash))
	}
	if err != nil {
		return audit.Head{}, errs.New(errs.Corrupt, "the backup's place in the audit log: %w", err)
	}
	return audit.Head{Seq: n, Hash: h}, nil
}

func listDestroyed(all map[string]time.Time, file string) error {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return errs.New(errs.NotFound, "%w", err)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	now := time.Now().UTC().Truncate(time.Second)
	lines := bufio.NewScanner(io.Reader(f))
	for n := 1; lines.Scan(); n++ {
		id := strings.TrimSpace(lines.Text())
		if id == "" {
			continue
		}
		if u, err := uuid.Parse(id); err != nil || u.String() != id {
			return errs.New(errs.Invalid, "line %d: %.64q is no identifier of a key", n, id)
		}
		if _, ok := all[id]; !ok {
			all[id] = now
		}
	}
	return lines.Err()
}
