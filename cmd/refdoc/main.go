// Command refdoc writes the reference that is made from the code: the pages and
// man pages of the command line, the API with the privilege of each method, and
// the privileges. It is run by `go generate` with the folder docs/reference; a
// test fails if what lies there is not what it would write.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"strongroom/internal/face/cli"
)

//go:generate go run . ../../docs/reference

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: refdoc DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "refdoc:", err)
		os.Exit(1)
	}
}

// generatedDirs are the folders that hold generated files only.
var generatedDirs = []string{"cli", "man"}

// write replaces what was generated below dir.
func write(dir string) error {
	pages, err := generate(filepath.Join(dir, "..", "..", "api", "strongroom", "v1"))
	if err != nil {
		return err
	}
	for _, d := range generatedDirs {
		if err := os.RemoveAll(filepath.Join(dir, d)); err != nil {
			return err
		}
	}
	for name, text := range pages {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// generate returns the contents of all generated files by their names below
// docs/reference. protos is the folder of the API's proto files.
func generate(protos string) (map[string][]byte, error) {
	pages := make(map[string][]byte)
	if err := commands(pages); err != nil {
		return nil, err
	}
	comments, err := readComments(protos)
	if err != nil {
		return nil, err
	}
	pages["api.md"] = apiPage(comments)
	pages["privileges.md"] = privilegesPage()
	pages["kmip.md"] = kmipPage()
	return pages, nil
}

// commands adds a page and a man page for every command.
func commands(pages map[string][]byte) error {
	root := cli.New(&cli.Env{Version: "0.1.0"}, cli.Roles{})
	root.InitDefaultHelpCmd()
	var index strings.Builder
	index.WriteString("# Command line\n\n" +
		"Generated from the commands' own help. Conventions: results go to standard output, all else to\n" +
		"standard error; `-o json` has the field names of the [API](../api.md); a command that is hard to\n" +
		"undo asks, unless `--yes` is given.\n\n" +
		"| Command | |\n|---|---|\n")
	var walk func(c *cobra.Command) error
	walk = func(c *cobra.Command) error {
		if c.Name() == "help" || c.Name() == "completion" || c.Hidden {
			return nil
		}
		name := strings.ReplaceAll(c.CommandPath(), " ", "_")
		var page, man bytes.Buffer
		if err := doc.GenMarkdownCustom(c, &page, func(link string) string { return link }); err != nil {
			return err
		}
		// The date is that of the reference, not of the build: the same source
		// gives the same page.
		date := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC)
		header := &doc.GenManHeader{Title: strings.ToUpper(strings.ReplaceAll(name, "_", "-")), Section: "1", Source: "Strongroom", Manual: "Strongroom", Date: &date}
		if err := doc.GenMan(c, header, &man); err != nil {
			return err
		}
		pages["cli/"+name+".md"] = page.Bytes()
		pages["man/"+strings.ReplaceAll(name, "_", "-")+".1"] = man.Bytes()
		if c.Runnable() && !c.HasSubCommands() {
			fmt.Fprintf(&index, "| [%s](%s.md) | %s |\n", c.CommandPath(), name, c.Short)
		}
		for _, sub := range c.Commands() {
			if err := walk(sub); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk(root); err != nil {
		return err
	}
	pages["cli/README.md"] = []byte(index.String())
	return nil
}
