package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestControllerRestored loses a controller and brings it back from a copy of its
// data folder that is older than the last rekey and the last VM: 262, 269.
func TestControllerRestored(t *testing.T) {
	t.Parallel()
	s := newSite(t, newLab(t), "")
	server, err := s.lab.StartKMS("kms")
	must(t, err)
	must(t, server.AddProvider(t.Context(), s.controller, "kms-1"))
	s.provider(t, "kp-1")
	s.ok(t, encryptedVM("web-1", "--provider", "kms-1")...)
	s.ok(t, encryptedVM("db-1", "--provider", "kp-1")...)

	data, saved := s.controller.DataDir(), filepath.Join(s.lab.Dir, "saved")
	copied := func(from, to string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	must(t, s.controller.Stop())
	copied(data, saved)
	must(t, s.controller.Start())
	s.connected(t)
	s.ok(t, "vm", "rekey", "web-1")
	s.ok(t, "vm", "rekey", "db-1")
	s.ok(t, encryptedVM("web-2", "--provider", "kms-1")...)
	web1, db1, web2 := s.show(t, "web-1"), s.show(t, "db-1"), s.show(t, "web-2")
	s.ok(t, "vm", "power-on", "db-1")

	s.controller.Kill()
	must(t, os.RemoveAll(data))
	copied(saved, data)
	must(t, s.controller.Start())
	s.connected(t)
	// What was done since, the hosts tell.
	await(t, "the controller to know the keys of now", func() bool {
		return s.show(t, "web-1").Key == web1.Key && s.show(t, "db-1").Key == db1.Key && s.show(t, "db-1").PowerState == "poweredOn"
	})
	s.refused(t, refusal{3, "web-2", ""}, "vm", "show", "web-2")
	s.ok(t, "vm", "register", "web-2", "--datastore", "ds")
	if v := s.show(t, "web-2"); v.Key != web2.Key {
		t.Errorf("web-2 has key %+v, had %+v", v.Key, web2.Key)
	}
	// With its host's memory empty, all depends on what the controller knows.
	must(t, s.host.Crash())
	must(t, s.host.Start())
	for _, name := range []string{"web-1", "web-2", "db-1"} {
		await(t, name+" to be unlocked and off", func() bool {
			v := s.show(t, name)
			return v.CryptoState == "unlocked" && v.PowerState == "poweredOff"
		})
		s.ok(t, "vm", "power-on", name)
		s.ok(t, "vm", "power-off", name, "--hard")
		s.ok(t, "vm", "rekey", name)
	}
}
