package access_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"testing"

	"strongroom/internal/control/access"
)

var update = flag.Bool("update", false, "write docs/reference/privileges.md anew")

// TestReference holds that docs/reference/privileges.md is made from the table.
func TestReference(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	b.WriteString("# Privileges\n\nMade from the table in `internal/control/access` by `go test ./internal/control/access -run TestReference -update`.\n" +
		"Names are vSphere's where it has them. The role Administrator has all; NoCryptoAdmin those marked \"yes\".\n\n" +
		"| privilege | allows to | NoCryptoAdmin |\n|---|---|---|\n")
	c, _ := open(t)
	roles, err := c.Roles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	noCrypto := map[access.Privilege]bool{}
	for _, r := range roles {
		if r.Name == access.NoCryptoAdmin {
			for _, p := range r.Privileges {
				noCrypto[p] = true
			}
		}
	}
	all, texts := access.Privileges()
	for _, p := range all {
		yes := ""
		if noCrypto[p] {
			yes = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", p, texts[p], yes)
	}
	const path = "../../../docs/reference/privileges.md"
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, b.Bytes()) {
		t.Errorf("%s is not up to date: run go test ./internal/control/access -run TestReference -update", path)
	}
}
