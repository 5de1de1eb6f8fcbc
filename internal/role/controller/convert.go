package controller

import (
	"cmp"
	"context"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/crypto/keysafe"
)

// stamp is nil for the zero time, which the API leaves out.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// seconds is a time.Duration of n seconds, or the longest there is.
func seconds(n int64) time.Duration {
	const most = int64(math.MaxInt64 / time.Second)
	return time.Duration(max(-most, min(n, most))) * time.Second
}

func keyToAPI(k *inventory.KeyRef) *strongroomv1.KeyRef {
	if k == nil {
		return nil
	}
	return &strongroomv1.KeyRef{Provider: k.Provider, KeyId: k.KeyID}
}

func keyFromAPI(k *strongroomv1.KeyRef) *inventory.KeyRef {
	if k == nil {
		return nil
	}
	return &inventory.KeyRef{Provider: k.GetProvider(), KeyID: k.GetKeyId()}
}

func safeRef(k inventory.KeyRef) keysafe.Ref {
	return keysafe.Ref{Provider: k.Provider, KeyID: k.KeyID}
}

func heldFromAPI(providers []*strongroomv1.HeldProvider) []inventory.HeldKey {
	var held []inventory.HeldKey
	for _, p := range providers {
		held = append(held, inventory.HeldKey{Provider: p.GetName(), KeyID: p.GetKeyId()})
	}
	return held
}

// names finds names of clusters and hosts by id, once for a whole list.
type names map[string]string

func (c *Controller) objectNames(ctx context.Context) (names, error) {
	n := names{}
	clusters, err := c.inv.Clusters(ctx)
	if err != nil {
		return nil, err
	}
	for _, cl := range clusters {
		n[cl.ID] = cl.Name
	}
	hosts, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		n[h.ID] = h.Name
	}
	return n, nil
}

func vmToAPI(v inventory.VM, n names) *strongroomv1.VM {
	out := &strongroomv1.VM{
		Id: v.ID, Name: v.Name, Cluster: n[v.ClusterID], Host: n[v.HostID], Datastore: v.Datastore, Folder: v.Folder,
		PowerState: string(v.PowerState), CryptoState: string(v.CryptoState), LockReason: v.LockReason, Encrypted: v.Encrypted(),
		Key: keyToAPI(v.Key), Created: stamp(v.Created), Settings: settingsToAPI(v.Settings),
		Runs: v.Runs,
	}
	out.Disks = disksToAPI(v.Disks)
	for _, s := range v.Snapshots {
		out.Snapshots = append(out.Snapshots, &strongroomv1.Snapshot{
			Id: s.ID, Name: s.Name, Description: s.Description, Created: stamp(s.Created), Parent: s.Parent, Settings: settingsToAPI(s.Settings),
			Disks: disksToAPI(s.Disks), LockReason: s.LockReason,
		})
	}
	out.CurrentSnapshot, out.ConsolidationNeeded = v.Snapshot, v.ConsolidationNeeded
	return out
}

func disksToAPI(disks []inventory.Disk) []*strongroomv1.Disk {
	var out []*strongroomv1.Disk
	for _, d := range disks {
		disk := &strongroomv1.Disk{
			Name: d.Name, File: d.File, SizeBytes: d.SizeBytes, AllocatedBytes: d.AllocatedBytes, Encrypted: d.Format == inventory.LUKS,
			Key: keyToAPI(d.Key), Uuid: d.UUID, Generation: d.Generation, Cipher: d.Cipher, Thin: d.Thin, Interface: d.Interface,
		}
		if r := d.Rekey; r != nil {
			disk.Rekey = &strongroomv1.DiskRekey{Key: keyToAPI(&r.Key), DoneBytes: r.DoneBytes, TotalBytes: r.TotalBytes}
		}
		if e := d.Encryption; e != nil {
			disk.Encryption = &strongroomv1.DiskEncryption{DoneBytes: e.DoneBytes, TotalBytes: e.TotalBytes}
		}
		out = append(out, disk)
	}
	return out
}

func settingsToAPI(s inventory.Settings) *strongroomv1.VMSettings {
	return &strongroomv1.VMSettings{
		Cpus: s.CPUs, MemoryMib: s.MemoryMiB, Machine: s.Machine, Kernel: s.Kernel, Initrd: s.Initrd, Append: s.Append, Network: s.Network,
		DiskInterface: s.DiskInterface,
	}
}

func settingsFromAPI(s *strongroomv1.VMSettings) inventory.Settings {
	return inventory.Settings{
		CPUs: s.GetCpus(), MemoryMiB: s.GetMemoryMib(), Machine: s.GetMachine(), Kernel: s.GetKernel(), Initrd: s.GetInitrd(),
		Append: s.GetAppend(), Network: s.GetNetwork(), DiskInterface: s.GetDiskInterface(),
	}
}

// apply takes over what a host says of a VM. A disk whose header the host could
// not read keeps the key it was last seen with: it still needs it.
func apply(v *inventory.VM, said *strongroomv1.VM) {
	v.PowerState = inventory.PowerState(said.GetPowerState())
	v.CryptoState = inventory.CryptoState(said.GetCryptoState())
	v.LockReason = said.GetLockReason()
	if unread(said) {
		return // it needs what it needed when it could be read
	}
	v.Disks = disksFromAPI(said.GetDisks(), v.Disks)
	known := map[string][]inventory.Disk{}
	for _, s := range v.Snapshots {
		known[s.ID] = s.Disks
	}
	v.Snapshots = nil
	for _, s := range said.GetSnapshots() {
		v.Snapshots = append(v.Snapshots, inventory.Snapshot{
			ID: s.GetId(), Name: s.GetName(), Description: s.GetDescription(), Created: s.GetCreated().AsTime(), Parent: s.GetParent(),
			Settings: settingsFromAPI(s.GetSettings()), Disks: disksFromAPI(s.GetDisks(), known[s.GetId()]), LockReason: s.GetLockReason(),
		})
	}
	v.Snapshot, v.ConsolidationNeeded = said.GetCurrentSnapshot(), said.GetConsolidationNeeded()
	v.Key = keyFromAPI(said.GetKey())
	v.Settings = settingsFromAPI(said.GetSettings())
}

// unread reports whether the host could not read the VM's folder when it said this:
// it does not know what the VM has.
func unread(said *strongroomv1.VM) bool {
	return said.GetPowerState() == string(inventory.PowerUnknown)
}

// disksFromAPI returns the disks that a host tells of; before are those that it
// told of before.
func disksFromAPI(disks []*strongroomv1.Disk, before []inventory.Disk) []inventory.Disk {
	known := map[string]inventory.Disk{}
	for _, d := range before {
		known[d.Name] = d
	}
	var out []inventory.Disk
	for _, d := range disks {
		disk := inventory.Disk{
			Name: d.GetName(), File: d.GetFile(), Format: inventory.Raw, SizeBytes: d.GetSizeBytes(), AllocatedBytes: d.GetAllocatedBytes(),
			Key: keyFromAPI(d.GetKey()), UUID: d.GetUuid(), Generation: d.GetGeneration(), Cipher: d.GetCipher(), Thin: d.GetThin(),
			Interface: d.GetInterface(),
		}
		if d.GetEncrypted() {
			disk.Format = inventory.LUKS
		}
		if r := d.GetRekey(); r.GetKey() != nil {
			disk.Rekey = &inventory.DiskRekey{Key: *keyFromAPI(r.GetKey()), DoneBytes: r.GetDoneBytes(), TotalBytes: r.GetTotalBytes()}
		}
		if e := d.GetEncryption(); e != nil {
			disk.Encryption = &inventory.DiskEncryption{DoneBytes: e.GetDoneBytes(), TotalBytes: e.GetTotalBytes()}
		}
		if disk.Format == inventory.LUKS && disk.Key == nil {
			if old, ok := known[disk.Name]; ok && old.Key != nil {
				disk.Key, disk.UUID, disk.Generation, disk.Cipher, disk.Thin, disk.Rekey = old.Key, old.UUID, old.Generation, old.Cipher, old.Thin, old.Rekey
			}
		}
		out = append(out, disk)
	}
	return out
}

func providerToAPI(p inventory.Provider, inUse bool) *strongroomv1.Provider {
	out := &strongroomv1.Provider{
		Name: p.Name, Type: string(p.Type), KeyId: p.KeyID, State: string(p.State), Details: p.Details, IsDefault: p.Default,
		TpmRequired: p.TPMRequired, Created: stamp(p.Created), BackedUp: stamp(p.BackedUpAt), InUse: inUse,
	}
	if s := p.Standard; s != nil {
		out.Standard = &strongroomv1.StandardProvider{
			User: s.User, Proxy: s.Proxy, TimeoutSeconds: s.TimeoutSeconds, ClientMethod: s.ClientMethod,
			ClientCertificate: certificateToAPI(s.Certificate), Established: stamp(s.Established),
			HostAccess: cmp.Or(s.HostAccess, inventory.HostsBrokered),
		}
		for _, server := range s.Servers {
			out.Standard.Servers = append(out.Standard.Servers, keyServerToAPI(server))
		}
	}
	return out
}

func keyServerToAPI(s inventory.KeyServer) *strongroomv1.KeyServer {
	out := &strongroomv1.KeyServer{
		Address: s.Address, Fingerprint: s.Fingerprint, Status: "gray", Problem: s.Problem, Message: s.Message, Connected: s.Connected,
		ClientTrustServer: s.ClientTrustServer, ServerTrustClient: s.ServerTrustClient, Certificate: certificateToAPI(s.Certificate),
	}
	switch {
	case !s.Checked:
	case s.Problem != "":
		out.Status = string(event.Red)
	case s.Certificate.Ending(time.Now()) != "":
		out.Status = string(event.Yellow)
	default:
		out.Status = string(event.Green)
	}
	return out
}

func certificateToAPI(c *inventory.Certificate) *strongroomv1.CertificateInfo {
	if c == nil {
		return nil
	}
	return &strongroomv1.CertificateInfo{
		Fingerprint: c.Fingerprint, Subject: c.Subject, Issuer: c.Issuer, NotBefore: stamp(c.NotBefore), NotAfter: stamp(c.NotAfter),
	}
}

func hostToAPI(h inventory.Host, n names) *strongroomv1.Host {
	out := &strongroomv1.Host{
		Id: h.ID, Name: h.Name, Cluster: n[h.ClusterID], Address: h.Address, ConnectionState: string(h.State),
		CryptoState: string(h.CryptoState), Version: h.Version, LastSeen: stamp(h.LastSeen), Capabilities: h.Capabilities,
	}
	for _, held := range h.Held {
		out.Providers = append(out.Providers, held.Provider)
	}
	return out
}

func datastoreToAPI(d inventory.Datastore, n names) *strongroomv1.Datastore {
	return &strongroomv1.Datastore{
		Name: d.Name, Type: d.Type, Cluster: n[d.ClusterID], Path: d.Path, CapacityBytes: d.CapacityBytes, FreeBytes: d.FreeBytes,
	}
}

func taskToAPI(t task.Task) *strongroomv1.Task {
	out := &strongroomv1.Task{
		Id: t.ID, Kind: t.Kind, Target: t.Target, Principal: t.Owner, State: string(t.State), Step: t.CurrentStep(),
		Created: stamp(t.Created), Started: stamp(t.Started), Ended: stamp(t.Ended),
	}
	if t.Progress != nil {
		out.Done, out.Total, out.Unit, out.RemainingSeconds = t.Progress.Done, t.Progress.Total, t.Progress.Unit, t.Progress.Remaining
	}
	if t.Waiting != nil {
		out.Step += " (waiting: " + t.Waiting.Reason + ")"
	}
	if t.Error != nil {
		out.Error = t.Error.Text
		out.ErrorDetail = &strongroomv1.ErrorDetail{Kind: t.Error.Kind, Reason: t.Error.Reason, Hint: t.Error.Hint}
	}
	return out
}
