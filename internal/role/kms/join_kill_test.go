package kms

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/errs"
)

// pause tells the parent a step and waits for a byte of it.
func pause(step string) {
	fmt.Println(step)
	io.ReadFull(os.Stdin, make([]byte, 1))
}

// firstStart are the messages of a node's log behind each step of its first start.
var firstStart = []string{
	"the other nodes take this one in", "the node's database is open", "the node's database has its say", "the other nodes know this one as a member",
}

// pausing is a log that pauses behind the steps of a first start.
type pausing struct{ slog.Handler }

func (h pausing) Handle(ctx context.Context, r slog.Record) error {
	if slices.Contains(firstStart, r.Message) {
		pause(r.Message)
	}
	return h.Handler.Handle(ctx, r)
}

// killBehind runs the test's binary, which reads input and then pauses behind each
// step, and kills it when stop says so of the steps up to there. It returns the
// steps, and whether the process came to its end.
func killBehind(t *testing.T, cmd *exec.Cmd, input []byte, stop func(steps []string) bool) (steps []string, ended bool) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := in.Write(input); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadString('\n')
		if err != nil { // it has ended
			if err := cmd.Wait(); err != nil {
				t.Fatalf("behind %q: %v", steps, err)
			}
			return steps, true
		}
		if steps = append(steps, strings.TrimSpace(line)); stop(steps) {
			return steps, false
		}
		if _, err := in.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
}

// child is a process that is the site's node, or has it join, and pauses behind
// each step.
func (s *site) child(env ...string) *exec.Cmd {
	cmd := self()
	cmd.Env = append(append(os.Environ(), childVariable+"="+s.config, childVariable+"_STEPS=1"), env...)
	cmd.Stderr = s.out
	return cmd
}

// joinKilled has the site join a KMS and kills it behind its nth step.
func (s *site) joinKilled(at *site, n int) (steps []string, ended bool) {
	s.t.Helper()
	token := at.joinToken()
	cmd := s.child(childVariable+"_JOIN="+token.GetAddress(), childVariable+"_TOKEN="+token.GetToken())
	return killBehind(s.t, cmd, nil, func(steps []string) bool { return len(steps) == n })
}

// TestJoinKilledAtEachStep kills a third node behind each step of its join and of
// its first start. The other two go on. What is left of a join does not start as
// another KMS, and gives way to the next one; what is left of a first start goes on
// with the next start, or gives way to a new join.
func TestJoinKilledAtEachStep(t *testing.T) {
	t.Parallel()
	n, keys := newNodes(t, "b")
	c := newSite(t, "c")
	goesOn := func(i int, behind string, members ...string) {
		t.Helper()
		id, secret := n.create(n.sites[i%2])
		keys[id] = secret
		var names []string
		for _, m := range n.sites[i%2].list() {
			names = append(names, m.GetName())
		}
		if !slices.Equal(names, members) {
			t.Errorf("killed behind %q: the members are %q, want %q", behind, names, members)
		}
	}
	joined := func() (steps []string) {
		ended := false
		if steps, ended = c.joinKilled(n.sites[0], 0); !ended {
			t.Fatal("the join did not end")
		}
		return steps
	}
	steps := []string{"folder taken", "member", "root key made", "key ring stored", "authority stored", "membership stored"}
	for i, step := range steps {
		done, ended := c.joinKilled(n.sites[i%2], i+1)
		if ended || done[i] != step {
			t.Fatalf("step %d is %q, want %q", i, done, step)
		}
		members := []string{"a", "b", "c"}
		if i == 0 {
			members = members[:2]
		}
		goesOn(i, step, members...)
		err := RunReady(t.Context(), c.cfg, slog.New(slog.DiscardHandler), func(*KMS) error { return errors.New("it runs") })
		if errs.KindOf(err) != errs.InvalidState || errs.HintOf(err) == "" {
			t.Fatalf("killed behind %q: %v", step, err)
		}
	}
	if done := joined(); !slices.Equal(done, steps) {
		t.Errorf("the steps are %q, want %q", done, steps)
	}
	for i, step := range firstStart {
		done, _ := killBehind(t, c.child(), nil, func(steps []string) bool {
			last := steps[len(steps)-1]
			return last == step || !slices.Contains(firstStart, last) // or it serves
		})
		if done[len(done)-1] != step {
			t.Fatalf("no step %q among %q", step, done)
		}
		goesOn(i, step, "a", "b", "c")
		if step == firstStart[1] { // the machine's administrator begins anew
			if err := os.RemoveAll(c.cfg.DataDir); err != nil {
				t.Fatal(err)
			}
			joined()
			goesOn(i, "a second join", "a", "b", "c")
		}
	}
	c.run()
	n.check(c, keys)
	id, _ := n.create(c)
	n.destroy(c, id)
	eventually(t, "all nodes are members, with nothing left to erase", func() bool {
		for _, m := range n.sites[0].list() {
			if m.GetState() == "joining" || m.GetErasuresDue() != 0 {
				return false
			}
		}
		return true
	})
}
