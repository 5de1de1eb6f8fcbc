package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/machine/bundle"
	"strongroom/test/guest"
)

// patternImage makes an image with the pattern of a seed from its start, X, and returns its path on
// the datastore.
func (s *site) patternImage(t *testing.T, name, format string, size int64, areas []area) string {
	t.Helper()
	raw := filepath.Join(s.lab.Dir, name+".raw")
	f, err := os.Create(raw)
	must(t, err)
	defer os.Remove(raw)
	for _, a := range areas {
		_, err := f.WriteAt(a.pattern(), a.off)
		must(t, err)
	}
	must(t, f.Truncate(size))
	must(t, f.Close())
	image := "images/" + name + "." + format
	args := []string{"convert", "-f", "raw", "-O", format, raw, filepath.Join(s.store, image)}
	if format == "qcow2" {
		args = append([]string{"convert", "-c"}, args[1:]...) // compressed clusters, as cloud images have them
	}
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, out)
	}
	return image
}

// holds checks that a disk has these patterns.
func (s *site) holds(t *testing.T, vm, disk string, areas []area) {
	t.Helper()
	dev := s.openDisk(t, vm, disk)
	defer dev.Close()
	for _, a := range areas {
		got := make([]byte, a.length)
		_, err := io.ReadFull(io.NewSectionReader(dev, a.off, a.length), got)
		must(t, err)
		want := a.pattern()
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%s of %s: byte %d is not as written", disk, vm, a.off+int64(i))
			}
		}
	}
}

// verifySteps has a guest check areas of a device.
func verifySteps(device string, areas []area) []guest.Step {
	var steps []guest.Step
	for _, a := range areas {
		steps = append(steps, guest.Step{
			Name:    fmt.Sprintf("verify-%s-%d", filepath.Base(device), a.off),
			Command: fmt.Sprintf("agent await %[1]s && agent verify-pattern %[1]s %d %d %d", device, a.off, a.length, a.seed),
		})
	}
	return steps
}

// TestImages imports images, runs a VM with a plain and two encrypted disks,
// changes single disks of it, and moves it to another site.
func TestImages(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	s.provider(t, "kp-2")
	const size = 40 << 20
	first := []area{{0, 1 << 20, 1}, {9<<20 + 512, 70000 / 512 * 512, 2}, {size - 65536, 65536, 3}}
	second := []area{{4096, 1 << 20, 4}, {size - 512, 512, 5}}
	written := area{20 << 20, 2 << 20, 6}

	steps := append(verifySteps("/dev/vda", first), verifySteps("/dev/vdb", second)...)
	steps = append(steps, guest.Step{Name: "zeros", Command: "agent await /dev/vdc && agent blank /dev/vdc"})
	for _, device := range []string{"/dev/vda", "/dev/vdb", "/dev/vdc"} {
		steps = append(steps, guest.Step{
			Name:    "write-" + filepath.Base(device),
			Command: fmt.Sprintf("agent write-pattern %s %d %d %d", device, written.off, written.length, written.seed),
		})
	}
	boot := s.bootFiles(t, "mixed", guest.Options{Steps: steps})
	s.ok(t, append([]string{
		"vm", "create", "mixed", "--datastore", "ds", "--encrypt",
		"--disk", "format=qcow2,image=" + s.patternImage(t, "first", "qcow2", size, first),
		"--disk", "plain,format=raw,image=" + s.patternImage(t, "second", "raw", size, second),
		"--disk", "size=40M",
	}, boot...)...)

	t.Run("imported", func(t *testing.T) {
		if v := s.show(t, "mixed"); !v.Disks[0].Encrypted || v.Disks[1].Encrypted || !v.Disks[2].Encrypted || v.Disks[0].UUID == v.Disks[2].UUID {
			t.Errorf("the disks are %+v", v.Disks)
		}
		s.holds(t, "mixed", "disk-0", first)
		s.holds(t, "mixed", "disk-1", second)
		dir := s.folder("mixed")
		out, err := exec.Command("cryptsetup", "luksDump", filepath.Join(dir, "disk-0.luks")).CombinedOutput() // 5
		must(t, err)
		for _, want := range []string{"cipher: aes-xts-plain64", "strongroom", "crypt", "512 [bytes]"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("cryptsetup luksDump does not say %q:\n%s", want, out)
			}
		}
		if s.dek(t, filepath.Join(dir, "disk-0.luks")).Equal(s.dek(t, filepath.Join(dir, "disk-2.luks"))) { // 12
			t.Error("two disks have the same DEK")
		}
		if out := s.ok(t, "vm", "ls").Stdout; !strings.Contains(out, "partial") {
			t.Errorf("vm ls: %s", out)
		}
	})
	t.Run("in the guest", func(t *testing.T) { // 14, 16, 157, 158
		c := s.powerOn(t, "mixed")
		c.await(t, guest.Done, "", "")
		await(t, "mixed to be off", func() bool { return s.show(t, "mixed").PowerState == "poweredOff" })
		c.noIOErrors(t)
		s.holds(t, "mixed", "disk-0", append(first, written))
		s.holds(t, "mixed", "disk-1", append(second, written))
		s.holds(t, "mixed", "disk-2", []area{written})
	})
	t.Run("single disks", func(t *testing.T) {
		singleDisks(t, s, append(first, written), append(second, written), []area{written})
	})
	t.Run("moved to another site", func(t *testing.T) { movedVM(t, s, append(first, written)) })
}

// singleDisks encrypts, decrypts and rekeys one disk of several: 153.
func singleDisks(t *testing.T, s *site, contents ...[]area) {
	check := func(what string, want ...string) {
		t.Helper()
		v := s.show(t, "mixed")
		for i, d := range v.Disks {
			if d.Key.Provider != want[i] {
				t.Errorf("%s: %s is under %q, want %q", what, d.Name, d.Key.Provider, want[i])
			}
			s.holds(t, "mixed", d.Name, contents[i])
		}
		if left := s.leftovers(t); len(left) > 0 {
			t.Errorf("%s: left over %v", what, left)
		}
	}
	s.refused(t, refusal{1, "mixed", ""}, "vm", "encrypt", "mixed", "--disk", "disk-0") // it is
	s.refused(t, refusal{1, "not encrypted", "strongroom vm encrypt mixed"}, "vm", "rekey", "mixed", "--disk", "disk-1")
	s.refused(t, refusal{1, "not encrypted", ""}, "vm", "decrypt", "mixed", "--disk", "disk-1", "--yes")
	s.refused(t, refusal{3, `no disk "disk-7"`, "strongroom vm show mixed"}, "vm", "rekey", "mixed", "--disk", "disk-7")
	check("refused", "kp-1", "", "kp-1")

	s.ok(t, "vm", "encrypt", "mixed", "--disk", "disk-1", "--provider", "kp-2")
	check("disk-1 encrypted", "kp-1", "kp-2", "kp-1")
	s.ok(t, "vm", "decrypt", "mixed", "--disk", "disk-2", "--yes")
	check("disk-2 decrypted", "kp-1", "kp-2", "")
	before := s.dek(t, filepath.Join(s.folder("mixed"), "disk-0.luks"))
	s.ok(t, "vm", "rekey", "mixed", "--disk", "disk-0", "--provider", "kp-2")
	check("disk-0 rekeyed", "kp-2", "kp-2", "")
	if !s.dek(t, filepath.Join(s.folder("mixed"), "disk-0.luks")).Equal(before) { // 210
		t.Error("a shallow rekey changed the DEK")
	}
	s.ok(t, "vm", "rekey", "mixed", "--disk", "disk-0", "--deep", "--provider", "kp-1")
	check("disk-0 rekeyed deeply", "kp-1", "kp-2", "")
	if s.dek(t, filepath.Join(s.folder("mixed"), "disk-0.luks")).Equal(before) { // 212
		t.Error("a deep rekey left the DEK")
	}
	s.ok(t, "vm", "encrypt", "mixed", "--provider", "kp-2") // the one that is plain
	check("all encrypted", "kp-1", "kp-2", "kp-2")
	s.ok(t, "vm", "rekey", "mixed", "--provider", "kp-2")
	check("all rekeyed", "kp-2", "kp-2", "kp-2")
	if s.showProvider(t, "kp-1").InUse {
		t.Error("kp-1 counts as in use")
	}
}

// movedVM copies the folder to another site: locked until the provider is
// imported there, then it boots: 9, 114, 123, 162, 163, 237, 254.
func movedVM(t *testing.T, s *site, areas []area) {
	there := newSite(t, s.lab, "b-")
	dir := there.folder("mixed")
	must(t, os.CopyFS(dir, os.DirFS(s.folder("mixed"))))
	there.bootFiles(t, "mixed", guest.Options{Steps: verifySteps("/dev/vda", areas)})

	there.ok(t, "vm", "register", "mixed", "--datastore", "ds")
	if v := there.show(t, "mixed"); v.CryptoState != "locked" || !strings.Contains(v.LockReason, "kp-2") {
		t.Errorf("the copy is %+v", v)
	}
	await(t, "an alarm", func() bool { return there.hasAlarm(t, "vm-locked vm/mixed") }) // 253
	there.refused(t, refusal{5, "provider kp-2", "strongroom provider import"}, "vm", "power-on", "mixed")
	// Another provider does not help.
	there.ok(t, "provider", "import", s.backupOf("kp-1"), "--password-file", s.passwordFile(t))
	there.refused(t, refusal{5, "provider kp-2", ""}, "vm", "power-on", "mixed")

	out := there.ok(t, "provider", "import", s.backupOf("kp-2"), "--password-file", s.passwordFile(t)).Stdout
	if !strings.Contains(out, "mixed unlocked") {
		t.Errorf("import: %s", out)
	}
	c := there.powerOn(t, "mixed")
	c.await(t, guest.Done, "", "")
	await(t, "mixed to be off", func() bool { return there.show(t, "mixed").PowerState == "poweredOff" })

	// A copy of the copy has the same id: one of them must go first.
	must(t, os.CopyFS(there.folder("twin"), os.DirFS(dir)))
	there.refused(t, refusal{1, "the same id", "strongroom vm unregister mixed"}, "vm", "register", "twin", "--datastore", "ds")
	there.ok(t, "vm", "delete", "mixed", "--yes")
	if _, err := bundle.Read(dir); err == nil {
		t.Error("the folder of the deleted VM is still there")
	}
	there.ok(t, "vm", "register", "twin", "--datastore", "ds", "--name", "twin")
	if v := there.show(t, "twin"); v.CryptoState != "unlocked" {
		t.Errorf("twin is %+v", v)
	}
}

// badImages has hostile and broken images refused.
func badImages(t *testing.T, s *site) {
	const size = 4 << 20
	whole := s.patternImage(t, "whole", "qcow2", size, []area{{0, 4096, 1}})
	secret := s.writeFile(t, "secret.raw", strings.Repeat("secret of the host ", 4096))
	images := filepath.Join(s.store, "images")
	right, wrong := s.writeFile(t, "right.pass", "secret"), s.writeFile(t, "wrong.pass", "Secret")
	for _, args := range [][]string{
		{"create", "-f", "qcow2", "-F", "qcow2", "-b", filepath.Join(s.store, whole), filepath.Join(images, "backed.qcow2")},
		{"create", "-f", "qcow2", "-F", "raw", "-b", secret, filepath.Join(images, "stealing.qcow2")},
		{"create", "-f", "luks", "--object", "secret,id=s,file=" + right, "-o", "key-secret=s,hash-alg=sha512,iter-time=10", filepath.Join(images, "foreign.luks"), "1M"},
		{"create", "-f", "qcow2", "-o", "data_file=" + filepath.Join(images, "data"), filepath.Join(images, "split.qcow2"), "1M"},
	} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
		}
	}
	qcow2, err := os.ReadFile(filepath.Join(s.store, whole))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(images, "cut.qcow2"), qcow2[:100], 0o644))
	must(t, os.WriteFile(filepath.Join(images, "empty"), nil, 0o644))
	must(t, os.Symlink(secret, filepath.Join(images, "link")))
	must(t, os.Mkdir(filepath.Join(images, "folder"), 0o755))
	for _, c := range []struct {
		disk string
		want refusal
	}{
		{"format=qcow2,image=images/backed.qcow2", refusal{2, "it is not whole", "qemu-img convert"}},
		{"format=qcow2,image=images/stealing.qcow2", refusal{2, "it is not whole", "qemu-img convert"}},
		{"format=qcow2,image=images/split.qcow2", refusal{2, "it is not whole", "qemu-img convert"}},
		{"format=qcow2,image=images/cut.qcow2", refusal{2, "cannot use image", ""}},
		{"format=qcow2,image=images/empty", refusal{2, "cannot use image", ""}},
		{"format=raw,image=images/empty", refusal{2, "disk-0", ""}},
		{"format=raw,image=images/link", refusal{2, "no path on the datastore", ""}},
		{"format=raw,image=../secret.raw", refusal{2, "no path on the datastore", ""}},
		{"format=raw,image=" + secret, refusal{2, "no path on the datastore", ""}},
		{"format=raw,image=images/none", refusal{3, "images/none", ""}},
		{"format=qcow2,image=images/none", refusal{3, "images/none", ""}},
		{"format=raw,image=images/folder", refusal{2, "disk-0", ""}},
		{"format=vmdk,image=" + whole, refusal{2, "neither raw, qcow2 nor luks", ""}},
		{"format=luks,image=images/foreign.luks,passphrase-file=" + wrong, refusal{4, "opens no keyslot", "--test-passphrase"}},
		{"format=luks,image=" + whole + ",passphrase-file=" + right, refusal{2, "not a LUKS volume", ""}},
		{"format=luks,image=images/foreign.luks,passphrase-file=" + right, refusal{}},
		{"image=" + whole, refusal{2, "image and format go together", ""}},
		{"format=qcow2,size=1M,image=" + whole, refusal{}}, // as large as the image
	} {
		args := []string{"vm", "create", "bad", "--datastore", "ds", "--encrypt", "--disk", c.disk}
		if c.want.code == 0 {
			s.ok(t, args...)
			s.ok(t, "vm", "delete", "bad", "--yes")
			continue
		}
		s.refused(t, c.want, args...)
		s.refused(t, refusal{3, "bad", ""}, "vm", "show", "bad")
		if _, err := os.Lstat(s.folder("bad")); err == nil {
			t.Errorf("%s: there is a folder", c.disk)
		}
	}
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}
