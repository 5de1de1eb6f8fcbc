package main

import (
	"bytes"
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
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"golang.org/x/sync/errgroup"
)

// kmsScale is what many keys cost a key management server of ours. Times are of
// one run, sizes in MiB.
type kmsScale struct {
	Keys         int     `json:"keys"`
	LoadSeconds  float64 `json:"load_seconds"` // 0: an earlier run made them
	DatabaseMiB  float64 `json:"database_mib"`
	StartSeconds float64 `json:"start_seconds"` // until a key was got
	SettleCPU    float64 `json:"settle_cpu_s"`  // processor time until it had nothing more to do
	SettleSecs   float64 `json:"settle_seconds"`
	// Memory of the process: its own, and pages of the database's file.
	AnonStartMiB float64    `json:"anon_start_mib"`
	FileStartMiB float64    `json:"file_start_mib"`
	AnonLoadMiB  float64    `json:"anon_load_mib"` // after the loads
	FileLoadMiB  float64    `json:"file_load_mib"`
	ListSeconds  float64    `json:"list_seconds"` // of all keys, in pages
	Loads        []kmsSpeed `json:"loads"`
}

const (
	scaleConnections = 64
	scaleBatch       = 64
	scaleStartMax    = 10 * time.Minute
)

// measureScale fills a server with keys that have names, starts it anew and
// loads it.
func measureScale(ctx context.Context, o options, binary string) (_ *kmsScale, err error) {
	dir := o.kmsDir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "sr-bench-"); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	out := &kmsScale{Keys: o.kmsKeys}
	s, err := startScale(ctx, dir, binary)
	if err != nil {
		return nil, err
	}
	defer func() { s.end() }()
	if s.keys == 0 {
		begin := time.Now()
		err = s.fill(ctx, o.kmsKeys)
		out.LoadSeconds = time.Since(begin).Seconds()
	} else if s.keys < o.kmsKeys*9/10 {
		err = fmt.Errorf("in %s are %d keys or some more", dir, s.keys)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make %d keys: %w", o.kmsKeys, err)
	}
	if err := s.stop(); err != nil {
		return nil, err
	}
	if info, err := os.Stat(filepath.Join(dir, "kms", "store", "member", "snap", "db")); err == nil {
		out.DatabaseMiB = float64(info.Size()) / (1 << 20)
	}
	begin := time.Now()
	if s, err = startScale(ctx, dir, binary); err != nil {
		return nil, err
	}
	out.StartSeconds = time.Since(begin).Seconds()
	if out.SettleSecs, out.SettleCPU, err = s.settled(ctx); err != nil {
		return nil, err
	}
	if out.AnonStartMiB, out.FileStartMiB, err = resident(s.process.Process.Pid); err != nil {
		return nil, err
	}
	for _, load := range []struct {
		name        string
		connections int
		once        func(*kmsServer, net.Conn) error
	}{
		{"Get of any key", 1, s.getAny},
		{"Get of any key", 8, s.getAny},
		{"Locate by name", 1, s.locateAny},
		{"Locate of the newest 100", 1, locateNewest},
		{"Create, then Activate", 8, (*kmsServer).createActivate},
	} {
		var runs []kmsSpeed
		for range o.rounds {
			run, err := s.load(ctx, o.duration, load.connections, true, load.once)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", load.name, err)
			}
			runs = append(runs, run)
		}
		speed := medianRun(runs)
		speed.Server, speed.Load, speed.Connections, speed.Rounds = s.name, load.name, load.connections, o.rounds
		out.Loads = append(out.Loads, speed)
	}
	begin = time.Now()
	if err := s.list(); err != nil {
		return nil, fmt.Errorf("cannot list all keys: %w", err)
	}
	out.ListSeconds = time.Since(begin).Seconds()
	out.AnonLoadMiB, out.FileLoadMiB, err = resident(s.process.Process.Pid)
	return out, err
}

// scaleServer is a server with many keys.
type scaleServer struct {
	*kmsServer
	ids  []string // of some keys
	keys int
	next atomic.Int64
}

// startScale starts the server and returns once a key can be made or got.
func startScale(ctx context.Context, dir, binary string) (*scaleServer, error) {
	one, err := prepareOurs(ctx, dir, binary)
	if err != nil {
		return nil, err
	}
	s := &scaleServer{kmsServer: one}
	s.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := s.process.Start(); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; {
		conn, err := tls.Dial("tcp", s.addr, s.client)
		if err == nil {
			_, err = ask(conn, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}})
			if err == nil {
				s.ids, s.keys, err = sampled(conn)
			}
			conn.Close()
		}
		if err == nil {
			return s, nil
		}
		if time.Since(begin) > scaleStartMax {
			s.end()
			return nil, fmt.Errorf("it did not start: %w", err)
		}
		select {
		case <-ctx.Done():
			s.end()
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// sampled finds some keys by their names, and out how many there are.
func sampled(conn net.Conn) (ids []string, keys int, err error) {
	find := func(i int) (string, error) {
		p, err := ask(conn, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named(scaleName(i))}})
		if err != nil || len(p.(*payloads.LocateResponsePayload).UniqueIdentifier) != 1 {
			return "", err
		}
		return p.(*payloads.LocateResponsePayload).UniqueIdentifier[0], nil
	}
	for step := 1; ; step++ {
		id, err := find(step*step - 1)
		if err != nil || id == "" {
			return ids, keys, err
		}
		ids, keys = append(ids, id), step*step
	}
}

func (s *scaleServer) end() {
	if s.process.ProcessState == nil {
		s.kmsServer.end()
	}
}

// stop has the server stop as it should.
func (s *kmsServer) stop() error {
	if err := s.process.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := s.process.Wait(); err != nil {
		var status *exec.ExitError
		if !errors.As(err, &status) {
			return err
		}
		return fmt.Errorf("the server stopped with %w", err)
	}
	return nil
}

func scaleName(i int) string { return fmt.Sprintf("cluster-7/vm-%d/disk-%d", i/4, i%4) }

func named(name string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}}
}

func newKey(name string) *payloads.CreateRequestPayload {
	list := []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
	}
	if name != "" {
		list = append(list, named(name))
	}
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: list}}
}

// fill makes so many keys, in batches on many connections.
func (s *scaleServer) fill(ctx context.Context, keys int) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range scaleConnections {
		group.Go(func() error {
			conn, err := tls.Dial("tcp", s.addr, s.client)
			if err != nil {
				return err
			}
			defer conn.Close()
			for ctx.Err() == nil {
				first := int(next.Add(scaleBatch)) - scaleBatch
				if first >= keys {
					return nil
				}
				var items []kmip.OperationPayload
				for i := first; i < min(first+scaleBatch, keys); i++ {
					items = append(items, newKey(scaleName(i)))
				}
				if err := together(conn, items...); err != nil {
					return err
				}
				if first%(100*scaleBatch) == 0 {
					fmt.Fprintf(os.Stderr, "\r%d keys of %d", first, keys)
				}
			}
			return context.Cause(ctx)
		})
	}
	defer fmt.Fprintln(os.Stderr)
	return group.Wait()
}

// together does operations in one message.
func together(conn net.Conn, items ...kmip.OperationPayload) error {
	m := kmip.NewRequestMessage(kmip.V1_2, items...)
	for i := range m.BatchItem {
		m.BatchItem[i].UniqueBatchItemID = []byte{byte(i)}
	}
	_, err := exchange(conn, &m)
	return err
}

// exchange does the operations of a message, which must succeed.
func exchange(conn net.Conn, m *kmip.RequestMessage) ([]kmip.ResponseBatchItem, error) {
	if _, err := conn.Write(ttlv.MarshalTTLV(m)); err != nil {
		return nil, err
	}
	var head [8]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	body := make([]byte, binary.BigEndian.Uint32(head[4:]))
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	var r kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(append(head[:], body...), &r); err != nil {
		return nil, err
	}
	for _, item := range r.BatchItem {
		if err := item.Err(); err != nil {
			return nil, err
		}
	}
	if len(r.BatchItem) != len(m.BatchItem) {
		return nil, fmt.Errorf("an answer of %d items", len(r.BatchItem))
	}
	return r.BatchItem, nil
}

// settled waits until the process has used less than a tenth of a processor for
// two seconds, and returns how long and how much processor time that took.
func (s *scaleServer) settled(ctx context.Context) (seconds, cpu float64, err error) {
	const pause, quiet = 500 * time.Millisecond, 4
	begin := time.Now()
	last, err := processorTime(s.process.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	calm := 0
	for calm < quiet {
		select {
		case <-ctx.Done():
			return 0, 0, context.Cause(ctx)
		case <-time.After(pause):
		}
		now, err := processorTime(s.process.Process.Pid)
		if err != nil {
			return 0, 0, err
		}
		calm++
		if now-last > pause/10 {
			calm = 0
		}
		last = now
	}
	return (time.Since(begin) - quiet*pause).Seconds(), last.Seconds(), nil
}

// resident returns what a process has in memory, in MiB.
func resident(pid int) (anon, file float64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range bytes.Lines(status) {
		name, value, _ := strings.Cut(string(line), ":")
		kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		switch {
		case name == "RssAnon" && err == nil:
			anon = kib / 1024
		case name == "RssFile" && err == nil:
			file = kib / 1024
		}
	}
	return anon, file, nil
}

func (s *scaleServer) getAny(_ *kmsServer, conn net.Conn) error {
	id := s.ids[int(s.next.Add(1))*7%len(s.ids)]
	_, err := ask(conn, &payloads.GetRequestPayload{UniqueIdentifier: id})
	return err
}

func (s *scaleServer) locateAny(_ *kmsServer, conn net.Conn) error {
	p, err := ask(conn, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named(scaleName(int(s.next.Add(1)) * 7919 % s.keys))}})
	if err == nil && len(p.(*payloads.LocateResponsePayload).UniqueIdentifier) != 1 {
		err = errors.New("the name was not found")
	}
	return err
}

func locateNewest(_ *kmsServer, conn net.Conn) error {
	p, err := ask(conn, &payloads.LocateRequestPayload{MaximumItems: 100})
	if err == nil && len(p.(*payloads.LocateResponsePayload).UniqueIdentifier) != 100 {
		err = errors.New("the newest were not found")
	}
	return err
}

// list reads the identifiers of all keys, page by page.
func (s *scaleServer) list() error {
	conn, err := tls.Dial("tcp", s.addr, s.client)
	if err != nil {
		return err
	}
	defer conn.Close()
	for found := 0; ; {
		m := kmip.NewRequestMessage(kmip.V1_3, &payloads.LocateRequestPayload{OffsetItems: int32(found), MaximumItems: 5000, Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey},
		}})
		items, err := exchange(conn, &m)
		if err != nil {
			return err
		}
		page := len(items[0].ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier)
		if found += page; page == 0 && found >= s.keys {
			return nil
		} else if page == 0 {
			return fmt.Errorf("%d keys were listed of %d", found, s.keys)
		}
	}
}
