package host

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
)

// serve serves until the test ends.
func serve(t testing.TB, server func(context.Context, net.Listener) error, l net.Listener) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("server: %v", err)
		}
	})
}

// TestAgentAPI: the controller of this host is served, and nobody else.
func TestAgentAPI(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	server, err := b.agentServer()
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	serve(t, server.Serve, l)
	self := pki.Identity{Cluster: b.secrets.identity.ClusterID, Role: pki.Host, Name: b.secrets.identity.HostID}
	// call makes a request with a certificate that ca has issued for id.
	call := func(ca *pki.CA, id pki.Identity, do func(strongroomv1connect.AgentServiceClient) error) error {
		credential, err := ca.Issue(id, nil)
		check(t, err)
		transport := &http.Transport{TLSClientConfig: pki.ClientConfig(credential, b.ca.Certificate(), self), ForceAttemptHTTP2: true}
		defer transport.CloseIdleConnections()
		return do(strongroomv1connect.NewAgentServiceClient(&http.Client{Transport: transport}, "https://"+l.Addr().String()))
	}
	get := func(c strongroomv1connect.AgentServiceClient) error {
		_, err := c.GetVM(t.Context(), connect.NewRequest(&strongroomv1.AgentGetVMRequest{Id: uuid.NewString()}))
		return apierr.From(err)
	}
	wantKind(t, "the controller", call(b.ca, controllerIdentity, get), errs.NotFound)
	otherName, otherInstallation := controllerIdentity, controllerIdentity
	otherName.Name, otherInstallation.Cluster = "controller-2", "elsewhere"
	for name, c := range map[string]struct {
		ca *pki.CA
		id pki.Identity
	}{
		"another controller":                   {b.ca, otherName},
		"a controller of another installation": {b.ca, otherInstallation},
		"another host":                         {b.ca, pki.Identity{Cluster: self.Cluster, Role: pki.Host, Name: uuid.NewString()}},
		"this host":                            {b.ca, self},
		"a host that is called as it":          {b.ca, pki.Identity{Cluster: controllerIdentity.Cluster, Role: pki.Host, Name: controllerIdentity.Name}},
		"a controller of another CA":           {newCA(t), controllerIdentity},
	} {
		if err := call(c.ca, c.id, get); err == nil || errs.KindOf(err) == errs.NotFound {
			t.Errorf("%s was answered: %v", name, err)
		}
	}
	bare := &http.Transport{TLSClientConfig: pki.JoinConfig(pki.FingerprintOf(b.ca.Certificate()), pki.Controller), ForceAttemptHTTP2: true}
	defer bare.CloseIdleConnections()
	if err := get(strongroomv1connect.NewAgentServiceClient(&http.Client{Transport: bare}, "https://"+l.Addr().String())); err == nil || errs.KindOf(err) == errs.NotFound {
		t.Errorf("a client without a certificate was answered: %v", err)
	}

	// A stream tells progress, ends with the VM, and carries kind and hint.
	create := func(req *strongroomv1.AgentCreateVMRequest) (vm *strongroomv1.VM, err error) {
		err = call(b.ca, controllerIdentity, func(c strongroomv1connect.AgentServiceClient) error {
			stream, err := c.CreateVM(t.Context(), connect.NewRequest(req))
			check(t, err)
			for stream.Receive() {
				vm = stream.Msg().GetResult()
			}
			err = apierr.From(stream.Err())
			check(t, stream.Close())
			return err
		})
		return vm, err
	}
	if vm, err := create(request("web-1", b.newRef(t))); err != nil || vm.GetName() != "web-1" || !vm.GetEncrypted() {
		t.Errorf("CreateVM ended with %v, %v", vm, err)
	}
	vm, err := create(request("web-2", keysafe.Ref{Provider: "kp-9", KeyID: "k"}))
	if vm != nil || errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != reasonProviderUnknown || errs.HintOf(err) == "" {
		t.Errorf("CreateVM without the key ended with %v, %v", vm, err)
	}
}

// TestAgentStrangers: whoever can reach the port takes no more than a bounded number
// of connections.
func TestAgentStrangers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	server, err := b.agentServer()
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	serve(t, server.Serve, l)
	const most = 64 // from one address
	for n := range most + 1 {
		c, err := net.Dial("tcp", l.Addr().String())
		check(t, err)
		defer c.Close()
		if n < most {
			continue
		}
		check(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connection %d of one stranger stays open", n+1)
		}
	}
}

// localClient returns a client of a local socket.
func localClient(t testing.TB, path string) *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func TestLocalAPI(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.create(t, "web-1", b.newRef(t))
	path := b.cfg.LocalSocket
	l, err := daemon.ListenLocal(path)
	check(t, err)
	serve(t, func(ctx context.Context, l net.Listener) error { return daemon.Serve(ctx, b.localServer(), l) }, l)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, error %v", info.Mode(), err)
	}
	vms := strongroomv1connect.NewVMServiceClient(localClient(t, path), "http://host")
	all, err := vms.ListVMs(t.Context(), connect.NewRequest(&strongroomv1.ListVMsRequest{}))
	if err != nil || len(all.Msg.GetVms()) != 1 || all.Msg.GetVms()[0].GetName() != "web-1" {
		t.Errorf("ListVMs = %v, %v", all, err)
	}
	one, err := vms.GetVM(t.Context(), connect.NewRequest(&strongroomv1.GetVMRequest{Name: "web-1"}))
	if err != nil || one.Msg.GetPowerState() != "poweredOff" || one.Msg.GetHost() != "esx-1" {
		t.Errorf("GetVM = %v, %v", one, err)
	}
	_, err = vms.GetVM(t.Context(), connect.NewRequest(&strongroomv1.GetVMRequest{Name: "web-9"}))
	wantKind(t, "an unknown VM", apierr.From(err), errs.NotFound)
	// A VM that is off is no error to power off.
	if _, err := vms.PowerOffVM(t.Context(), connect.NewRequest(&strongroomv1.PowerOffVMRequest{Name: "web-1"})); err != nil {
		t.Error(err)
	}
	_, err = vms.DeleteVM(t.Context(), connect.NewRequest(&strongroomv1.DeleteVMRequest{Name: "web-1"}))
	if err = apierr.From(err); errs.KindOf(err) != errs.InvalidState || !strings.Contains(errs.HintOf(err), "controller") {
		t.Errorf("what a host alone cannot do: %v, hint %q", err, errs.HintOf(err))
	}
}
