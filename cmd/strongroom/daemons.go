package main

import (
	"context"
	"log/slog"
	"os"
	"strings"

	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
	"strongroom/internal/role/controller"
	"strongroom/internal/role/host"
)

// daemonLog is where roles that run as services log to: standard error, one
// line an event, for the journal.
func daemonLog() *slog.Logger {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	slog.SetDefault(log)
	return log
}

func runController(ctx context.Context, configFile string) error {
	cfg, err := controller.LoadConfig(configFile)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return controller.Run(ctx, cfg, daemonLog())
}

func runHost(ctx context.Context, configFile string) error {
	cfg, err := host.LoadConfig(configFile)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return host.Run(ctx, cfg, daemonLog())
}

func joinHost(ctx context.Context, j cli.HostJoin) error {
	cfg, err := host.LoadConfig(j.ConfigFile)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	name := j.Name
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return err
		}
		name, _, _ = strings.Cut(name, ".")
	}
	address, ok := strings.CutPrefix(j.Controller, "https://")
	if !ok {
		return errs.New(errs.Invalid, `controller %.128q is not "https://HOST:PORT"`, j.Controller)
	}
	return host.Join(ctx, cfg, host.JoinRequest{Controller: address, Token: j.Token, Name: name})
}
