package kms

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/shamir"
	"strongroom/internal/errs"
	"strongroom/internal/keys/hsm"
	"strongroom/internal/keys/rootkey"
	"strongroom/internal/keys/tpm"
)

// rootName is the root file: docs/spec/root-key.md.
const rootName = "kms.root"

// unlocked is a vault's lock and the root key that opened it.
type unlocked struct {
	lock   *rootkey.Lock
	root   *keymem.Key
	people bool // they opened it
	wrong  int  // attempts of theirs that failed
}

// unlock gets the root key, or makes it the first time. If people must give it,
// a sealed KMS serves until they did.
func unlock(ctx context.Context, cfg Config, log *slog.Logger) (_ *unlocked, err error) {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, err
	}
	if err := makeRoot(cfg); err != nil {
		return nil, err
	}
	path := filepath.Join(cfg.DataDir, vaultName)
	u := &unlocked{}
	u.lock, err = rootkey.Load(filepath.Join(cfg.DataDir, rootName), rootkey.Source{KeyFile: &rootkey.KeyFile{Path: cfg.KeyFile}}, func(root *keymem.Key) error {
		content, err := sealed.ReadFile(path, root, vaultContext)
		if errors.Is(err, fs.ErrNotExist) { // the first start
			return nil
		}
		if err == nil {
			content.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	u.root, err = u.lock.Open(ctx)
	switch {
	case errors.Is(err, rootkey.ErrSealed):
		err = u.serveSealed(ctx, cfg, log, nil)
	case err != nil && u.refused(err):
		err = u.serveSealed(ctx, cfg, log, err)
	}
	if err == nil {
		return u, nil
	}
	u.lock.Close()
	switch {
	case errs.KindOf(err) == errs.NotFound:
		err = errs.New(errs.NotFound, "cannot open the vault: %w", err).WithHint("put the key file back from a backup; without it %s cannot be read", vaultName)
	case errors.Is(err, sealed.ErrWrongKey):
		err = errs.New(errs.Corrupt, "cannot open the vault: %w", err).
			WithHint("see that the root key is the one that belongs to %s, or put both back from a backup", path)
	}
	return nil, err
}

// refused reports whether err says that a TPM or an HSM is away, or does not give
// the root key: nothing is wrong with what is here.
func (u *unlocked) refused(err error) bool {
	device := slices.ContainsFunc(u.lock.Sources(), func(s rootkey.Source) bool { return s.TPM != nil || s.HSM != nil })
	return device && !errors.Is(err, sealed.ErrWrongKey) && slices.Contains([]errs.Kind{errs.Unavailable, errs.NotFound, errs.Denied, errs.Locked}, errs.KindOf(err))
}

// makeRoot makes a key file the first time.
func makeRoot(cfg Config) error {
	path := filepath.Join(cfg.DataDir, vaultName)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The CA is made after the vault.
	if _, err := os.Lstat(filepath.Join(cfg.DataDir, pkiName)); !errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Corrupt, "cannot open the vault: %s is missing, although this KMS has run before", path).
			WithHint("put %s back from a backup: without it no key in the database can be read", vaultName)
	}
	if _, err := os.Lstat(cfg.KeyFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	root, err := keyfile.Create(cfg.KeyFile, rootkey.Size)
	if err != nil {
		return errs.Wrap(err, "cannot open the vault")
	}
	return root.Close()
}

// recordUnsealed puts on record that people opened the vault, which could not be
// done before it was open.
func (k *KMS) recordUnsealed(u *unlocked) error {
	if !u.people {
		return nil
	}
	record := func(outcome string) error {
		_, err := k.audit.Append(audit.Entry{Actor: "local administrator", Action: "KMSRootService/UnsealKMS", Object: "kms", Outcome: outcome})
		return err
	}
	for range min(u.wrong, wrongMax) {
		if err := record(audit.Denied); err != nil {
			return err
		}
	}
	if err := record(audit.Success); err != nil {
		return err
	}
	return k.audit.Flush(k.audit.Head())
}

// sealOf tells about a lock.
func sealOf(lock *rootkey.Lock, sealed bool) *connect.Response[strongroomv1.KMSSeal] {
	out := &strongroomv1.KMSSeal{Sealed: sealed, Given: uint32(lock.Given())}
	for _, s := range lock.Sources() {
		out.Sources = append(out.Sources, &strongroomv1.KMSRootSource{Description: s.String(), People: uint32(s.People())})
	}
	return connect.NewResponse(out)
}

func (a *api) GetKMSSeal(context.Context, *connect.Request[strongroomv1.GetKMSSealRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	return sealOf(a.k.lock, false), nil
}

func (a *api) UnsealKMS(context.Context, *connect.Request[strongroomv1.UnsealKMSRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	return nil, errs.New(errs.InvalidState, "the KMS is not sealed")
}

func (a *api) SetKMSRoot(ctx context.Context, req *connect.Request[strongroomv1.SetKMSRootRequest]) (*connect.Response[strongroomv1.SetKMSRootResponse], error) {
	begin, err := beginOf(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	shares, err := a.k.lock.Begin(begin)
	if err != nil {
		return nil, err
	}
	defer shamir.Close(shares)
	out := &strongroomv1.SetKMSRootResponse{}
	for _, s := range shares {
		text, err := s.Text()
		if err != nil {
			return nil, err
		}
		out.Shares = append(out.Shares, append([]byte(nil), text.Bytes()...)) // the answer holds them, once
		text.Close()
	}
	return connect.NewResponse(out), nil
}

// beginOf returns what makes the source that a request asks for.
func beginOf(ctx context.Context, m *strongroomv1.SetKMSRootRequest) (func(root *keymem.Key) (rootkey.Source, []shamir.Share, error), error) {
	switch s := m.GetSource().(type) {
	case *strongroomv1.SetKMSRootRequest_KeyFile:
		return func(root *keymem.Key) (rootkey.Source, []shamir.Share, error) {
			source, err := rootkey.NewKeyFile(s.KeyFile.GetPath(), root)
			return source, nil, err
		}, nil
	case *strongroomv1.SetKMSRootRequest_Passphrase:
		return func(root *keymem.Key) (rootkey.Source, []shamir.Share, error) {
			passphrase, err := takeSecret(s.Passphrase.GetPassphrase())
			if err != nil {
				return rootkey.Source{}, nil, err
			}
			defer passphrase.Close()
			source, err := rootkey.NewPassphrase(passphrase, root, rootkey.DefaultCost())
			return source, nil, err
		}, nil
	case *strongroomv1.SetKMSRootRequest_Shares:
		return func(root *keymem.Key) (rootkey.Source, []shamir.Share, error) {
			return rootkey.NewShares(int(s.Shares.GetThreshold()), int(s.Shares.GetCount()), root)
		}, nil
	case *strongroomv1.SetKMSRootRequest_Tpm:
		var pcrs []int
		for _, n := range s.Tpm.GetPcrs() {
			pcrs = append(pcrs, int(min(n, tpm.PCRMax+1))) // too large stays so
		}
		return func(root *keymem.Key) (rootkey.Source, []shamir.Share, error) {
			source, err := rootkey.NewTPM(ctx, s.Tpm.GetDevice(), pcrs, root)
			return source, nil, err
		}, nil
	case *strongroomv1.SetKMSRootRequest_Hsm:
		key := hsm.Key{Module: s.Hsm.GetModule(), Token: s.Hsm.GetToken(), Label: s.Hsm.GetKey(), PINFile: s.Hsm.GetPinFile()}
		return func(root *keymem.Key) (rootkey.Source, []shamir.Share, error) {
			source, err := rootkey.NewHSM(ctx, key, root)
			return source, nil, err
		}, nil
	}
	return nil, errs.New(errs.Invalid, "the request names no source of a root key")
}

// takeSecret takes what people gave out of a request.
func takeSecret(b []byte) (*keymem.Key, error) {
	if len(b) == 0 || len(b) > rootkey.PassphraseMax {
		clear(b)
		return nil, errs.New(errs.Invalid, "a passphrase or share of 1 to %d bytes is needed", rootkey.PassphraseMax)
	}
	return keymem.Take(b)
}

func (a *api) ConfirmKMSRoot(ctx context.Context, req *connect.Request[strongroomv1.ConfirmKMSRootRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	var secrets []*keymem.Key
	defer func() {
		for _, s := range secrets {
			s.Close()
		}
	}()
	if len(req.Msg.GetSecrets()) > rootkey.SharesMax {
		return nil, errs.New(errs.Invalid, "more than %d secrets", rootkey.SharesMax)
	}
	for _, b := range req.Msg.GetSecrets() {
		s, err := takeSecret(b)
		if err != nil {
			return nil, err
		}
		secrets = append(secrets, s)
	}
	if err := a.k.lock.Confirm(ctx, secrets, a.k.secrets.vault.Rekey); err != nil {
		return nil, err
	}
	a.k.log.InfoContext(ctx, "the root key has another source", slog.String("source", a.k.lock.Sources()[0].String()))
	return sealOf(a.k.lock, false), nil
}
