package kms

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/backup"
	"strongroom/test/keyscan"
)

// backupClient is the client of backups on a local socket.
func backupClient(t testing.TB, socket string) strongroomv1connect.KMSBackupServiceClient {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return strongroomv1connect.NewKMSBackupServiceClient(&http.Client{Transport: transport}, "http://kms")
}

// takeBackup writes a backup to a file.
func takeBackup(t testing.TB, c strongroomv1connect.KMSBackupServiceClient, req *strongroomv1.BackupKMSRequest) (string, *strongroomv1.KMSBackup) {
	t.Helper()
	stream, err := c.BackupKMS(t.Context(), connect.NewRequest(req))
	if err != nil {
		t.Fatal(apierr.From(err))
	}
	defer stream.Close()
	var text bytes.Buffer
	var done *strongroomv1.KMSBackup
	for stream.Receive() {
		text.Write(stream.Msg().GetData())
		done = stream.Msg().GetDone()
	}
	if err := stream.Err(); err != nil || done == nil {
		t.Fatalf("the backup did not end: %v", apierr.From(err))
	}
	if int64(text.Len()) != done.GetBytes() {
		t.Errorf("%d bytes of %d", text.Len(), done.GetBytes())
	}
	file := filepath.Join(t.TempDir(), "kms.backup")
	if err := os.WriteFile(file, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, done
}

// newRecipient returns who opens a test's backups.
func newRecipient(t testing.TB) (*strongroomv1.BackupKMSRequest, backup.Key) {
	t.Helper()
	r, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return &strongroomv1.BackupKMSRequest{Protection: &strongroomv1.BackupKMSRequest_Recipient{Recipient: r.PublicKey()}}, backup.Key{Recipient: r}
}

// TestBackupUnderLoad backs a KMS up while clients make and destroy keys, kills it,
// and restores it: what was acknowledged before the backup began is there, unless
// it was destroyed since, which the old audit log tells.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	dir, socket := filepath.Join(t.TempDir(), "kms"), filepath.Join(socketDir(t), "s")
	a := &acknowledged{keys: map[string][]byte{}, active: map[string]bool{}, destroyed: map[string]bool{}}
	p := startProcess(t, dir, socket)
	cfg := tlsOf(t, dir, first(t, dir))
	var clients sync.WaitGroup
	for range 3 {
		clients.Go(func() { a.work(p.addr, cfg) })
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		clients.Wait()
	}()
	getOn := func(more int) (got bool) {
		t.Helper()
		for before := a.count(); a.count() < before+more; {
			select {
			case <-ended: // their minute is over
				return false
			case <-time.After(time.Millisecond):
			}
		}
		return true
	}
	if !getOn(60) {
		t.Fatal("the clients do not get on")
	}
	// One that will be destroyed between the backup and the end.
	conn := dial(t, p.addr, cfg)
	doomed := ask(t, conn, nil, newAES("doomed")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	doomedKey, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: doomed}))
	if err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	before := maps.Clone(a.keys)
	a.mu.Unlock()
	maps.DeleteFunc(before, func(_ string, secret []byte) bool { return secret == nil })
	client := backupClient(t, socket)
	req, key := newRecipient(t)
	file, made := takeBackup(t, client, req)
	confirmed, err := client.ConfirmKMSBackup(t.Context(), connect.NewRequest(&strongroomv1.ConfirmKMSBackupRequest{Id: made.GetId(), Sha256: made.GetSha256()}))
	if err != nil || confirmed.Msg.GetLast().GetId() != made.GetId() {
		t.Fatalf("confirmed: %v, %v", confirmed, err)
	}
	conn = dial(t, p.addr, cfg)
	if item := ask(t, conn, nil, &payloads.DestroyRequestPayload{UniqueIdentifier: doomed}); item.Err() != nil {
		t.Fatal(item.Err())
	}
	getOn(20)
	p.kill()
	<-ended

	v, err := VerifyBackup(t.Context(), file, key)
	if err != nil || v.End.Keys != made.GetKeys() || v.End.Keys < int64(len(before)) {
		t.Fatalf("%d keys were acknowledged before the backup; it holds %+v: %v", len(before), v.End, err)
	}
	drillDir := t.TempDir()
	d, err := Drill(t.Context(), file, key, drillDir, slog.New(slog.DiscardHandler))
	if err != nil || d.Keys != v.End.Keys || d.Objects != v.End.Objects || d.Applications != 1 {
		t.Errorf("drill: %+v, %v", d, err)
	}
	if left, err := os.ReadDir(drillDir); err != nil || len(left) > 0 {
		t.Errorf("the drill left %v, %v", left, err)
	}

	again := filepath.Join(t.TempDir(), "kms")
	restored, err := Restore(t.Context(), configOf(t, again), file, key, Since{AuditLogs: []string{filepath.Join(dir, auditName)}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(restored.Destroyed, doomed) {
		t.Errorf("the key that was destroyed since is not among %d that are destroyed again", len(restored.Destroyed))
	}
	b := start(t, again)
	if !bytes.Equal(b.ca.Certificate().Raw, v.About.CA) {
		t.Error("the restored KMS has another CA")
	}
	// The client's own certificate, and what it trusts, are as they were.
	conn = dial(t, b.addr, cfg)
	got := 0
	for id, want := range before {
		secret, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}))
		switch {
		case a.destroyed[id] || slices.Contains(restored.Destroyed, id):
			if err == nil {
				t.Errorf("key %s is back although it was destroyed", id)
			}
		case err != nil || !bytes.Equal(secret, want):
			if a.keys[id] != nil { // else nobody was told what became of it
				t.Errorf("key %s: %v", id, err)
			}
		default:
			got++
		}
	}
	if got == 0 {
		t.Error("no key was compared")
	}
	for id := range a.destroyed {
		if item := ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}); item.ResultReason != kmip.ResultReasonItemNotFound {
			t.Errorf("destroyed key %s: reason %v", id, item.ResultReason)
		}
	}
	if item := ask(t, conn, nil, newAES("new")); item.Err() != nil {
		t.Error("a new key: ", item.Err())
	}
	located := ask(t, conn, nil, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "doomed", NameType: kmip.NameTypeUninterpretedTextString}},
		{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateDestroyed},
	}})
	if located.Err() != nil || !slices.Equal(located.ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier, []string{doomed}) {
		t.Errorf("the destroyed key by its name and state: %+v", located)
	}
	t.Logf("%d keys compared, %d destroyed again, %d in the backup", got, len(restored.Destroyed), v.End.Keys)
	b.stop()
	b.checkAudit(t, "local administrator kms.restore kms success", "local administrator kms.destroyAgain key/"+doomed+" success")

	var scan keyscan.Scanner
	scan.AddKey("doomed", doomedKey)
	for id, secret := range before {
		scan.AddKey(id, secret)
	}
	for _, place := range []string{filepath.Dir(file), again} {
		found, scanned, err := scan.Tree(place, 10)
		if err != nil || len(found) > 0 || scanned < 1000 {
			t.Errorf("in %d bytes below %s: %v, %v", scanned, place, found, err)
		}
	}
}

// small is a KMS that has stopped, with some keys, and a backup of it.
type small struct {
	dir  string
	file string
	key  backup.Key
	keys map[string][]byte
	tls  *tls.Config
}

func newSmall(t *testing.T, keys int) *small {
	t.Helper()
	s := &small{dir: filepath.Join(t.TempDir(), "kms"), keys: map[string][]byte{}}
	b := start(t, s.dir)
	s.tls = tlsOf(t, s.dir, first(t, s.dir))
	conn := dial(t, b.addr, s.tls)
	for i := range keys {
		id := ask(t, conn, nil, newAES(fmt.Sprint("key ", i))).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
		secret, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}))
		if err != nil {
			t.Fatal(err)
		}
		s.keys[id] = secret
	}
	var req *strongroomv1.BackupKMSRequest
	req, s.key = newRecipient(t)
	s.file, _ = takeBackup(t, backupClient(t, b.cfg.LocalSocket), req)
	b.stop()
	return s
}

// check gets all keys of a KMS that was restored in dir.
func (s *small) check(t *testing.T, dir string) {
	t.Helper()
	b := start(t, dir)
	conn := dial(t, b.addr, s.tls)
	for id, want := range s.keys {
		if got, err := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id})); err != nil || !bytes.Equal(got, want) {
			t.Errorf("key %s: %v", id, err)
		}
	}
	b.stop()
}

// restoreChild restores, in a process that its parent kills: it tells each step and
// waits for a byte behind it.
func restoreChild(dir, file string) {
	err := func() error {
		secret, err := keymem.Read(os.Stdin, parcel.SecretSize)
		if err != nil {
			return err
		}
		r, err := parcel.RestoreRecipient(secret)
		if err != nil {
			return err
		}
		cfg, err := ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = \"127.0.0.1:0\"\nadvertise = \"127.0.0.1:5696\"\n", dir))
		if err != nil {
			return err
		}
		_, err = restore(context.Background(), cfg, file, backup.Key{Recipient: r}, Since{BringBack: true}, pause)
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestRestoreKilledAtEachStep kills a restore behind each of its steps: there is no
// KMS in the folder, and a restore that is repeated makes one.
func TestRestoreKilledAtEachStep(t *testing.T) {
	t.Parallel()
	s := newSmall(t, 3)
	secret, err := s.key.Recipient.Secret()
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	dir := filepath.Join(t.TempDir(), "kms")
	cfg := configOf(t, dir)
	ended := false
	var steps []string
	for kill := 1; !ended; kill++ {
		if kill > 50 {
			t.Fatalf("a restore of more than 50 steps: %q", steps)
		}
		// In the same folder each time: it begins anew.
		steps, ended = runRestore(t, dir, s.file, secret, kill)
		if ended {
			break
		}
		if err := RunReady(t.Context(), cfg, slog.New(slog.DiscardHandler), func(*KMS) error { return errors.New("it runs") }); errs.KindOf(err) != errs.InvalidState || errs.HintOf(err) == "" {
			t.Fatalf("killed behind %q: %v", steps[len(steps)-1], err)
		}
	}
	for _, want := range []string{"folder taken", "root key made", "secret keyring", "secret ca-key", "secret server", "records stored", "put on record"} {
		if !slices.Contains(steps, want) {
			t.Errorf("no step %q among %q", want, steps)
		}
	}
	s.check(t, dir)
	if _, err := Restore(t.Context(), cfg, s.file, s.key, Since{BringBack: true}); errs.KindOf(err) != errs.Exists {
		t.Errorf("into a folder with a KMS: %v", err)
	}
	s.check(t, dir) // and that is as it was
}

// TestRestoreThatFails leaves nothing, and is refused before it begins if what it is
// given is wrong.
func TestRestoreThatFails(t *testing.T) {
	t.Parallel()
	s := newSmall(t, 2)
	dir := filepath.Join(t.TempDir(), "kms")
	cfg := configOf(t, dir)
	other, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	text, err := os.ReadFile(s.file)
	if err != nil {
		t.Fatal(err)
	}
	damaged := filepath.Join(t.TempDir(), "damaged")
	if err := os.WriteFile(damaged, text[:len(text)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("no-id\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all := Since{BringBack: true}
	for name, c := range map[string]struct {
		file  string
		key   backup.Key
		since Since
		kind  errs.Kind
	}{
		"nothing about destroyed keys": {s.file, s.key, Since{}, errs.Invalid},
		"another's private key":        {s.file, backup.Key{Recipient: other}, all, errs.Denied},
		"no such file":                 {s.file + "x", s.key, all, errs.NotFound},
		"a damaged backup":             {damaged, s.key, all, errs.Corrupt},
		"no backup":                    {list, s.key, all, errs.Invalid},
		"a list that is none":          {s.file, s.key, Since{Lists: []string{list}}, errs.Invalid},
		"no list":                      {s.file, s.key, Since{Lists: []string{list + "x"}}, errs.NotFound},
		"no audit log":                 {s.file, s.key, Since{AuditLogs: []string{filepath.Join(filepath.Dir(list), "audit")}}, errs.NotFound},
	} {
		if _, err := Restore(t.Context(), cfg, c.file, c.key, c.since); errs.KindOf(err) != c.kind {
			t.Errorf("%s: %v (%v), want %v", name, err, errs.KindOf(err), c.kind)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s: there is something in the folder", name)
		}
	}
	// An audit log that ends before the backup does not tell what came after it.
	short := filepath.Join(t.TempDir(), auditName)
	if err := os.CopyFS(short, os.DirFS(filepath.Join(s.dir, auditName))); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(short, "audit-*"))
	if err != nil || len(logs) != 1 {
		t.Fatal(logs, err)
	}
	lines, err := os.ReadFile(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(logs[0], bytes.Join(bytes.SplitAfter(lines, []byte("\n"))[:2], nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Dir(short), oneFile(t, s.dir, auditKeyName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), cfg, s.file, s.key, Since{AuditLogs: []string{short}}); errs.KindOf(err) != errs.Corrupt {
		t.Errorf("an audit log that was cut: %v", err)
	}
	// In the middle of it.
	for n := 1; ; n++ {
		ctx, cancel := context.WithCancel(t.Context())
		steps := 0
		_, err := restore(ctx, cfg, s.file, s.key, all, func(string) {
			if steps++; steps == n {
				cancel()
			}
		})
		cancel()
		if err == nil {
			break
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Fatalf("canceled behind step %d it left %v, %v", n, left, err)
		}
	}
	s.check(t, dir)
	full := filepath.Join(t.TempDir(), "full")
	if err := os.MkdirAll(full, 0o700); err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(full, "mine")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), configOf(t, full), s.file, s.key, all); errs.KindOf(err) != errs.Exists {
		t.Errorf("a folder with something in it: %v", err)
	}
	if left, err := os.ReadDir(full); err != nil || len(left) != 1 {
		t.Errorf("it holds %v now, %v", left, err)
	}
}

// TestRestoreFromAList destroys what a list names.
func TestRestoreFromAList(t *testing.T) {
	t.Parallel()
	s := newSmall(t, 3)
	ids := slices.Sorted(maps.Keys(s.keys))
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("\n"+ids[1]+"\n00000000-0000-7000-8000-000000000001\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "kms")
	r, err := Restore(t.Context(), configOf(t, dir), s.file, s.key, Since{Lists: []string{list}})
	if err != nil || !slices.Equal(r.Destroyed, ids[1:2]) {
		t.Fatal(r, err)
	}
	b := start(t, dir)
	conn := dial(t, b.addr, s.tls)
	if item := ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: ids[1]}); item.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("a destroyed key: %+v", item)
	}
	if got, err := b.objects.Keys(t.Context(), "default"); err != nil || got != 2 {
		t.Errorf("%d keys are left, %v", got, err)
	}
}

// TestBackupRequests are those that are refused, and what is on record.
func TestBackupRequests(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	c := backupClient(t, b.cfg.LocalSocket)
	refused := func(what string, req *strongroomv1.BackupKMSRequest, kind errs.Kind) {
		t.Helper()
		stream, err := c.BackupKMS(t.Context(), connect.NewRequest(req))
		if err == nil {
			for stream.Receive() {
				t.Errorf("%s: an answer", what)
			}
			err = stream.Err()
			stream.Close()
		}
		if got := errs.KindOf(apierr.From(err)); got != kind {
			t.Errorf("%s: %v (%v)", what, err, got)
		}
	}
	refused("nothing that opens it", &strongroomv1.BackupKMSRequest{}, errs.Invalid)
	refused("a short passphrase", &strongroomv1.BackupKMSRequest{Protection: &strongroomv1.BackupKMSRequest_Passphrase{Passphrase: []byte("short")}}, errs.Invalid)
	refused("a public key of 3 bytes", &strongroomv1.BackupKMSRequest{Protection: &strongroomv1.BackupKMSRequest_Recipient{Recipient: []byte("abc")}}, errs.Invalid)
	b.backups.making.Lock()
	req, _ := newRecipient(t)
	refused("a second one", req, errs.Unavailable)
	b.backups.making.Unlock()

	status := func() *strongroomv1.KMSBackupStatus {
		t.Helper()
		res, err := c.GetKMSBackupStatus(t.Context(), connect.NewRequest(&strongroomv1.GetKMSBackupStatusRequest{}))
		if err != nil {
			t.Fatal(apierr.From(err))
		}
		return res.Msg
	}
	_, made := takeBackup(t, c, req)
	if s := status(); s.GetLast() != nil || s.GetOverdue() || s.GetMaxAgeSeconds() != 7*24*3600 {
		t.Errorf("before it is confirmed: %v", s)
	}
	for _, bad := range []*strongroomv1.ConfirmKMSBackupRequest{{Id: "x", Sha256: made.GetSha256()}, {Id: made.GetId(), Sha256: "00"}} {
		if _, err := c.ConfirmKMSBackup(t.Context(), connect.NewRequest(bad)); err == nil {
			t.Errorf("confirmed: %v", bad)
		}
	}
	if _, err := c.ConfirmKMSBackup(t.Context(), connect.NewRequest(&strongroomv1.ConfirmKMSBackupRequest{Id: made.GetId(), Sha256: made.GetSha256()})); err != nil {
		t.Fatal(apierr.From(err))
	}
	if s := status(); s.GetLast().GetSha256() != made.GetSha256() || !strings.HasPrefix(s.GetLast().GetOpensWith(), "recipient ") {
		t.Errorf("after it was confirmed: %v", s)
	}
	last, err := b.lastBackup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at := last.Created
	for want, overdue := range map[bool]bool{
		false: b.backupOverdue(last, at.Add(7*24*time.Hour)), true: b.backupOverdue(last, at.Add(7*24*time.Hour+time.Second)),
	} {
		if overdue != want {
			t.Errorf("overdue: %v, want %v", overdue, want)
		}
	}
	if !b.backupOverdue(nil, b.ca.Certificate().NotBefore.Add(8*24*time.Hour)) {
		t.Error("a KMS of eight days without a backup is not overdue")
	}
	families, err := b.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]float64{}
	for _, f := range families {
		if strings.Contains(f.GetName(), "backup") {
			seen[f.GetName()] = f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	want := map[string]float64{"strongroom_kms_last_backup_timestamp_seconds": float64(at.Unix()), "strongroom_kms_backup_overdue": 0}
	if !maps.Equal(seen, want) {
		t.Errorf("metrics %v, want %v", seen, want)
	}
	b.stop()
	b.checkAudit(t, "local administrator KMSBackupService/BackupKMS kms success", "local administrator KMSBackupService/ConfirmKMSBackup kms error", "local administrator KMSBackupService/ConfirmKMSBackup kms success")
}
