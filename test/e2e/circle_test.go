package e2e

import "testing"

// TestCircularDependency: 256, 257. A VM that runs a key server, or the controller, is
// not encrypted with keys that come by way of it, unless somebody knows better; a
// native provider's keys do not.
func TestCircularDependency(t *testing.T) {
	t.Parallel()
	s := newStandardSite(t)
	s.kms.Clients = nil // any certificate will do
	s.kms.Stop()
	s.kms.Start(t)
	s.ok(t, "provider", "add-standard", "kms-1", "--server", s.kms.Addr, "--trust-fingerprint", s.pin)
	s.ok(t, "provider", "check", "kms-1")

	plain := func(name string, more ...string) []string {
		return append([]string{"vm", "create", name, "--datastore", "ds", "--disk", "1M"}, more...)
	}
	s.ok(t, plain("kms-vm", "--runs", "provider:kms-1")...)
	s.ok(t, plain("ctl-vm")...)
	s.ok(t, "vm", "set", "ctl-vm", "--runs", "controller")
	for name, needs := range map[string]string{"kms-vm": "key provider kms-1, which VM kms-vm runs", "ctl-vm": "the controller, which VM ctl-vm runs"} {
		s.refused(t, refusal{1, needs, "--allow-circular"}, "vm", "encrypt", name, "--provider", "kms-1")
		if s.show(t, name).Encrypted {
			t.Errorf("%s is encrypted", name)
		}
		s.ok(t, "vm", "encrypt", name, "--provider", "kp-1")
		s.refused(t, refusal{1, needs, "--allow-circular"}, "vm", "rekey", name, "--provider", "kms-1")
		if s.hasAlarm(t, "circular-dependency vm/"+name) {
			t.Errorf("%s, of a native provider, has the alarm", name)
		}
	}
	s.ok(t, "vm", "rekey", "kms-vm", "--provider", "kms-1", "--allow-circular")
	await(t, "the alarm", func() bool { return s.hasAlarm(t, "circular-dependency vm/kms-vm") })
	// As the runbook says.
	s.ok(t, "vm", "rekey", "kms-vm", "--provider", "kp-1")
	await(t, "the end of the alarm", func() bool { return !s.hasAlarm(t, "circular-dependency vm/kms-vm") })

	// Hosts that ask the key server themselves do without the controller; and no longer, if
	// a VM would wait for itself then.
	s.ok(t, "provider", "update", "kms-1", "--host-access", "direct")
	s.ok(t, "vm", "rekey", "ctl-vm", "--provider", "kms-1")
	s.refused(t, refusal{1, "VM ctl-vm could then not be started", "vm rekey ctl-vm"}, "provider", "update", "kms-1", "--host-access", "brokered")
	s.ok(t, "provider", "update", "kms-1", "--host-access", "brokered", "--allow-circular")
	await(t, "the alarm", func() bool { return s.hasAlarm(t, "circular-dependency vm/ctl-vm") })
}
