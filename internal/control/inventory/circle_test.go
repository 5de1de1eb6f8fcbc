package inventory_test

import (
	"slices"
	"testing"

	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// standardOf is a standard provider with that host access and a key server there.
func standardOf(name, access, server string) inventory.Provider {
	return inventory.Provider{Name: name, Type: inventory.StandardType, Standard: &inventory.Standard{
		HostAccess: access, Servers: []inventory.KeyServer{{Address: server}},
	}}
}

// runner is a VM that was marked with parts and has keys of a provider, if any.
func runner(name, provider string, parts ...string) inventory.VM {
	v := inventory.VM{ID: name, Name: name, Runs: parts}
	if provider != "" {
		v.Key = &inventory.KeyRef{Provider: provider, KeyID: "k"}
	}
	return v
}

func TestCircle(t *testing.T) {
	t.Parallel()
	inv := open(t)
	inv.NameController("ctl.example", "127.0.0.1")
	providers := []inventory.Provider{
		{Name: "kp-1", Type: inventory.Native},
		standardOf("brokered", "", "KMS-a.example.:5696"),
		standardOf("direct", inventory.HostsDirect, "[2001:db8::1]:5696"),
		standardOf("third", inventory.HostsDirect, "third:5696"),
	}
	of := inventory.PartProvider
	others := []inventory.VM{
		runner("loop", "third", of("direct")), runner("plain", "", of("direct")),
		runner("ctl-2", "third", inventory.PartController),
	}
	for name, c := range map[string]struct {
		vm   inventory.VM
		want string
	}{
		"runs nothing":                                  {runner("web-1", "brokered"), ""},
		"its own provider":                              {runner("a", "brokered", of("brokered")), "key provider brokered, which VM a runs"},
		"its own provider, direct":                      {runner("a", "direct", of("direct")), "key provider direct, which VM a runs"},
		"another provider":                              {runner("a", "direct", of("brokered")), ""},
		"a native one":                                  {runner("a", "kp-1", of("brokered"), inventory.PartController), ""},
		"one that is gone":                              {runner("a", "gone", of("gone")), ""},
		"no key":                                        {runner("a", "", of("brokered")), ""},
		"the controller, brokered":                      {runner("c", "brokered", inventory.PartController), "the controller, which VM c runs"},
		"the controller, direct":                        {runner("c", "direct", inventory.PartController), ""},
		"by the name of its machine":                    {runner("kms-a.example", "brokered"), "key provider brokered, which VM kms-a.example runs"},
		"by the first label":                            {runner("Kms-A", "brokered"), "key provider brokered, which VM Kms-A runs"},
		"an address is no name":                         {runner("2001", "direct"), ""},
		"the controller by its name":                    {runner("ctl", "brokered"), "the controller, which VM ctl runs"},
		"an address of the controller":                  {runner("127.0.0.1", "brokered"), ""},
		"by way of another VM":                          {runner("third", "direct"), "key provider direct, which VM loop runs; that needs key provider third, which VM third runs"},
		"by way of the controller's VM":                 {runner("third", "brokered"), "the controller, which VM ctl-2 runs; that needs key provider third, which VM third runs"},
		"a circle of others, which it is not a part of": {runner("a", "direct", of("brokered")), ""},
	} {
		site := inv.Site(providers, append(slices.Clone(others), c.vm))
		if got := site.Circle(c.vm); got != c.want {
			t.Errorf("%s: needs %q, want %q", name, got, c.want)
		}
	}

	// Keys that only a snapshot needs start nothing.
	v := runner("a", "kp-1", of("brokered"))
	v.Snapshots = []inventory.Snapshot{{Disks: []inventory.Disk{{Key: &inventory.KeyRef{Provider: "brokered", KeyID: "k"}}}}}
	if got := inv.Site(providers, []inventory.VM{v}).Circle(v); got != "" {
		t.Errorf("a snapshot: %q", got)
	}
}

func TestCheckParts(t *testing.T) {
	t.Parallel()
	inv := open(t)
	must(inv.CreateProvider(t.Context(), inventory.Provider{Name: "kp-1", Type: inventory.Native, KeyID: "k"}))(t)
	must(inv.CreateProvider(t.Context(), standardOf("kms-1", "", "a:1")))(t)
	for part, kind := range map[string]errs.Kind{
		"": errs.Invalid, "none": errs.Invalid, "kms-1": errs.Invalid, "provider:kp-1": errs.Invalid, "provider:kp-9": errs.NotFound, "provider:": errs.NotFound,
	} {
		_, err := inv.CheckParts(t.Context(), []string{"controller", part})
		wantKind(t, part, err, kind)
	}
	got := must(inv.CheckParts(t.Context(), []string{"provider:kms-1", "controller", "provider:kms-1"}))(t)
	if !slices.Equal(got, []string{"controller", "provider:kms-1"}) {
		t.Errorf("parts %q", got)
	}
}
