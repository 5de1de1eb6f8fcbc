package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// comments holds the comment of every service, method, message and field of the
// API by its name, such as "VMService.CreateVM" or "VM.power_state". Generated Go code has
// no comments, so they are taken from the proto files.
type comments map[string]string

var (
	protoBlock  = regexp.MustCompile(`^(?:service|message) (\w+) \{(\})?`)
	protoMethod = regexp.MustCompile(`^rpc (\w+)\(`)
	protoField  = regexp.MustCompile(`^(?:repeated |optional )?(?:map<\w+, \w+>|[\w.]+) (\w+) = \d+;`)
)

// readComments reads the proto files of a folder. They are formatted by buf: one
// declaration a line, its comment above it.
func readComments(dir string) (comments, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.proto"))
	if err != nil {
		return nil, err
	}
	all := make(comments)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		all.scan(string(text))
	}
	return all, nil
}

func (c comments) scan(text string) {
	var block string
	var above []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if comment, ok := strings.CutPrefix(line, "//"); ok {
			above = append(above, strings.TrimSpace(comment))
			continue
		}
		name := ""
		if m := protoBlock.FindStringSubmatch(line); m != nil {
			block = m[1]
			name = block
		} else if m := protoMethod.FindStringSubmatch(line); m != nil {
			name = block + "." + m[1]
		} else if m := protoField.FindStringSubmatch(line); m != nil {
			name = block + "." + m[1]
		}
		if name != "" {
			c[name] = strings.Join(above, " ")
		}
		above = nil
	}
}
