package volumectl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestViolations sends what no Client sends: each ends the connection, does
// nothing, and leaves the server in order.
func TestViolations(t *testing.T) {
	t.Parallel()
	const hello = `{"op":"hello","version":1}`
	addDisk := fmt.Sprintf(`{"op":"add-disk","disk":"d","format":"luks","key_bytes":%d}`, KeySize)
	addBoth := fmt.Sprintf(`{"op":"add-disk","disk":"d","format":"luks","key_bytes":%d,"next_key_bytes":%d}`, KeySize, KeySize)
	key := strings.Repeat("k", KeySize)
	for name, packets := range map[string][]packet{
		"not hello first":    {{text: `{"op":"status"}`}},
		"hello twice":        {{text: hello, ok: true}, {text: hello}},
		"not JSON":           {{text: hello, ok: true}, {text: "\x00"}},
		"two objects":        {{text: hello, ok: true}, {text: `{"op":"status"}{}`}},
		"unknown operation":  {{text: hello, ok: true}, {text: `{"op":"format-disk"}`}},
		"unknown member":     {{text: hello, ok: true}, {text: `{"op":"status","x":1}`}},
		"foreign member":     {{text: hello, ok: true}, {text: `{"op":"status","disk":"d"}`}},
		"too long":           {{text: hello, ok: true}, {text: `{"op":"status"}` + strings.Repeat(" ", MessageMax)}},
		"no descriptor":      {{text: hello, ok: true}, {text: `{"op":"listen"}`}},
		"no vhost socket":    {{text: hello, ok: true}, {text: `{"op":"listen-vhost-user","disk":"d"}`}},
		"vhost of no disk":   {{text: hello, ok: true}, {text: `{"op":"listen-vhost-user"}`, fds: 1}},
		"stray descriptor":   {{text: hello, ok: true}, {text: `{"op":"status"}`, fds: 1}},
		"two descriptors":    {{text: hello, ok: true}, {text: `{"op":"listen"}`, fds: 2}},
		"many descriptors":   {{text: hello, ok: true}, {text: `{"op":"listen"}`, fds: 60}},
		"key too short":      {{text: hello, ok: true}, {text: addDisk, fds: 1, more: true}, {text: strings.Repeat("k", KeySize-1)}},
		"key too long":       {{text: hello, ok: true}, {text: addDisk, fds: 1, more: true}, {text: strings.Repeat("k", KeySize+1)}},
		"second key short":   {{text: hello, ok: true}, {text: addBoth, fds: 1, more: true}, {text: key, more: true}, {text: key[1:]}},
		"bad safe":           {{text: hello, ok: true}, {text: `{"op":"replace-safe","disk":"d","safe":{"version":1}}`}},
		"negative size":      {{text: hello, ok: true}, {text: `{"op":"resize","disk":"d","size":-512}`}},
		"version zero":       {{text: `{"op":"hello"}`}},
		"key for a raw disk": {{text: hello, ok: true}, {text: `{"op":"add-disk","disk":"d","format":"raw","key_bytes":64}`, fds: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := new(recorder)
			path := serve(t, r)
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, p := range packets {
				p.exchange(t, conn)
			}
			if calls := r.seen(); len(calls) != 0 {
				t.Errorf("the handler saw %q", calls)
			}
			if _, err := dial(t, path).Status(t.Context()); err != nil {
				t.Errorf("the server does not answer others any more: %v", err)
			}
		})
	}
}

type packet struct {
	text string
	fds  int
	ok   bool // an answer comes
	more bool // neither an answer nor the end of the connection comes
}

func (p packet) exchange(t *testing.T, conn *net.UnixConn) {
	t.Helper()
	var oob []byte
	if p.fds > 0 {
		fds := make([]int, p.fds)
		for i := range fds {
			fds[i] = 0 // anything open
		}
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix([]byte(p.text), oob, nil); err != nil {
		t.Fatal(err)
	}
	if p.more {
		return
	}
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	n, err := conn.Read(make([]byte, MessageMax))
	if p.ok && (n == 0 || err != nil) {
		t.Fatalf("no answer to %s: %v", p.text, err)
	}
	if !p.ok && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("after %.80s: %d bytes, %v; want the end of the connection", p.text, n, err)
	}
}

func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	path := serve(t, new(recorder))
	for range ConnectionsMax {
		dial(t, path)
	}
	if c, err := Dial(t.Context(), path); err == nil {
		c.Close()
		t.Error("one connection too many was served")
	}
}

func FuzzParseRequest(f *testing.F) {
	safe := testSafe(f)
	for _, r := range []request{
		{Op: opHello, Version: 1},
		{Op: opAddDisk, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, Size: 512, ReadOnly: true},
		{Op: opAddDisk, Disk: "disk-0", Format: Raw},
		{Op: opReplaceSafe, Disk: "disk-0", Safe: safe},
		{Op: opResize, Disk: "disk-0", Size: 1 << 40},
		{Op: opAddDisk, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, NextKeyBytes: KeySize},
		{Op: opRekey, Disk: "disk-0", NextKeyBytes: KeySize, Safe: safe, Rate: 100 << 20},
		{Op: opRekey, Disk: "disk-0"},
		{Op: opStopRekey, Disk: "disk-0"},
		{Op: opConvert, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, Rate: 100 << 20},
		{Op: opStopConvert, Disk: "disk-0"},
		{Op: opSuspend, Limit: 10_000},
		{Op: opResume},
		{Op: opStatus},
	} {
		message, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(message)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := parseRequest(message)
		if err != nil {
			if r != nil || !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v with request %+v", err, r)
			}
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		second, err := parseRequest(again)
		if err != nil {
			t.Fatalf("%s is refused after it was parsed from %s: %v", again, message, err)
		}
		third, err := json.Marshal(second)
		if err != nil || !bytes.Equal(again, third) {
			t.Errorf("%s becomes %s", again, third)
		}
	})
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"error":{"text":"x","kind":"Locked","reason":"r","hint":"h"}}`))
	f.Add([]byte(`{"version":1,"vm":"web-1","pid":7,"future":true}`))
	f.Add([]byte(`{"status":{"disks":[{"conversion":{"phase":"failed","done":1,"total":2,"error":{"text":"x","kind":"NoSpace"}}}]}}`))
	f.Add([]byte(`{"status":{"listening":true,"disks":[{"disk":"d","format":"luks","size":512,"damage":["x"]}]}}`))
	f.Add([]byte(`{"status":{"disks":[{"rekey":{"running":true,"done":1,"total":2,"rate":3,"error":{"text":"x","kind":"NoSpace"}}}]}}`))
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := parseReply(message)
		if err != nil {
			if r != nil || !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v with reply %+v", err, r)
			}
			return
		}
		if r.Error != nil && r.Error.Err().Error() == "" {
			t.Error("an error without text")
		}
	})
}
