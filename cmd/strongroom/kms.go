package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"

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

// runKMSDev runs a KMS with all state in dir, and a first application and a first
// user that can use it at once.
func runKMSDev(ctx context.Context, dir, listen, apiListen string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if apiListen == "" {
		if apiListen, err = apiBeside(listen); err != nil {
			return err
		}
	}
	cfg, err := kms.ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = %q\napi_listen = %q\n", dir, listen, apiListen))
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
users: strongroom login --server https://%s --ca %s --user administrator
`, listen, logFile.Name(), dir, cfg.LocalSocket, apiListen, filepath.Join(dir, "ca.pem"))
		password := filepath.Join(dir, kms.FirstPasswordName)
		if _, err := os.Lstat(password); err == nil {
			fmt.Fprintf(os.Stderr, "the first password is in %s; change it (strongroom user password) and delete the file\n", password)
		}
		return nil
	})
}

// apiPortAbove is how far the port for users is above that for KMIP clients: 5700
// beside 5696.
const apiPortAbove = 4

// apiBeside returns an address for users on the host of listen: with the port that
// goes with that of listen, or a free one if that is taken.
func apiBeside(listen string) (string, error) {
	host, text, err := net.SplitHostPort(listen)
	if err != nil {
		return "", errs.New(errs.Invalid, "listen %q is not host:port", listen)
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", errs.New(errs.Invalid, "listen %q has no port number", listen)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.FormatUint(port+apiPortAbove, 10)))
	if err != nil {
		if l, err = net.Listen("tcp", net.JoinHostPort(host, "0")); err != nil {
			return "", errs.New(errs.Unavailable, "cannot listen for users: %w", err)
		}
	}
	defer l.Close()
	return l.Addr().String(), nil
}
