package kms

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

func publicKey(text []byte) (ed25519.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no PEM")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	return key.(ed25519.PublicKey), nil
}

// childVariable makes the test's binary a KMS in the folder that it names.
const childVariable = "STRONGROOM_TEST_KMS_DIR"

func child(dir string) {
	if file := os.Getenv(childVariable + "_RESTORE"); file != "" {
		restoreChild(dir, file)
	}
	if strings.HasSuffix(dir, ".toml") {
		nodeChild(dir)
	}
	cfg, err := ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = \"127.0.0.1:0\"\nadvertise = \"127.0.0.1:5696\"\nlocal_socket = %q\n", dir, os.Getenv(childVariable+"_SOCKET")))
	if err == nil {
		err = RunReady(context.Background(), cfg, slog.New(slog.DiscardHandler), func(k *KMS) error {
			err := k.EnsureFirstApplication(context.Background())
			fmt.Println(k.Address())
			return err
		})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// process is a KMS in a process of its own.
type process struct {
	cmd  *exec.Cmd
	addr string
}

// self is the command of this program. It is not to die with its parent (Pdeathsig):
// that is the thread which started it, and those of TestPartition end.
func self() *exec.Cmd { return exec.Command("/proc/self/exe") }

func startProcess(t *testing.T, dir, socket string) *process {
	t.Helper()
	p := &process{cmd: self()}
	p.cmd.Env = append(os.Environ(), childVariable+"="+dir, childVariable+"_SOCKET="+socket)
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal("the KMS did not start: ", err)
	}
	p.addr = strings.TrimSpace(line)
	return p
}

// kill is kill -9.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// acknowledged is what clients were told about keys.
type acknowledged struct {
	mu        sync.Mutex
	keys      map[string][]byte // what Get gave
	active    map[string]bool
	destroyed map[string]bool
}

// work creates, gets, activates and destroys keys on one connection until it
// breaks.
func (a *acknowledged) work(addr string, cfg *tls.Config) {
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	do := func(p kmip.OperationPayload) (kmip.ResponseBatchItem, bool) {
		m := kmip.NewRequestMessage(kmip.V1_4, p)
		r, err := exchange(conn, &m)
		if err != nil || r.BatchItem[0].Err() != nil {
			return kmip.ResponseBatchItem{}, false
		}
		return r.BatchItem[0], true
	}
	for i := 0; ; i++ {
		created, ok := do(newAES(""))
		if !ok {
			return
		}
		id := created.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
		a.mu.Lock()
		a.keys[id] = nil // there, whatever it is
		a.mu.Unlock()
		got, ok := do(&payloads.GetRequestPayload{UniqueIdentifier: id})
		if !ok {
			return
		}
		secret, err := secretOf(got)
		if err != nil {
			return
		}
		a.mu.Lock()
		a.keys[id] = secret
		a.mu.Unlock()
		if i%3 == 0 {
			if _, ok := do(&payloads.DestroyRequestPayload{UniqueIdentifier: id}); !ok {
				a.mu.Lock()
				delete(a.keys, id) // nobody was told what became of it
				a.mu.Unlock()
				return
			}
			a.mu.Lock()
			a.destroyed[id] = true
			delete(a.keys, id)
			a.mu.Unlock()
			continue
		}
		if _, ok := do(&payloads.ActivateRequestPayload{UniqueIdentifier: id}); !ok {
			return
		}
		a.mu.Lock()
		a.active[id] = true
		a.mu.Unlock()
	}
}

func (a *acknowledged) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.keys) + len(a.destroyed)
}

// TestKilledUnderLoad kills the KMS with clients at work, several times: what
// was acknowledged is there afterwards, and what was destroyed is not.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	dir, socket := filepath.Join(t.TempDir(), "kms"), filepath.Join(socketDir(t), "s")
	a := &acknowledged{keys: map[string][]byte{}, active: map[string]bool{}, destroyed: map[string]bool{}}
	for round := range 3 {
		p := startProcess(t, dir, socket)
		cfg := tlsOf(t, dir, first(t, dir))
		var clients sync.WaitGroup
		before := a.count()
		for range 4 {
			clients.Go(func() { a.work(p.addr, cfg) })
		}
		for begin := time.Now(); a.count() < before+60; time.Sleep(time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatalf("round %d: the clients do not get on", round)
			}
		}
		p.kill()
		clients.Wait()
	}
	p := startProcess(t, dir, socket)
	conn := dial(t, p.addr, tlsOf(t, dir, first(t, dir)))
	for id, secret := range a.keys {
		got, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}))
		if err != nil || secret != nil && !bytes.Equal(got, secret) {
			t.Errorf("acknowledged key %s: %v", id, err)
		}
	}
	for id := range a.active {
		item := ask(t, conn, nil, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}})
		if item.Err() != nil || item.ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue != kmip.StateActive {
			t.Errorf("acknowledged activation of %s: %+v", id, item)
		}
	}
	for id := range a.destroyed {
		if item := ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}); item.ResultReason != kmip.ResultReasonItemNotFound {
			t.Errorf("destroyed key %s: reason %v", id, item.ResultReason)
		}
	}
	t.Logf("%d keys, %d active, %d destroyed", len(a.keys), len(a.active), len(a.destroyed))
	p.kill()
	// The records of what was acknowledged are on disk too: a log that was torn
	// goes on after the next start, and verifies.
	b := start(t, dir)
	b.stop()
	var want []string
	for id := range a.active {
		want = append(want, "application:first kmip.Activate group/default/key/"+id+" success")
	}
	for id := range a.destroyed {
		want = append(want, "application:first kmip.Destroy group/default/key/"+id+" success")
	}
	b.checkAudit(t, want...)
}

// TestMetricsAndHealth asks as Prometheus does.
func TestMetricsAndHealth(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	if item := ask(t, conn, nil, newAES("m")); item.Err() != nil {
		t.Fatal(item.Err())
	}
	stranger := dial(t, b.addr, tlsOf(t, dir))
	for range 2 * refusedPerSecond {
		ask(t, stranger, nil, newAES(""))
	}
	server := b.metricsServer()
	get := func(path string) (int, string) {
		w := &recorder{header: http.Header{}, code: http.StatusOK}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		server.Handler.ServeHTTP(w, r)
		return w.code, w.body.String()
	}
	if code, body := get("/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("health: %d %q", code, body)
	}
	_, body := get("/metrics")
	for _, want := range []string{
		`strongroom_kms_operations_total{operation="Create",outcome="success"} 1`,
		fmt.Sprintf("strongroom_kms_refused_requests_total %d", 2*refusedPerSecond),
		`strongroom_kms_operation_seconds_count{operation="Create"} 1`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %q:\n%s", want, body)
		}
	}
	b.stop()
	if code, _ := get("/healthz"); code != http.StatusServiceUnavailable {
		t.Errorf("health of a KMS that has stopped: %d", code)
	}
}

type recorder struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(code int)        { r.code = code }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
