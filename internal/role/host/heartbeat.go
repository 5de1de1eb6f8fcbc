package host

import (
	"context"
	"crypto"
	"crypto/x509"
	"log/slog"
	"net/http"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
)

const (
	heartbeatInterval = 5 * time.Second // until the controller says otherwise
	heartbeatTimeout  = 10 * time.Second
	intervalMax       = time.Minute
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
	for {
		next, err := h.heartbeat(ctx)
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

func (h *Host) heartbeat(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, heartbeatTimeout)
	defer cancel()
	sequence := h.told.Add(1) // heartbeats are made one after the other
	res, err := h.enroll.Heartbeat(ctx, connect.NewRequest(&strongroomv1.HeartbeatRequest{
		Address: h.cfg.Advertise, Version: Version, BootId: h.bootID, Capabilities: capabilities(),
		Providers: h.held(), Vms: h.describeAll(ctx), Instance: h.instance, Sequence: sequence,
	}))
	if err != nil {
		return 0, err
	}
	next := time.Duration(res.Msg.GetIntervalMs()) * time.Millisecond
	return min(max(next, 100*time.Millisecond), intervalMax), nil
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
