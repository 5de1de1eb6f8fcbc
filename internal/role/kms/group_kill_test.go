package kms

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// TestGroupDeletionKilled kills the KMS while it deletes a group, at points spread over
// the time that this takes: the deletion can be repeated, or the name be used again
// with nothing of the former, and the other group is as it was.
func TestGroupDeletionKilled(t *testing.T) {
	t.Parallel()
	const points, keys = 6, 24
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	local := b.local(t)
	nameOf := func(i int) string { return fmt.Sprint("g", i) }
	for i := range points + 1 {
		do(t, local.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: nameOf(i)})
		do(t, local.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: nameOf(i), Group: nameOf(i)})
		as := user(nameOf(i), string(do(t, local.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: nameOf(i)}).GetPassword()))
		conn := dial(t, b.addr, tlsOf(t, dir))
		for range keys {
			id := ask(t, conn, as, newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
			if item := ask(t, conn, as, &payloads.DestroyRequestPayload{UniqueIdentifier: id}); item.Err() != nil {
				t.Fatal(item.ResultMessage)
			}
		}
		do(t, local.KMS().DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: nameOf(i)})
	}
	kept := ask(t, dial(t, b.addr, tlsOf(t, dir, first(t, dir))), nil, newAES("kept")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	// How long it takes undisturbed.
	began := time.Now()
	do(t, local.KMS().DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: nameOf(points)})
	took := time.Since(began)
	b.stop()

	socket := filepath.Join(socketDir(t), "s")
	dialSocket := func() *client.Client {
		t.Helper()
		c, err := client.New(client.Config{Server: "unix:" + socket})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	p := startProcess(t, dir, socket)
	for i := range points {
		c := dialSocket()
		ended := make(chan error, 1)
		go func() {
			_, err := client.Call(ctx, c.KMS().DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: nameOf(i)})
			ended <- err
		}()
		time.Sleep(took * time.Duration(i) / points)
		p.kill()
		t.Logf("killed after %v of %v: %v", took*time.Duration(i)/points, took, <-ended)
		c.Close()

		p = startProcess(t, dir, socket)
		c = dialSocket()
		if _, err := client.Call(ctx, c.KMS().DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: nameOf(i)}); err != nil && errs.KindOf(err) != errs.NotFound {
			t.Errorf("again: %v", err)
		}
		g := do(t, c.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: nameOf(i)})
		if u := g.GetUsage(); u.GetKeys() != 0 || u.GetOperations() != 0 {
			t.Errorf("the new group has %v", u)
		}
		c.Close()
	}
	if _, err := secretOf(ask(t, dial(t, p.addr, tlsOf(t, dir, first(t, dir))), nil, &payloads.GetRequestPayload{UniqueIdentifier: kept})); err != nil {
		t.Errorf("the key of another group: %v", err)
	}
}
