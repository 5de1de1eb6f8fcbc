package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/clientcert"
	"strongroom/test/port"
)

// kmsSpeed is the median of the rounds of one load on one key management server.
type kmsSpeed struct {
	Server      string  `json:"server"`
	Load        string  `json:"load"`
	Connections int     `json:"connections"`
	PerSecond   float64 `json:"per_second"`
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
	Rounds      int     `json:"rounds"`
}

const (
	pykmipProgram = "/usr/bin/pykmip-server"
	kmsStartMax   = time.Minute
)

// kmsServer is a server under test and how its client connects.
type kmsServer struct {
	name, addr string
	client     *tls.Config
	process    *exec.Cmd
	others     []*exec.Cmd // processes of its other nodes
	key        string      // one that is there, to be got
}

func (s *kmsServer) end() {
	for _, p := range append([]*exec.Cmd{s.process}, s.others...) {
		if p.Process != nil {
			_ = syscall.Kill(-p.Process.Pid, syscall.SIGKILL)
			_ = p.Wait()
		}
	}
}

// measureKMS loads our KMS and PyKMIP in turn: mutual TLS, keys durable, one
// client process, on the disk of the system's temporary folder.
func measureKMS(ctx context.Context, o options, binary string) (_ []kmsSpeed, err error) {
	dir, err := os.MkdirTemp("", "sr-bench-") // short: socket paths are limited
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var servers []*kmsServer
	defer func() {
		for _, s := range servers {
			s.end()
		}
	}()
	for _, prepare := range []func(context.Context, string, string) (*kmsServer, error){prepareOurs, preparePyKMIP, prepareNodes} {
		s, err := prepare(ctx, dir, binary)
		if err != nil {
			return nil, err
		}
		servers = append(servers, s)
		if s.process.Process == nil {
			s.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
			if err := s.process.Start(); err != nil {
				return nil, err
			}
		}
		if err := s.settle(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	ours, peers, all := servers[:1], servers[:2], servers
	// PyKMIP cannot parse a message of these two operations (InvalidMessage).
	batches := []*kmsServer{servers[0], servers[2]}
	quota := func(s *kmsServer, on bool) error { return limitOperations(ctx, binary, dir, on) }
	loads := []struct {
		name        string
		servers     []*kmsServer
		connections int
		once        func(s *kmsServer, conn net.Conn) error // nil conn: it connects itself
		connect     bool
		change      func(s *kmsServer, on bool) error // of the server, for this load; nil: none
	}{
		{"Get", peers, 1, (*kmsServer).get, true, nil},
		{"Get", all, 8, (*kmsServer).get, true, nil},
		{"Get, with quotas", ours, 8, (*kmsServer).get, true, quota},
		{"Create, then Activate", peers, 1, (*kmsServer).createActivate, true, nil},
		{"Create, then Activate", all, 8, (*kmsServer).createActivate, true, nil},
		{"Create, then Activate", ours, 32, (*kmsServer).createActivate, true, nil},
		{"Create, then Activate", ours, 64, (*kmsServer).createActivate, true, nil},
		{"Create and Activate in one batch", ours, 1, (*kmsServer).createActivateBatch, true, nil},
		{"Create and Activate in one batch", batches, 8, (*kmsServer).createActivateBatch, true, nil},
		{"Create and Activate in one batch", ours, 32, (*kmsServer).createActivateBatch, true, nil},
		{"Create and Activate in one batch", ours, 64, (*kmsServer).createActivateBatch, true, nil},
		{"connect, Get, close", peers, 1, (*kmsServer).connectGet, false, nil},
		{"connect, Get, close", peers, 8, (*kmsServer).connectGet, false, nil},
		{"Locate by name", peers, 1, (*kmsServer).locate, true, nil},
	}
	var out []kmsSpeed
	for _, load := range loads {
		runs := make([][]kmsSpeed, len(load.servers))
		for range o.rounds {
			for i, s := range load.servers {
				if load.change != nil {
					if err := load.change(s, true); err != nil {
						return nil, fmt.Errorf("%s, %s: %w", s.name, load.name, err)
					}
				}
				run, err := s.load(ctx, o.duration, load.connections, load.connect, load.once)
				if load.change != nil {
					err = errors.Join(err, load.change(s, false))
				}
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", s.name, load.name, err)
				}
				runs[i] = append(runs[i], run)
			}
		}
		for i, s := range load.servers {
			speed := medianRun(runs[i])
			speed.Server, speed.Load, speed.Connections, speed.Rounds = s.name, load.name, load.connections, o.rounds
			out = append(out, speed)
		}
	}
	return out, nil
}

func medianRun(runs []kmsSpeed) kmsSpeed {
	slices.SortFunc(runs, func(a, b kmsSpeed) int { return int(a.PerSecond - b.PerSecond) })
	return runs[len(runs)/2]
}

func prepareOurs(_ context.Context, dir, binary string) (*kmsServer, error) {
	addr, err := port.Reserve()
	if err != nil {
		return nil, err
	}
	own := filepath.Join(dir, "kms")
	s := &kmsServer{name: "strongroom kms", addr: addr, process: exec.Command(binary, "kms", "dev", "--dir", own, "--listen", addr)}
	s.client = &tls.Config{
		// What is measured is on this machine; nothing secret is sent.
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(filepath.Join(own, "client.pem"), filepath.Join(own, "client.key"))
			return &pair, err
		},
	}
	return s, nil
}

func preparePyKMIP(_ context.Context, dir, _ string) (*kmsServer, error) {
	addr, err := port.Reserve()
	if err != nil {
		return nil, err
	}
	own := filepath.Join(dir, "pykmip")
	if err := os.MkdirAll(filepath.Join(own, "policies"), 0o700); err != nil {
		return nil, err
	}
	_, cert, key, err := clientcert.New("bench", time.Hour)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(addr)
	config := strings.Join([]string{
		"[server]", "hostname=" + host, "port=" + port, "certificate_path=" + own + "/cert.pem", "key_path=" + own + "/cert.key",
		"ca_path=" + own + "/cert.pem", "auth_suite=TLS1.2", "policy_path=" + own + "/policies", "enable_tls_client_auth=True",
		"logging_level=ERROR", "database_path=" + own + "/pykmip.db", "",
	}, "\n")
	for name, data := range map[string][]byte{"cert.pem": cert, "cert.key": key, "server.conf": []byte(config)} {
		if err := os.WriteFile(filepath.Join(own, name), data, 0o600); err != nil {
			return nil, err
		}
	}
	process := exec.Command(pykmipProgram, "-f", own+"/server.conf", "-l", own+"/server.log")
	process.Env = append(os.Environ(), "TMPDIR="+own) // it leaves folders there when it is killed
	return &kmsServer{
		name: "PyKMIP", addr: addr, process: process,
		client: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}},
	}, nil
}

// settle waits until a key can be made, and makes 1000 with names, the first to
// be got.
func (s *kmsServer) settle(ctx context.Context) error {
	deadline := time.Now().Add(kmsStartMax)
	for {
		conn, err := tls.Dial("tcp", s.addr, s.client)
		if err == nil {
			s.key, err = s.create(conn, "key-0")
			conn.Close()
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it did not start: %w", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
	conn, err := tls.Dial("tcp", s.addr, s.client)
	if err != nil {
		return err
	}
	defer conn.Close()
	for i := 1; i < 1000; i++ {
		if _, err := s.create(conn, fmt.Sprint("key-", i)); err != nil {
			return err
		}
	}
	return s.get(conn) // the first Get of a key makes it stale
}

// load runs once on so many connections for the duration.
func (s *kmsServer) load(ctx context.Context, duration time.Duration, connections int, connect bool, once func(*kmsServer, net.Conn) error) (kmsSpeed, error) {
	conns := make([]net.Conn, connections)
	for i := range conns {
		if !connect {
			break
		}
		conn, err := tls.Dial("tcp", s.addr, s.client)
		if err != nil {
			return kmsSpeed{}, err
		}
		defer conn.Close()
		conns[i] = conn
	}
	var (
		mu    sync.Mutex
		took  []time.Duration
		first error
		all   sync.WaitGroup
	)
	begin := time.Now()
	for _, conn := range conns {
		all.Go(func() {
			var own []time.Duration
			var err error
			for err == nil && time.Since(begin) < duration && ctx.Err() == nil {
				start := time.Now()
				if err = once(s, conn); err == nil {
					own = append(own, time.Since(start))
				}
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, own...)
			if first == nil {
				first = err
			}
		})
	}
	all.Wait()
	elapsed := time.Since(begin)
	if first != nil || len(took) == 0 {
		return kmsSpeed{}, errors.Join(first, ctx.Err())
	}
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
	return kmsSpeed{PerSecond: float64(len(took)) / elapsed.Seconds(), P50: ms(took[len(took)/2]), P99: ms(took[len(took)*99/100])}, nil
}

// ask does one operation in KMIP 1.2.
func ask(conn net.Conn, p kmip.OperationPayload) (kmip.OperationPayload, error) {
	m := kmip.NewRequestMessage(kmip.V1_2, p)
	if _, err := conn.Write(ttlv.MarshalTTLV(&m)); err != nil {
		return nil, err
	}
	b := make([]byte, 8, 1024)
	if _, err := io.ReadFull(conn, b); err != nil {
		return nil, err
	}
	b = append(b, make([]byte, binary.BigEndian.Uint32(b[4:]))...)
	if _, err := io.ReadFull(conn, b[8:]); err != nil {
		return nil, err
	}
	var r kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(b, &r); err != nil {
		return nil, err
	}
	if len(r.BatchItem) != 1 {
		return nil, fmt.Errorf("an answer of %d items", len(r.BatchItem))
	}
	return r.BatchItem[0].ResponsePayload, r.BatchItem[0].Err()
}

func (s *kmsServer) get(conn net.Conn) error {
	_, err := ask(conn, &payloads.GetRequestPayload{UniqueIdentifier: s.key})
	return err
}

func (s *kmsServer) create(conn net.Conn, name string) (string, error) {
	p, err := ask(conn, newKey(name))
	if err != nil {
		return "", err
	}
	return p.(*payloads.CreateResponsePayload).UniqueIdentifier, nil
}

func (s *kmsServer) createActivate(conn net.Conn) error {
	id, err := s.create(conn, "")
	if err != nil {
		return err
	}
	_, err = ask(conn, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
	return err
}

// createActivateBatch is createActivate in one message.
func (s *kmsServer) createActivateBatch(conn net.Conn) error {
	return together(conn, newKey(""), &payloads.ActivateRequestPayload{})
}

func (s *kmsServer) connectGet(net.Conn) error {
	conn, err := tls.Dial("tcp", s.addr, s.client)
	if err != nil {
		return err
	}
	defer conn.Close()
	return s.get(conn)
}

func (s *kmsServer) locate(conn net.Conn) error {
	p, err := ask(conn, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "key-500", NameType: kmip.NameTypeUninterpretedTextString}},
	}})
	if err == nil && len(p.(*payloads.LocateResponsePayload).UniqueIdentifier) != 1 {
		err = errors.New("the name was not found")
	}
	return err
}
