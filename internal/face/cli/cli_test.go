package cli_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestOutput holds the formats that scripts rely on: JSON and YAML must not
// change but by new fields.
func TestOutput(t *testing.T) {
	t.Parallel()
	for _, command := range []string{
		"vm ls", "vm show web-1", "vm show web-2", "vm show old-1", "cluster ls", "host ls", "datastore ls",
		"provider ls", "provider show kp-1", "provider usage kp-1", "provider orphans kms-1", "task ls", "event ls",
		"event ls --follow", "alarm ls", "health", "user ls", "role ls", "whoami",
		"vm snapshot ls web-1", "vm snapshot show web-1 installed", "vm snapshot show web-1 upgraded",
		"vm encrypt web-1 plain-1", "vm encrypt web-1 --no-wait", "vm encrypt web-1 --quiet",
		"host join-token --cluster lab",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			var got strings.Builder
			for _, format := range []string{"table", "json", "yaml"} {
				stdout, stderr, code := s.run(t, append(strings.Fields(command), "-o", format)...)
				if code != 0 {
					t.Fatalf("exit code %d: %s", code, stderr)
				}
				got.WriteString("$ strongroom " + command + " -o " + format + "\n" + strings.ReplaceAll(stdout, s.dir, "DIR"))
				if format == "json" && command != "event ls --follow" && !json.Valid([]byte(stdout)) {
					t.Errorf("not JSON: %s", stdout)
				}
				if strings.ContainsRune(stdout, '\x1b') {
					t.Errorf("-o %s lets control characters through: %q", format, stdout)
				}
			}
			golden(t, filepath.Join("testdata", "output", strings.ReplaceAll(command, " ", "_")+".txt"), sortTwo(command, got.String()))
		})
	}
}

// sortTwo puts lines of two VMs, which are done in any order, into one order.
func sortTwo(command, text string) string {
	if command != "vm encrypt web-1 plain-1" {
		return text
	}
	a, b := "plain-1 encrypted\n", "web-1 encrypted\n"
	return strings.Replace(text, a+b, b+a, 1)
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (to accept: go test -update):\n%s", file, diff)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args   string
		fail   error
		code   int
		stderr string
	}{
		{"vm show nope", nil, 3, "strongroom: cannot show the VM: no VM \"nope\"\nhint: strongroom vm ls\n"},
		{"vm encrypt web-2", nil, 5, "strongroom: cannot encrypt VM web-2: no key for web-2\nhint: strongroom provider import FILE.p12\n"},
		{"vm power-on x", errs.New(errs.Denied, "cannot power on x: no privilege"), 4, "strongroom: cannot power on x: no privilege\n"},
		{"vm power-on x", errs.New(errs.Unavailable, "host host-1 does not answer"), 6, "strongroom: cannot power on VM x: host host-1 does not answer\n"},
		{"vm power-on x", errs.New(errs.InvalidState, "it is on"), 1, "strongroom: cannot power on VM x: it is on\n"},
		{"vm power-on x", errs.New(errs.NoSpace, "full\x1b[2J"), 1, "strongroom: cannot power on VM x: full?[2J\n"},
		{"vm power-on a b", errs.New(errs.NotFound, "no such VM"), 3, "strongroom: cannot power on VM a: no such VM\nstrongroom: cannot power on VM b: no such VM\n"},
		{"vm power-on --server unix:/nonexistent/s a", nil, 6, "strongroom: cannot reach unix:/nonexistent/s: "},
		{"vm power-on", nil, 2, "strongroom: strongroom vm power-on needs a VM's name\nhint: strongroom vm power-on --help\n"},
		{"vm lss", nil, 2, "strongroom: strongroom vm has no command \"lss\"\nhint: strongroom vm ls\n"},
		{"frobnicate", nil, 2, "strongroom: strongroom has no command \"frobnicate\"\nhint: strongroom --help\n"},
		{"vm", nil, 2, "strongroom: strongroom vm needs a command\n"},
		{"vm ls -o xml", nil, 2, "strongroom: --output \"xml\": want one of table, json, yaml\n"},
		{"vm ls --nope", nil, 2, "strongroom: unknown flag: --nope\nhint: strongroom vm ls --help\n"},
		{"vm ls extra", nil, 2, "strongroom: strongroom vm ls takes no argument, got \"extra\"\n"},
		{"vm create x --disk 10G", nil, 2, "strongroom: required flag(s) \"datastore\" not set\n"},
		{"vm create x --datastore d --disk 10GB", nil, 2, "strongroom: cannot create the VM: disk \"10GB\": size \"10GB\": want "},
		{"vm create x --datastore d --disk image=a", nil, 2, "strongroom: cannot create the VM: disk \"image=a\": image and format go together\n"},
		{"vm create x --datastore d --provider kp-1", nil, 2, "--provider needs --encrypt"},
		{"vm encrypt x --wait --no-wait", nil, 2, "strongroom: "},
		{"vm rekey --all web-1", nil, 2, "strongroom: --all and the names of VMs exclude each other\n"},
		{"vm rekey --all --rate 1M", nil, 2, "--rate without --deep changes the rekey of the VMs named, and nothing else\n"},
		{"vm rekey", nil, 2, "strongroom: strongroom vm rekey needs a VM's name, or --all\n"},
		{"vm delete web-1", nil, 2, "strongroom: cannot delete the VMs: this needs a confirmation, and there is no terminal to ask: Delete web-1 with all data?\nhint: add --yes\n"},
		{"vm snapshot revert a b", nil, 2, "needs a confirmation, and there is no terminal to ask: Revert a to snapshot b? What its disks hold now is lost.\nhint: add --yes\n"},
		{"vm snapshot delete a b", nil, 2, "needs a confirmation, and there is no terminal to ask: Delete snapshot b of a? It cannot be undone.\nhint: add --yes\n"},
		{"vm snapshot consolidate a", nil, 2, "needs a confirmation, and there is no terminal to ask: "},
		{"vm snapshot show a b", nil, 3, "VM a has no snapshot \"b\"\nhint: strongroom vm snapshot ls a\n"},
		{"vm snapshot create a", nil, 2, "strongroom vm snapshot create needs the VM's name and the snapshot's, got 1 arguments\n"},
		{"provider default", nil, 2, "needs either the provider's name or --clear"},
		{"login --user u", nil, 2, "a password is needed, and there is no terminal to ask\nhint: use --password-file FILE\n"},
		{"vm register x --datastore d", nil, 2, "RegisterVM is not implemented"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			s.fail = tt.fail
			stdout, stderr, code := s.run(t, strings.Fields(tt.args)...)
			if code != tt.code || !strings.Contains(stderr, tt.stderr) || !strings.HasPrefix(stderr, "strongroom: ") && !strings.HasPrefix(stderr, "vm/") {
				t.Errorf("exit code %d, want %d; stderr:\n%s\nwant in it:\n%s", code, tt.code, stderr, tt.stderr)
			}
			if stdout != "" {
				t.Errorf("stdout is for results: %q", stdout)
			}
		})
	}
}

func TestCalls(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args  string
		calls []string
	}{
		{"vm create a --datastore ds-1 --memory 2G --disk 1G --disk image=i,format=raw,plain --encrypt --provider kp-2", []string{`Create a on ds-1 encrypt true "kp-2" memory 2048 disks 2`}},
		{"vm power-off a --hard --timeout 7", []string{"PowerOff a true 7"}},
		{"vm encrypt a --disk disk-1 --disk disk-2 --provider kp-2", []string{"Encrypt a kp-2[disk-1 disk-2]"}},
		{"vm encrypt --all", []string{"Encrypt plain-1\x1b[31m []"}},
		{"vm rekey --all --provider kp-2 --no-wait", []string{"Rekey old-1 kp-2 false", "Rekey web-1 kp-2 false", "Rekey web-2 kp-2 false"}},
		{"vm encrypt --all --in-place --rate 1M", []string{"Encrypt old-1 [] in place at 1048576", "Encrypt plain-1\x1b[31m [] in place at 1048576"}},
		{"vm rekey a b --deep", []string{"Rekey a  true", "Rekey b  true"}},
		{"disk resize a disk-0 --size 2G", []string{"Resize a disk-0 2147483648"}},
		{"vm clone a b", []string{`Clone a b "" "" recrypt false`}},
		{"vm clone a b --datastore ds-2 --provider kp-2 --recrypt", []string{`Clone a b "ds-2" "kp-2" recrypt true`}},
		{"vm snapshot create a b", []string{`CreateSnapshot a b ""`}},
		{"vm snapshot create a b --description c", []string{`CreateSnapshot a b "c"`}},
		{"vm snapshot revert a b --yes", []string{"RevertToSnapshot a b"}},
		{"vm snapshot rename a b c", []string{"RenameSnapshot a b c described as before"}},
		{"vm snapshot rename a b b --description d", []string{`RenameSnapshot a b b described "d"`}},
		{"vm snapshot rename a b c --description=", []string{`RenameSnapshot a b c described ""`}},
		{"vm snapshot delete a b --yes", []string{"DeleteSnapshot a b"}},
		{"vm snapshot consolidate a c --yes", []string{"ConsolidateSnapshots a ", "ConsolidateSnapshots c "}},
		{"vm set a --runs controller --runs provider:kms-1", []string{`MarkVM a ["controller" "provider:kms-1"]`}},
		{"vm set a --runs none", []string{"MarkVM a []"}},
		{"vm encrypt a --allow-circular", []string{"Encrypt a [] circular"}},
		{"vm rekey a --allow-circular", []string{"Rekey a  false circular"}},
		{"vm clone a b --allow-circular", []string{`Clone a b "" "" recrypt false circular`}},
		{"vm create a --datastore ds-1 --encrypt --runs controller --allow-circular", []string{`Create a on ds-1 encrypt true "" memory 1024 disks 0 runs ["controller"] circular`}},
		{"disk fill a", []string{"Fill a []"}},
		{"disk fill a disk-0 disk-1", []string{"Fill a [disk-0 disk-1]"}},
		{"vm rekey a --deep --rate 100M", []string{"Rekey a  true at 104857600"}},
		{"vm decrypt a -y", []string{"Decrypt a []"}},
		{"provider default --clear", []string{`SetDefaultProvider ""`}},
		{"provider delete kp-1 --yes", []string{"DeleteProvider kp-1"}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			if _, stderr, code := s.run(t, strings.Fields(tt.args)...); code != 0 {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			if got := s.seen(); !slices.Equal(got, tt.calls) {
				t.Errorf("calls %q, want %q", got, tt.calls)
			}
		})
	}
}

// TestOthersGoOn: one VM of several fails, the rest is done.
func TestOthersGoOn(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	stdout, stderr, code := s.run(t, "vm", "rekey", "web-1", "web-2", "web-3")
	if code != 5 || !strings.Contains(stdout, "web-1 rekeyed\n") || !strings.Contains(stdout, "web-3 rekeyed\n") || strings.Contains(stdout, "web-2") {
		t.Errorf("exit code %d, stdout %q", code, stdout)
	}
	if !strings.Contains(stderr, "vm/web-1: copying disk-0: 25% of 4 MiB\n") || !strings.Contains(stderr, "cannot rekey VM web-2: no key") {
		t.Errorf("stderr %q", stderr)
	}
}

// TestRekeyRate: a rate by itself changes the rekeys under way.
func TestRekeyRate(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	stdout, stderr, code := s.run(t, "vm", "rekey", "web-1", "web-2", "--rate", "20M")
	if code != 0 || stdout != "rekey of web-1: 20 MiB a second\nrekey of web-2: 20 MiB a second\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	if stdout, _, code := s.run(t, "vm", "rekey", "web-1", "--rate", "0"); code != 0 || stdout != "rekey of web-1: without a bound\n" {
		t.Errorf("exit code %d, stdout %q", code, stdout)
	}
	if got, want := s.seen(), []string{"SetRekeyRate web-1 0", "SetRekeyRate web-1 20971520", "SetRekeyRate web-2 20971520"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
}

func TestBars(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.person = true
	stdout, stderr, code := s.run(t, "vm", "rekey", "web-1", "--deep")
	if code != 0 || stdout != "web-1 rekeyed\n" {
		t.Errorf("exit code %d, stdout %q", code, stdout)
	}
	if !strings.Contains(stderr, "copying disk-0") || !strings.Contains(stderr, "/ 4.0 MiB") {
		t.Errorf("no bar: %q", stderr)
	}
}

func TestConfirm(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.person = true
	for answer, code := range map[string]int{"y\n": 0, "yes\n": 0, "n\n": 1, "\n": 1, "": 1} {
		s.stdin = answer
		if _, stderr, got := s.run(t, "provider", "delete", "kp-1"); got != code || !strings.Contains(stderr, "used by web-1. Backups and replicas elsewhere may need it too") {
			t.Errorf("answer %q: exit code %d, stderr %q", answer, got, stderr)
		}
		if calls := s.seen(); (len(calls) == 1) != (code == 0) {
			t.Errorf("answer %q: calls %q", answer, calls)
		}
	}
}

func TestLogin(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	pw := filepath.Join(s.dir, "pw")
	if err := os.WriteFile(pw, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := s.run(t, "login", "--user", "alice", "--password-file", pw)
	if code != 0 || !strings.Contains(stdout, "as alice until 2026-11-23 05:05:06\n") {
		t.Fatalf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	server := s.env["STRONGROOM_SERVER"]
	delete(s.env, "STRONGROOM_SERVER") // from now on it is remembered
	if stdout, _, code := s.run(t, "whoami"); code != 0 || !strings.Contains(stdout, server) {
		t.Errorf("exit code %d, stdout %q", code, stdout)
	}
	s.seen()
	if _, stderr, code := s.run(t, "logout"); code != 0 {
		t.Errorf("logout: %d, %s", code, stderr)
	}
	if got := s.seen(); !slices.Equal(got, []string{"Logout Bearer session-1"}) {
		t.Errorf("calls %q", got)
	}
	if _, stderr, code := s.run(t, "logout"); code != 1 || !strings.Contains(stderr, "nobody is logged in") {
		t.Errorf("second logout: %d, %s", code, stderr)
	}

	s.person, s.passwords = true, []string{"wrong"}
	if _, stderr, code := s.run(t, "login"); code != 4 || !strings.Contains(stderr, "Password of alice") {
		t.Errorf("wrong password: exit code %d, %s", code, stderr)
	}
}

func TestBackup(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	out := filepath.Join(s.dir, "kp-1.p12")

	s.person, s.passwords = true, []string{"correct horse", "correct house"}
	if _, stderr, code := s.run(t, "provider", "backup", "kp-1", "--out", out); code != 2 || !strings.Contains(stderr, "the two passwords differ") {
		t.Errorf("mistyped password: %d, %s", code, stderr)
	}
	s.passwords = []string{"", ""}
	if _, stderr, code := s.run(t, "provider", "backup", "kp-1", "--out", out); code != 2 || !strings.Contains(stderr, "hint: for a backup that anybody can open, use --no-password") {
		t.Errorf("empty password: %d, %s", code, stderr)
	}
	if calls := s.seen(); len(calls) != 0 {
		t.Errorf("exported already: %q", calls)
	}

	s.passwords = []string{"correct horse", "correct horse"}
	stdout, stderr, code := s.run(t, "provider", "backup", "kp-1", "--out", out)
	if code != 0 || stdout != "provider kp-1 backed up to "+out+", Active\n" {
		t.Fatalf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	if !strings.Contains(stderr, "is lost for ever") || !strings.Contains(stderr, "copy at another site") {
		t.Errorf("it is not said what depends on the file: %q", stderr)
	}
	if got, want := s.seen(), []string{"ConfirmProviderBackup kp-1", `ExportProvider kp-1 password "correct horse"`}; !slices.Equal(got, want) {
		t.Errorf("calls %q", got)
	}
	info, err := os.Stat(out)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if text, _ := os.ReadFile(out); string(text) != "a backup" {
		t.Errorf("the file holds %q", text)
	}

	if _, stderr, code := s.run(t, "provider", "backup", "kp-1", "--out", out, "--no-password"); code != 1 || !strings.Contains(stderr, "exists") {
		t.Errorf("second backup: %d, %s", code, stderr)
	}
	other := filepath.Join(s.dir, "other.p12")
	if _, stderr, code := s.run(t, "provider", "backup", "kp-1", "--out", other, "--no-password"); code != 0 || !strings.Contains(stderr, "whoever reads the file has the key") {
		t.Errorf("without password: %d, %s", code, stderr)
	}
	if _, _, code := s.run(t, "provider", "backup", "kp-1", "--out", filepath.Join(s.dir, "no", "such", "dir"), "--no-password"); code != 2 {
		t.Errorf("into a folder that is not there: %d", code)
	}
}

func TestImport(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	file := filepath.Join(s.dir, "kp-1.p12")
	if err := os.WriteFile(file, []byte("a backup"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := s.run(t, "provider", "import", file); code != 4 || !strings.Contains(stderr, "protected by a password") {
		t.Errorf("without a password: %d, %s", code, stderr)
	}
	s.person, s.passwords = true, []string{"correct horse"}
	stdout, stderr, code := s.run(t, "provider", "import", file)
	if code != 0 || stdout != "provider kp-1 imported, Active\nweb-2 unlocked\n" || !strings.Contains(stderr, "Password of "+file) {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	s.passwords = []string{"correct horse"}
	if stdout, _, code := s.run(t, "provider", "import", file, "--dry-run"); code != 0 || !strings.Contains(stdout, "exported 2026-11-23 03:05:06, password yes: can be imported\n") {
		t.Errorf("dry run: %d, %q", code, stdout)
	}
	if _, _, code := s.run(t, "provider", "import", filepath.Join(s.dir, "nope")); code != 3 {
		t.Errorf("no file: exit code %d", code)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	for args, want := range map[string]string{
		"vm rekey ":              "web-1\nweb-2\n",
		"vm rekey web-1 ":        "web-2\n",
		"vm rekey --provider ":   "kp-1\n",
		"provider show ":         "kp-1\n",
		"provider show kp-1 ":    ":",
		"vm create --datastore ": "ds-1\n",
		"vm ls -o ":              "table\njson\nyaml\n",
		"task wait ":             "t-1\nt-2\n",
	} {
		fields := strings.Split(args, " ")
		stdout, _, code := s.run(t, append([]string{"__complete"}, fields...)...)
		if code != 0 || !strings.HasPrefix(stdout, want) {
			t.Errorf("%q completes to %q", args, stdout)
		}
	}
}

// TestEveryCommand holds what every command must have.
func TestEveryCommand(t *testing.T) {
	t.Parallel()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		path := c.CommandPath()
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: Short %q", path, c.Short)
		}
		if !c.Hidden && c.Long == "" {
			t.Errorf("%s has no Long", path)
		}
		if !c.HasSubCommands() && !c.Hidden && !strings.Contains(c.Example, path) {
			t.Errorf("%s: its example does not run it: %q", path, c.Example)
		}
		for line := range strings.Lines(c.Long) {
			if len(line) > 84 {
				t.Errorf("%s: line of %d columns: %s", path, len(line), line)
			}
		}
		if c.Run != nil || c.RunE == nil {
			t.Errorf("%s has no RunE, or has Run", path)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	root := cli.New(&cli.Env{}, cli.Roles{})
	walk(root)
}
