// Command agent is the program inside a test guest: its first process, which
// loads modules, runs the steps and powers off, and the tool that the steps use
// to write data and to verify it later. Package guest puts it into an initramfs.
//
// Every result is a line on the serial console that starts with "STRONGROOM";
// see [strongroom/test/guest.ParseEvent].
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"
)

// command is what a step calls: agent NAME ARG...
type command struct {
	name  string
	usage string
	args  int // number of arguments
	run   func(ctx context.Context, args []string) error
}

func commands() []command {
	return []command{
		{"await", "await PATH: wait until PATH exists", 1, await},
		{"blank", "blank DEVICE: succeed if the first MiB is zero", 1, blank},
		{"write-files", "write-files FOLDER COUNT SIZE MARKER: new files, with checksums", 4, writeFiles},
		{"verify-files", "verify-files FOLDER: check all checksums below FOLDER", 1, verifyFiles},
		{"write-pattern", "write-pattern PATH OFFSET LENGTH SEED: fill a device or file", 4, writePattern},
		{"verify-pattern", "verify-pattern PATH OFFSET LENGTH SEED: check what write-pattern wrote", 4, verifyPattern},
		{"count", "count DEVICE DEVICE: tell what it counted last time, and count on, on the first and then the second, until SIGTERM", 2, count},
		{"churn", "churn FOLDER SIZE ROUNDS: rewrite blocks of a file, then check all; ROUNDS 0: until SIGTERM", 3, churn},
	}
}

func main() {
	if os.Getpid() == 1 {
		runInit()
		return
	}
	// Steps get SIGTERM when the power button is pressed.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	if err := dispatch(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

func dispatch(ctx context.Context, args []string) error {
	var usage strings.Builder
	for _, c := range commands() {
		if len(args) > 0 && args[0] == c.name && len(args)-1 == c.args {
			return c.run(ctx, args[1:])
		}
		fmt.Fprintf(&usage, "\n  agent %s", c.usage)
	}
	return fmt.Errorf("unknown command or wrong number of arguments; there are:%s", usage.String())
}

// note prints a line of result for the step that runs.
func note(format string, args ...any) {
	report("note", os.Getenv("STRONGROOM_STEP"), fmt.Sprintf(format, args...))
}

// report prints one event. A single write keeps it in one piece.
func report(kind, step, text string) {
	os.Stdout.WriteString(strings.TrimRight("STRONGROOM "+kind+" "+step+" "+text, " ") + "\n")
}
