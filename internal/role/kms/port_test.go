package kms

import (
	"bytes"
	"net"
	"os"
	"testing"
)

// TestPortTaken: a new node that cannot listen says so before the others count on
// it. With two nodes they would have no majority from then on.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	n, keys := newNodes(t)
	a := n.sites[0]
	b := newSite(t, "b")
	b.join(a)
	for what, addr := range map[string]string{
		"KMIP clients": b.cfg.Listen, "users": b.cfg.APIListen, "metrics": b.cfg.MetricsListen,
		"other nodes": b.cfg.Cluster.Listen, "the other nodes' databases": b.cfg.Cluster.StoreListen,
	} {
		taken, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		cmd := self()
		cmd.Env = append(os.Environ(), childVariable+"="+b.config)
		text, err := cmd.CombinedOutput()
		taken.Close()
		if err == nil || !bytes.Contains(text, []byte("cannot listen for "+what)) || !bytes.Contains(text, []byte(addr)) {
			t.Errorf("with the port for %s taken: %v\n%s", what, err, text)
		}
		for _, m := range a.list() {
			if m.GetName() == "b" && m.GetState() != "joining" {
				t.Fatalf("with the port for %s taken the node became a %s", what, m.GetState())
			}
		}
		n.check(a, keys)
	}
	b.run()
	n.check(b, keys)
}
