package controller

import (
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/testca"
)

// lastAccess returns what the host was last told of the provider's key servers.
func (h *fakeHost) lastAccess(provider string) *strongroomv1.KeyServerAccess {
	all := h.allSyncs()
	if len(all) == 0 {
		return nil
	}
	for _, p := range all[len(all)-1].GetProviders() {
		if p.GetName() == provider {
			return p.GetKeyServers()
		}
	}
	return nil
}

// TestHostAccess: hosts are given the way to key servers only if that was asked
// for, sealed to each, and never the controller's own key.
func TestHostAccess(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster("c1")
	h := s.host("c1", "esx-1")
	server := anyClient(t, testca.New(t))
	server.User, server.Password = "vcenter", "s3cret"
	settings := standardSettings(server)
	settings.User, settings.Password = "vcenter", []byte("s3cret")
	s.addStandard("kms-1", settings)
	update := func(settings *strongroomv1.StandardSettings) (*strongroomv1.Provider, error) {
		return client.Call(t.Context(), s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: settings})
	}
	p := must[strongroomv1.Provider](t)(s.check("kms-1"))
	if got := p.GetStandard().GetHostAccess(); got != inventory.HostsBrokered {
		t.Errorf("host access of a new provider is %q", got)
	}
	eventually(t, "a sync with the provider", func() bool {
		all := h.allSyncs()
		return len(all) > 0 && len(all[len(all)-1].GetProviders()) == 1
	})
	if got := h.lastAccess("kms-1"); got != nil {
		t.Errorf("the host was told of key servers that it may not ask: %v", got)
	}

	for name, c := range map[string]struct {
		settings *strongroomv1.StandardSettings
		kind     errs.Kind
	}{
		"another word":         {&strongroomv1.StandardSettings{HostAccess: "none"}, errs.Invalid},
		"the controller's own": {&strongroomv1.StandardSettings{HostAccess: inventory.HostsDirect, ClientMethod: inventory.ClientOfCA}, errs.InvalidState},
	} {
		_, err := update(c.settings)
		if errs.KindOf(err) != c.kind || errs.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}

	p = must[strongroomv1.Provider](t)(update(&strongroomv1.StandardSettings{HostAccess: inventory.HostsDirect}))
	if got := p.GetStandard().GetHostAccess(); got != inventory.HostsDirect || s.events(event.ProviderUpdated, "provider/kms-1") != 1 {
		t.Errorf("host access %q", got)
	}
	eventually(t, "the host to be told", func() bool { return h.lastAccess("kms-1") != nil })
	got := h.lastAccess("kms-1")
	blob, err := h.recipient.Open(got.GetParcel(), standard.AccessContext("controller", h.id, "kms-1"))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	all, err := standard.UnmarshalCredentials(blob)
	if err != nil {
		t.Fatal(err)
	}
	own := all["kms-1"]
	defer own.Close()
	if len(all) != 1 || own.Requested != nil || string(own.Password.Bytes()) != "s3cret" || got.GetUser() != "vcenter" ||
		len(got.GetServers()) != 1 || got.GetServers()[0].GetAddress() != server.Addr || got.GetTimeoutSeconds() != 30 {
		t.Errorf("the host got %v", got)
	}
	if _, err := standard.Pair(got.GetClient(), own.ClientKey); err != nil {
		t.Errorf("its client certificate: %v", err)
	}

	// Neither order leads to the controller's own key on a host.
	if _, err := update(&strongroomv1.StandardSettings{ClientMethod: inventory.ClientOfCA}); errs.KindOf(err) != errs.InvalidState || !strings.Contains(errs.HintOf(err), "brokered") {
		t.Errorf("controller-ca with direct access: %v", err)
	}
	must[strongroomv1.Provider](t)(update(&strongroomv1.StandardSettings{HostAccess: inventory.HostsBrokered, ClientMethod: inventory.ClientOfCA}))
	eventually(t, "the host to be told to forget", func() bool { return h.lastAccess("kms-1") == nil })
}
