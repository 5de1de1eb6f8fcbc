package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"strongroom/internal/keys/keyprovider"
	"strongroom/test/guest"
	"strongroom/test/lab"
)

// vm is what the demonstration needs of `vm show -o json`.
type vm struct {
	PowerState  string
	CryptoState string
	LockReason  string
	Key         struct{ Provider, KeyID string }
}

func show(ctx context.Context, c *lab.Controller, name string) (vm, error) {
	var v vm
	r, err := c.Must(ctx, "vm", "show", name, "-o", "json")
	if err == nil {
		err = r.JSON(&v)
	}
	return v, err
}

// powered waits until the VM is in a power state.
func powered(ctx context.Context, c *lab.Controller, name, state string) error {
	return c.WaitFor(ctx, name+" to be "+state, func() (bool, error) {
		v, err := show(ctx, c, name)
		return v.PowerState == state, err
	})
}

func (d *demo) disk() string { return filepath.Join(d.store, "web-1", "disk-0.luks") }

// start is step 1.
func (d *demo) start(ctx context.Context) (err error) {
	d.keys = &keys{providers: keyprovider.NewSet()}
	if d.image, err = guest.Build(ctx, guest.Workload(marker)); err != nil {
		return err
	}
	if d.controller, err = d.lab.StartController(ctx, "controller"); err != nil {
		return err
	}
	d.say("controller is ready at https://%s, with etcd inside", d.controller.Address)
	if _, err := d.controller.Must(ctx, "cluster", "create", "lab"); err != nil {
		return err
	}
	if d.host, err = d.controller.StartHost(ctx, "host-1", "lab"); err != nil {
		return err
	}
	d.say("host-1 joined cluster lab with a one-time token and is connected")
	d.store, err = d.addDatastore(ctx, d.controller, "lab", "ds1")
	return err
}

// addDatastore makes a datastore with the guest's kernel on it.
func (d *demo) addDatastore(ctx context.Context, c *lab.Controller, cluster, name string) (string, error) {
	dir := filepath.Join(d.lab.Dir, name)
	if err := os.MkdirAll(filepath.Join(dir, "boot"), 0o700); err != nil {
		return "", err
	}
	for file, source := range map[string]string{"vmlinuz": d.image.Kernel, "initrd": d.image.Initrd} {
		if err := copyFile(filepath.Join(dir, "boot", file), source); err != nil {
			return "", err
		}
	}
	_, err := c.Must(ctx, "datastore", "create", name, "--cluster", cluster, "--path", dir)
	return dir, err
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}

func (d *demo) createVM(ctx context.Context, args ...string) (lab.Result, error) {
	return d.controller.CLI(ctx, append([]string{
		"vm", "create", "web-1", "--datastore", "ds1", "--memory", "192M", "--disk", "192M", "--encrypt",
		"--kernel", "boot/vmlinuz", "--initrd", "boot/initrd", "--append", d.image.Append,
	}, args...)...)
}

// makeProvider makes a native provider and backs it up.
func (d *demo) makeProvider(ctx context.Context, c *lab.Controller, name string) error {
	if _, err := c.Must(ctx, "provider", "create-native", name); err != nil {
		return err
	}
	return d.backUp(ctx, c, name)
}

func (d *demo) backupOf(name string) string { return filepath.Join(d.lab.Dir, "backups", name+".p12") }

func (d *demo) passwordFile() string { return filepath.Join(d.lab.Dir, "backups", "password") }

func (d *demo) backUp(ctx context.Context, c *lab.Controller, name string) error {
	if err := os.MkdirAll(filepath.Dir(d.passwordFile()), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(d.passwordFile(), []byte(password), 0o600); err != nil {
		return err
	}
	if _, err := c.Must(ctx, "provider", "backup", name, "--out", d.backupOf(name), "--password-file", d.passwordFile()); err != nil {
		return err
	}
	return d.keys.addBackup(d.backupOf(name))
}

// provider is step 2.
func (d *demo) provider(ctx context.Context) error {
	c := d.controller
	if _, err := c.Must(ctx, "provider", "create-native", "kp-1"); err != nil {
		return err
	}
	r, err := d.createVM(ctx, "--provider", "kp-1")
	if err != nil {
		return err
	}
	if r.Code == 0 || !strings.Contains(r.Stderr, "not backed up") {
		return fmt.Errorf("encrypting before the backup was not refused for that reason: exit code %d, %s%s", r.Code, r.Stdout, r.Stderr)
	}
	d.say("encrypting before its backup is refused: %s", strings.ReplaceAll(strings.TrimSpace(r.Stderr), "\n", "; "))
	if err := d.backUp(ctx, c, "kp-1"); err != nil {
		return err
	}
	if _, err := c.Must(ctx, "provider", "default", "kp-1"); err != nil {
		return err
	}
	var p struct {
		State     string
		IsDefault bool
	}
	if r, err = c.Must(ctx, "provider", "show", "kp-1", "-o", "json"); err == nil {
		err = r.JSON(&p)
	}
	if err == nil && (p.State != "Active" || !p.IsDefault) {
		err = fmt.Errorf("kp-1 is %q, default %v; want Active and default", p.State, p.IsDefault)
	}
	if err != nil {
		return err
	}
	d.say("backed up to kp-1.p12, read again and confirmed: kp-1 is Active and the default")
	return nil
}

// firstBoot is step 3.
func (d *demo) firstBoot(ctx context.Context) error {
	r, err := d.createVM(ctx)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("cannot create web-1: %s", r.Stderr)
	}
	if err != nil {
		return err
	}
	d.console = &console{path: filepath.Join(d.store, "web-1", "vm.log")}
	if _, err := d.controller.Must(ctx, "vm", "power-on", "web-1"); err != nil {
		return err
	}
	if _, err := d.console.await(ctx, guest.OK, "write", ""); err != nil {
		return err
	}
	// From then on the guest knows what to do when its power button is pressed.
	if _, err := d.console.await(ctx, guest.Note, "churn", "churned"); err != nil {
		return err
	}
	d.say("the guest made ext4 on its encrypted disk and wrote files with checksums")
	if _, err := d.controller.Must(ctx, "vm", "power-off", "web-1"); err != nil {
		return err
	}
	if _, err := d.console.await(ctx, guest.Done, "", ""); err != nil {
		return err
	}
	d.say("it shut down when asked")
	return d.scan(ctx, d.disk())
}

// scan looks for keys and plain text in everything that is on disk.
func (d *demo) scan(ctx context.Context, disks ...string) error {
	s, err := d.keys.scanner(ctx, disks...)
	if err != nil {
		return err
	}
	own, err := os.MkdirTemp(d.lab.Dir, "scan-")
	if err != nil {
		return err
	}
	defer os.Remove(own)
	if err := selfTest(s, own); err != nil {
		return err
	}
	// The kernel image with the guest's program is not data of the guest, and
	// knows the marker; all else is looked at.
	boot, err := filepath.Glob(filepath.Join(d.lab.Dir, "*", "boot"))
	if err != nil {
		return err
	}
	found, read, err := s.Tree(d.lab.Dir, 10, boot...)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("found what must not be there: %v", found)
	}
	d.say("searched %d MB of datastore, controller, host, logs and backups for the plain text and every KDK, KEK and DEK: nothing", read>>20)
	return nil
}

// liveRekey is step 4.
func (d *demo) liveRekey(ctx context.Context) error {
	c := d.controller
	if err := d.makeProvider(ctx, c, "kp-2"); err != nil {
		return err
	}
	if _, err := c.Must(ctx, "vm", "power-on", "web-1"); err != nil {
		return err
	}
	verified, err := d.console.await(ctx, guest.Note, "verify", "verified")
	if err != nil {
		return err
	}
	d.say("second boot: the guest %s", verified.Text)
	before, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	if _, err := c.Must(ctx, "vm", "rekey", "web-1", "--provider", "kp-2"); err != nil {
		return err
	}
	after, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	d.say("rekeyed to kp-2 while the guest wrote (%s before, %s after)", before.Text, after.Text)
	v, err := show(ctx, c, "web-1")
	if err != nil {
		return err
	}
	if v.PowerState != "poweredOn" || v.Key.Provider != "kp-2" {
		return fmt.Errorf("after the rekey web-1 is %s under provider %q; want poweredOn under kp-2", v.PowerState, v.Key.Provider)
	}
	var usage struct{ Users []struct{ VM, Disk string } }
	r, err := c.Must(ctx, "provider", "usage", "kp-1", "-o", "json")
	if err == nil {
		err = r.JSON(&usage)
	}
	if err != nil {
		return err
	}
	if len(usage.Users) > 0 {
		return fmt.Errorf("kp-1 is still used by %v", usage.Users)
	}
	d.say("kp-1 is reported as unused")
	return nil
}

// deepRekey is step 5: the guest still writes.
func (d *demo) deepRekey(ctx context.Context) error {
	old, err := d.keys.dek(ctx, d.disk())
	if err != nil {
		return err
	}
	defer old.Close()
	if ok, err := opens(d.disk(), old); err != nil || !ok {
		return fmt.Errorf("the DEK does not open the disk before the rekey: %v", err)
	}
	before, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	if _, err := d.controller.Must(ctx, "vm", "rekey", "web-1", "--deep"); err != nil {
		return err
	}
	after, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	d.say("the whole disk was rewritten under a new DEK while the guest wrote (%s before, %s after)", before.Text, after.Text)
	if ok, err := opens(d.disk(), old); err != nil || ok {
		return fmt.Errorf("the old DEK still opens the disk (error %v)", err)
	}
	d.say("the old DEK no longer opens the disk, the new one does")
	return d.scan(ctx, d.disk())
}

// crash is step 6: the guest still writes.
func (d *demo) crash(ctx context.Context) error {
	c := d.controller
	if err := c.Stop(); err != nil {
		return err
	}
	if err := d.host.Crash(); err != nil {
		return err
	}
	d.say("the controller is stopped; host, QEMU and volume process are killed with -9")
	if err := d.host.Start(); err != nil {
		return err
	}
	r, err := d.host.CLI(ctx, "vm", "power-on", "web-1")
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("cannot power on web-1 without the controller: %s", r.Stderr)
	}
	if err != nil {
		return err
	}
	d.say("host-1 alone powered web-1 on, with the key in its sealed configuration")
	verified, err := d.console.await(ctx, guest.Note, "verify", "verified")
	if err != nil {
		return err
	}
	d.say("third boot, after the crash: the guest %s", verified.Text)
	if _, err := d.console.await(ctx, guest.OK, "write", ""); err != nil {
		return err
	}
	// From then on the guest knows what to do when its power button is pressed.
	if _, err := d.console.await(ctx, guest.Note, "churn", "churned"); err != nil {
		return err
	}
	if r, err = d.host.CLI(ctx, "vm", "power-off", "web-1"); err == nil && r.Code != 0 {
		err = fmt.Errorf("cannot power off web-1 without the controller: %s", r.Stderr)
	}
	if err != nil {
		return err
	}
	if _, err := d.console.await(ctx, guest.Done, "", ""); err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	d.say("the controller is back")
	return powered(ctx, c, "web-1", "poweredOff")
}

// elsewhere is step 7: a fresh controller and host get a copy of
// the VM folder.
func (d *demo) elsewhere(ctx context.Context) error {
	c, err := d.lab.StartController(ctx, "controller-2")
	if err != nil {
		return err
	}
	if _, err := c.Must(ctx, "cluster", "create", "dr"); err != nil {
		return err
	}
	if d.second, err = c.StartHost(ctx, "host-2", "dr"); err != nil {
		return err
	}
	store, err := d.addDatastore(ctx, c, "dr", "ds2")
	if err != nil {
		return err
	}
	dir := filepath.Join(store, "web-1")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(d.store, "web-1"))); err != nil {
		return err
	}
	if _, err := c.Must(ctx, "vm", "register", "web-1", "--datastore", "ds2"); err != nil {
		return err
	}
	v, err := show(ctx, c, "web-1")
	if err != nil {
		return err
	}
	if v.CryptoState != "locked" {
		return fmt.Errorf("the copy is %q, want locked", v.CryptoState)
	}
	d.say("the copy is locked: %s", v.LockReason)
	if r, err := c.CLI(ctx, "vm", "power-on", "web-1"); err != nil || r.Code != 5 {
		return fmt.Errorf("power-on of the locked copy: exit code %d, want 5 (%v): %s", r.Code, err, r.Stderr)
	}
	if _, err := c.Must(ctx, "provider", "import", d.backupOf("kp-2"), "--password-file", d.passwordFile()); err != nil {
		return err
	}
	if v, err = show(ctx, c, "web-1"); err != nil || v.CryptoState != "unlocked" {
		return fmt.Errorf("after the import the copy is %q, want unlocked (%v)", v.CryptoState, err)
	}
	if _, err := c.Must(ctx, "vm", "power-on", "web-1"); err != nil {
		return err
	}
	copied := &console{path: filepath.Join(dir, "vm.log"), seen: d.console.seen}
	verified, err := copied.await(ctx, guest.Note, "verify", "verified")
	if err != nil {
		return err
	}
	d.say("after the import of kp-2.p12 it boots there: the guest %s", verified.Text)
	if _, err := c.Must(ctx, "vm", "power-off", "web-1", "--hard"); err != nil {
		return err
	}
	return nil
}
