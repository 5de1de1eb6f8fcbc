package e2e

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/test/guest"
)

type sheet struct {
	File, KeyFile         string
	DataOffset            int64
	FillNeeded, PoweredOn bool
	Commands              map[string]string
}

// exportKey exports a disk's key to a new file and returns the recovery sheet.
func (s *site) exportKey(t *testing.T, vm, disk, out string) sheet {
	t.Helper()
	var got sheet
	must(t, s.ok(t, "disk", "export-key", vm, disk, "--out", out, "-o", "json").JSON(&got))
	return got
}

// inGuest returns a command of a sheet for a guest that has the disk as a device.
func (s sheet) inGuest(t *testing.T, what, device string) string {
	t.Helper()
	command := s.Commands[what]
	if command == "" {
		t.Fatalf("the sheet has no %s", what)
	}
	return strings.NewReplacer("$(losetup --find --show "+s.File+")", device, s.File, device, s.KeyFile, "/run/dek").Replace(command)
}

// TestRecoverySheet does what the sheet says, in a guest with dm-crypt: with a
// thin import, and with the same disk after it was filled by the command of the
// controller and by that which needs none.
func TestRecoverySheet(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	const size = 24 << 20
	areas := []area{{0, 1 << 20, 1}, {9 << 20, 65536, 2}, {size - 65536, 65536, 3}}
	zeros := area{off: 16 << 20, length: 1 << 20} // nothing was written there
	for i, format := range []string{"raw", "qcow2"} {
		disk := "thin,format=" + format + ",image=" + s.patternImage(t, format, format, size, areas)
		s.ok(t, "vm", "create", fmt.Sprint("web-", i), "--datastore", "ds", "--encrypt", "--disk", disk)
	}
	key := filepath.Join(s.lab.Dir, "disk.key")
	got := s.exportKey(t, "web-0", "disk-0", key)
	if !got.FillNeeded || got.PoweredOn {
		t.Errorf("the sheet is %+v", got)
	}
	dek := s.dek(t, got.File)
	if exported, err := os.ReadFile(key); err != nil || string(exported) != string(dek.Bytes()) {
		t.Errorf("the file does not hold the DEK (%v)", err)
	}
	text := s.ok(t, "disk", "export-key", "web-0", "disk-0", "--out", key+".2")
	for _, form := range []string{hex.EncodeToString(dek.Bytes()[:12]), base64.StdEncoding.EncodeToString(dek.Bytes()[:12]), string(dek.Bytes()[:8])} {
		if strings.Contains(text.Stdout+text.Stderr, form) {
			t.Error("the key is printed")
		}
	}
	if !strings.Contains(text.Stdout, "FILL IT FIRST") {
		t.Errorf("the sheet does not say that the disk is thin:\n%s", text.Stdout)
	}
	s.refused(t, refusal{1, key + " exists", "--out"}, "disk", "export-key", "web-0", "disk-0", "--out", key)
	if out := s.ok(t, "event", "ls").Stdout; !strings.Contains(out, "exported the key of disk-0") {
		t.Errorf("no event tells of the export:\n%s", out)
	}
	logged := false
	must(t, filepath.WalkDir(filepath.Join(s.lab.Dir, "controller", "data", "audit"), func(path string, _ fs.DirEntry, err error) error {
		text, _ := os.ReadFile(path)
		logged = logged || strings.Contains(string(text), "disk.export-key")
		return err
	}))
	if !logged {
		t.Error("the export is not in the audit log")
	}
	// A host alone can do it too.
	r, err := s.host.CLI(t.Context(), "disk", "export-key", "web-0", "disk-0", "--out", key+".3")
	must(t, err)
	if exported, err := os.ReadFile(key + ".3"); r.Code != 0 || err != nil || string(exported) != string(dek.Bytes()) {
		t.Errorf("export by the host alone: %d, %v: %s", r.Code, err, r.Stderr)
	}

	unfilled := filepath.Join(s.lab.Dir, "unfilled")
	copyFile(t, unfilled, got.File)
	s.ok(t, "disk", "fill", "web-0")
	filled := s.exportKey(t, "web-0", "disk-0", key+".4")
	if filled.FillNeeded || filled.Commands["fill"] != "" {
		t.Errorf("after disk fill the sheet is %+v", filled)
	}
	other := s.exportKey(t, "web-1", "disk-0", key+".5")
	r, err = s.controller.CLI(t.Context(), strings.Fields(other.Commands["fill"])[1:]...)
	must(t, err)
	if r.Code != 0 {
		t.Errorf("%s: %s", other.Commands["fill"], r.Stderr)
	}
	otherDEK := s.dek(t, other.File)

	const emptyThere = `test $(dd if=/dev/mapper/%[1]s bs=65536 skip=%[2]d count=%[3]d 2>/run/null | tr -d '\000' | wc -c) %[4]s 0`
	empty := func(name, is string) guest.Step {
		return guest.Step{Name: "zeros", Command: fmt.Sprintf(emptyThere, name, zeros.off/65536, zeros.length/65536, is)}
	}
	var steps []guest.Step
	opened := func(sh sheet, what, device, name, zeros, closing string) {
		steps = append(steps, guest.Step{Name: what, Command: sh.inGuest(t, what, device)})
		for _, a := range areas {
			steps = append(steps, a.step("verify", name))
		}
		steps = append(steps, empty(name, zeros), guest.Step{Name: "close", Command: closing + " " + name})
	}
	steps = append(steps, guest.Step{Name: "verify", Command: got.inGuest(t, "verify", "/dev/vdb")})
	opened(got, "open", "/dev/vdb", "web-0-disk-0", "-ne", "cryptsetup close") // noise, as the sheet warns
	opened(filled, "open", "/dev/vdc", "web-0-disk-0", "-eq", "cryptsetup close")
	opened(filled, "openPlain", "/dev/vdc", "web-0-disk-0", "-eq", "cryptsetup close")
	opened(filled, "openDmsetup", "/dev/vdc", "web-0-disk-0", "-eq", "dmsetup remove")
	steps = append(steps, guest.Step{Name: "other-key", Command: "head -c 64 /dev/vde > /run/dek"})
	opened(other, "open", "/dev/vdd", "web-1-disk-0", "-eq", "cryptsetup close")
	boot(t, dmGuest(t, []string{"dmsetup"}, steps...),
		rawDrive(exportKey(t, dek)), rawDrive(unfilled), rawDrive(got.File), rawDrive(other.File), rawDrive(exportKey(t, otherDEK)))
	s.holds(t, "web-0", "disk-0", areas)
}
