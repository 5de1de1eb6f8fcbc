package host

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
)

const (
	heartbeatInterval = 5 * time.Second // until the controller says otherwise
	heartbeatTimeout  = 10 * time.Second
	intervalMin       = 100 * time.Millisecond
	intervalMax       = time.Minute
	lookPatience      = 2 * time.Second // for a look at all VMs, before the host says that it is there
	tellMax           = 1 << 20         // bytes of VMs in one heartbeat: each is a transaction of the controller
)

// enrollClient returns the client of the controller's side of the agent API.
func (h *Host) enrollClient() (strongroomv1connect.EnrollServiceClient, error) {
	controller, err := pki.ParseIdentity(h.secrets.identity.ControllerIdentity)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		TLSClientConfig: pki.ClientConfig(h.credential, h.secrets.ca, controller), ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: heartbeatTimeout, IdleConnTimeout: 2 * intervalMax,
	}
	return strongroomv1connect.NewEnrollServiceClient(&http.Client{Transport: transport}, "https://"+h.secrets.identity.Controller), nil
}

// heartbeats tells the controller what this host has, regularly and soon after
// a change, until ctx ends. A controller that is away changes nothing here.
func (h *Host) heartbeats(ctx context.Context) error {
	interval, reachable := heartbeatInterval, true
	var news news
	view := view{look: func() []*strongroomv1.VM { return h.describeAll(ctx) }}
	defer view.close()
	for {
		next, err := h.heartbeat(ctx, view.now(ctx, lookPatience), &news)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			interval = next
			if err := h.renewCertificate(ctx); err != nil {
				h.log.LogAttrs(ctx, slog.LevelWarn, "certificate not renewed", slog.Any("err", err))
			}
		}
		// Said once, not at every attempt.
		if reachable != (err == nil) {
			reachable = err == nil
			if reachable {
				h.log.LogAttrs(ctx, slog.LevelInfo, "controller is back")
			} else {
				h.log.LogAttrs(ctx, slog.LevelWarn, "controller does not answer; VMs go on", slog.Any("err", err))
			}
		}
		timer := time.NewTimer(interval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-h.changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// view is what a host knows of its VMs. To look at thousands of disks takes a while,
// and at a datastore that hangs for ever: the host is there nevertheless.
type view struct {
	look    func() []*strongroomv1.VM
	looking chan []*strongroomv1.VM // what comes of a look that is under way; nil: none is
	last    []*strongroomv1.VM
	seen    bool // last is what was seen last
}

// now returns what is seen now or, after a time, what was seen last. It waits for
// the first look: before that the host does not know what it has.
func (v *view) now(ctx context.Context, patience time.Duration) []*strongroomv1.VM {
	if v.looking == nil {
		looking := make(chan []*strongroomv1.VM, 1)
		v.looking = looking
		go func() { looking <- v.look() }()
	}
	var late <-chan time.Time
	if v.seen {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case v.last = <-v.looking:
		v.looking, v.seen = nil, true
	case <-late:
	case <-ctx.Done():
	}
	return v.last
}

// close waits for a look that is under way.
func (v *view) close() {
	if v.looking != nil {
		<-v.looking
	}
}

func (h *Host) heartbeat(ctx context.Context, vms []*strongroomv1.VM, news *news) (time.Duration, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, heartbeatTimeout)
	defer cancel()
	sequence := h.told.Add(1) // heartbeats are made one after the other
	full, digests, err := news.of(vms)
	if err != nil {
		return 0, err
	}
	res, err := h.enroll.Heartbeat(ctx, connect.NewRequest(&strongroomv1.HeartbeatRequest{
		Address: h.cfg.Advertise, Version: Version, BootId: h.bootID, Capabilities: capabilities(),
		Providers: h.held(), Vms: full, Digests: digests, Instance: h.instance, Sequence: sequence,
	}))
	if err != nil {
		return 0, err
	}
	news.lacking = res.Msg.GetLacking()
	if len(news.lacking) > 0 {
		return intervalMin, nil
	}
	next := time.Duration(res.Msg.GetIntervalMs()) * time.Millisecond
	return min(max(next, intervalMin), intervalMax), nil
}

// news chooses what of the VMs a heartbeat tells in full. Whatever is lost, the
// controller says what it lacks.
type news struct {
	lacking []string          // ids of VMs, as the controller said
	last    map[string]string // digests in the heartbeat before, by id
}

// of returns those of all that are to be told in full, and the digests of all.
func (n *news) of(all []*strongroomv1.VM) (full []*strongroomv1.VM, digests []*strongroomv1.VMDigest, err error) {
	byID, changed, now := map[string]*strongroomv1.VM{}, []string{}, map[string]string{}
	for _, vm := range all {
		id := vm.GetId()
		digest, err := digestOf(vm)
		if err != nil {
			return nil, nil, err
		}
		byID[id], now[id] = vm, string(digest)
		digests = append(digests, &strongroomv1.VMDigest{Id: id, Digest: digest})
		if n.last[id] != now[id] {
			changed = append(changed, id)
		}
	}
	size := 0
	for _, id := range slices.Concat(n.lacking, changed) {
		vm := byID[id]
		if vm == nil {
			continue // told already, or gone
		}
		if size += proto.Size(vm); size > tellMax && len(full) > 0 {
			break
		}
		full = append(full, vm)
		delete(byID, id)
	}
	n.last = now
	return full, digests, nil
}

// digestOf returns a hash of all that is said of a VM but of when it is said.
func digestOf(vm *strongroomv1.VM) ([]byte, error) {
	description := vm.GetDescription()
	vm.Description = nil
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(vm)
	vm.Description = description
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	return sum[:], nil
}

// parsePair reads a certificate (DER) and its private key (PKCS #8).
func parsePair(der []byte, key *keymem.Key) (*x509.Certificate, crypto.Signer, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	private, err := x509.ParsePKCS8PrivateKey(key.Bytes())
	if err != nil {
		return nil, nil, err
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return nil, nil, errNoKey
	}
	return cert, signer, nil
}
