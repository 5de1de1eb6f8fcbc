package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"strongroom/internal/face/cli"
)

// example is one command line in a command's help.
type example struct {
	root *cobra.Command
	args []string
}

// examples returns all command lines in the help of all commands.
func examples() []example {
	var all []example
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for line := range strings.Lines(strings.ReplaceAll(c.Example, "\\\n", " ")) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), " > ")
			line, _, _ = strings.Cut(line, " | ")
			if args := strings.Fields(line); len(args) > 0 && args[0] == "strongroom" && !strings.Contains(line, "$(") {
				all = append(all, example{cli.New(newEnv(), newRoles()), args[1:]})
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(cli.New(newEnv(), newRoles()))
	return all
}

// check finds the command and parses its flags and arguments, as running it
// does, without running it.
func (e example) check() error {
	cmd, rest, err := e.root.Find(e.args)
	if err != nil {
		return err
	}
	if cmd.HasSubCommands() {
		return fmt.Errorf("%s is no command that does something", cmd.CommandPath())
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	if err := cmd.ValidateRequiredFlags(); err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}
