package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"strongroom/internal/face/cli"
)

// TestMentionedCommandsExist looks up every command that a hint, an alarm or a
// document names: whoever follows it must not be told that there is no such
// command or flag.
func TestMentionedCommandsExist(t *testing.T) {
	t.Parallel()
	mentions := 0
	check := func(where, text string) {
		for _, words := range mentioned(text, strings.HasSuffix(strings.SplitN(where, ":", 2)[0], ".md")) {
			mentions++
			if err := exists(words); err != nil {
				t.Errorf("%s: strongroom %s: %v", where, strings.Join(words, " "), err)
			}
		}
	}
	for _, root := range []string{"../../internal", "../../api", "../../client"} {
		inStrings(t, root, check)
	}
	for _, root := range []string{"../../docs", "../../README.md"} {
		inDocuments(t, root, check)
	}
	if mentions < 50 {
		t.Errorf("only %d commands were found: the test does not see them", mentions)
	}
}

var mention = regexp.MustCompile(`(?:^|[\s"'(` + "`" + `/;:])strongroom((?: +[A-Za-z0-9%{}._:/=\[\]<>-]+)+)`)

// mentioned returns the words after "strongroom" of each command in text. Unless
// text is code, a word that is no noun of the command line is prose.
func mentioned(text string, code bool) [][]string {
	var all [][]string
	for _, m := range mention.FindAllStringSubmatch(text, -1) {
		words := strings.Fields(m[1])
		if internal := map[string]bool{"volumed": true, "native-backup": true}; internal[words[0]] {
			continue // started by the host; a label inside a file
		}
		if code && lowerCase.MatchString(words[0]) {
			all = append(all, words)
			continue
		}
		for _, c := range cli.New(newEnv(), newRoles()).Commands() {
			if c.Name() == words[0] {
				all = append(all, words)
			}
		}
	}
	return all
}

var lowerCase = regexp.MustCompile(`^[a-z-]+$`)

// exists checks the verb and the flags. What follows the last flag or argument
// may be prose.
func exists(words []string) error {
	cmd, rest, err := cli.New(newEnv(), newRoles()).Find(words)
	if err != nil {
		return err
	}
	if cmd.HasSubCommands() && len(rest) > 0 && lowerCase.MatchString(rest[0]) && !strings.HasPrefix(rest[0], "-") {
		return fmt.Errorf("%s has no %s", cmd.CommandPath(), rest[0])
	}
	for _, word := range rest {
		name, ok := strings.CutPrefix(word, "--")
		if !ok {
			continue
		}
		name, _, _ = strings.Cut(name, "=")
		if cmd.Flag(name) == nil && cmd.InheritedFlags().Lookup(name) == nil {
			return fmt.Errorf("%s has no flag --%s", cmd.CommandPath(), name)
		}
	}
	return nil
}

// inStrings yields the string literals of the Go files below root, without
// tests and generated code.
func inStrings(t *testing.T, root string, yield func(where, text string)) {
	t.Helper()
	walk(t, root, ".go", func(path string) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if ast.IsGenerated(file) {
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if text, err := strconv.Unquote(lit.Value); err == nil {
					yield(fset.Position(lit.Pos()).String(), text)
				}
			}
			return true
		})
	})
}

// inDocuments yields the code in the documents below root: indented or fenced
// lines, and what stands between backquotes.
func inDocuments(t *testing.T, root string, yield func(where, text string)) {
	t.Helper()
	inline := regexp.MustCompile("`([^`\n]+)`")
	walk(t, root, ".md", func(path string) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		fenced, n := false, 0
		for line := range strings.Lines(string(text)) {
			n++
			where := path + ":" + strconv.Itoa(n)
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				fenced = !fenced
			} else if fenced || strings.HasPrefix(line, "    ") {
				yield(where, line)
			} else {
				for _, m := range inline.FindAllStringSubmatch(line, -1) {
					yield(where, m[1])
				}
			}
		}
	})
}

func walk(t *testing.T, root, ext string, f func(path string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ext {
			f(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
