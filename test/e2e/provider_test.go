package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/machine/bundle"
)

// TestProviders takes key providers through their life: each subtest goes on
// where the one before ended.
func TestProviders(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newSite(t, l, "")
	for _, part := range []struct {
		name string
		run  func(*testing.T, *site)
	}{
		{"unusable before its backup", unusableBeforeBackup},
		{"default", defaultProvider},
		{"backup and import", backupAndImport},
		{"backup by the API", backupByAPI},
		{"only with a TPM", tpmOnly},
		{"delete guard", deleteGuard},
		{"delete by force", deleteByForce},
		{"import again", importAgain},
		{"sealed on disk", sealedOnDisk},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(t, s) }) {
			t.FailNow()
		}
	}
}

// encryptedVM returns the arguments that create one with a disk of 1 MiB.
func encryptedVM(name string, more ...string) []string {
	return append([]string{"vm", "create", name, "--datastore", "ds", "--disk", "1M", "--encrypt"}, more...)
}

func (s *site) hasAlarm(t *testing.T, want string) bool {
	t.Helper()
	return slices.Contains(s.alarms(t), want)
}

// unusableBeforeBackup: 67, 68, 69, 107, 110, 112, 122, 255.
func unusableBeforeBackup(t *testing.T, s *site) {
	s.refused(t, refusal{1, "there is no default key provider", "strongroom provider default NAME"}, encryptedVM("web-1")...)
	if !s.hasAlarm(t, "no-default-provider") {
		t.Errorf("no alarm for the missing default: %v", s.alarms(t))
	}
	s.ok(t, "provider", "create-native", "kp-1")
	if p := s.showProvider(t, "kp-1"); p.State != "Not backed up" {
		t.Errorf("kp-1 is %+v", p)
	}
	if !s.hasAlarm(t, "provider-not-backed-up provider/kp-1") {
		t.Errorf("no alarm for the missing backup: %v", s.alarms(t))
	}
	notBackedUp := refusal{1, "key provider kp-1 is not backed up", "strongroom provider backup kp-1"}
	s.refused(t, notBackedUp, encryptedVM("web-1", "--provider", "kp-1")...)
	s.ok(t, "vm", "create", "plain-1", "--datastore", "ds", "--disk", "1M")
	s.refused(t, notBackedUp, "vm", "encrypt", "plain-1", "--provider", "kp-1")

	s.backUp(t, "kp-1")
	if p := s.showProvider(t, "kp-1"); p.State != "Active" || len(p.Details) > 0 {
		t.Errorf("after the backup kp-1 is %+v", p)
	}
	if s.hasAlarm(t, "provider-not-backed-up provider/kp-1") {
		t.Error("the alarm stays after the backup")
	}
	if info, err := os.Stat(s.backupOf("kp-1")); err != nil || info.Mode() != 0o600 {
		t.Errorf("the backup is %v, %v; want mode 0600", info, err)
	}
	s.refused(t, refusal{1, "exists", "choose another --out"}, "provider", "backup", "kp-1", "--out", s.backupOf("kp-1"), "--password-file", s.passwordFile(t))
	s.ok(t, encryptedVM("web-1", "--provider", "kp-1")...)
	s.refused(t, refusal{1, "there is no default key provider", ""}, encryptedVM("web-2")...) // a backup makes no default
}

// defaultProvider: one at most, and never chosen by the product: 91, 121.
func defaultProvider(t *testing.T, s *site) {
	s.provider(t, "kp-2")
	for _, name := range []string{"kp-1", "kp-2"} {
		s.ok(t, "provider", "default", name)
		one, two := s.showProvider(t, "kp-1"), s.showProvider(t, "kp-2")
		if one.IsDefault != (name == "kp-1") || two.IsDefault != (name == "kp-2") {
			t.Errorf("default is %s: %+v, %+v", name, one, two)
		}
	}
	if s.hasAlarm(t, "no-default-provider") {
		t.Error("the alarm stays with a default")
	}
	s.ok(t, encryptedVM("web-2")...)
	if v := s.show(t, "web-2"); v.Key.Provider != "kp-2" {
		t.Errorf("web-2 is under %s", v.Key.Provider)
	}
	if v := s.show(t, "web-1"); v.Key.Provider != "kp-1" { // it keeps its own
		t.Errorf("web-1 is under %s", v.Key.Provider)
	}
	s.refused(t, refusal{3, "kp-9", "strongroom provider ls"}, "provider", "default", "kp-9")
	if !s.showProvider(t, "kp-2").IsDefault {
		t.Error("an unknown name took the default away")
	}
	s.ok(t, "vm", "delete", "web-2", "--yes")
}

// backupAndImport uses a second controller, which has no hosts: 111, 114, 115,
// 123, 124, 125.
func backupAndImport(t *testing.T, s *site) {
	other, err := s.lab.StartController(t.Context(), "other")
	must(t, err)
	defer other.Kill()
	there := &site{lab: s.lab, controller: other}
	backup, right := s.backupOf("kp-1"), s.passwordFile(t)

	there.refused(t, refusal{3, "kp-1", "strongroom provider ls"}, "provider", "show", "kp-1") // 123
	there.refused(t, refusal{4, "password", "--password-file"}, "provider", "import", backup)
	there.refused(t, refusal{4, "password", "set at the export"}, "provider", "import", backup, "--password-file", s.writeFile(t, "wrong", "not the password"))
	there.refused(t, refusal{3, "cannot read the backup", ""}, "provider", "import", backup+".missing")
	p12, err := os.ReadFile(backup)
	must(t, err)
	for name, text := range map[string]string{
		"cut":     string(p12[:len(p12)-20]),
		"garbage": "this is no PKCS #12 file",
		"empty":   "",
	} {
		there.refused(t, refusal{1, "cannot import", "another copy"}, "provider", "import", s.writeFile(t, name+".p12", text), "--password-file", right)
	}
	p12[len(p12)/2] ^= 1
	if r, err := other.CLI(t.Context(), "provider", "import", s.writeFile(t, "flipped.p12", string(p12)), "--password-file", right); err != nil || r.Code == 0 {
		t.Errorf("a backup with a changed bit is imported: %v\n%s", err, r.Stdout)
	}

	if out := there.ok(t, "provider", "import", backup, "--password-file", right, "--dry-run").Stdout; !strings.Contains(out, "kp-1") || !strings.Contains(out, "can be imported") {
		t.Errorf("dry run: %s", out)
	}
	there.refused(t, refusal{3, "kp-1", ""}, "provider", "show", "kp-1") // it changed nothing
	there.ok(t, "provider", "import", backup, "--password-file", right)
	if here, p := s.showProvider(t, "kp-1"), there.showProvider(t, "kp-1"); p.KeyID != here.KeyID || p.State == "Not backed up" || p.IsDefault {
		t.Errorf("imported as %+v, here it is %+v", p, here)
	}
	if out := there.ok(t, "provider", "import", backup, "--password-file", right).Stdout; !strings.Contains(out, "here already") {
		t.Errorf("imported twice: %s", out)
	}

	// A backup without a password is the operator's choice.
	open := filepath.Join(s.lab.Dir, "backups", "open.p12")
	if r := s.ok(t, "provider", "backup", "kp-2", "--out", open, "--no-password"); !strings.Contains(r.Stderr, "no password: whoever reads the file has the key") {
		t.Errorf("no warning:\n%s", r.Stderr)
	}
	// The name stands for other key material there.
	there.ok(t, "provider", "create-native", "kp-2")
	mine := there.showProvider(t, "kp-2").KeyID
	there.refused(t, refusal{1, "other key material", "strongroom provider ls"}, "provider", "import", open)
	if there.showProvider(t, "kp-2").KeyID != mine {
		t.Error("the import replaced a provider of the same name")
	}
	must(t, os.Remove(open)) // it is the key: the scan must not find it
}

// tpmOnly: a provider for hosts with a TPM, on a host without: 81, 82.
func tpmOnly(t *testing.T, s *site) {
	s.ok(t, "provider", "create-native", "kp-tpm", "--tpm-required")
	s.backUp(t, "kp-tpm")
	if p := s.showProvider(t, "kp-tpm"); p.State != "Warning" || !strings.Contains(strings.Join(p.Details, " "), "has no TPM") {
		t.Errorf("kp-tpm is %+v", p)
	}
	if !s.hasAlarm(t, "provider-not-on-all-hosts provider/kp-tpm") {
		t.Errorf("no alarm: %v", s.alarms(t))
	}
	want := refusal{1, "does not have the keys of provider kp-tpm", "with a TPM only"}
	s.refused(t, want, encryptedVM("web-9", "--provider", "kp-tpm")...)
	s.refused(t, want, "vm", "encrypt", "plain-1", "--provider", "kp-tpm")
	s.refused(t, want, "vm", "rekey", "web-1", "--provider", "kp-tpm")
	s.ok(t, "provider", "delete", "kp-tpm", "--yes")
}

// deleteGuard: 116, 117, 118, 166.
func deleteGuard(t *testing.T, s *site) {
	var usage struct {
		Users []struct{ VM, Disk, KeyID string }
	}
	must(t, s.ok(t, "provider", "usage", "kp-1", "-o", "json").JSON(&usage))
	users := map[string]bool{}
	for _, u := range usage.Users {
		users[u.VM+"/"+u.Disk] = true
		if u.KeyID == "" {
			t.Errorf("no key id for %+v", u)
		}
	}
	if !users["web-1/disk-0"] || !users["web-1/"] || len(users) != 2 {
		t.Errorf("kp-1 is used by %v", users)
	}
	s.refused(t, refusal{1, "in use by web-1", "strongroom vm rekey"}, "provider", "delete", "kp-1", "--yes")
	s.refused(t, refusal{2, "needs a confirmation", "--yes"}, "provider", "delete", "kp-1")
	s.refused(t, refusal{3, "kp-9", "strongroom provider ls"}, "provider", "delete", "kp-9", "--yes")
	if r, err := s.controller.CLI(t.Context(), "provider", "delete", "kp-1"); err != nil || !strings.Contains(r.Stderr, "used by web-1") || !strings.Contains(r.Stderr, "replicas") {
		t.Errorf("the dialog does not name the known users and the unknown: %v\n%s", err, r.Stderr)
	}
	if p := s.showProvider(t, "kp-1"); p.State != "Active" || !p.InUse {
		t.Errorf("kp-1 is %+v", p)
	}
}

// deleteByForce: the VM is locked, and nothing is lost: 121, 253, 254.
func deleteByForce(t *testing.T, s *site) {
	s.ok(t, "provider", "default", "kp-1")
	s.ok(t, "provider", "delete", "kp-1", "--force", "--yes")
	if s.showProvider(t, "kp-2").IsDefault || !s.hasAlarm(t, "no-default-provider") {
		t.Errorf("another provider became the default, or there is no alarm: %v", s.alarms(t))
	}
	await(t, "web-1 to be locked", func() bool { return s.show(t, "web-1").CryptoState == "locked" })
	if v := s.show(t, "web-1"); !strings.Contains(v.LockReason, "kp-1") || !v.Encrypted || v.Key.Provider != "kp-1" {
		t.Errorf("web-1 is %+v", v)
	}
	for _, alarm := range []string{"vm-locked vm/web-1", "provider-missing provider/kp-1"} {
		await(t, "alarm "+alarm, func() bool { return s.hasAlarm(t, alarm) })
	}
	missing := refusal{5, "provider kp-1", "strongroom provider import"}
	s.refused(t, missing, "vm", "power-on", "web-1")
	s.refused(t, missing, "vm", "unlock", "web-1")
	s.refused(t, missing, "vm", "decrypt", "web-1", "--yes")
	s.refused(t, missing, "vm", "rekey", "web-1", "--provider", "kp-2")
	s.refused(t, missing, "vm", "rekey", "web-1", "--provider", "kp-2", "--deep")
	s.refused(t, refusal{3, "kp-1", "strongroom provider ls"}, "vm", "rekey", "web-1")
	s.refused(t, refusal{1, "other key material", "never used"}, "provider", "create-native", "kp-1") // 125
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// importAgain: 119, 163, 239.
func importAgain(t *testing.T, s *site) {
	if out := s.ok(t, "provider", "import", s.backupOf("kp-1"), "--password-file", s.passwordFile(t)).Stdout; !strings.Contains(out, "web-1 unlocked") {
		t.Errorf("import: %s", out)
	}
	if v := s.show(t, "web-1"); v.CryptoState != "unlocked" || v.LockReason != "" {
		t.Errorf("web-1 is %+v", v)
	}
	for _, alarm := range []string{"vm-locked vm/web-1", "provider-missing provider/kp-1"} {
		await(t, "the end of alarm "+alarm, func() bool { return !s.hasAlarm(t, alarm) })
	}
	s.ok(t, "vm", "unlock", "web-1")
	s.ok(t, "vm", "rekey", "web-1", "--deep")

	// Unregistered, and registered again: 162, 163.
	s.ok(t, "vm", "unregister", "web-1", "--yes")
	s.refused(t, refusal{3, "web-1", "strongroom vm ls"}, "vm", "show", "web-1")
	if s.showProvider(t, "kp-1").InUse {
		t.Error("kp-1 counts as in use by a VM that is not registered")
	}
	if _, err := bundle.Read(s.folder("web-1")); err != nil {
		t.Error("unregistering removed the folder:", err)
	}
	s.ok(t, "vm", "register", "web-1", "--datastore", "ds")
	if v := s.show(t, "web-1"); v.CryptoState != "unlocked" || !v.Encrypted {
		t.Errorf("registered again web-1 is %+v", v)
	}
}

// sealedOnDisk looks for the KDKs in all files of controller, host and logs: 21,
// 78, 101.
func sealedOnDisk(t *testing.T, s *site) {
	found := s.scan(t, s.scanner(t))
	if len(found) > 0 {
		t.Errorf("found %v", found)
	}
}
