package controller

import (
	"context"
	"crypto/tls"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

// orphans lists the orphans of a provider, whatever their age.
func (s *site) orphans(name string) *strongroomv1.ListOrphanKeysResponse {
	s.t.Helper()
	stream, err := s.admin.Provider().ListOrphanKeys(s.t.Context(), connect.NewRequest(&strongroomv1.ListOrphanKeysRequest{Name: name, OlderThanSeconds: 1}))
	if err != nil {
		s.t.Fatal(apierr.From(err))
	}
	defer stream.Close()
	all := &strongroomv1.ListOrphanKeysResponse{}
	for stream.Receive() {
		all.Keys = append(all.Keys, stream.Msg().GetKeys()...)
		all.Unlabelled, all.KeptFor, all.SilentHosts = stream.Msg().GetUnlabelled(), stream.Msg().GetKeptFor(), stream.Msg().GetSilentHosts()
	}
	if err := stream.Err(); err != nil {
		s.t.Fatal(apierr.From(err))
	}
	return all
}

func orphanIDs(res *strongroomv1.ListOrphanKeysResponse) []string {
	var ids []string
	for _, k := range res.GetKeys() {
		ids = append(ids, k.GetKeyId())
	}
	slices.Sort(ids)
	return ids
}

// destroyOrphans has the orphans of a provider destroyed that are as old as the
// guard wants.
func (s *site) destroyOrphans(name string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), s.admin.Provider().DestroyOrphanKeys, &strongroomv1.DestroyOrphanKeysRequest{
		Name: name, Before: timestamppb.New(time.Now().Add(-s.c.orphanAgeMin)),
	})
}

// stranger makes a key in the same account as the controller, as another
// installation does; labelled says whether it is of our product.
func stranger(t *testing.T, ca *testca.Authority, server *kms.Server, labelled bool) string {
	t.Helper()
	pair := ca.Client(t, clientName)
	p, err := standard.New(standard.Config{
		Name: "kms-1", Installation: "another one", Servers: []string{server.Addr}, Pins: []kmipclient.Fingerprint{kmipclient.FingerprintOf(server.Certificate.Leaf)},
		Certificate: func() *tls.Certificate { return &pair },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ref, kek, err := p.NewKEK(t.Context(), uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	kek.Close()
	if labelled {
		if err := p.Label(t.Context(), ref, standard.Labels{Component: standard.ComponentVM, Identifier: uuid.NewString(), Name: "web-1"}); err != nil {
			t.Fatal(err)
		}
	}
	return ref.KeyID
}

// TestOrphans: keys that nothing needs are told of and destroyed, and no others.
func TestOrphans(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.c.orphanAgeMin = time.Second
	ca := testca.New(t)
	server := anyClient(t, ca)
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	foreign := []string{stranger(t, ca, server, true), stranger(t, ca, server, false)}
	for _, name := range []string{"web-1", "web-2", "web-3", "web-4"} {
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
	}
	rekeyed := s.vm("web-1").Key.KeyID
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	deleted := s.vm("web-2").Key.KeyID
	s.success(client.Call(t.Context(), s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-2"}))
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "web-3"}))
	// web-4 is not in the inventory any more, as after its restoration from an old
	// backup, but its host tells of it.
	lost := s.vm("web-4")
	if err := s.c.inv.DeleteVM(t.Context(), lost.ID); err != nil {
		t.Fatal(err)
	}
	h.beat()
	want := []string{deleted, rekeyed}
	slices.Sort(want)
	var found *strongroomv1.ListOrphanKeysResponse
	eventually(t, "the keys to be old enough", func() bool {
		found = s.orphans("kms-1")
		return len(found.GetKeys()) >= len(want)
	})
	if got := orphanIDs(found); !slices.Equal(got, want) {
		t.Errorf("orphans %v, want %v", got, want)
	}
	if found.GetUnlabelled() != 0 || !slices.Equal(found.GetKeptFor(), []string{"web-3 (east/web-3)"}) || len(found.GetSilentHosts()) > 0 {
		t.Errorf("told beside the keys: %v", found)
	}
	for _, k := range found.GetKeys() {
		if k.GetComponent() != standard.ComponentVM || !strings.HasPrefix(k.GetVm(), "web-") || k.GetVmId() == "" || k.GetCreated() == nil || k.GetUnusedSince().AsTime().Before(k.GetCreated().AsTime()) {
			t.Errorf("orphan %v", k)
		}
	}

	before := materials(t, server, clientName)
	s.success(s.destroyOrphans("kms-1"))
	after := materials(t, server, clientName)
	for id := range before {
		if gone := after[id] == nil; gone != slices.Contains(want, id) {
			t.Errorf("key %s: destroyed %v; foreign %v, orphans %v", id, gone, foreign, want)
		}
	}
	if left := s.orphans("kms-1"); len(left.GetKeys()) > 0 {
		t.Errorf("left over: %v", left)
	}
	if n := s.events("strongroom.kms.OrphansDestroyed", "provider/kms-1"); n != 1 {
		t.Errorf("%d events", n)
	}
	recorded := map[string]int{}
	for _, r := range s.records() {
		if r.Outcome == audit.Success && r.Object == "/provider/kms-1" && r.Details["vm"] != "" {
			recorded[r.Action+" "+r.Details["key_id"]]++
		}
	}
	for _, id := range want {
		if recorded["provider.deactivate-key "+id] != 1 || recorded["provider.destroy-key "+id] != 1 {
			t.Errorf("records of key %s: %v", id, recorded)
		}
	}
	if retired, err := s.c.inv.Retired(t.Context(), "kms-1"); err != nil || len(retired) != 2 { // of web-3 and web-4
		t.Errorf("still known as retired: %v, %v", retired, err)
	}
}

// TestOrphanGuards: what is refused, and what waits.
func TestOrphanGuards(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	old := s.vm("web-1").Key.KeyID
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))

	destroy := func(name string, before *timestamppb.Timestamp) error {
		_, err := client.Call(t.Context(), s.admin.Provider().DestroyOrphanKeys, &strongroomv1.DestroyOrphanKeysRequest{Name: name, Before: before})
		return err
	}
	wantKind(t, destroy("kms-1", nil), errs.Invalid)
	wantKind(t, destroy("kms-1", timestamppb.Now()), errs.Invalid)
	wantKind(t, destroy("kms-1", timestamppb.New(time.Now().Add(time.Hour))), errs.Invalid)
	dayAgo := timestamppb.New(time.Now().Add(-25 * time.Hour))
	wantKind(t, destroy("kms-2", dayAgo), errs.NotFound)
	_, err := client.Call(t.Context(), s.user("eve", "ReadOnly").Provider().DestroyOrphanKeys, &strongroomv1.DestroyOrphanKeysRequest{Name: "kms-1", Before: dayAgo})
	wantKind(t, err, errs.Denied)
	must[strongroomv1.Provider](t)(client.Call(t.Context(), s.admin.Provider().CreateNativeProvider, &strongroomv1.CreateNativeProviderRequest{Name: "kp-1"}))
	wantKind(t, destroy("kp-1", dayAgo), errs.InvalidState)

	// A key that was needed until just now is not old enough, however old it is.
	n, err := s.c.needed(t.Context(), "kms-1")
	if err != nil {
		t.Fatal(err)
	}
	key := standard.Key{ID: old, Labels: standard.Labels{Component: standard.ComponentVM}, Created: time.Now().Add(-1000 * 24 * time.Hour)}
	if o, ok := n.orphan(key, dayAgo.AsTime()); ok || time.Since(o.since) > time.Hour {
		t.Errorf("a key that was needed today is an orphan since %v", o.since)
	}
	key.ID = "another"
	if _, ok := n.orphan(key, dayAgo.AsTime()); !ok {
		t.Error("a key that was never needed and is 1000 days old is no orphan")
	}
	key.Created = time.Time{}
	if _, ok := n.orphan(key, dayAgo.AsTime()); ok {
		t.Error("a key of unknown age is an orphan")
	}
	key.Created, key.Labels.Component = time.Unix(1, 0), "Datastore"
	if _, ok := n.orphan(key, dayAgo.AsTime()); ok {
		t.Error("a key of a kind that is not known here is an orphan")
	}

	// After a restart nobody knows what the hosts have until they tell.
	s.restart()
	s.c.orphanAgeMin = time.Second
	if got := s.orphans("kms-1"); !slices.Equal(got.GetSilentHosts(), []string{"host-1"}) {
		t.Errorf("silent hosts: %v", got)
	}
	_, err = s.destroyOrphans("kms-1")
	wantKind(t, err, errs.Unavailable)
	h.beat()
	// The key server is away: the task waits, outlives the controller, and ends.
	eventually(t, "the key to be old enough", func() bool { return len(s.orphans("kms-1").GetKeys()) == 1 })
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	task := must[strongroomv1.Task](t)(s.destroyOrphans("kms-1"))
	_, err = s.destroyOrphans("kms-1")
	wantKind(t, err, errs.InvalidState) // one at a time
	eventually(t, "the task to wait", func() bool {
		got := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.Task().GetTask, &strongroomv1.GetTaskRequest{Id: task.GetId()}))
		return strings.Contains(got.GetStep(), "waiting")
	})
	s.restart()
	server.Start(t)
	h.beat()
	s.success(task, nil)
	if after := materials(t, server, clientName); len(after) != 1 || after[old] != nil {
		t.Errorf("%d keys are left", len(after))
	}
}

// TestOrphansWithoutLabels: at a key server that takes no labels nothing is an
// orphan, and that is told.
func TestOrphansWithoutLabels(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.c.orphanAgeMin = time.Second
	ca := testca.New(t)
	py := kms.StartPyKMIP(t, ca, ca.PEM())
	cert, key := testca.KeyPEM(t, ca.Client(t, clientName))
	inspected := must[strongroomv1.InspectKeyServersResponse](t)(client.Call(t.Context(), s.admin.Provider().InspectKeyServers, &strongroomv1.InspectKeyServersRequest{Servers: []string{py.Addr}, TimeoutSeconds: 30}))
	s.cluster("east")
	s.host("east", "host-1")
	s.addStandard("kms-1", &strongroomv1.StandardSettings{
		Servers:        []*strongroomv1.TrustedServer{{Address: py.Addr, Fingerprint: inspected.GetServers()[0].GetCertificate().GetFingerprint()}},
		TimeoutSeconds: 30, ClientMethod: inventory.ClientUploaded, ClientCertificate: cert, ClientKey: key,
	})
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := s.admin.Provider().ListOrphanKeys(ctx, connect.NewRequest(&strongroomv1.ListOrphanKeysRequest{Name: "kms-1", OlderThanSeconds: 1}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		t.Errorf("told: %v", stream.Msg())
	}
	if err := apierr.From(stream.Err()); errs.ReasonOf(err) != "LabelsUnsupported" || errs.KindOf(err) != errs.InvalidState {
		t.Errorf("%v (%s)", err, errs.ReasonOf(err))
	}
}
