package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/guest"
	"strongroom/test/keyscan"
	"strongroom/test/kms"
)

// kmsAccount is the account that our server gives to the controller: the name
// in its client certificate.
const kmsAccount = "strongroom"

// standardSite is a site with the standard provider kms-1 on our own server and
// the native provider kp-1.
type standardSite struct {
	*site
	kms *kms.Server
	pin string // fingerprint of the server's certificate

	keks map[string][]byte // that were ever seen at the KMS, by identifier
}

func newStandardSite(t *testing.T) *standardSite {
	t.Helper()
	ca := testca.New(t)
	s := &standardSite{site: newSite(t, newLab(t), ""), kms: kms.NewServer(t, ca), keks: map[string][]byte{}}
	s.pin = kmipclient.FingerprintOf(s.kms.Certificate.Leaf).String()
	s.kms.Clients = x509.NewCertPool() // nobody yet
	s.kms.Start(t)
	s.provider(t, "kp-1")
	return s
}

// keepKEKs notes all keys that the KMS has now, for the scan at the end.
func (s *standardSite) keepKEKs(t *testing.T) {
	t.Helper()
	must(t, s.kms.Store.View(t.Context(), kmsAccount, func(r kmipserver.Reader) error {
		for o, err := range r.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			full, err := r.Get(o.ID)
			if err != nil {
				return err
			}
			if full.Material != nil {
				s.keks[o.ID] = append([]byte(nil), full.Material.Bytes()...)
			}
		}
		return nil
	}))
}

// TestStandardProvider takes a VM under a standard provider through the loss and
// return of its KMS: each subtest goes on where the one before ended.
func TestStandardProvider(t *testing.T) {
	t.Parallel()
	s := newStandardSite(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T, *standardSite)
	}{
		{"trust in both directions", trustBothWays},
		{"one key for each VM", oneKeyEach},
		{"KMS down", kmsDown},
		{"KMS back", kmsBack},
		{"hosts ask the KMS themselves", directAccess},
		{"to native and back", toNativeAndBack},
		{"keys in no file", keksInNoFile},
		{"always removable", alwaysRemovable},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(t, s) }) {
			t.FailNow()
		}
	}
}

// trustBothWays: 34 to 42, 250, 251, 265.
func trustBothWays(t *testing.T, s *standardSite) {
	// A wrong address, and a certificate that is not the one, change nothing.
	began := time.Now()
	s.refused(t, refusal{6, "key server 127.0.0.1:1: no connection", "nothing was changed"},
		"provider", "add-standard", "kms-1", "--server", "127.0.0.1:1", "--trust-fingerprint", s.pin)
	s.refused(t, refusal{4, "none of those to trust", "compare"},
		"provider", "add-standard", "kms-1", "--server", s.kms.Addr, "--trust-fingerprint", "sha256:"+strings.Repeat("00", 32))
	s.refused(t, refusal{2, "must be confirmed", "--trust-fingerprint " + s.pin}, "provider", "add-standard", "kms-1", "--server", s.kms.Addr)
	s.refused(t, refusal{3, "no provider kms-1", ""}, "provider", "show", "kms-1")
	t.Logf("three refusals took %v", time.Since(began).Round(time.Millisecond))

	// Added, but the server does not know us.
	if r := s.ok(t, "provider", "add-standard", "kms-1", "--server", s.kms.Addr, "--trust-fingerprint", s.pin); !strings.Contains(r.Stderr, "does not trust the controller's client certificate") {
		t.Errorf("add-standard said:\n%s%s", r.Stdout, r.Stderr)
	}
	if p := s.showProvider(t, "kms-1"); p.State != "Not established" {
		t.Errorf("the provider is %q", p.State)
	}
	if !s.hasAlarm(t, "key-server-failure provider/kms-1/"+s.kms.Addr) || !s.hasAlarm(t, "provider-not-established provider/kms-1") {
		t.Errorf("alarms: %v", s.alarms(t))
	}
	s.refused(t, refusal{6, "does not trust the controller's client certificate", "strongroom provider client-cert kms-1"}, "provider", "check", "kms-1")
	s.refused(t, refusal{1, "key provider kms-1 is not established", "strongroom provider check kms-1"}, encryptedVM("web-0", "--provider", "kms-1")...)

	// The server is told of us.
	file := filepath.Join(s.lab.Dir, "client.pem")
	s.ok(t, "provider", "client-cert", "kms-1", "--out", file)
	text, err := os.ReadFile(file)
	must(t, err)
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	s.kms.Clients.AddCert(cert)
	s.ok(t, "provider", "check", "kms-1")
	if p := s.showProvider(t, "kms-1"); p.State != "Active" {
		t.Errorf("the provider is %q: %v", p.State, p.Details)
	}
	await(t, "alarms to clear", func() bool {
		return !strings.Contains(strings.Join(s.alarms(t), " "), "kms-1")
	})
	shown := s.ok(t, "provider", "show", "kms-1").Stdout
	for _, want := range []string{s.kms.Addr + ", green", s.pin, "self-signed"} {
		if !strings.Contains(shown, want) {
			t.Errorf("provider show lacks %q:\n%s", want, shown)
		}
	}
	s.ok(t, "provider", "default", "kms-1")
}

// oneKeyEach: 17 to 20, 25 to 31.
func oneKeyEach(t *testing.T, s *standardSite) {
	boot := s.bootFiles(t, "workload", guest.Workload(marker))
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "192M", "--encrypt"}, boot...)...)
	s.ok(t, encryptedVM("web-2")...)
	one, two := s.show(t, "web-1"), s.show(t, "web-2")
	if one.Key.Provider != "kms-1" || two.Key.Provider != "kms-1" || one.Key.KeyID == two.Key.KeyID || one.Disks[0].Key != one.Key {
		t.Errorf("keys %+v of web-1, %+v of web-2", one.Key, two.Key)
	}
	s.keepKEKs(t)
	for _, v := range []vmState{one, two} {
		if len(s.keks[v.Key.KeyID]) != 32 {
			t.Errorf("the KMS has no key %s", v.Key.KeyID)
		}
	}
	// Creation that fails leaves no key behind.
	before := len(s.keks)
	s.refused(t, refusal{3, "there is no", ""}, "vm", "create", "web-3", "--datastore", "ds", "--disk", "format=raw,image=images/none.raw", "--encrypt")
	s.keepKEKs(t)
	if live := s.liveKeys(t); live != 2 {
		t.Errorf("%d live keys at the KMS, want 2 (%d were ever made, %d before)", live, len(s.keks), before)
	}
	c := s.powerOn(t, "web-1")
	c.await(t, guest.OK, "write", "")
	c.writes(t)
}

// liveKeys counts the keys at the KMS that are not destroyed.
func (s *standardSite) liveKeys(t *testing.T) (n int) {
	t.Helper()
	must(t, s.kms.Store.View(t.Context(), kmsAccount, func(r kmipserver.Reader) error {
		for o, err := range r.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			full, err := r.Get(o.ID)
			if err != nil {
				return err
			}
			if full.Material != nil {
				n++
			}
		}
		return nil
	}))
	return n
}

// kmsDown: 21, 22, 28, 32, 258 to 261, 265.
func kmsDown(t *testing.T, s *standardSite) {
	must(t, s.kms.Stop())
	await(t, "the alarm", func() bool { return s.hasAlarm(t, "key-server-failure provider/kms-1/"+s.kms.Addr) })
	c := s.console("web-1")
	c.writes(t)
	// From the host's memory a VM starts without the KMS.
	s.ok(t, "vm", "power-on", "web-2")
	s.ok(t, "vm", "power-off", "web-2", "--hard")
	if p := s.showProvider(t, "kms-1"); p.State != "Not connected" {
		t.Errorf("the provider is %q: %v", p.State, p.Details)
	}
	began := time.Now()
	s.refused(t, refusal{6, "kms-1", "strongroom provider check kms-1"}, encryptedVM("web-4")...)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the refusal took %v", took)
	}

	// The agent restarts: its memory is empty, the guest does not notice.
	key := s.show(t, "web-1").Key.KeyID
	s.host.Kill()
	must(t, s.host.Start())
	await(t, "web-2 to be locked", func() bool { return s.show(t, "web-2").CryptoState == "locked" })
	if v := s.show(t, "web-2"); !strings.Contains(v.LockReason, "KeyStateMissingInCache") || !strings.Contains(v.LockReason, "kms-1") || !strings.Contains(v.LockReason, v.Key.KeyID) {
		t.Errorf("web-2 is locked because %q", v.LockReason)
	}
	c.writes(t)
	s.ok(t, "vm", "power-off", "web-1", "--hard")
	r := s.refused(t, refusal{5, key, "strongroom provider check kms-1"}, "vm", "power-on", "web-1")
	if !strings.Contains(r.Stderr, "kms-1") || !strings.Contains(r.Stderr, "connection refused") {
		t.Errorf("power-on says: %s", r.Stderr)
	}
	local, err := s.host.CLI(t.Context(), "vm", "power-on", "web-1")
	must(t, err)
	refusal{5, "key " + key + " of provider kms-1 is not in this host's memory", "strongroom provider check kms-1"}.check(t, local, []string{"vm", "power-on", "web-1"})
	s.refused(t, refusal{5, key, ""}, "vm", "rekey", "web-1", "--provider", "kp-1")
}

// kmsBack: 23, 259, 262, 273: nobody has to do anything.
func kmsBack(t *testing.T, s *standardSite) {
	s.kms.Start(t)
	await(t, "the VMs to be unlocked", func() bool {
		return s.show(t, "web-1").CryptoState == "unlocked" && s.show(t, "web-2").CryptoState == "unlocked"
	})
	c := s.powerOn(t, "web-1")
	if e := c.await(t, guest.Note, "verify", "verified"); !strings.HasPrefix(e.Text, "verified 20 files") { // it was never shut down
		t.Errorf("the guest %s, want 20 files", e.Text)
	}
	c.writes(t)
	// The machine and the controller restart: still nobody has to do anything.
	must(t, s.host.Crash())
	s.controller.Kill()
	must(t, s.controller.Start())
	must(t, s.host.Start())
	await(t, "the host to be back with the keys", func() bool {
		r, err := s.controller.CLI(t.Context(), "host", "show", "host-1")
		v := s.show(t, "web-1")
		return err == nil && strings.Contains(r.Stdout, "connected") && v.PowerState == "poweredOff" && v.CryptoState == "unlocked"
	})
	c = s.powerOn(t, "web-1")
	c.await(t, guest.Note, "verify", "verified")
	c.writes(t)
}

// directAccess: a host that may ask the KMS powers on after its restart without
// its controller, and with neither of the two it says whom it could not ask.
func directAccess(t *testing.T, s *standardSite) {
	s.ok(t, "provider", "update", "kms-1", "--host-access", "direct")
	if r := s.ok(t, "provider", "show", "kms-1"); !regexp.MustCompile(`Host access:? +direct`).MatchString(r.Stdout) {
		t.Errorf("the provider is shown as:\n%s", r.Stdout)
	}
	s.ok(t, "vm", "power-on", "web-2") // before that its host is told
	s.ok(t, "vm", "power-off", "web-2", "--hard")
	s.controller.Kill()
	must(t, s.kms.Stop())
	must(t, s.host.Crash())
	must(t, s.host.Start())
	args := []string{"vm", "power-on", "web-1"}
	r, err := s.host.CLI(t.Context(), args...)
	must(t, err)
	refusal{5, "its key server does not give it", "strongroom provider check kms-1"}.check(t, r, args)
	if !strings.Contains(r.Stderr, "connection refused") {
		t.Errorf("power-on says: %s", r.Stderr)
	}
	s.kms.Start(t)
	c := s.console("web-1")
	c.seen = len(c.events(t))
	await(t, "the host to have the key", func() bool { // it passes over a server that has just failed
		r, err = s.host.CLI(t.Context(), args...)
		must(t, err)
		return r.Code == 0
	})
	c.await(t, guest.Note, "verify", "verified")
	must(t, s.controller.Start())
	s.connected(t)
	s.ok(t, "provider", "update", "kms-1", "--host-access", "brokered")
	c.writes(t)
}

// toNativeAndBack: 210, 211, 214, 215, 226.
func toNativeAndBack(t *testing.T, s *standardSite) {
	c := s.console("web-1")
	from := s.show(t, "web-1").Key
	s.ok(t, "vm", "rekey", "web-1", "--provider", "kp-1")
	if v := s.show(t, "web-1"); v.Key.Provider != "kp-1" || v.PowerState != "poweredOn" {
		t.Errorf("web-1 is %+v", v)
	}
	c.writes(t)
	s.ok(t, "vm", "rekey", "web-1", "--provider", "kms-1")
	v := s.show(t, "web-1")
	if v.Key.Provider != "kms-1" || v.Key.KeyID == from.KeyID || v.Disks[0].Key != v.Key {
		t.Errorf("web-1 has key %+v, before %+v", v.Key, from)
	}
	c.writes(t)
	s.ok(t, "vm", "power-off", "web-1")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	s.ok(t, "vm", "rekey", "web-1", "--deep")
	s.ok(t, "vm", "decrypt", "web-1", "--yes")
	s.ok(t, "vm", "encrypt", "web-1")
	if again := s.show(t, "web-1"); again.Key.Provider != "kms-1" || again.Key.KeyID == v.Key.KeyID {
		t.Errorf("encrypted again with %+v", again.Key)
	}
	c = s.powerOn(t, "web-1")
	c.await(t, guest.Note, "verify", "verified")
	s.ok(t, "vm", "power-off", "web-1", "--hard")
	c.noIOErrors(t)
	s.keepKEKs(t)
}

// keksInNoFile: 19, 21, 32.
func keksInNoFile(t *testing.T, s *standardSite) {
	scan := new(keyscan.Scanner)
	for id, kek := range s.keks {
		scan.AddKey("KEK "+id, kek)
	}
	if len(s.keks) < 5 {
		t.Errorf("only %d keys were seen", len(s.keks))
	}
	if found := s.scan(t, scan); len(found) > 0 {
		t.Errorf("found %v", found)
	}
}

// alwaysRemovable: 41, 162 to 164, 277.
func alwaysRemovable(t *testing.T, s *standardSite) {
	must(t, s.kms.Stop())
	s.refused(t, refusal{1, "it is in use by web-", "strongroom vm rekey"}, "provider", "delete", "kms-1", "--yes")
	// Unregistered, it is out of the hosts' memory: 162, 163.
	s.ok(t, "vm", "unregister", "web-2", "--yes")
	s.ok(t, "vm", "register", "web-2", "--datastore", "ds")
	if v := s.show(t, "web-2"); v.CryptoState != "locked" || !strings.Contains(v.LockReason, "KeyStateMissingInCache") {
		t.Errorf("registered again without its KMS, web-2 is %s: %s", v.CryptoState, v.LockReason)
	}
	s.ok(t, "vm", "delete", "web-1", "--yes")
	// A folder that somebody deleted by hand is forgotten when it is gone.
	s.ok(t, "vm", "unregister", "web-2", "--yes")
	s.refused(t, refusal{1, "sees its folder, web-2 on datastore ds", "strongroom vm register web-2 --datastore ds"}, "vm", "forget", "web-2", "--datastore", "ds", "--yes")
	must(t, os.RemoveAll(s.folder("web-2")))
	if r := s.ok(t, "vm", "ls", "--unregistered"); !strings.Contains(r.Stdout, "web-2") || !strings.Contains(r.Stdout, "of kms-1") {
		t.Errorf("unregistered:\n%s", r.Stdout)
	}
	s.ok(t, "vm", "forget", "web-2", "--datastore", "ds", "--yes")
	s.refused(t, refusal{3, "no unregistered VM", "strongroom vm ls --unregistered"}, "vm", "forget", "web-2", "--datastore", "ds", "--yes")
	began := time.Now()
	s.ok(t, "provider", "delete", "kms-1", "--yes")
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("deletion took %v", took)
	}
	// And added again under its name.
	s.kms.Start(t)
	s.ok(t, "provider", "add-standard", "kms-1", "--server", s.kms.Addr, "--trust-fingerprint", s.pin)
	s.ok(t, "provider", "delete", "kms-1", "--yes")
}

// TestStandardProviderPyKMIP has a KMS that is not ours, which takes no labels,
// and knows the controller by its CA.
func TestStandardProviderPyKMIP(t *testing.T) {
	t.Parallel()
	s := newSite(t, newLab(t), "")
	ca := testca.New(t)
	py := kms.StartPyKMIP(t, ca, ca.PEM())
	cert := filepath.Join(s.lab.Dir, "ca.pem")
	// The fingerprint is what the refusal to trust unseen shows.
	r := s.refused(t, refusal{2, "must be confirmed", "--trust-fingerprint sha256:"}, "provider", "add-standard", "kms-1", "--server", py.Addr)
	_, pin, _ := strings.Cut(r.Stderr, "--trust-fingerprint ")
	s.ok(t, "provider", "add-standard", "kms-1", "--server", py.Addr, "--client-method", "controller-ca", "--trust-fingerprint", strings.TrimSpace(pin))
	s.ok(t, "provider", "client-cert", "kms-1", "--out", cert)
	text, err := os.ReadFile(cert)
	must(t, err)
	py.Kill()
	py.Trust(t, text)
	py.Start(t)
	s.ok(t, "provider", "check", "kms-1")
	s.ok(t, encryptedVM("web-1", "--provider", "kms-1")...)
	s.ok(t, "vm", "power-on", "web-1")
	s.ok(t, "vm", "rekey", "web-1")
	py.Kill()
	must(t, s.host.Crash())
	must(t, s.host.Start())
	await(t, "web-1 to be locked and off", func() bool {
		v := s.show(t, "web-1")
		return v.CryptoState == "locked" && v.PowerState == "poweredOff"
	})
	s.refused(t, refusal{5, "of key provider kms-1", "strongroom provider check kms-1"}, "vm", "power-on", "web-1")
	py.Start(t)
	await(t, "web-1 to be unlocked", func() bool { return s.show(t, "web-1").CryptoState == "unlocked" })
	s.ok(t, "vm", "power-on", "web-1")
	s.ok(t, "vm", "power-off", "web-1", "--hard")
	s.ok(t, "vm", "delete", "web-1", "--yes")
}

// TestStandardProviderOwnKMS has the product's own KMS, which made certificate
// and key for its first client: the fourth way of being known to a key server.
func TestStandardProviderOwnKMS(t *testing.T) {
	t.Parallel()
	s := newSite(t, newLab(t), "")
	server, err := s.lab.StartKMS("kms")
	must(t, err)
	must(t, server.AddProvider(t.Context(), s.controller, "kms-1"))
	if p := s.showProvider(t, "kms-1"); p.State != "Active" {
		t.Fatalf("the provider is %q: %v", p.State, p.Details)
	}
	s.ok(t, encryptedVM("web-1", "--provider", "kms-1")...)
	// Power is cut at the host and the KMS; both come back, and nobody helps.
	server.Kill()
	must(t, s.host.Crash())
	must(t, s.host.Start())
	await(t, "web-1 to be locked", func() bool { return s.show(t, "web-1").CryptoState == "locked" })
	must(t, server.Start())
	await(t, "web-1 to be unlocked", func() bool { return s.show(t, "web-1").CryptoState == "unlocked" })
	s.ok(t, "vm", "power-on", "web-1")
	s.ok(t, "vm", "power-off", "web-1", "--hard")
	s.ok(t, "vm", "rekey", "web-1", "--deep")
}
