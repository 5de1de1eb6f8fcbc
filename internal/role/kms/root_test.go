package kms

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
	"strongroom/test/port"
	"strongroom/test/swtpm"
)

// waiting is a KMS of a test that may be sealed.
type waiting struct {
	t     testing.TB
	cfg   Config
	local *client.Client
	ready chan *KMS
	ended chan error
	stop  func()
}

// startSealed runs a KMS in dir until the test ends or stop is called.
func startSealed(t testing.TB, dir string) *waiting {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &waiting{t: t, cfg: configOf(t, dir), ready: make(chan *KMS, 1), ended: make(chan error, 1)}
	w.cfg.MetricsListen = port.For(t) // it is not told before the KMS is unsealed
	go func() {
		w.ended <- RunReady(ctx, w.cfg, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError})), func(k *KMS) error {
			w.ready <- k
			return k.EnsureFirstApplication(ctx)
		})
	}()
	var err error
	if w.local, err = client.New(client.Config{Server: "unix:" + w.cfg.LocalSocket}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.local.Close)
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-w.ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(w.stop)
	w.await(func() error {
		_, err := client.Call(ctx, w.local.KMSRoot().GetKMSSeal, &strongroomv1.GetKMSSealRequest{})
		return err
	})
	return w
}

// await waits until what succeeds.
func (w *waiting) await(what func() error) {
	w.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := what()
		if err == nil {
			return
		}
		select {
		case err := <-w.ended:
			w.ended <- err
			w.t.Fatal("the KMS ended: ", err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			w.t.Fatal(err)
		}
	}
}

// serving waits until the KMS serves.
func (w *waiting) serving() *KMS {
	w.t.Helper()
	select {
	case k := <-w.ready:
		return k
	case err := <-w.ended:
		w.ended <- err
		w.t.Fatal("the KMS ended: ", err)
	case <-time.After(2 * time.Minute):
		w.t.Fatal("the KMS does not serve")
	}
	return nil
}

func (w *waiting) unseal(secret string) (*strongroomv1.KMSSeal, error) {
	return client.Call(w.t.Context(), w.local.KMSRoot().UnsealKMS, &strongroomv1.UnsealKMSRequest{Secret: []byte(secret)})
}

func (w *waiting) health() int {
	w.t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	status := 0
	w.await(func() error {
		res, err := (&http.Client{Transport: transport}).Get("http://" + w.cfg.MetricsListen + "/healthz")
		if err == nil {
			status = res.StatusCode
			res.Body.Close()
		}
		return err
	})
	return status
}

// TestSealed takes a KMS from a key file to a passphrase, to shares, back and to a TPM:
// while people have the key it is sealed after a start, says so, serves nothing else, and serves
// as before when people gave what it needs.
func TestSealed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := startSealed(t, dir)
	w.serving()
	ctx := t.Context()
	w.await(func() error {
		_, err := os.Stat(filepath.Join(dir, "client.key"))
		return err
	})
	set := func(req *strongroomv1.SetKMSRootRequest, secrets func(shares [][]byte) [][]byte) [][]byte {
		t.Helper()
		begun, err := client.Call(ctx, w.local.KMSRoot().SetKMSRoot, req)
		if err != nil {
			t.Fatal(err)
		}
		shares := begun.GetShares()
		seal, err := client.Call(ctx, w.local.KMSRoot().ConfirmKMSRoot, &strongroomv1.ConfirmKMSRootRequest{Secrets: secrets(shares)})
		if err != nil || len(seal.GetSources()) != 1 {
			t.Fatalf("%v, %v", seal, err)
		}
		return shares
	}
	sealed := func(people uint32) {
		t.Helper()
		seal, err := client.Call(ctx, w.local.KMSRoot().GetKMSSeal, &strongroomv1.GetKMSSealRequest{})
		if err != nil || !seal.GetSealed() || seal.GetSources()[0].GetPeople() != people {
			t.Fatalf("the KMS is not sealed: %v, %v", seal, err)
		}
		if _, err := client.Call(ctx, w.local.KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{}); errs.KindOf(err) != errs.Locked || errs.HintOf(err) == "" {
			t.Errorf("a sealed KMS answers: %v", err)
		}
		if _, err := client.Call(ctx, w.local.KMSRoot().SetKMSRoot, &strongroomv1.SetKMSRootRequest{}); errs.KindOf(err) != errs.Locked {
			t.Errorf("a sealed KMS changes its root key: %v", err)
		}
		stream, err := w.local.KMSBackup().BackupKMS(ctx, connect.NewRequest(&strongroomv1.BackupKMSRequest{}))
		if err == nil {
			if stream.Receive() {
				t.Error("a sealed KMS backs itself up")
			}
			err = stream.Err()
			stream.Close()
		}
		if err := apierr.From(err); errs.KindOf(err) != errs.Locked {
			t.Errorf("a backup of a sealed KMS: %v", err)
		}
		if status := w.health(); status != http.StatusServiceUnavailable {
			t.Errorf("a sealed KMS is healthy: %d", status)
		}
	}
	works := func() {
		t.Helper()
		w.serving()
		w.await(func() error {
			groups, err := client.Call(ctx, w.local.KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{})
			if err == nil && (len(groups.GetGroups()) != 1 || groups.GetGroups()[0].GetName() != FirstGroup) {
				t.Errorf("the KMS has the groups %v", groups)
			}
			return err
		})
		if status := w.health(); status != http.StatusOK {
			t.Errorf("health %d", status)
		}
		if _, err := w.unseal("what for"); errs.KindOf(err) != errs.InvalidState {
			t.Errorf("unsealed twice: %v", err)
		}
	}

	const passphrase = "correct horse battery staple"
	if _, err := client.Call(ctx, w.local.KMSRoot().ConfirmKMSRoot, &strongroomv1.ConfirmKMSRootRequest{}); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("confirmed what was not begun: %v", err)
	}
	set(&strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Passphrase{Passphrase: &strongroomv1.KMSRootPassphrase{Passphrase: []byte(passphrase)}}},
		func([][]byte) [][]byte { return [][]byte{[]byte(passphrase)} })
	w.stop()

	w = startSealed(t, dir)
	sealed(1)
	if _, err := w.unseal("wrong horse battery staple"); errs.KindOf(err) != errs.Denied {
		t.Errorf("a wrong passphrase: %v", err)
	}
	sealed(1)
	if seal, err := w.unseal(passphrase); err != nil || seal.GetSealed() {
		t.Fatalf("%v, %v", seal, err)
	}
	works()
	var shares []string
	set(&strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Shares{Shares: &strongroomv1.KMSRootShares{Threshold: 2, Count: 3}}},
		func(texts [][]byte) [][]byte {
			for _, text := range texts {
				shares = append(shares, string(text))
			}
			return texts
		})
	w.stop()

	w = startSealed(t, dir)
	sealed(2)
	if _, err := w.unseal(passphrase); err == nil {
		t.Error("the passphrase from before unseals")
	}
	if seal, err := w.unseal(shares[2]); err != nil || !seal.GetSealed() || seal.GetGiven() != 1 {
		t.Fatalf("%v, %v", seal, err)
	}
	if seal, err := w.unseal(shares[0]); err != nil || seal.GetSealed() {
		t.Fatalf("%v, %v", seal, err)
	}
	works()
	keyFile := filepath.Join(dir, "again.key")
	set(&strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_KeyFile{KeyFile: &strongroomv1.KMSRootKeyFile{Path: keyFile}}},
		func([][]byte) [][]byte { return nil })
	w.stop()

	w = startSealed(t, dir)
	works()
	emulator := swtpm.Start(t)
	set(&strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Tpm{Tpm: &strongroomv1.KMSRootTPM{Device: "unix:" + emulator.Socket(), Pcrs: []uint32{7}}}},
		func([][]byte) [][]byte { return nil })
	if _, err := os.Lstat(keyFile); !os.IsNotExist(err) {
		t.Errorf("the key file is still there: %v", err)
	}
	w.stop()

	emulator.Reboot()
	w = startSealed(t, dir)
	works()
	w.stop()

	public, err := os.ReadFile(filepath.Join(dir, auditKeyName))
	if err != nil {
		t.Fatal(err)
	}
	key, err := publicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	var unsealed, changed []string
	if _, err := audit.Verify(filepath.Join(dir, "audit"), audit.Expect{Key: key}, func(r audit.Record) error {
		switch r.Action {
		case "KMSRootService/UnsealKMS":
			unsealed = append(unsealed, r.Outcome)
		case "KMSRootService/ConfirmKMSRoot":
			changed = append(changed, r.Outcome)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// Each time that it was unsealed twice is on record too.
	if want := []string{audit.Denied, audit.Success, audit.Failed, audit.Success, audit.Failed, audit.Failed, audit.Failed}; !slices.Equal(unsealed, want) {
		t.Errorf("on record is %q, want %q", unsealed, want)
	}
	if want := []string{audit.Failed, audit.Success, audit.Success, audit.Success, audit.Success}; !slices.Equal(changed, want) {
		t.Errorf("on record is %q, want %q", changed, want)
	}
}

// TestSealedEnds ends a KMS that nobody unsealed.
func TestSealedEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := startSealed(t, dir)
	w.serving()
	const passphrase = "correct horse battery staple"
	if _, err := client.Call(t.Context(), w.local.KMSRoot().SetKMSRoot, &strongroomv1.SetKMSRootRequest{
		Source: &strongroomv1.SetKMSRootRequest_Passphrase{Passphrase: &strongroomv1.KMSRootPassphrase{Passphrase: []byte(passphrase)}},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Call(t.Context(), w.local.KMSRoot().ConfirmKMSRoot, &strongroomv1.ConfirmKMSRootRequest{Secrets: [][]byte{[]byte(passphrase)}}); err != nil {
		t.Fatal(err)
	}
	w.stop()
	w = startSealed(t, dir)
	w.stop() // without an error
}
