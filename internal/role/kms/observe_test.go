package kms

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestMetricsReference: docs/reference/metrics.md names each metric, and none that
// is not there.
func TestMetricsReference(t *testing.T) {
	t.Parallel()
	name := regexp.MustCompile("[\"`](strongroom_kms_[a-z_]+)[\"`]")
	names := func(file string) (found []string) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllSubmatch(text, -1) {
			found = append(found, string(m[1]))
		}
		return found
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	metrics := map[string]bool{}
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			for _, n := range names(f) {
				metrics[n] = true
			}
		}
	}
	if len(metrics) == 0 {
		t.Fatal("no metric was found in the source")
	}
	const reference = "../../../docs/reference/metrics.md"
	for _, n := range names(reference) {
		if !metrics[n] {
			t.Errorf("%s names %s, which is not there", reference, n)
		}
		delete(metrics, n)
	}
	for n := range metrics {
		t.Errorf("%s does not name %s", reference, n)
	}
}
