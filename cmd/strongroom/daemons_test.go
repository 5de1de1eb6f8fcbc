package main

import (
	"os"
	"reflect"
	"regexp"
	"testing"

	"strongroom/internal/role/controller"
	"strongroom/internal/role/host"
	"strongroom/internal/role/kms"
)

// TestExampleConfigs parses the documented configuration files, as they are and
// with all that is commented out in force. They must name every field.
func TestExampleConfigs(t *testing.T) {
	t.Parallel()
	for file, c := range map[string]struct {
		config reflect.Type
		parse  func([]byte) error
	}{
		"controller.toml": {reflect.TypeFor[controller.Config](), func(b []byte) error { _, err := controller.ParseConfig(b); return err }},
		"kms.toml":        {reflect.TypeFor[kms.Config](), func(b []byte) error { _, err := kms.ParseConfig(b); return err }},
		"host.toml":       {reflect.TypeFor[host.Config](), func(b []byte) error { _, err := host.ParseConfig(b); return err }},
	} {
		text, err := os.ReadFile("../../docs/reference/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.parse(text); err != nil {
			t.Errorf("%s as it is: %v", file, err)
		}
		all := regexp.MustCompile(`(?m)^#([a-z_]+ = |\[)`).ReplaceAll(text, []byte("$1"))
		if err := c.parse(all); err != nil {
			t.Errorf("%s with everything in force: %v", file, err)
		}
		for _, pattern := range fieldPatterns(c.config) {
			if !regexp.MustCompile(pattern).Match(all) {
				t.Errorf("%s has no line %s", file, pattern)
			}
		}
	}
}

// fieldPatterns match the lines that a configuration file with every field has.
func fieldPatterns(config reflect.Type) []string {
	var all []string
	for i := range config.NumField() {
		if !config.Field(i).IsExported() { // it is not of the file
			continue
		}
		name, field := config.Field(i).Tag.Get("toml"), config.Field(i).Type
		if field.Kind() == reflect.Pointer {
			field = field.Elem()
		}
		if field.Kind() == reflect.Struct {
			all = append(append(all, `(?m)^\[`+name+`\]$`), fieldPatterns(field)...)
		} else {
			all = append(all, `(?m)^`+name+` = `)
		}
	}
	return all
}
