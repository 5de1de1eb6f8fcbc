package main

import (
	"context"
	"fmt"
	"strings"

	"strongroom/test/guest"
)

// keyServerDies is step 8: the VM, under a key that a key server made, does not
// notice that the server is killed.
func (d *demo) keyServerDies(ctx context.Context) (err error) {
	c := d.controller
	if d.kms, err = d.lab.StartKMS("kms"); err != nil {
		return err
	}
	if err := d.kms.AddProvider(ctx, c, "kms-1"); err != nil {
		return err
	}
	if err := d.keys.addKeyServer("kms-1", d.kms); err != nil {
		return err
	}
	d.say("strongroom kms dev runs; its certificate was confirmed, and it made, gave and destroyed a trial key: kms-1 is ready")
	if _, err := c.Must(ctx, "vm", "rekey", "web-1", "--provider", "kms-1"); err != nil {
		return err
	}
	v, err := show(ctx, c, "web-1")
	if err != nil {
		return err
	}
	if v.Key.Provider != "kms-1" {
		return fmt.Errorf("after the rekey web-1 has the key %+v; want one of kms-1", v.Key)
	}
	d.say("web-1 was rekeyed to key %s, which the KMS made for it alone", v.Key.KeyID)
	if _, err := c.Must(ctx, "vm", "power-on", "web-1"); err != nil {
		return err
	}
	verified, err := d.console.await(ctx, guest.Note, "verify", "verified")
	if err != nil {
		return err
	}
	before, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	d.say("fourth boot: the guest %s", verified.Text)
	// While the KMS is there to tell what to look for.
	if err := d.scan(ctx, d.disk()); err != nil {
		return err
	}
	d.kms.Kill()
	if err := c.WaitFor(ctx, "the alarm that the KMS is away", func() (bool, error) {
		r, err := c.Must(ctx, "alarm", "ls")
		return strings.Contains(r.Stdout, "key-server-failure"), err
	}); err != nil {
		return err
	}
	after, err := d.console.later(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	d.say("the KMS is killed with -9 and an alarm tells of it; the guest writes on (%s before, %s after)", before.Text, after.Text)
	return nil
}

// keyServerReturns is step 9: the KEK was in the host's memory only.
func (d *demo) keyServerReturns(ctx context.Context) error {
	c := d.controller
	key, err := show(ctx, c, "web-1")
	if err != nil {
		return err
	}
	if err := d.host.Crash(); err != nil {
		return err
	}
	if err := d.host.Start(); err != nil {
		return err
	}
	if err := c.WaitFor(ctx, "web-1 to be off and locked", func() (bool, error) {
		v, err := show(ctx, c, "web-1")
		return v.PowerState == "poweredOff" && v.CryptoState == "locked", err
	}); err != nil {
		return err
	}
	d.say("host, QEMU and volume process are killed with -9, and the host starts again: web-1 is locked")
	r, err := c.CLI(ctx, "vm", "power-on", "web-1")
	if err != nil {
		return err
	}
	told := strings.Join(strings.Fields(r.Stderr), " ")
	if r.Code != 5 || !strings.Contains(told, key.Key.KeyID) || !strings.Contains(told, "kms-1") ||
		!strings.Contains(told, "connection refused") || !strings.Contains(told, "strongroom provider check kms-1") {
		return fmt.Errorf("power-on without the KMS: exit code %d, want 5 and an error that names provider, key, reason and what to do: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	d.say("power-on is refused: %s", told)

	if err := d.kms.Start(); err != nil {
		return err
	}
	if err := c.WaitFor(ctx, "web-1 to be unlocked", func() (bool, error) {
		v, err := show(ctx, c, "web-1")
		return v.CryptoState == "unlocked", err
	}); err != nil {
		return err
	}
	d.say("the KMS is back: the host got the key from the controller, and web-1 is unlocked without anyone's help")
	if _, err := c.Must(ctx, "vm", "power-on", "web-1"); err != nil {
		return err
	}
	verified, err := d.console.await(ctx, guest.Note, "verify", "verified")
	if err != nil {
		return err
	}
	d.say("fifth boot, after the crash: the guest %s", verified.Text)
	return nil
}

// leaveKeyServer is step 10.
func (d *demo) leaveKeyServer(ctx context.Context) error {
	c := d.controller
	before, err := d.console.await(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	if _, err := c.Must(ctx, "vm", "rekey", "web-1", "--provider", "kp-2"); err != nil {
		return err
	}
	after, err := d.console.later(ctx, guest.Note, "churn", "churned")
	if err != nil {
		return err
	}
	v, err := show(ctx, c, "web-1")
	if err != nil {
		return err
	}
	if v.PowerState != "poweredOn" || v.Key.Provider != "kp-2" {
		return fmt.Errorf("after the rekey web-1 is %s under provider %q; want poweredOn under kp-2", v.PowerState, v.Key.Provider)
	}
	d.say("rekeyed to the native provider kp-2 while the guest wrote (%s before, %s after)", before.Text, after.Text)
	d.kms.Kill()
	if _, err := c.Must(ctx, "provider", "delete", "kms-1", "--yes"); err != nil {
		return err
	}
	d.say("kms-1 is used by nothing, and was removed although its KMS is killed")
	if _, err := c.Must(ctx, "vm", "power-off", "web-1"); err != nil {
		return err
	}
	if _, err := d.console.await(ctx, guest.Done, "", ""); err != nil {
		return err
	}
	return powered(ctx, c, "web-1", "poweredOff")
}
