package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
	"strongroom/internal/role/kms"
)

func runKMS(ctx context.Context, configFile string) error {
	cfg, err := kms.LoadConfig(configFile)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return kms.Run(ctx, cfg, daemonLog())
}

func joinKMS(ctx context.Context, j cli.KMSJoin) error {
	cfg, err := kms.LoadConfig(j.ConfigFile)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return kms.Join(ctx, cfg, j.Server, j.Token)
}

// runKMSDev runs a KMS with all state in dir, and a first application that can
// use it at once.
func runKMSDev(ctx context.Context, dir, listen string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	cfg, err := kms.ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = %q\n", dir, listen))
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	logFile, err := os.OpenFile(filepath.Join(dir, "kms.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	log := slog.New(slog.NewTextHandler(logFile, nil))
	slog.SetDefault(log)
	return kms.RunReady(ctx, cfg, log, func(k *kms.KMS) error {
		if err := k.EnsureFirstApplication(ctx); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, `a KMS runs at %s; its log is %s
a first KMIP client has what it needs in %s: ca.pem, client.pem, client.key
next: strongroom --server unix:%s kms app ls
`, listen, logFile.Name(), dir, cfg.LocalSocket)
		return nil
	})
}
