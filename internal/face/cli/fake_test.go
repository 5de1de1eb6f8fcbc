package cli_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/face/cli"
)

// now is the time of the tests.
var now = time.Date(2026, 11, 23, 4, 5, 6, 0, time.UTC)

func stamp(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }

// controller is a controller of which the answers are given: what the command
// line makes of them is the question here, not how they come about.
type controller struct {
	strongroomv1connect.UnimplementedSessionServiceHandler
	strongroomv1connect.UnimplementedAccessServiceHandler
	strongroomv1connect.UnimplementedClusterServiceHandler
	strongroomv1connect.UnimplementedHostServiceHandler
	strongroomv1connect.UnimplementedDatastoreServiceHandler
	strongroomv1connect.UnimplementedProviderServiceHandler
	strongroomv1connect.UnimplementedVMServiceHandler
	strongroomv1connect.UnimplementedTaskServiceHandler
	strongroomv1connect.UnimplementedEventServiceHandler

	mu    sync.Mutex
	calls []string // "EncryptVM web-1", ...
	fail  error    // what every VM operation answers
	p12   []byte   // what ExportProvider answers
	// What ExportDiskKey tells of the volume.
	sectorSize uint32
	thin       bool
}

func (c *controller) called(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, fmt.Sprintf(format, args...))
}

// seen returns the calls so far, sorted, and forgets them.
func (c *controller) seen() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	calls := c.calls
	c.calls = nil
	slices.Sort(calls)
	return calls
}

func reply[T any](m *T) (*connect.Response[T], error) { return connect.NewResponse(m), nil }

func (c *controller) WhoAmI(context.Context, *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	return reply(&strongroomv1.WhoAmIResponse{Principal: "admin", Roles: []string{"Administrator"}, Privileges: []string{"Cryptographer.Recrypt", "System.Read"}, ServerVersion: "v1"})
}

func (c *controller) Login(_ context.Context, r *connect.Request[strongroomv1.LoginRequest]) (*connect.Response[strongroomv1.LoginResponse], error) {
	c.called("Login %s %s", r.Msg.GetUser(), r.Msg.GetPassword())
	if string(r.Msg.GetPassword()) != "correct horse" {
		return nil, apierr.To(errs.New(errs.Denied, "cannot log in: wrong user name or password"))
	}
	return reply(&strongroomv1.LoginResponse{Token: "session-1", Expires: stamp(time.Hour)})
}

func (c *controller) Logout(_ context.Context, r *connect.Request[strongroomv1.LogoutRequest]) (*connect.Response[strongroomv1.LogoutResponse], error) {
	c.called("Logout %s", r.Header().Get("Authorization"))
	return reply(&strongroomv1.LogoutResponse{})
}

func (c *controller) ListClusters(context.Context, *connect.Request[strongroomv1.ListClustersRequest]) (*connect.Response[strongroomv1.ListClustersResponse], error) {
	return reply(&strongroomv1.ListClustersResponse{Clusters: []*strongroomv1.Cluster{{Id: "c1", Name: "lab", Hosts: []string{"host-1", "host-2"}, Created: stamp(0)}}})
}

func (c *controller) CreateJoinToken(context.Context, *connect.Request[strongroomv1.CreateJoinTokenRequest]) (*connect.Response[strongroomv1.CreateJoinTokenResponse], error) {
	return reply(&strongroomv1.CreateJoinTokenResponse{Token: "join-me", Expires: stamp(time.Hour)})
}

func (c *controller) ListHosts(context.Context, *connect.Request[strongroomv1.ListHostsRequest]) (*connect.Response[strongroomv1.ListHostsResponse], error) {
	return reply(&strongroomv1.ListHostsResponse{Hosts: []*strongroomv1.Host{{Id: "h1", Name: "host-1", Cluster: "lab", Address: "127.0.0.1:7444", ConnectionState: "connected", CryptoState: "safe", Providers: []string{"kp-1"}, Version: "v1"}}})
}

func (c *controller) ListDatastores(context.Context, *connect.Request[strongroomv1.ListDatastoresRequest]) (*connect.Response[strongroomv1.ListDatastoresResponse], error) {
	return reply(&strongroomv1.ListDatastoresResponse{Datastores: []*strongroomv1.Datastore{{Name: "ds-1", Type: "dir", Cluster: "lab", Path: "/srv/vms", CapacityBytes: 1 << 40, FreeBytes: 3 << 38}}})
}

var provider = &strongroomv1.Provider{Name: "kp-1", Type: "native", KeyId: "k-1", State: "Not backed up", Details: []string{"It was never backed up."}, InUse: true, Created: stamp(-time.Hour)}

func (c *controller) ListProviders(context.Context, *connect.Request[strongroomv1.ListProvidersRequest]) (*connect.Response[strongroomv1.ListProvidersResponse], error) {
	return reply(&strongroomv1.ListProvidersResponse{Providers: []*strongroomv1.Provider{provider}})
}

func (c *controller) GetProvider(_ context.Context, r *connect.Request[strongroomv1.GetProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	for _, p := range []*strongroomv1.Provider{standardProvider, wrappingProvider} {
		if r.Msg.GetName() == p.GetName() {
			return reply(p)
		}
	}
	if r.Msg.GetName() != provider.GetName() {
		return nil, apierr.To(errs.New(errs.NotFound, "no provider %q", r.Msg.GetName()).WithHint("strongroom provider ls"))
	}
	return reply(provider)
}

func (c *controller) GetProviderUsage(context.Context, *connect.Request[strongroomv1.GetProviderUsageRequest]) (*connect.Response[strongroomv1.GetProviderUsageResponse], error) {
	return reply(&strongroomv1.GetProviderUsageResponse{Users: []*strongroomv1.KeyUser{{Vm: "web-1", Disk: "disk-0", KeyId: "k-1/1", Host: "host-1"}}})
}

func (c *controller) DeleteProvider(_ context.Context, r *connect.Request[strongroomv1.DeleteProviderRequest]) (*connect.Response[strongroomv1.DeleteProviderResponse], error) {
	c.called("DeleteProvider %s", r.Msg.GetName())
	return reply(&strongroomv1.DeleteProviderResponse{})
}

func (c *controller) SetDefaultProvider(_ context.Context, r *connect.Request[strongroomv1.SetDefaultProviderRequest]) (*connect.Response[strongroomv1.SetDefaultProviderResponse], error) {
	c.called("SetDefaultProvider %q", r.Msg.GetName())
	return reply(&strongroomv1.SetDefaultProviderResponse{})
}

func (c *controller) ExportProvider(_ context.Context, r *connect.Request[strongroomv1.ExportProviderRequest]) (*connect.Response[strongroomv1.ExportProviderResponse], error) {
	c.called("ExportProvider %s password %q", r.Msg.GetName(), r.Msg.GetPassword())
	return reply(&strongroomv1.ExportProviderResponse{FileName: "kp-1.p12", P12: c.p12, ExportId: "e1"})
}

func (c *controller) ConfirmProviderBackup(_ context.Context, r *connect.Request[strongroomv1.ConfirmProviderBackupRequest]) (*connect.Response[strongroomv1.Provider], error) {
	want := sha256.Sum256(c.p12)
	if !bytes.Equal(r.Msg.GetSha256(), want[:]) || r.Msg.GetExportId() != "e1" {
		return nil, apierr.To(errs.New(errs.Invalid, "another file"))
	}
	c.called("ConfirmProviderBackup %s", r.Msg.GetName())
	return reply(&strongroomv1.Provider{Name: "kp-1", Type: "native", State: "Active", IsDefault: true})
}

func (c *controller) ImportProvider(_ context.Context, r *connect.Request[strongroomv1.ImportProviderRequest]) (*connect.Response[strongroomv1.ImportProviderResponse], error) {
	c.called("ImportProvider password %q dry run %v", r.Msg.GetPassword(), r.Msg.GetDryRun())
	switch {
	case string(r.Msg.GetPassword()) == "correct horse":
	case len(r.Msg.GetPassword()) == 0:
		return nil, apierr.To(errs.New(errs.Denied, "backup is protected by a password").WithReason(apierr.ReasonPasswordNeeded))
	default:
		return nil, apierr.To(errs.New(errs.Denied, "wrong password"))
	}
	return reply(&strongroomv1.ImportProviderResponse{
		Provider: &strongroomv1.Provider{Name: "kp-1", KeyId: "k-1", State: "Active"}, Exported: stamp(-time.Hour),
		PasswordProtected: true, Imported: !r.Msg.GetDryRun(), Unlocked: []string{"web-2"},
	})
}

var vms = []*strongroomv1.VM{
	{
		Id: "v1", Name: "web-1", Cluster: "lab", Host: "host-1", Datastore: "ds-1", Folder: "web-1", PowerState: "poweredOn",
		CryptoState: "unlocked", Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/1"},
		Disks: []*strongroomv1.Disk{{
			Name: "disk-0", File: "disk-0.luks", SizeBytes: 10 << 30, AllocatedBytes: 3 << 20, Encrypted: true,
			Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/1"}, Generation: 2, Cipher: "xts-aes-256", Uuid: "u", Interface: "vhost-user",
		}},
		Settings: &strongroomv1.VMSettings{Cpus: 1, MemoryMib: 1536, Machine: "q35", Network: "none", DiskInterface: "auto"}, Created: stamp(0),
	},
	{
		Id: "v2", Name: "web-2", Host: "host-1", Datastore: "ds-1", Folder: "web-2", PowerState: "poweredOff",
		CryptoState: "locked", LockReason: "provider kp-9 is not here", Runs: []string{"controller", "provider:kms-1"}, Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "kp-9", KeyId: "k-9/1"},
	},
	{Id: "v3", Name: "plain-1\x1b[31m", PowerState: "poweredOff", CryptoState: "unlocked", Disks: []*strongroomv1.Disk{{Name: "disk-0", SizeBytes: 512}}},
	{
		Id: "v4", Name: "old-1", PowerState: "poweredOff", CryptoState: "unlocked", Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/4"},
		Disks: []*strongroomv1.Disk{{
			Name: "disk-0", File: "disk-0.raw", SizeBytes: 3 << 30, AllocatedBytes: 3 << 30, Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/4"},
			Generation: 1, Cipher: "xts-aes-256", Uuid: "u", Encryption: &strongroomv1.DiskEncryption{DoneBytes: 1 << 30, TotalBytes: 3 << 30},
		}},
		Settings: &strongroomv1.VMSettings{Cpus: 1, MemoryMib: 512, Machine: "q35", Network: "none", DiskInterface: "auto"}, Created: stamp(0),
	},
}

func (c *controller) ListVMs(context.Context, *connect.Request[strongroomv1.ListVMsRequest]) (*connect.Response[strongroomv1.ListVMsResponse], error) {
	return reply(&strongroomv1.ListVMsResponse{Vms: vms})
}

func (c *controller) GetVM(_ context.Context, r *connect.Request[strongroomv1.GetVMRequest]) (*connect.Response[strongroomv1.VM], error) {
	for _, v := range vms {
		if v.GetName() == r.Msg.GetName() {
			return reply(v)
		}
	}
	return nil, apierr.To(errs.New(errs.NotFound, "no VM %q", r.Msg.GetName()).WithHint("strongroom vm ls"))
}

var snapshotDisks = []*strongroomv1.Disk{{
	Name: "disk-0", File: "snapshot-s.disk-0.luks", SizeBytes: 10 << 30, AllocatedBytes: 3 << 20, Encrypted: true,
	Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/1"}, Generation: 2, Cipher: "xts-aes-256", Uuid: "u",
}}

// snapshots are those of every VM: a root with two children.
var snapshots = []*strongroomv1.Snapshot{
	{Id: "s1", Name: "installed", Description: "before the upgrade\x1b[31m", Created: stamp(-48 * time.Hour), Settings: vms[0].GetSettings(), Disks: snapshotDisks},
	{Id: "s2", Name: "upgraded", Created: stamp(-24 * time.Hour), Parent: "s1", Settings: vms[0].GetSettings(), Disks: snapshotDisks, LockReason: "disk disk-0: key k-1/1 is not here"},
	{Id: "s3", Name: "once-more", Created: stamp(-time.Hour), Parent: "s1", Settings: vms[0].GetSettings(), Disks: snapshotDisks},
}

func (c *controller) ListSnapshots(context.Context, *connect.Request[strongroomv1.ListSnapshotsRequest]) (*connect.Response[strongroomv1.ListSnapshotsResponse], error) {
	return reply(&strongroomv1.ListSnapshotsResponse{Snapshots: snapshots, CurrentSnapshot: "s3", ConsolidationNeeded: true})
}

func (c *controller) CreateSnapshot(_ context.Context, r *connect.Request[strongroomv1.CreateSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("CreateSnapshot", r.Msg.GetName(), fmt.Sprintf("%s %q", r.Msg.GetSnapshot(), r.Msg.GetDescription()))
}

func (c *controller) RevertToSnapshot(_ context.Context, r *connect.Request[strongroomv1.RevertToSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("RevertToSnapshot", r.Msg.GetName(), r.Msg.GetSnapshot())
}

func (c *controller) RenameSnapshot(_ context.Context, r *connect.Request[strongroomv1.RenameSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	described := "as before"
	if r.Msg.Description != nil {
		described = fmt.Sprintf("%q", r.Msg.GetDescription())
	}
	return c.task("RenameSnapshot", r.Msg.GetName(), fmt.Sprintf("%s %s described %s", r.Msg.GetSnapshot(), r.Msg.GetNewName(), described))
}

func (c *controller) DeleteSnapshot(_ context.Context, r *connect.Request[strongroomv1.DeleteSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("DeleteSnapshot", r.Msg.GetName(), r.Msg.GetSnapshot())
}

func (c *controller) ConsolidateSnapshots(_ context.Context, r *connect.Request[strongroomv1.ConsolidateSnapshotsRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("ConsolidateSnapshots", r.Msg.GetName(), "")
}

func (c *controller) task(verb, vm string, detail any) (*connect.Response[strongroomv1.Task], error) {
	c.called("%s %s %v", verb, vm, detail)
	if c.fail != nil {
		return nil, apierr.To(c.fail)
	}
	return reply(&strongroomv1.Task{Id: "t-" + vm, Kind: "vm." + strings.ToLower(verb), Target: "vm/" + vm, Principal: "admin", State: "queued", Created: stamp(0)})
}

func (c *controller) CreateVM(_ context.Context, r *connect.Request[strongroomv1.CreateVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := r.Msg
	how := fmt.Sprintf("on %s encrypt %v %q memory %d disks %d", m.GetDatastore(), m.GetEncrypt(), m.GetProvider(), m.GetSettings().GetMemoryMib(), len(m.GetDisks()))
	if runs := m.GetRuns(); len(runs) > 0 {
		how += fmt.Sprintf(" runs %q", runs)
	}
	return c.task("Create", m.GetName(), how+circular(m))
}

func (c *controller) PowerOnVM(_ context.Context, r *connect.Request[strongroomv1.PowerOnVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("PowerOn", r.Msg.GetName(), "")
}

func (c *controller) PowerOffVM(_ context.Context, r *connect.Request[strongroomv1.PowerOffVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("PowerOff", r.Msg.GetName(), fmt.Sprint(r.Msg.GetHard(), r.Msg.GetTimeoutSeconds()))
}

func (c *controller) EncryptVM(_ context.Context, r *connect.Request[strongroomv1.EncryptVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	how := fmt.Sprint(r.Msg.GetProvider(), r.Msg.GetDisks())
	if r.Msg.GetInPlace() {
		how += fmt.Sprintf(" in place at %d", r.Msg.GetRate())
	}
	how += circular(r.Msg)
	return c.task("Encrypt", r.Msg.GetName(), how)
}

func (c *controller) DecryptVM(_ context.Context, r *connect.Request[strongroomv1.DecryptVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("Decrypt", r.Msg.GetName(), r.Msg.GetDisks())
}

func (c *controller) SetRekeyRate(_ context.Context, r *connect.Request[strongroomv1.SetRekeyRateRequest]) (*connect.Response[strongroomv1.Task], error) {
	c.called("SetRekeyRate %s %d", r.Msg.GetName(), r.Msg.GetRate())
	return connect.NewResponse(&strongroomv1.Task{Id: "t-1"}), nil
}

func (c *controller) RekeyVM(_ context.Context, r *connect.Request[strongroomv1.RekeyVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	how := fmt.Sprintf("%s %v", r.Msg.GetProvider(), r.Msg.GetDeep())
	if rate := r.Msg.GetRate(); rate > 0 {
		how += fmt.Sprintf(" at %d", rate)
	}
	return c.task("Rekey", r.Msg.GetName(), how+circular(r.Msg))
}

func (c *controller) CloneVM(_ context.Context, r *connect.Request[strongroomv1.CloneVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := r.Msg
	return c.task("Clone", m.GetName(), fmt.Sprintf("%s %q %q recrypt %v", m.GetClone(), m.GetDatastore(), m.GetProvider(), m.GetRecrypt())+circular(m))
}

// circular tells of a request that allows a circular dependency.
func circular(m interface{ GetAllowCircular() bool }) string {
	if m.GetAllowCircular() {
		return " circular"
	}
	return ""
}

func (c *controller) MarkVM(_ context.Context, r *connect.Request[strongroomv1.MarkVMRequest]) (*connect.Response[strongroomv1.VM], error) {
	c.called("MarkVM %s %q", r.Msg.GetName(), r.Msg.GetRuns())
	return connect.NewResponse(&strongroomv1.VM{Name: r.Msg.GetName(), Runs: r.Msg.GetRuns()}), nil
}

func (c *controller) FillDisks(_ context.Context, r *connect.Request[strongroomv1.FillDisksRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("Fill", r.Msg.GetName(), r.Msg.GetDisks())
}

func (c *controller) ResizeDisk(_ context.Context, r *connect.Request[strongroomv1.ResizeDiskRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("Resize", r.Msg.GetName(), fmt.Sprint(r.Msg.GetDisk(), " ", r.Msg.GetSizeBytes()))
}

// exportedDEK is the key of every disk.
var exportedDEK = bytes.Repeat([]byte{0xd5}, 64)

func (c *controller) ExportDiskKey(_ context.Context, r *connect.Request[strongroomv1.ExportDiskKeyRequest]) (*connect.Response[strongroomv1.ExportDiskKeyResponse], error) {
	dek, err := keymem.Take(bytes.Clone(exportedDEK))
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	sealed, err := parcel.Seal(r.Msg.GetRecipientPublicKey(), parcel.DiskContext{VM: "v1", UUID: "u"}.String(), dek)
	if err != nil {
		return nil, err
	}
	return reply(&strongroomv1.ExportDiskKeyResponse{Parcel: sealed, Layout: &strongroomv1.VolumeLayout{
		VmId: "v1", Vm: r.Msg.GetName(), Disk: r.Msg.GetDisk(), Uuid: "u", Host: "host-1", Path: "/srv/ds 1/" + r.Msg.GetName() + "/disk-0.luks",
		SizeBytes: 10 << 30, DataOffset: 16 << 20, SectorSize: c.sectorSize, Thin: c.thin, PowerState: "poweredOff",
		Key: &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "k-1/1"},
	}})
}

func (c *controller) DeleteVM(_ context.Context, r *connect.Request[strongroomv1.DeleteVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("Delete", r.Msg.GetName(), "")
}

func (c *controller) WatchTask(_ context.Context, r *connect.Request[strongroomv1.WatchTaskRequest], s *connect.ServerStream[strongroomv1.Task]) error {
	t := &strongroomv1.Task{Id: r.Msg.GetId(), Target: "vm/" + strings.TrimPrefix(r.Msg.GetId(), "t-"), State: "running", Step: "copying disk-0", Done: 1 << 20, Total: 4 << 20, Unit: "bytes"}
	if err := s.Send(t); err != nil {
		return err
	}
	t.State, t.Step, t.Done, t.Total, t.Unit = "success", "", 0, 0, "" // the last bytes are seen or not
	if t.GetId() == "t-web-2" {
		t.State, t.Error = "error", "no key for web-2"
		t.ErrorDetail = &strongroomv1.ErrorDetail{Kind: "Locked", Reason: "KeyStateMissingInCache", Hint: "strongroom provider import FILE.p12"}
	}
	return s.Send(t)
}

func (c *controller) ListTasks(context.Context, *connect.Request[strongroomv1.ListTasksRequest]) (*connect.Response[strongroomv1.ListTasksResponse], error) {
	return reply(&strongroomv1.ListTasksResponse{Tasks: []*strongroomv1.Task{
		{Id: "t-1", Kind: "vm.encrypt", Target: "vm/web-1", Principal: "admin", State: "running", Done: 1 << 30, Total: 4 << 30, Unit: "bytes"},
		{Id: "t-2", Kind: "vm.rekey", Target: "vm/web-2", Principal: "admin", State: "error", Error: "no key", Done: 1, Total: 3, Unit: "items"},
	}})
}

func (c *controller) ListEvents(context.Context, *connect.Request[strongroomv1.ListEventsRequest]) (*connect.Response[strongroomv1.ListEventsResponse], error) {
	return reply(&strongroomv1.ListEventsResponse{Events: []*strongroomv1.Event{event(1)}})
}

func (c *controller) WatchEvents(_ context.Context, _ *connect.Request[strongroomv1.WatchEventsRequest], s *connect.ServerStream[strongroomv1.Event]) error {
	for i := range uint64(2) {
		if err := s.Send(event(i + 1)); err != nil {
			return err
		}
	}
	return nil
}

func event(n uint64) *strongroomv1.Event {
	return &strongroomv1.Event{Sequence: n, Type: "strongroom.vm.crypto.VMLocked", Severity: "warning", Time: stamp(0), Principal: "admin", Target: "vm/web-2", Message: "web-2 is locked"}
}

func (c *controller) ListAlarms(context.Context, *connect.Request[strongroomv1.ListAlarmsRequest]) (*connect.Response[strongroomv1.ListAlarmsResponse], error) {
	return reply(&strongroomv1.ListAlarmsResponse{Alarms: []*strongroomv1.Alarm{{Name: "VMLocked", Severity: "error", Target: "vm/web-2", Message: "locked", Since: stamp(0), Runbook: "runbooks/vm-locked.md"}}})
}

func (c *controller) GetHealth(context.Context, *connect.Request[strongroomv1.GetHealthRequest]) (*connect.Response[strongroomv1.GetHealthResponse], error) {
	return reply(&strongroomv1.GetHealthResponse{Checks: []*strongroomv1.HealthCheck{{Name: "Default key provider", Status: "yellow", Message: "there is none", Checked: stamp(0)}}})
}

func (c *controller) ListUsers(context.Context, *connect.Request[strongroomv1.ListUsersRequest]) (*connect.Response[strongroomv1.ListUsersResponse], error) {
	return reply(&strongroomv1.ListUsersResponse{Users: []*strongroomv1.User{{Name: "admin", Roles: []string{"Administrator"}, Created: stamp(0)}}})
}

func (c *controller) ListRoles(context.Context, *connect.Request[strongroomv1.ListRolesRequest]) (*connect.Response[strongroomv1.ListRolesResponse], error) {
	return reply(&strongroomv1.ListRolesResponse{Roles: []*strongroomv1.Role{{Name: "ReadOnly", Description: "May look.", Privileges: []string{"System.Read"}}}})
}

// session is a person or a program at the command line.
type session struct {
	*controller
	env       map[string]string
	dir       string
	stdin     string
	passwords []string // what is typed
	person    bool     // sits at a terminal
}

// newSession starts a controller on a unix socket.
func newSession(t *testing.T) *session {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	c := &controller{p12: []byte("a backup"), sectorSize: 512}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewSessionServiceHandler(c))
	mux.Handle(strongroomv1connect.NewAccessServiceHandler(c))
	mux.Handle(strongroomv1connect.NewClusterServiceHandler(c))
	mux.Handle(strongroomv1connect.NewHostServiceHandler(c))
	mux.Handle(strongroomv1connect.NewDatastoreServiceHandler(c))
	mux.Handle(strongroomv1connect.NewProviderServiceHandler(c))
	mux.Handle(strongroomv1connect.NewVMServiceHandler(c))
	mux.Handle(strongroomv1connect.NewTaskServiceHandler(c))
	mux.Handle(strongroomv1connect.NewEventServiceHandler(c))
	srv := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return &session{
		controller: c,
		dir:        dir,
		env:        map[string]string{"STRONGROOM_SERVER": "unix:" + socket, "HOME": dir},
	}
}

// run runs one command line.
func (s *session) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	env := &cli.Env{
		Stdin: strings.NewReader(s.stdin), Stdout: &out, Stderr: &errOut, Interactive: s.person,
		ReadPassword: func(prompt string) ([]byte, error) {
			fmt.Fprintln(&errOut, prompt)
			if len(s.passwords) == 0 {
				return nil, fmt.Errorf("nothing is typed for %q", prompt)
			}
			pw := s.passwords[0]
			s.passwords = s.passwords[1:]
			return []byte(pw), nil
		},
		Getenv:    func(k string) string { return s.env[k] },
		Now:       func() time.Time { return now },
		NewClient: client.New,
		Version:   "v1",
	}
	code = cli.Run(t.Context(), env, cli.Roles{}, args)
	return out.String(), errOut.String(), code
}
