package controller

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/test/port"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		controllerChild(dir)
	}
	goleak.VerifyTestMain(m)
}

// patience bounds everything that a test waits for.
const patience = 60 * time.Second

// site is a controller in this process, with a real store and real TLS on
// loopback, that can be stopped and started again.
type site struct {
	t     testing.TB
	cfg   Config
	admin *client.Client // the first administrator
	// beatLife replaces heartbeatLife from the next start on, if it is set.
	beatLife time.Duration
	// now replaces the clock of rotations, too.
	now func() time.Time

	c    *Controller
	stop func()
}

// cheapHashing is enough for the passwords of tests.
var cheapHashing = access.Hashing{Time: 1, MemoryKiB: 64, Threads: 1}

// newSite starts a controller on an empty folder.
func newSite(t testing.TB) *site {
	t.Helper()
	l := listenLoopback(t)
	cfg, err := Config{DataDir: t.TempDir(), Listen: l.Addr().String()}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	// All clients of a test have one address.
	cfg.MaxConnectionsPerAddress, cfg.MaxRequestsPerSecond = 4096, 10000
	// Fake hosts send a heartbeat when they are told to, and a slow machine must
	// not make them silent.
	s := &site{t: t, cfg: cfg, beatLife: 10 * time.Minute}
	s.start(l)
	t.Cleanup(func() { s.stop() })
	return s
}

// listenLoopback listens at an address at which a test can listen again.
func listenLoopback(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", port.For(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// restart ends the controller and starts another on the same folder.
func (s *site) restart() {
	s.t.Helper()
	s.stop()
	l, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		s.t.Fatal(err)
	}
	s.start(l)
}

func (s *site) start(l net.Listener) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	if s.c, err = open(ctx, s.cfg, testLog(), cheapHashing); err != nil {
		cancel()
		l.Close()
		s.t.Fatal(err)
	}
	if s.beatLife != 0 {
		s.c.beatLife = s.beatLife
	}
	s.c.reluctant.again = 100 * time.Millisecond
	if s.now != nil {
		s.c.now = s.now
	}
	ended := make(chan error, 1)
	go func() { ended <- s.c.run(ctx, l) }()
	_, token := s.token("administrator", time.Hour)
	s.admin = s.as(token)
	s.stop = func() {
		s.stop = func() {}
		s.admin.Close()
		cancel()
		if err := errors.Join(<-ended, s.c.close()); err != nil {
			s.t.Errorf("controller ended with: %v", err)
		}
	}
}

// testLog is silent unless STRONGROOM_TEST_LOG is set.
func testLog() *slog.Logger {
	if os.Getenv("STRONGROOM_TEST_LOG") == "" {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}

func (s *site) token(user string, life time.Duration) (id, text string) {
	s.t.Helper()
	text, t, err := s.c.access.IssueToken(s.t.Context(), user, "test", life)
	if err != nil {
		s.t.Fatal(err)
	}
	return t.ID, text
}

// as returns a client with that token.
func (s *site) as(token string) *client.Client {
	s.t.Helper()
	ca, err := os.ReadFile(filepath.Join(s.cfg.DataDir, caCertName))
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := client.New(client.Config{Server: "https://" + s.cfg.Listen, CA: ca, Token: token})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// testPassword is the password of all users but the first.
const testPassword = "correct horse battery staple"

// user makes a user with roles and returns its client.
func (s *site) user(name string, roles ...string) *client.Client {
	s.t.Helper()
	if err := s.c.access.CreateUser(s.t.Context(), name, []byte(testPassword), roles); err != nil {
		s.t.Fatal(err)
	}
	_, text := s.token(name, time.Hour)
	return s.as(text)
}

// cluster makes a cluster with a datastore, both named name.
func (s *site) cluster(name string) {
	s.t.Helper()
	must[strongroomv1.Cluster](s.t)(client.Call(s.t.Context(), s.admin.Cluster().CreateCluster, &strongroomv1.CreateClusterRequest{Name: name}))
	must[strongroomv1.Datastore](s.t)(client.Call(s.t.Context(), s.admin.Datastore().CreateDatastore,
		&strongroomv1.CreateDatastoreRequest{Name: name, Cluster: name, Path: "/datastore/" + name}))
}

// must ends the test on an error.
func must[T any](t testing.TB) func(*T, error) *T {
	t.Helper()
	return func(v *T, err error) *T {
		t.Helper()
		if err != nil {
			t.Fatalf("%v (kind %v, hint %q)", err, errs.KindOf(err), errs.HintOf(err))
		}
		return v
	}
}

// wantKind checks an error's kind.
func wantKind(t testing.TB, err error, kind errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != kind {
		t.Errorf("got error %v (kind %v), want kind %v", err, errs.KindOf(err), kind)
	}
}

// eventually waits until check returns true.
func eventually(t testing.TB, what string, check func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !check() {
		if time.Now().After(deadline) {
			t.Fatalf("in %v it did not happen: %s", patience, what)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("the test ended before: %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ended waits for a task and returns it with its error.
func (s *site) ended(task *strongroomv1.Task) (*strongroomv1.Task, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	return s.admin.WaitTask(ctx, task.GetId(), nil)
}

// success waits for a task that must succeed.
func (s *site) success(task *strongroomv1.Task, err error) {
	s.t.Helper()
	if err == nil {
		_, err = s.ended(task)
	}
	if err != nil {
		s.t.Fatalf("%v (kind %v, hint %q)", err, errs.KindOf(err), errs.HintOf(err))
	}
}

func (s *site) vm(name string) inventory.VM {
	s.t.Helper()
	v, err := s.c.inv.VM(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// events counts the events of a type about a target.
func (s *site) events(kind, target string) int {
	s.t.Helper()
	all, err := s.c.events.List(s.t.Context(), 0)
	if err != nil {
		s.t.Fatal(err)
	}
	n := 0
	for _, e := range all {
		if e.Type == kind && e.Target == target {
			n++
		}
	}
	return n
}

// alarms returns the ids of the alarms of a target.
func (s *site) alarms(target string) []string {
	s.t.Helper()
	all, err := s.c.events.Alarms(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	var ids []string
	for _, a := range all {
		if a.Target == target {
			ids = append(ids, a.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// records verifies the audit log and returns it.
func (s *site) records() []audit.Record {
	s.t.Helper()
	if err := s.c.audit.Checkpoint(); err != nil {
		s.t.Fatal(err)
	}
	var all []audit.Record
	report, err := audit.Verify(filepath.Join(s.cfg.DataDir, "audit"), audit.Expect{Head: s.c.audit.Head()}, func(r audit.Record) error {
		all = append(all, r)
		return nil
	})
	if err != nil || report.Unsigned != 0 {
		s.t.Fatalf("audit log: %v; %d records without signature", err, report.Unsigned)
	}
	return all
}
