// Command strongroom encrypts QEMU/KVM virtual machines: it is the command line
// and, as subcommands, every role. This package only wires them together.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/term"

	"strongroom/client"
	"strongroom/internal/face/cli"
	"strongroom/internal/role/volumed"
)

func main() {
	// A volume process is started by a host at every power-on: it is no command
	// for people, and needs no command tree.
	if len(os.Args) > 1 && os.Args[1] == "volumed" {
		os.Exit(volumed.Main(os.Args[2:]))
	}
	os.Exit(run())
}

// run is main with an exit code, so that tests can run it in their process.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	return cli.Run(ctx, newEnv(), newRoles(), os.Args[1:])
}

func newEnv() *cli.Env {
	return &cli.Env{
		Stdin:        os.Stdin,
		Stdout:       os.Stdout,
		Stderr:       os.Stderr,
		Interactive:  term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())),
		ReadPassword: readPassword,
		Getenv:       os.Getenv,
		Now:          time.Now,
		NewClient:    client.New,
		Version:      version(),
	}
}

// readPassword reads a line from the terminal without echo.
func readPassword(prompt string) ([]byte, error) {
	os.Stderr.WriteString(prompt + ": ")
	defer os.Stderr.WriteString("\n")
	return term.ReadPassword(int(os.Stdin.Fd()))
}

// version is what the build recorded: a tag, or the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}
