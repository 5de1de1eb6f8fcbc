package cli_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
)

// pinOf is the fingerprint of the certificate that a key server of the fake
// controller shows.
func pinOf(server string) string {
	return "sha256:" + strings.Repeat(fmt.Sprintf("%02x", len(server)), 32)
}

func (c *controller) InspectKeyServers(_ context.Context, r *connect.Request[strongroomv1.InspectKeyServersRequest]) (*connect.Response[strongroomv1.InspectKeyServersResponse], error) {
	c.called("Inspect %v proxy %q timeout %d", r.Msg.GetServers(), r.Msg.GetProxy(), r.Msg.GetTimeoutSeconds())
	res := &strongroomv1.InspectKeyServersResponse{}
	for _, address := range r.Msg.GetServers() {
		s := &strongroomv1.KeyServer{Address: address, Certificate: &strongroomv1.CertificateInfo{Fingerprint: pinOf(address), Subject: "CN=\x1b[2J", NotBefore: stamp(0), NotAfter: stamp(1)}}
		if strings.HasPrefix(address, "down") {
			s.Certificate, s.Problem, s.Message = nil, "Unreachable", "no connection"
		}
		res.Servers = append(res.Servers, s)
	}
	return reply(res)
}

// standardProvider is one as the fake controller tells of it.
var standardProvider = &strongroomv1.Provider{Name: "kms-1", Type: "standard", State: "Active", Standard: &strongroomv1.StandardProvider{
	Servers: []*strongroomv1.KeyServer{{Address: "kms-old:5696", Fingerprint: pinOf("kms-old:5696")}}, Proxy: "old:1", TimeoutSeconds: 7, HostAccess: "direct",
}}

// settings tells what a request sets; secrets by their length.
func settings(s *strongroomv1.StandardSettings) string {
	var all []string
	for _, server := range s.GetServers() {
		all = append(all, server.GetAddress()+" "+server.GetFingerprint()[:11])
	}
	for name, v := range map[string]string{"user": s.GetUser(), "proxy": s.GetProxy(), "method": s.GetClientMethod(), "access": s.GetHostAccess(), "keys": s.GetKeys()} {
		if v != "" {
			all = append(all, name+" "+v)
		}
	}
	for name, n := range map[string]int{"password": len(s.GetPassword()), "timeout": int(s.GetTimeoutSeconds()), "cert": len(s.GetClientCertificate()), "key": len(s.GetClientKey())} {
		if n > 0 {
			all = append(all, fmt.Sprintf("%s %d", name, n))
		}
	}
	if n := s.GetRotateDays(); n != 0 {
		all = append(all, fmt.Sprintf("rotate %d", n))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func (c *controller) AddStandardProvider(_ context.Context, r *connect.Request[strongroomv1.AddStandardProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	c.called("Add %s: %s", r.Msg.GetName(), settings(r.Msg.GetSettings()))
	return reply(&strongroomv1.Provider{Name: r.Msg.GetName(), Type: "standard", State: "Not established"})
}

func (c *controller) UpdateStandardProvider(_ context.Context, r *connect.Request[strongroomv1.UpdateStandardProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	c.called("Update %s: %s", r.Msg.GetName(), settings(r.Msg.GetSettings()))
	return reply(&strongroomv1.Provider{Name: r.Msg.GetName(), Type: "standard", State: "Active"})
}

func (c *controller) CheckProvider(_ context.Context, r *connect.Request[strongroomv1.CheckProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	c.called("Check %s", r.Msg.GetName())
	if c.fail != nil {
		return nil, apierr.To(c.fail)
	}
	return reply(&strongroomv1.Provider{Name: r.Msg.GetName(), Type: "standard", State: "Active"})
}

func (c *controller) GetClientIdentity(_ context.Context, r *connect.Request[strongroomv1.GetClientIdentityRequest]) (*connect.Response[strongroomv1.ClientIdentity], error) {
	id := &strongroomv1.ClientIdentity{Method: "self-signed", Certificate: []byte("a certificate")}
	switch r.Msg.GetName() {
	case "csr-1":
		id.Request = []byte("a request")
	case "ca-1":
		id.Authority = []byte("an authority")
	}
	return reply(id)
}

// ListOrphanKeys answers in several messages.
func (c *controller) ListOrphanKeys(_ context.Context, r *connect.Request[strongroomv1.ListOrphanKeysRequest], out *connect.ServerStream[strongroomv1.ListOrphanKeysResponse]) error {
	c.called("Orphans %s %d", r.Msg.GetName(), r.Msg.GetOlderThanSeconds())
	if r.Msg.GetName() != "clean-1" {
		for _, id := range []string{"k-1", "k-2\x1b[31m"} {
			key := &strongroomv1.OrphanKey{KeyId: id, Component: "Virtual Machine", Vm: "web-1", VmId: "v-1", Created: stamp(-2), UnusedSince: stamp(-1)}
			if err := out.Send(&strongroomv1.ListOrphanKeysResponse{Keys: []*strongroomv1.OrphanKey{key}}); err != nil {
				return err
			}
		}
	}
	return out.Send(&strongroomv1.ListOrphanKeysResponse{Before: stamp(0), Unlabelled: 3, KeptFor: []string{"old-1 (ds/old-1)"}, SilentHosts: []string{"host-2"}})
}

func (c *controller) DestroyOrphanKeys(_ context.Context, r *connect.Request[strongroomv1.DestroyOrphanKeysRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("DestroyOrphans", r.Msg.GetName(), r.Msg.GetBefore().AsTime().Format("2006-01-02"))
}

func TestStandardProviderCalls(t *testing.T) {
	t.Parallel()
	const server = "kms-a.example:5696"
	pin, inspected := pinOf(server), "Inspect ["+server+"] proxy \"\" timeout 0"
	trusted := server + " " + pin[:11]
	for _, tt := range []struct {
		args  string
		calls []string
	}{
		{"provider add-standard kms-1 --server " + server + " --trust-fingerprint " + strings.ToUpper(pin[7:]), []string{"Add kms-1: " + trusted, "Check kms-1", inspected}},
		{
			"provider add-standard kms-1 --server " + server + " --server kms-b:5696 --proxy p:1 --timeout 9 --user app --password-file DIR/pw --trust-fingerprint " + pin + " --trust-fingerprint " + pinOf("kms-b:5696"),
			[]string{"Add kms-1: " + trusted + ", kms-b:5696 " + pinOf("kms-b:5696")[:11] + ", password 6, proxy p:1, timeout 9, user app", "Check kms-1", "Inspect [" + server + " kms-b:5696] proxy \"p:1\" timeout 9"},
		},
		{
			"provider add-standard kms-1 --server " + server + " --trust-fingerprint " + pin + " --client-cert DIR/cert --client-key DIR/key",
			[]string{"Add kms-1: cert 4, key 3, " + trusted + ", method upload", "Check kms-1", inspected},
		},
		{"provider trust kms-1 --server " + server + " --trust-fingerprint " + pin, []string{"Check kms-1", "Inspect [" + server + "] proxy \"old:1\" timeout 7", "Update kms-1: " + trusted}},
		{"provider trust kms-1 --trust-fingerprint " + pinOf("kms-old:5696"), []string{"Check kms-1", "Inspect [kms-old:5696] proxy \"old:1\" timeout 7", "Update kms-1: kms-old:5696 " + pinOf("kms-old:5696")[:11]}},
		{"provider update kms-1 --proxy none --timeout 10", []string{"Check kms-1", "Update kms-1: proxy none, timeout 10"}},
		{"provider update kms-1 --user app-2 --password-file DIR/pw", []string{"Check kms-1", "Update kms-1: password 6, user app-2"}},
		{"provider update kms-1 --host-access direct", []string{"Check kms-1", "Update kms-1: access direct"}},
		{
			"provider add-standard kms-1 --server " + server + " --trust-fingerprint " + pin + " --host-access direct",
			[]string{"Add kms-1: access direct, " + trusted, "Check kms-1", inspected},
		},
		{"provider set-client kms-1 --method csr", []string{"Update kms-1: method csr"}},
		{"provider set-client kms-1 --cert DIR/cert", []string{"Update kms-1: cert 4, method csr"}},
		{"provider set-client kms-1 --method upload --cert DIR/cert --key DIR/key", []string{"Update kms-1: cert 4, key 3, method upload"}},
		{"provider check kms-1", []string{"Check kms-1"}},
		{"provider orphans kms-1 --older-than 400d", []string{"Orphans kms-1 34560000"}},
		{"provider orphans kms-1 --destroy --yes", []string{"DestroyOrphans kms-1 2026-11-23", "Orphans kms-1 2592000"}},
		{"provider orphans clean-1 --destroy", []string{"Orphans clean-1 2592000"}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			for name, text := range map[string]string{"pw": "s3cret\n", "cert": "cert", "key": "key"} {
				if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, stderr, code := s.run(t, strings.Fields(strings.ReplaceAll(tt.args, "DIR", s.dir))...); code != 0 {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			if got := s.seen(); strings.Join(got, "\n") != strings.Join(tt.calls, "\n") {
				t.Errorf("calls\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.calls, "\n"))
			}
		})
	}
}

func TestStandardProviderErrors(t *testing.T) {
	t.Parallel()
	refused := errs.New(errs.Unavailable, "it does not trust the certificate").WithHint("strongroom provider client-cert kms-1 --out FILE")
	for _, tt := range []struct {
		args   string
		fail   error
		code   int
		stderr []string
		calls  int
	}{
		{"provider add-standard kms-1", nil, 2, []string{`required flag(s) "server" not set`}, 0},
		{"provider add-standard kms-1 --server down:1", nil, 6, []string{"key server down:1: no connection", "nothing was changed"}, 1},
		{"provider add-standard kms-1 --server a:1", nil, 2, []string{"must be confirmed", "CN=?[2J", "--trust-fingerprint " + pinOf("a:1")}, 1},
		{"provider add-standard kms-1 --server a:1 --trust-fingerprint sha256:00", nil, 4, []string{"which is none of those to trust"}, 1},
		{"provider add-standard kms-1 --server a:1 --password-file pw --trust-fingerprint " + pinOf("a:1"), nil, 2, []string{"a password needs a user name", "--user NAME"}, 1},
		{"provider add-standard kms-1 --server a:1 --client-cert /nonexistent", nil, 3, []string{"cannot read the file"}, 0},
		{"provider trust kms-1 --server down:1", nil, 6, []string{"no connection"}, 1},
		{"provider update kms-1 --timeout 5", refused, 6, []string{"provider kms-1 is changed, but gives no key", "strongroom provider client-cert kms-1"}, 2},
		{"provider set-client kms-1", nil, 2, []string{"needs --method, or --cert"}, 0},
		{"provider client-cert kms-1", nil, 2, []string{`required flag(s) "out" not set`}, 0},
		{"provider check kms-1", refused, 6, []string{"it does not trust the certificate", "hint: strongroom provider client-cert kms-1"}, 1},
		{"provider orphans kms-1 --older-than 1h", nil, 2, []string{"--older-than 1h is less than one day"}, 0},
		{"provider orphans kms-1 --older-than 30", nil, 2, []string{`"90d"`}, 0},
		{"provider orphans kms-1 --destroy", nil, 2, []string{"2 keys of provider kms-1", "3 keys that VMs need bear no label", "old-1 (ds/old-1)", "host-2", "add --yes"}, 1},
		{"provider orphans kms-1 --destroy --yes", errs.New(errs.Unavailable, "host host-2 has not told"), 6, []string{"cannot destroy the orphans of provider kms-1: host host-2 has not told"}, 2},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			s.fail = tt.fail
			stdout, stderr, code := s.run(t, strings.Fields(tt.args)...)
			if code != tt.code || stdout != "" {
				t.Errorf("exit code %d, want %d; stdout %q, stderr:\n%s", code, tt.code, stdout, stderr)
			}
			for _, want := range tt.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr lacks %q:\n%s", want, stderr)
				}
			}
			if got := s.seen(); len(got) != tt.calls {
				t.Errorf("calls %q, want %d", got, tt.calls)
			}
		})
	}
}

// TestAddedAllTheSame: a provider whose server does not know us yet is added, and
// the next commands are told.
func TestAddedAllTheSame(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.fail = errs.New(errs.Unavailable, "it does not trust the certificate")
	stdout, stderr, code := s.run(t, "provider", "add-standard", "kms-1", "--server", "a:1", "--trust-fingerprint", pinOf("a:1"))
	if code != 0 || stdout != "provider kms-1 added, Not established\n" || !strings.Contains(stderr, "strongroom provider client-cert kms-1 --out FILE\n  strongroom provider check kms-1") {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

// TestClientCert: what the key server needs is written, by method.
func TestClientCert(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	for name, want := range map[string][2]string{"kms-1": {"certificate", "a certificate"}, "csr-1": {"certificate request", "a request"}, "ca-1": {"CA's certificate", "an authority"}} {
		out := filepath.Join(s.dir, name+".pem")
		stdout, stderr, code := s.run(t, "provider", "client-cert", name, "--out", out)
		text, err := os.ReadFile(out)
		if code != 0 || stdout != want[0]+" written to "+out+"\n" || string(text) != want[1] || err != nil {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q, file %q, %v", name, code, stdout, stderr, text, err)
		}
	}
	if _, _, code := s.run(t, "provider", "client-cert", "kms-1", "--out", filepath.Join(s.dir, "none", "f")); code != 2 {
		t.Errorf("a file that cannot be written: exit code %d", code)
	}
}
