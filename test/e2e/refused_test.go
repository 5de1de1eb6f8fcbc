package e2e

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"strongroom/test/lab"
)

// TestRefused asks for what cannot be: every refusal says why, with its exit
// code and a hint, and leaves everything as it was. The site has an encrypted VM
// "web-1" and a plain one "plain-1", with disks of 1 MiB.
func TestRefused(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	s.ok(t, encryptedVM("web-1")...)
	s.ok(t, "vm", "create", "plain-1", "--datastore", "ds", "--disk", "1M")
	for _, part := range []struct {
		name string
		run  func(*testing.T, *site)
	}{
		{"unknown names", unknownNames},
		{"invalid requests", invalidRequests},
		{"privileges", privileges},
		{"logins", logins},
		{"hosts that have not joined", strangers},
		{"datastores", badDatastores},
		{"images", badImages},
		{"folders", badFolders},
		{"powered on", poweredOn},
		{"host does not answer", hostDown},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(t, s) })
	}
	for name, encrypted := range map[string]bool{"web-1": true, "plain-1": false} {
		if v := s.show(t, name); v.Encrypted != encrypted || v.CryptoState != "unlocked" || v.PowerState != "poweredOff" {
			t.Errorf("at the end %s is %+v", name, v)
		}
		s.ok(t, "vm", "delete", name, "--yes")
	}
}

func unknownNames(t *testing.T, s *site) {
	vm := refusal{3, "none", "strongroom vm ls"}
	for _, verb := range []string{"show", "power-on", "power-off", "encrypt", "decrypt", "rekey", "unlock", "unregister", "delete"} {
		args := []string{"vm", verb, "none"}
		if slices.Contains([]string{"decrypt", "unregister", "delete"}, verb) {
			args = append(args, "--yes")
		}
		s.refused(t, vm, args...)
	}
	for _, verb := range []string{"show", "usage", "default"} {
		s.refused(t, refusal{3, "none", "strongroom provider ls"}, "provider", verb, "none")
	}
	for _, noun := range []string{"datastore", "cluster", "host"} {
		s.refused(t, refusal{3, "none", "strongroom " + noun + " ls"}, noun, "show", "none")
	}
	s.refused(t, refusal{3, "none", "strongroom provider ls"}, encryptedVM("x", "--provider", "none")...)
	s.refused(t, refusal{3, "none", "strongroom provider ls"}, "vm", "encrypt", "plain-1", "--provider", "none")
	s.refused(t, refusal{3, "none", "strongroom datastore ls"}, "vm", "create", "x", "--datastore", "none", "--disk", "1M")
	s.refused(t, refusal{3, "none", "strongroom host ls"}, "vm", "create", "x", "--datastore", "ds", "--host", "none", "--disk", "1M")
	s.refused(t, refusal{3, "none", "strongroom cluster ls"}, "datastore", "create", "x", "--cluster", "none", "--path", s.store)
	s.refused(t, refusal{3, "none", "strongroom cluster ls"}, "host", "join-token", "--cluster", "none")
	s.refused(t, refusal{3, "none", ""}, "vm", "register", "none", "--datastore", "ds")
	s.refused(t, refusal{3, "none", ""}, "user", "delete", "none", "--yes")
	s.refused(t, refusal{3, "0197c1de", ""}, "task", "show", "0197c1de-52f0-7c4d-9bd5-a4f7e9c4a6a5")
	s.refused(t, refusal{3, "0197c1de", ""}, "task", "cancel", "0197c1de-52f0-7c4d-9bd5-a4f7e9c4a6a5")
}

func invalidRequests(t *testing.T, s *site) {
	create := func(name string, more ...string) []string {
		return append([]string{"vm", "create", name, "--datastore", "ds"}, more...)
	}
	outside := s.writeFile(t, "outside", "kernel")
	must(t, os.Symlink(outside, filepath.Join(s.store, "images", "kernel")))
	for _, c := range []struct {
		want refusal
		args []string
	}{
		{refusal{2, "Bad Name", ""}, create("Bad Name", "--disk", "1M")},
		{refusal{2, "../x", ""}, create("../x", "--disk", "1M")},
		{refusal{2, ".creating-x", ""}, create(".creating-x", "--disk", "1M")},
		{refusal{1, "web-1", ""}, create("web-1", "--disk", "1M")},
		{refusal{2, "1000", ""}, create("x", "--disk", "1000")},
		{refusal{2, "disk", ""}, create("x", "--disk", "0")},
		{refusal{2, "disk", ""}, create("x", "--disk", "-1M")},
		{refusal{2, "memory", ""}, create("x", "--disk", "1M", "--memory", "1M")},
		{refusal{2, "CPUs", ""}, create("x", "--disk", "1M", "--cpus", "1000")},
		{refusal{2, "machine", ""}, create("x", "--disk", "1M", "--machine", "none")},
		{refusal{2, "network", ""}, create("x", "--disk", "1M", "--network", "bridge")},
		{refusal{2, "disk interface", ""}, create("x", "--disk", "1M", "--disk-interface", "ide")},
		{refusal{2, "path", ""}, create("x", "--disk", "1M", "--kernel", "../outside")},
		{refusal{2, "path", ""}, create("x", "--disk", "1M", "--kernel", outside)},
		{refusal{2, "--provider needs --encrypt", ""}, create("x", "--disk", "1M", "--provider", "kp-1")},
		{refusal{1, "not encrypted", "strongroom vm encrypt plain-1"}, []string{"vm", "rekey", "plain-1"}},
		{refusal{1, "not encrypted", "strongroom vm encrypt plain-1"}, []string{"vm", "decrypt", "plain-1", "--yes"}},
		{refusal{1, "no disk that is not encrypted", "strongroom vm rekey web-1"}, []string{"vm", "encrypt", "web-1"}},
		{refusal{2, "needs a confirmation", "--yes"}, []string{"vm", "delete", "web-1"}},
		{refusal{2, "needs a confirmation", "--yes"}, []string{"vm", "decrypt", "web-1"}},
		{refusal{1, "lab", ""}, []string{"cluster", "create", "lab"}},
		{refusal{1, "kp-1", ""}, []string{"provider", "create-native", "kp-1"}},
		{refusal{2, "Bad", ""}, []string{"provider", "create-native", "Bad"}},
	} {
		s.refused(t, c.want, c.args...)
	}
	// A kernel that leads out of the datastore is found out when it is used.
	s.ok(t, create("linked", "--disk", "1M", "--kernel", "images/kernel")...)
	s.refused(t, refusal{2, "no path on the datastore", ""}, "vm", "power-on", "linked")
	if left := s.children(t, ""); len(left) > 0 {
		t.Errorf("after the failed power-on there is %v", left)
	}
	s.ok(t, "vm", "delete", "linked", "--yes")
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// privileges: 246, 247.
func privileges(t *testing.T, s *site) {
	pw := s.writeFile(t, "user-password", "a password of a user")
	login := func(name, role string) *lab.User {
		t.Helper()
		s.ok(t, "user", "create", name, "--role", role, "--password-file", pw)
		u := s.controller.User(name)
		r, err := u.Login(t.Context(), pw)
		must(t, err)
		if r.Code != 0 {
			t.Fatalf("%s cannot log in: %s", name, r.Stderr)
		}
		return u
	}
	run := func(u *lab.User, want int, args ...string) {
		t.Helper()
		r, err := u.CLI(t.Context(), args...)
		must(t, err)
		if r.Code != want {
			t.Errorf("%s: strongroom %s: exit code %d, want %d\n%s%s", u.Name, strings.Join(args, " "), r.Code, want, r.Stdout, r.Stderr)
		}
		if want == 4 && !strings.Contains(r.Stderr, "privilege") {
			t.Errorf("%s: strongroom %s does not name the privilege: %s", u.Name, strings.Join(args, " "), r.Stderr)
		}
	}
	crypto := [][]string{
		{"vm", "encrypt", "plain-1"},
		{"vm", "decrypt", "web-1", "--yes"},
		{"vm", "rekey", "web-1"},
		{"vm", "rekey", "web-1", "--deep"},
		{"vm", "unlock", "web-1"},
		{"disk", "export-key", "web-1", "disk-0", "--out", filepath.Join(s.lab.Dir, "x.key")},
		{"vm", "register", "web-1", "--datastore", "ds"},
		encryptedVM("x"),
		{"provider", "create-native", "kp-x"},
		{"provider", "backup", "kp-1", "--out", filepath.Join(s.lab.Dir, "x.p12"), "--no-password"},
		{"provider", "import", s.backupOf("kp-1"), "--password-file", s.passwordFile(t)},
		{"provider", "default", "kp-1"},
		{"provider", "delete", "kp-1", "--force", "--yes"},
		{"host", "join-token", "--cluster", "lab"},
		{"user", "create", "more", "--role", "Administrator", "--password-file", pw},
		{"user", "delete", "administrator", "--yes"},
	}
	noCrypto, readOnly := login("nocrypto", "NoCryptoAdmin"), login("readonly", "ReadOnly")
	for _, args := range crypto {
		run(noCrypto, 4, args...)
		run(readOnly, 4, args...)
	}
	run(noCrypto, 0, "vm", "create", "by-nocrypto", "--datastore", "ds", "--disk", "1M")
	run(noCrypto, 0, "vm", "power-on", "by-nocrypto", "web-1") // what is encrypted may be used
	run(readOnly, 4, "vm", "power-off", "by-nocrypto", "--hard")
	run(noCrypto, 0, "vm", "power-off", "by-nocrypto", "web-1", "--hard")
	run(readOnly, 4, "vm", "delete", "by-nocrypto", "--yes")
	run(noCrypto, 0, "vm", "delete", "by-nocrypto", "--yes")
	for _, args := range [][]string{{"vm", "ls"}, {"vm", "show", "web-1"}, {"host", "ls"}, {"provider", "ls"}, {"provider", "usage", "kp-1"}, {"alarm", "ls"}, {"event", "ls"}, {"health"}, {"whoami"}} {
		run(readOnly, 0, args...)
	}
	for _, args := range [][]string{
		{"vm", "create", "x", "--datastore", "ds", "--disk", "1M"},
		{"vm", "power-on", "web-1"},
		{"vm", "delete", "web-1", "--yes"},
		{"cluster", "create", "x"},
		{"datastore", "create", "x", "--cluster", "lab", "--path", s.store},
		{"host", "remove", s.host.Name, "--yes"},
	} {
		run(readOnly, 4, args...)
	}
	for _, name := range []string{"x.p12", "x.key"} {
		if _, err := os.Lstat(filepath.Join(s.lab.Dir, name)); !os.IsNotExist(err) {
			t.Errorf("who may not have %s got a file", name)
		}
	}
	// Who is deleted is out at once.
	s.ok(t, "user", "delete", "readonly", "--yes")
	if r, err := readOnly.CLI(t.Context(), "vm", "ls"); err != nil || r.Code != 4 {
		t.Errorf("a deleted user: exit code %d, %v", r.Code, err)
	}
}

// logins: wrong passwords are refused alike for users that are and are not, and
// slowed down.
func logins(t *testing.T, s *site) {
	right, wrong := s.writeFile(t, "alice-password", "the password of alice"), s.writeFile(t, "wrong-password", "not the password")
	s.refused(t, refusal{2, "12", ""}, "user", "create", "alice", "--password-file", s.writeFile(t, "short", "short"))
	s.refused(t, refusal{3, "Emperor", ""}, "user", "create", "alice", "--role", "Emperor", "--password-file", right)
	s.ok(t, "user", "create", "alice", "--password-file", right)
	alice, nobody := s.controller.User("alice"), s.controller.User("nobody")
	try := func(u *lab.User, file string) lab.Result {
		t.Helper()
		r, err := u.Login(t.Context(), file)
		must(t, err)
		return r
	}
	a, b := try(alice, wrong), try(nobody, wrong)
	if a.Code != 4 || b.Code != 4 || strings.ReplaceAll(a.Stderr, "alice", "nobody") != b.Stderr {
		t.Errorf("wrong password: exit code %d\n%sunknown user: exit code %d\n%s", a.Code, a.Stderr, b.Code, b.Stderr)
	}
	throttled := false
	for range 12 {
		if r := try(nobody, wrong); strings.Contains(r.Stderr, "too many failed attempts") {
			throttled = true
			if r.Code != 6 {
				t.Errorf("throttled: exit code %d, want 6", r.Code)
			}
			break
		}
	}
	if !throttled {
		t.Error("passwords can be guessed without end")
	}
	if r := try(alice, right); r.Code != 0 { // another name is not slowed down
		t.Errorf("alice cannot log in: %s", r.Stderr)
	}
	r, err := s.controller.User("stranger").CLI(t.Context(), "--server", "https://"+s.controller.Address, "--ca", s.controller.CA(), "vm", "ls")
	must(t, err)
	refusal{4, "not logged in", "strongroom login"}.check(t, r, []string{"vm", "ls"})
	r, err = s.controller.User("stranger").CLI(t.Context(), "--server", "https://"+s.controller.Address, "--ca", s.writeFile(t, "ca.pem", otherCA()), "vm", "ls")
	must(t, err)
	if r.Code == 0 || !strings.Contains(r.Stderr, "certificate") {
		t.Errorf("a controller that another authority vouches for: exit code %d\n%s", r.Code, r.Stderr)
	}
}

// otherCA returns the PEM of an authority that has nothing to do with us.
func otherCA() string {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
}

// strangers: 70.
func strangers(t *testing.T, s *site) {
	dir := filepath.Join(s.lab.Dir, "stranger")
	config := s.writeFile(t, "stranger/host.toml", fmt.Sprintf("data_dir = %q\nrun_dir = %q\nlisten = \"127.0.0.1:1\"\n", dir+"/data", dir+"/run"))
	binary := func(want refusal, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), binary, args...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		_ = cmd.Run() // its exit code tells
		want.check(t, lab.Result{Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}, args)
	}
	binary(refusal{3, "it is in no cluster", "strongroom host join"}, "host", "run", "--config", config)

	var token struct{ Token string }
	must(t, s.ok(t, "host", "join-token", "--cluster", "lab", "-o", "json").JSON(&token))
	join := func(name, text string) []string {
		return []string{"host", "join", "--config", config, "--name", name, "--controller", "https://" + s.controller.Address, "--token-file", s.writeFile(t, "stranger/token", text)}
	}
	for _, text := range []string{"no token", token.Token[:len(token.Token)-3], token.Token + "x"} {
		binary(refusal{2, "no join token", "strongroom host join-token"}, join("stranger", text)...)
	}
	if r := s.ok(t, "host", "ls"); strings.Contains(r.Stdout, "stranger") {
		t.Errorf("host ls: %s", r.Stdout)
	}
	s.ok(t, join("stranger", token.Token)...)
	must(t, os.RemoveAll(filepath.Join(dir, "data")))
	binary(refusal{4, "token", ""}, join("stranger-2", token.Token)...) // it is good for one
	s.ok(t, "host", "remove", "stranger", "--yes")
}

func badDatastores(t *testing.T, s *site) {
	s.refused(t, refusal{2, "absolute path", ""}, "datastore", "create", "x", "--cluster", "lab", "--path", "relative")
	s.refused(t, refusal{2, "absolute path", ""}, "datastore", "create", "x", "--cluster", "lab", "--path", s.store+"/../ds")
	s.refused(t, refusal{1, "ds", ""}, "datastore", "create", "ds", "--cluster", "lab", "--path", s.store)
	s.ok(t, "datastore", "create", "gone", "--cluster", "lab", "--path", filepath.Join(s.lab.Dir, "gone"))
	s.refused(t, refusal{3, "gone", ""}, "vm", "create", "x", "--datastore", "gone", "--disk", "1M", "--encrypt")
	s.refused(t, refusal{3, "gone", ""}, "vm", "register", "x", "--datastore", "gone")
	if v := s.ok(t, "vm", "ls"); strings.Contains(v.Stdout, "gone") {
		t.Errorf("vm ls: %s", v.Stdout)
	}
}

// change copies the folder of a VM to another name, with another id, and changes
// it.
func (s *site) change(t *testing.T, vm, copied string, edit func(dir string, vm map[string]any)) {
	t.Helper()
	dir := s.folder(copied)
	must(t, os.CopyFS(dir, os.DirFS(s.folder(vm))))
	text, err := os.ReadFile(filepath.Join(dir, "vm.json"))
	must(t, err)
	var content map[string]any
	must(t, json.Unmarshal(text, &content))
	content["name"] = copied
	content["id"] = fmt.Sprintf("%08x-0000-4000-8000-000000000000", len(copied)*65537)
	edit(dir, content)
	text, err = json.Marshal(content)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "vm.json"), text, 0o600))
}

// badFolders registers folders that are broken, or made to harm.
func badFolders(t *testing.T, s *site) {
	register := func(name string) []string { return []string{"vm", "register", name, "--datastore", "ds"} }
	secret := s.writeFile(t, "secret.raw", strings.Repeat("s", 1<<20))
	disk := func(vm map[string]any) map[string]any { return vm["disks"].([]any)[0].(map[string]any) }

	must(t, os.MkdirAll(s.folder("empty"), 0o755))
	s.refused(t, refusal{3, "no vm.json", ""}, register("empty")...)
	must(t, os.MkdirAll(s.folder("text"), 0o755))
	must(t, os.WriteFile(filepath.Join(s.folder("text"), "vm.json"), []byte("not JSON"), 0o600))
	s.refused(t, refusal{2, "vm.json", ""}, register("text")...)
	must(t, os.MkdirAll(s.folder("link"), 0o755))
	must(t, os.Symlink(filepath.Join(s.folder("web-1"), "vm.json"), filepath.Join(s.folder("link"), "vm.json")))
	if r, err := s.controller.CLI(t.Context(), register("link")...); err != nil || r.Code == 0 {
		t.Errorf("vm.json that is a link is followed: %v", err)
	}
	s.refused(t, refusal{2, "", ""}, register("../ds")...)

	for name, edit := range map[string]func(string, map[string]any){
		"outside-disk":   func(_ string, vm map[string]any) { disk(vm)["file"] = "../../secret.raw" },
		"outside-kernel": func(_ string, vm map[string]any) { vm["settings"].(map[string]any)["kernel"] = "../../../etc/passwd" },
		"future":         func(_ string, vm map[string]any) { vm["version"] = 99 },
		"more":           func(_ string, vm map[string]any) { vm["unknown_field"] = 1 },
		"bad-id":         func(_ string, vm map[string]any) { vm["id"] = "../../x" },
		"odd-size":       func(_ string, vm map[string]any) { disk(vm)["size_bytes"] = 1000 },
	} {
		s.change(t, "web-1", name, edit)
		r, err := s.controller.CLI(t.Context(), register(name)...)
		must(t, err)
		if r.Code != 2 && r.Code != 1 || !strings.Contains(r.Stderr, "cannot register") {
			t.Errorf("%s: exit code %d\n%s", name, r.Code, r.Stderr)
		}
	}

	// What a look at vm.json does not show makes the VM locked, and no power-on
	// does harm.
	luks := func(dir string) string { return filepath.Join(dir, "disk-0.luks") }
	for name, c := range map[string]struct {
		vm   string
		edit func(dir string, vm map[string]any)
	}{
		"symlink-plain": {"plain-1", func(dir string, _ map[string]any) {
			must(t, os.Remove(filepath.Join(dir, "disk-0.raw")))
			must(t, os.Symlink(secret, filepath.Join(dir, "disk-0.raw")))
		}},
		"symlink-luks": {"web-1", func(dir string, _ map[string]any) {
			must(t, os.Rename(luks(dir), filepath.Join(s.lab.Dir, "elsewhere.luks")))
			must(t, os.Symlink(filepath.Join(s.lab.Dir, "elsewhere.luks"), luks(dir)))
		}},
		"no-disk": {"plain-1", func(dir string, _ map[string]any) { must(t, os.Remove(filepath.Join(dir, "disk-0.raw"))) }},
		"fifo": {"plain-1", func(dir string, _ map[string]any) {
			must(t, os.Remove(filepath.Join(dir, "disk-0.raw")))
			must(t, exec.Command("mkfifo", filepath.Join(dir, "disk-0.raw")).Run())
		}},
		"header":   {"web-1", func(dir string, _ map[string]any) { overwrite(t, luks(dir), 0, 64<<10) }},
		"cut":      {"web-1", func(dir string, _ map[string]any) { must(t, os.Truncate(luks(dir), 5000)) }},
		"not-luks": {"web-1", func(dir string, _ map[string]any) { must(t, os.WriteFile(luks(dir), make([]byte, 20<<20), 0o600)) }},
	} {
		s.change(t, c.vm, name, c.edit)
		r, err := s.controller.CLI(t.Context(), register(name)...)
		must(t, err)
		if r.Code == 0 {
			if v := s.show(t, name); v.CryptoState != "locked" {
				t.Errorf("%s is registered as %+v", name, v)
			}
			on, err := s.controller.CLI(t.Context(), "vm", "power-on", name)
			must(t, err)
			if on.Code == 0 {
				t.Errorf("%s is powered on", name)
				s.ok(t, "vm", "power-off", name, "--hard")
			}
			if !strings.Contains(on.Stderr, "disk-0") {
				t.Errorf("%s: the error does not name the disk: %s", name, on.Stderr)
			}
			s.ok(t, "vm", "unregister", name, "--yes")
		} else if !strings.Contains(r.Stderr, "disk-0") {
			t.Errorf("%s: the error does not name the disk: %s", name, r.Stderr)
		}
	}
	if text, err := os.ReadFile(secret); err != nil || strings.Trim(string(text), "s") != "" {
		t.Errorf("a file outside of the datastore was changed (%v)", err)
	}
	if left := s.children(t, ""); len(left) > 0 {
		t.Errorf("processes: %v", left)
	}

	// One damaged header copy is no reason to refuse: the other is whole.
	s.change(t, "web-1", "one-copy", func(dir string, _ map[string]any) { overwrite(t, luks(dir), 5000, 100) })
	s.ok(t, register("one-copy")...)
	s.ok(t, "vm", "rekey", "one-copy")
	if damage := inspect(t, luks(s.folder("one-copy"))).Damage; len(damage) > 0 {
		t.Errorf("after a rekey the header is still damaged: %v", damage)
	}
	s.ok(t, "vm", "delete", "one-copy", "--yes")
}

// overwrite fills a part of a file with ones.
func overwrite(t *testing.T, path string, off, n int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(slices.Repeat([]byte{0xff}, int(n)), off)
	must(t, err)
}

// poweredOn tries what needs the VM to be off: 213. There is nothing to boot on
// its disk, so it runs its firmware.
func poweredOn(t *testing.T, s *site) {
	s.ok(t, "vm", "power-on", "web-1", "plain-1")
	off := refusal{1, "needs the VM to be powered off", "strongroom vm power-off web-1"}
	s.refused(t, off, "vm", "unregister", "web-1", "--yes")
	s.refused(t, off, "vm", "delete", "web-1", "--yes")
	s.refused(t, refusal{6, "did not shut down within", "--hard"}, "vm", "power-off", "web-1", "--timeout", "1")
	for _, name := range []string{"web-1", "plain-1"} {
		if v := s.show(t, name); v.PowerState != "poweredOn" {
			t.Errorf("%s is %+v", name, v)
		}
	}
	s.ok(t, "vm", "power-off", "web-1", "plain-1", "--hard")
	s.ok(t, "vm", "power-off", "web-1") // it is off
	if left := s.children(t, ""); len(left) > 0 {
		t.Errorf("processes: %v", left)
	}
}

// hostDown stops the host, and starts it again: 240.
func hostDown(t *testing.T, s *site) {
	must(t, s.host.Stop())
	r := s.refused(t, refusal{6, s.host.Name, "strongroom host show " + s.host.Name}, "vm", "power-on", "web-1")
	t.Logf("at once: %s", r.Stderr)
	await(t, "the host to be known as not responding", func() bool {
		return strings.Contains(s.ok(t, "host", "show", s.host.Name, "-o", "json").Stdout, `"notResponding"`)
	})
	if v := s.show(t, "web-1"); v.PowerState != "unknown" {
		t.Errorf("on a host that does not answer web-1 is %+v", v)
	}
	await(t, "an alarm", func() bool { return s.hasAlarm(t, "host-not-responding host/"+s.host.Name) })
	down := refusal{6, s.host.Name, "strongroom host show " + s.host.Name}
	for _, args := range [][]string{
		{"vm", "power-on", "web-1"},
		{"vm", "encrypt", "plain-1"},
		{"vm", "rekey", "web-1"},
		{"vm", "delete", "web-1", "--yes"},
	} {
		s.refused(t, down, args...)
	}
	s.refused(t, refusal{6, "no host", "strongroom host ls"}, encryptedVM("x")...)
	must(t, s.host.Start())
	s.connected(t)
	await(t, "the VM's state to be known again", func() bool { return s.show(t, "web-1").PowerState == "poweredOff" })
	await(t, "the alarm to go", func() bool { return !s.hasAlarm(t, "host-not-responding host/"+s.host.Name) })
	s.ok(t, "vm", "rekey", "web-1")
}
