package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":["oob"]}}` + "\n"

// peer plays QEMU for faults that a real one does not show: serve gets the
// lines after qmp_capabilities.
func peer(t *testing.T, serve func(lines *bufio.Scanner, conn net.Conn)) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		fmt.Fprint(theirs, greeting)
		lines := bufio.NewScanner(theirs)
		if !lines.Scan() {
			return
		}
		fmt.Fprintf(theirs, `{"return":{},"id":%d}`+"\n", requestID(t, lines.Bytes()))
		serve(lines, theirs)
	}()
	t.Cleanup(func() { ours.Close(); <-done })
	return ours
}

func requestID(t *testing.T, line []byte) uint64 {
	var request struct{ ID uint64 }
	if err := json.Unmarshal(line, &request); err != nil {
		t.Errorf("client sent %q: %v", line, err)
	}
	return request.ID
}

func session(t *testing.T, serve func(lines *bufio.Scanner, conn net.Conn)) *Client {
	t.Helper()
	c, err := New(t.Context(), peer(t, serve))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestRepliesOutOfOrder(t *testing.T) {
	c := session(t, func(lines *bufio.Scanner, conn net.Conn) {
		type command struct {
			Execute string
			ID      uint64
		}
		var commands []command
		for len(commands) < 2 && lines.Scan() {
			var r command
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				t.Error(err)
			}
			commands = append(commands, r)
		}
		for _, r := range []command{commands[1], commands[0]} {
			fmt.Fprintf(conn, `{"return":%q,"id":%d}`+"\n", r.Execute, r.ID)
		}
		lines.Scan()
		fmt.Fprintf(conn, `{"error":{"class":"GenericError","desc":"no"},"id":%d}`+"\n", requestID(t, lines.Bytes()))
	})
	errs := make(chan error, 2)
	for _, command := range []string{"query-a", "query-b"} {
		go func() {
			var got string
			err := c.Do(t.Context(), command, nil, &got)
			if err == nil && got != command {
				err = fmt.Errorf("%s got the reply to %s", command, got)
			}
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	var refused *Error
	if err := c.Do(t.Context(), "query-c", nil, nil); !errors.As(err, &refused) || *refused != (Error{"query-c", "GenericError", "no"}) {
		t.Errorf("got %v, want QEMU's refusal", err)
	}
}

func TestEvents(t *testing.T) {
	c := session(t, func(lines *bufio.Scanner, conn net.Conn) {
		lines.Scan()
		id := requestID(t, lines.Bytes())
		for i := range 3 * watchDepth {
			fmt.Fprintf(conn, `{"event":"NOISE","data":{"n":%d},"timestamp":{"seconds":5,"microseconds":7}}`+"\n", i)
		}
		fmt.Fprint(conn, `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}`+"\n")
		fmt.Fprintf(conn, `{"return":{},"id":%d}`+"\n", id)
	})
	noise, shutdown := c.Watch("NOISE"), c.Watch("SHUTDOWN")
	defer noise.Close()
	if err := c.Do(t.Context(), "system_powerdown", nil, nil); err != nil {
		t.Fatal(err)
	}
	if e := <-shutdown.Events(); e.Name != "SHUTDOWN" || !strings.Contains(string(e.Data), "guest-shutdown") {
		t.Errorf("got event %+v", e)
	}
	shutdown.Close()
	shutdown.Close()
	if e, ok := <-shutdown.Events(); ok {
		t.Errorf("got event %+v after Close", e)
	}
	<-c.Done()
	count := 0
	for e := range noise.Events() { // closed by the end of the session
		if want := fmt.Sprintf(`{"n":%d}`, 2*watchDepth+count); string(e.Data) != want {
			t.Fatalf("event %d has data %s, want %s: the newest are kept", count, e.Data, want)
		}
		if e.Time.UnixMicro() != 5_000_007 {
			t.Fatalf("event time is %v", e.Time)
		}
		count++
	}
	if count != watchDepth {
		t.Errorf("got %d events of a flood, want the last %d", count, watchDepth)
	}
	if _, ok := <-c.Watch().Events(); ok {
		t.Error("a watch on a session that ended delivers")
	}
}

func TestSessionEnds(t *testing.T) {
	cases := map[string]struct {
		send string
		want string
	}{
		"closed":        {"", "closed the connection"},
		"not JSON":      {"\x00\x01\n", "cannot decode"},
		"no kind":       {"{}\n", "not one of"},
		"two kinds":     {`{"event":"A","return":{},"id":2}` + "\n", "not one of"},
		"no id":         {`{"return":{}}` + "\n", "no command"},
		"endless line":  {strings.Repeat("x", LineMax+1), "too long"},
		"truncated":     {`{"return":`, "cannot decode"},
		"id of no type": {`{"return":{},"id":"x"}` + "\n", "cannot decode"},
	}
	for name, test := range cases {
		t.Run(name, func(t *testing.T) {
			c := session(t, func(lines *bufio.Scanner, conn net.Conn) {
				lines.Scan()
				fmt.Fprint(conn, test.send)
			})
			err := c.Do(t.Context(), "query-status", nil, nil)
			if !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want a closed session: %s", err, test.want)
			}
			<-c.Done()
			if err := c.Do(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
				t.Errorf("after the end: got %v", err)
			}
		})
	}
}

func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := session(t, func(lines *bufio.Scanner, conn net.Conn) {
		lines.Scan()
		late := requestID(t, lines.Bytes())
		cancel()
		lines.Scan()
		fmt.Fprintf(conn, `{"return":1,"id":%d}`+"\n", late)
		fmt.Fprintf(conn, `{"return":2,"id":%d}`+"\n", requestID(t, lines.Bytes()))
	})
	if err := c.Do(ctx, "slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want cancellation", err)
	}
	var got int
	if err := c.Do(t.Context(), "quick", nil, &got); err != nil || got != 2 {
		t.Errorf("got %d, %v: a late reply to the cancelled command must be ignored", got, err)
	}
}

func TestNoGreeting(t *testing.T) {
	silent, other := net.Pipe()
	defer other.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, silent); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent peer: got %v, want the deadline", err)
	}

	ours, theirs := net.Pipe()
	go func() { fmt.Fprintln(theirs, `{"event":"RESUME"}`); theirs.Close() }()
	if _, err := New(t.Context(), ours); err == nil || !strings.Contains(err.Error(), "does not speak QMP") {
		t.Errorf("wrong peer: got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(greeting))
	f.Add([]byte(`{"return": {"status": "running"}, "id": 7}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "x"}}`))
	f.Add([]byte(`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`))
	f.Add([]byte(`{"return":null,"id":18446744073709551615}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		before := bytes.Clone(line)
		m, err := parse(line)
		if !bytes.Equal(line, before) {
			t.Error("parse changed its input")
		}
		if err != nil {
			if m.greeting || m.event != nil || m.result != nil || m.err != nil || m.hasID {
				t.Errorf("error %v with a message %+v", err, m)
			}
			return
		}
		kinds := 0
		for _, is := range []bool{m.greeting, m.event != nil, m.result != nil, m.err != nil} {
			if is {
				kinds++
			}
		}
		if kinds != 1 || (m.result != nil && !m.hasID) {
			t.Errorf("%q is parsed as %+v", line, m)
		}
	})
}
