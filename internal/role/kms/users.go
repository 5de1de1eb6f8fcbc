package kms

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

const (
	// FirstPasswordName is the file in the data folder with the password of the
	// first administrator.
	FirstPasswordName = "initial-admin-password"
	// renewRetry is the time between attempts to renew the API's certificate.
	renewRetry = time.Hour
)

// openUsers opens the users of the API, and with api_listen makes its certificate
// and, if there is nobody, the first administrator.
func (k *KMS) openUsers(ctx context.Context) (err error) {
	k.access, err = access.New(access.Config{DB: k.db, Hashing: k.cfg.hashing, BuiltIn: access.KMSRoles(), KeepUser: k.directory.CheckNoApprover, CheckObject: k.checkObject})
	if err != nil || k.cfg.APIListen == "" {
		return err
	}
	if k.credential, err = k.ca.Issue(k.apiIdentity(), k.apiNames()); err != nil {
		return err
	}
	path := filepath.Join(k.cfg.DataDir, FirstPasswordName)
	created, err := k.access.EnsureAdministrator(ctx, func(_ string, password []byte) error {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(password)
		return errors.Join(err, f.Sync(), f.Close())
	})
	if created {
		k.log.LogAttrs(ctx, slog.LevelInfo, "first administrator made; change the password and delete the file", slog.String("user", access.FirstUser), slog.String("file", path))
	}
	return err
}

// users serves users' sessions and their administration. What happens to them is
// in the audit log; a KMS has no events.
func (k *KMS) users() guard.Users {
	return guard.Users{Access: k.access, Version: Version, Post: func(ctx context.Context, n event.New) {
		if n.Type == event.UserLoginFailed {
			k.log.LogAttrs(ctx, slog.LevelWarn, "login refused", slog.String("target", n.Target), slog.String("peer", n.Args["address"]))
		}
	}}
}

func (k *KMS) apiIdentity() pki.Identity {
	fingerprint := pki.FingerprintOf(k.ca.Certificate())
	return pki.Identity{Cluster: fmt.Sprintf("%x", fingerprint[:8]), Role: pki.KMS, Name: "kms"}
}

// apiNames are the addresses under which the API is reached.
func (k *KMS) apiNames() []string {
	host, _, _ := net.SplitHostPort(k.cfg.APIAdvertise) // checked by the configuration
	return withLocal(host)
}

// keepCertificate renews the API's certificate when it is due, until ctx ends.
func (k *KMS) keepCertificate(ctx context.Context) error {
	return k.credential.KeepFresh(ctx, k.ca.Certificate(), renewRetry, func(_ context.Context, csr []byte) (*x509.Certificate, error) {
		return k.ca.IssueFromCSR(csr, k.apiIdentity(), k.apiNames())
	}, func(err error) {
		k.log.LogAttrs(ctx, slog.LevelError, "certificate of the API not renewed", slog.Any("err", err))
	})
}

// checkApprovers refuses approvers that could not approve what is asked of a
// group.
func (k *KMS) checkApprovers(ctx context.Context, group string, names []string) error {
	for _, name := range names {
		err := k.access.Check(ctx, access.Principal{Kind: access.UserPrincipal, Name: name}, "KeyServer.ApproveOperations", groupObject(group))
		if errs.KindOf(err) == errs.Denied {
			return errs.New(errs.Denied, "%.64s cannot be an approver: %w", name, err).WithReason(errs.ReasonOf(err)).
				WithHint("strongroom user grant %.64s --role KeyCustodian", name)
		}
		if err != nil {
			return errs.Wrap(err, "%.64s cannot be an approver", name)
		}
	}
	return nil
}

// approverCredential implements [approval.Credential].
func (k *KMS) approverCredential(ctx context.Context, tx *store.Tx, group, user string) (string, error) {
	return k.access.ApproverCredential(ctx, tx, user, "KeyServer.ApproveOperations", groupObject(group))
}
