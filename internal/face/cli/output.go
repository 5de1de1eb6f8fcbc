package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"
)

const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

var outputFormats = []string{outputTable, outputJSON, outputYAML}

func (env *Env) checkOutput(cmd *cobra.Command) error {
	if !slices.Contains(outputFormats, env.flags.output) {
		return usageError(cmd, "--output %q: want one of %s", env.flags.output, strings.Join(outputFormats, ", "))
	}
	return nil
}

// column is one column of a table of Ts.
type column[T any] struct {
	title string
	text  func(T) string
}

// field is one line of the description of one object.
type field struct {
	title string
	text  string
}

// printList prints rows as a table, or all, which holds them, as JSON or YAML.
func printList[T any](env *Env, all any, rows []T, columns []column[T]) error {
	if env.flags.output != outputTable {
		return env.printObject(all)
	}
	w := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	fmt.Fprintln(w, strings.Join(titles, "\t"))
	for _, r := range rows {
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = cell(c.text(r))
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// printOne prints an object as lines of titles and texts, or as JSON or YAML.
func (env *Env) printOne(object any, fields []field) error {
	if env.flags.output != outputTable {
		return env.printObject(object)
	}
	w := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	for _, f := range fields {
		fmt.Fprintf(w, "%s:\t%s\n", f.title, cell(f.text))
	}
	return w.Flush()
}

// printDone prints the line of [Env.donef], or the object.
func (env *Env) printDone(object any, format string, args ...any) error {
	if env.flags.output != outputTable {
		return env.printObject(object)
	}
	env.donef(format, args...)
	return nil
}

func (env *Env) printObject(object any) error {
	text, err := encodeJSON(object)
	if err != nil {
		return err
	}
	if env.flags.output == outputYAML {
		if text, err = yaml.JSONToYAML(text); err != nil {
			return err
		}
	}
	_, err = env.Stdout.Write(text)
	return err
}

// encodeJSON returns object as indented JSON with a line end. A message of the
// API has the same field names and values as in the API's own JSON, all of
// them, also the empty ones.
func encodeJSON(object any) ([]byte, error) {
	text, err := json.Marshal(object)
	if m, ok := object.(proto.Message); ok {
		text, err = protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	}
	if err != nil {
		return nil, err
	}
	// Indent also removes the white space that protojson varies on purpose.
	var b bytes.Buffer
	if err := json.Indent(&b, text, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// cell is a text as it stands in a table.
func cell(s string) string {
	if s == "" {
		return "-"
	}
	return strings.ReplaceAll(printable(s), "\n", " ")
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// when is a point in time in the user's time zone.
func (env *Env) when(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().In(env.Now().Location()).Format(time.DateTime)
}

// printSecret prints a token that is shown once: alone on standard output, so
// that it can be redirected to a file, with a note for the person beside it.
func (env *Env) printSecret(object any, secret, note string) error {
	if env.flags.output != outputTable {
		return env.printObject(object)
	}
	env.resultf("%s", secret)
	env.notef("%s", note)
	return nil
}
