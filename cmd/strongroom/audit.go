package main

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strconv"
	"strings"

	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
)

// verifyAudit checks an audit log with nothing but its files and a public key.
func verifyAudit(_ context.Context, v cli.AuditVerify) (cli.AuditReport, error) {
	key, err := publicKey(v.KeyFile)
	if err != nil {
		return cli.AuditReport{}, err
	}
	want := audit.Expect{Key: key, AllowPruned: true}
	if v.Head != "" {
		if want.Head, err = parseHead(v.Head); err != nil {
			return cli.AuditReport{}, err
		}
	}
	r, err := audit.Verify(v.Dir, want, nil)
	if err != nil {
		return cli.AuditReport{}, err
	}
	return cli.AuditReport{
		Log: r.Log, Files: r.Files, First: r.First, Last: r.Last, Head: fmt.Sprintf("%d:%s", r.Head.Seq, r.Head.Hash),
		Checkpoints: r.Checkpoints, Unsigned: r.Unsigned, TornBytes: r.TornBytes,
	}, nil
}

func publicKey(path string) (ed25519.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot read the public key: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errs.New(errs.Invalid, "%s holds no PEM block", path)
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%s holds no public key: %w", path, err)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, errs.New(errs.Invalid, "the public key in %s is not Ed25519", path)
	}
	return key, nil
}

func parseHead(text string) (audit.Head, error) {
	seq, hash, ok := strings.Cut(text, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	var h audit.Hash
	if ok && err == nil {
		err = h.UnmarshalText([]byte(hash))
	}
	if !ok || err != nil {
		return audit.Head{}, errs.New(errs.Invalid, `head %.100q is not "SEQ:HASH"`, text)
	}
	return audit.Head{Seq: n, Hash: h}, nil
}
