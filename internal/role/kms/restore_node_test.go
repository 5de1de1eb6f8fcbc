package kms

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/errs"
)

// TestMajorityLostForGood backs a KMS of three nodes up, loses two of them for good,
// begins a new one on another machine with what was backed up, and has a second node
// join that. The node that is left of the old ones does not meet them, although the
// new node is where an old one was.
func TestMajorityLostForGood(t *testing.T) {
	t.Parallel()
	n, keys := newTrio(t)
	a, b, c := n.sites[0], n.sites[1], n.sites[2]
	for _, at := range []*site{a, b} {
		id, secret := n.create(at)
		keys[id] = secret
	}
	n.check(c, keys) // so it has them: each node can be asked for a backup
	req, key := newRecipient(t)
	file, made := takeBackup(t, backupClient(t, c.cfg.LocalSocket), req)
	if int(made.GetKeys()) != len(keys) {
		t.Errorf("the backup has %d keys of %d", made.GetKeys(), len(keys))
	}
	a.stop()
	b.stop()

	// At the addresses of an old node.
	d := newSite(t, "d")
	old := a.cfg.Cluster
	text := fmt.Sprintf("data_dir = %q\nlisten = %q\nlocal_socket = %q\n[cluster]\nname = \"d\"\nlisten = %q\nstore_listen = %q\n",
		d.cfg.DataDir, a.cfg.Listen, d.cfg.LocalSocket, old.Listen, old.StoreListen)
	if err := os.WriteFile(d.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if d.cfg, err = LoadConfig(d.config); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), d.cfg, file, key, Since{AuditLogs: []string{filepath.Join(a.cfg.DataDir, auditName), filepath.Join(b.cfg.DataDir, auditName)}}); err != nil {
		t.Fatal(err)
	}
	d.run()
	e := newSite(t, "e")
	e.join(d)
	e.run()
	id, secret := n.create(e)
	after := maps.Clone(keys)
	after[id] = secret
	for _, at := range []*site{d, e} {
		n.check(at, after)
	}
	if list := d.list(); len(list) != 2 {
		t.Errorf("the new KMS has the members %v", list)
	}
	// c has been running all the time, and asks the address that a had.
	if _, err := n.get(c, id); err == nil || isNotFound(err) {
		t.Errorf("the old node answers: %v", err)
	}
	n.check(d, after)
}

// TestRollingUpgrade restarts one node after another with a release that knows a
// new format of the database, each once the one before serves again: keys are
// served and made all the time, and nodes of both releases may restart. When all
// have the new one, the old one is refused, at a start and at a join.
func TestRollingUpgrade(t *testing.T) {
	t.Parallel()
	n, keys := newTrio(t)
	for i, s := range n.sites {
		other := n.sites[(i+1)%len(n.sites)]
		if i == 1 { // the format is not in force yet: one may go back
			n.sites[0].format = formatKnown
			n.sites[0].stop()
			n.sites[0].run()
			n.sites[0].format = formatKnown + 1
			n.sites[0].stop()
			n.sites[0].run()
		}
		s.stop()
		id, secret := n.create(other)
		keys[id] = secret
		s.format = formatKnown + 1
		s.run()
		n.check(s, keys)
	}
	old := n.sites[2]
	old.stop()
	cmd := self()
	cmd.Env = append(os.Environ(), childVariable+"="+old.config)
	if text, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(text, fmt.Appendf(nil, "the database has format %d", formatKnown+1)) {
		t.Errorf("a release that is too old: %v\n%s", err, text)
	}
	id, secret := n.create(n.sites[0]) // the others go on
	keys[id] = secret
	stranger := newSite(t, "d")
	token := n.sites[0].joinToken()
	if err := Join(t.Context(), stranger.cfg, token.GetAddress(), token.GetToken()); errs.KindOf(err) != errs.InvalidState || errs.HintOf(err) == "" {
		t.Errorf("a release that is too old joins: %v", err)
	}
	if list := n.sites[0].list(); len(list) != 3 || list[0].GetRelease() != Version {
		t.Errorf("the members are %v", list)
	}
	old.run()
	n.check(old, keys)
}
