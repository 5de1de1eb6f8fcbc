package kms

import (
	"bytes"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/errs"
)

// request returns the id of the request for approval that a refusal names.
func requestIn(t testing.TB, text string) string {
	t.Helper()
	_, rest, ok := strings.Cut(text, "request ")
	if !ok || len(rest) < 16 {
		t.Fatalf("no request is named in %q", text)
	}
	return rest[:16]
}

func (p *person) approve(t testing.TB, id string) (*strongroomv1.KMSApproval, error) {
	return client.Call(t.Context(), p.KMSApproval().ApproveKMSRequest, &strongroomv1.ApproveKMSRequestRequest{Id: id})
}

func (p *person) mustApprove(t testing.TB, id, state string) {
	t.Helper()
	if a, err := p.approve(t, id); err != nil || a.GetState() != state {
		t.Fatalf("%s approves: %v, %v, want state %s", p.name, a, err, state)
	}
}

func wantKind(t testing.TB, what string, err error, kind errs.Kind) {
	t.Helper()
	if errs.KindOf(err) != kind {
		t.Errorf("%s: %v, want kind %v", what, err, kind)
	}
}

// TestQuorum is a group with a quorum of two of three: what needs it, what leads
// around it and does not.
func TestQuorum(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	ctx := t.Context()
	admin, local := b.administrator(t), b.local(t)
	ann, bob := b.person(t, "ann", true, access.KeyCustodian), b.person(t, "bob", true, access.KeyCustodian)
	eve := b.person(t, "eve", false, access.KeyCustodian)
	b.person(t, "reader", true, access.ReadOnly)
	quorum := &strongroomv1.KMSQuorum{Approvers: []string{"ann", "bob", "eve"}, Needed: 2, Destroy: true, Export: true}
	set := func(c *client.Client, q *strongroomv1.KMSQuorum) error {
		_, err := client.Call(ctx, c.KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: FirstGroup, Quorum: q})
		return err
	}
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	created := ask(t, conn, nil, newAES("disk of vm-1"))
	id := created.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	get, destroy := &payloads.GetRequestPayload{UniqueIdentifier: id}, &payloads.DestroyRequestPayload{UniqueIdentifier: id}
	secret, err := secretOf(ask(t, conn, nil, get))
	if err != nil {
		t.Fatal(err)
	}

	t.Log("who can be an approver")
	wantKind(t, "eve's password is known to who made her", set(admin.Client, quorum), errs.InvalidState)
	eve.change(t, "known to eve alone")
	for what, c := range map[string]struct {
		q    *strongroomv1.KMSQuorum
		kind errs.Kind
	}{
		"a reader":    {&strongroomv1.KMSQuorum{Approvers: []string{"ann", "reader"}, Needed: 1}, errs.Denied},
		"nobody":      {&strongroomv1.KMSQuorum{Approvers: []string{"ann", "nobody"}, Needed: 1}, errs.Denied},
		"one twice":   {&strongroomv1.KMSQuorum{Approvers: []string{"ann", "ann"}, Needed: 2}, errs.Invalid},
		"too many":    {&strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 2}, errs.Invalid},
		"none needed": {&strongroomv1.KMSQuorum{Approvers: []string{"ann"}}, errs.Invalid},
		"too soon":    {&strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1, ExpirySeconds: 1}, errs.Invalid},
		"too late":    {&strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1, ExpirySeconds: 1 << 40}, errs.Invalid},
	} {
		wantKind(t, what, set(admin.Client, c.q), c.kind)
	}
	if err := set(admin.Client, quorum); err != nil {
		t.Fatal(err)
	}
	_, err = client.Call(ctx, admin.Access().DeleteUser, &strongroomv1.DeleteUserRequest{Name: "ann"})
	wantKind(t, "an approver deleted, to be made again", err, errs.InvalidState)

	t.Log("an export, by who asked, once")
	refused := ask(t, conn, nil, get)
	if refused.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(refused.ResultMessage, "2 of 3 people") {
		t.Fatalf("refused: %+v", refused)
	}
	request := requestIn(t, refused.ResultMessage)
	if again := requestIn(t, ask(t, conn, nil, get).ResultMessage); again != request {
		t.Errorf("asked twice: requests %s and %s", request, again)
	}
	a, err := client.Call(ctx, ann.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: request})
	if err != nil || a.GetObject() != id || a.GetObjectName() != "disk of vm-1" || a.GetOperation() != "Export" || a.GetRequester() != "application:first" || a.GetNeeded() != 2 {
		t.Errorf("request: %v, %v", a, err)
	}
	_, err = client.Call(ctx, local.KMSApproval().ApproveKMSRequest, &strongroomv1.ApproveKMSRequestRequest{Id: request})
	wantKind(t, "root approves", err, errs.Denied)
	_, err = admin.approve(t, request)
	wantKind(t, "the administrator approves, and is no approver", err, errs.Denied)
	ann.mustApprove(t, request, "pending")
	_, err = ann.approve(t, request)
	wantKind(t, "ann approves twice", err, errs.Exists)
	if item := ask(t, conn, nil, get); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("with one of two: reason %v", item.ResultReason)
	}
	bob.mustApprove(t, request, "approved")
	if item := ask(t, conn, nil, destroy); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("another operation on the approved key: reason %v", item.ResultReason)
	}
	c := do(t, local.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "first"})
	if item := ask(t, dial(t, b.addr, tlsOf(t, dir)), user(c.GetCredential().GetUser(), string(c.GetPassword())), get); requestIn(t, item.ResultMessage) == request {
		t.Error("with a new credential of the application the request is the same")
	}
	if got, err := secretOf(ask(t, conn, nil, get)); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("approved: %v", err)
	}
	if next := requestIn(t, ask(t, conn, nil, get).ResultMessage); next == request {
		t.Error("used twice")
	}

	t.Log("a change of policy or quorum, by whom the quorum of before approves it")
	for what, change := range map[string]func() error{
		"no quorum": func() error { return set(admin.Client, nil) },
		"one needed": func() error {
			return set(admin.Client, &strongroomv1.KMSQuorum{Approvers: quorum.GetApprovers(), Needed: 1})
		},
		"root":        func() error { return set(local, nil) },
		"own quorum":  func() error { return set(admin.Client, &strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1}) },
		"same quorum": func() error { return set(admin.Client, quorum) },
		"policy": func() error {
			_, err := client.Call(ctx, admin.KMS().SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup})
			return err
		},
	} {
		wantKind(t, what, change(), errs.Denied)
	}
	policy := &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup, Policy: &strongroomv1.KMSPolicy{KeyTypes: []string{"AES-256"}}}
	_, err = client.Call(ctx, admin.KMS().SetKMSGroupPolicy, policy)
	wantKind(t, "a policy", err, errs.Denied)
	change := requestIn(t, err.Error())
	ann.mustApprove(t, change, "pending")
	if d, err := client.Call(ctx, eve.KMSApproval().DenyKMSRequest, &strongroomv1.DenyKMSRequestRequest{Id: change, Reason: "why?"}); err != nil || d.GetState() != "denied" {
		t.Errorf("denied: %v, %v", d, err)
	}
	bob.mustApprove(t, change, "denied")
	if _, err = client.Call(ctx, admin.KMS().SetKMSGroupPolicy, policy); err == nil || !strings.Contains(err.Error(), "eve has denied approval: request "+change) {
		t.Errorf("denied: %v", err)
	}
	eve.mustApprove(t, change, "approved")
	other := &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup, Policy: &strongroomv1.KMSPolicy{}}
	_, err = client.Call(ctx, admin.KMS().SetKMSGroupPolicy, other)
	wantKind(t, "another policy than the approved", err, errs.Denied)
	_, err = client.Call(ctx, local.KMS().SetKMSGroupPolicy, policy)
	wantKind(t, "the approved policy, by another", err, errs.Denied)
	if g, err := client.Call(ctx, admin.KMS().SetKMSGroupPolicy, policy); err != nil || len(g.GetPolicy().GetKeyTypes()) != 1 || g.GetQuorum().GetNeeded() != 2 {
		t.Errorf("approved: %v, %v", g, err)
	}
	_, err = client.Call(ctx, admin.KMS().SetKMSGroupPolicy, policy)
	wantKind(t, "the same policy again", err, errs.Denied)

	t.Log("a restart between each two steps")
	restart := func() {
		b.stop()
		b = start(t, dir)
		conn = dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	}
	request = requestIn(t, ask(t, conn, nil, destroy).ResultMessage)
	restart()
	login(t, b.apiAddress.String(), dir, "ann", ann.password).mustApprove(t, request, "pending")
	restart()
	login(t, b.apiAddress.String(), dir, "bob", bob.password).mustApprove(t, request, "approved")
	restart()
	if item := ask(t, conn, nil, destroy); item.Err() != nil {
		t.Errorf("approved: %v", item.Err())
	}
	restart()
	if item := ask(t, conn, nil, destroy); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("destroyed twice: reason %v", item.ResultReason)
	}
	a, err = client.Call(ctx, b.local(t).KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: request})
	if err != nil || a.GetState() != "used" || len(a.GetDecisions()) != 2 {
		t.Errorf("request: %v, %v", a, err)
	}
	b.stop()
	b.checkAudit(t, "application:first approval.Ask group/default/approval/"+request+" success", "user:ann KMSApprovalService/ApproveKMSRequest approval/"+request+" success",
		"user:eve KMSApprovalService/DenyKMSRequest approval/"+change+" success", "user:administrator approval.Use group/default/approval/"+change+" success",
		"application:first kmip.Get group/default/key/"+id+" denied", "application:first kmip.Destroy group/default/key/"+id+" success",
		"local administrator KMSService/SetKMSGroupQuorum group/default denied")
}

// TestRestoreForgetsApprovals has an export approved, and the KMS restored from a backup
// that was made then: the quorum holds, and nothing is approved.
func TestRestoreForgetsApprovals(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	ann := b.person(t, "ann", true, access.KeyCustodian)
	do(t, b.administrator(t).KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{
		Name: FirstGroup, Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1, Export: true},
	})
	cfg := tlsOf(t, dir, first(t, dir))
	conn := dial(t, b.addr, cfg)
	get := &payloads.GetRequestPayload{UniqueIdentifier: ask(t, conn, nil, newAES("a key")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier}
	request := requestIn(t, ask(t, conn, nil, get).ResultMessage)
	ann.mustApprove(t, request, "approved")
	req, key := newRecipient(t)
	file, _ := takeBackup(t, backupClient(t, b.cfg.LocalSocket), req)
	if _, err := secretOf(ask(t, conn, nil, get)); err != nil {
		t.Fatal(err)
	}
	b.stop()

	restored := filepath.Join(t.TempDir(), "kms")
	if _, err := Restore(t.Context(), configOf(t, restored), file, key, Since{BringBack: true}); err != nil {
		t.Fatal(err)
	}
	b = start(t, restored)
	item := ask(t, dial(t, b.addr, cfg), nil, get)
	if item.ResultReason != kmip.ResultReasonPermissionDenied || requestIn(t, item.ResultMessage) == request {
		t.Errorf("approved before the backup: reason %v, %s", item.ResultReason, item.ResultMessage)
	}
}

// testQuorum has a request made at one node, approved at others, each killed
// right after, and what was approved done at all of them at once.
func (n *trio) testQuorum(t *testing.T) {
	a, b, c := n.sites[0], n.sites[1], n.sites[2]
	id, _ := n.create(a)
	kill := func(s *site) {
		s.stop()
		s.run()
	}
	local, err := client.New(client.Config{Server: "unix:" + a.cfg.LocalSocket})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	passwords := map[string]string{"ann": "known to ann alone", "bob": "known to bob alone"}
	for name, own := range passwords {
		given := "given to " + name + " at first"
		eventually(t, name+" is a user", func() bool { // whichever answer is lost
			_, err := client.Call(t.Context(), local.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: name, Password: []byte(given), Roles: []string{access.KeyCustodian}})
			if err != nil && errs.KindOf(err) != errs.Exists {
				return false
			}
			if p, err := tryLogin(t, a.cfg.APIListen, a.cfg.DataDir, name, given); err == nil {
				_, err := client.Call(t.Context(), p.Access().ChangePassword, &strongroomv1.ChangePasswordRequest{OldPassword: []byte(given), NewPassword: []byte(own)})
				return err == nil
			}
			_, err = tryLogin(t, a.cfg.APIListen, a.cfg.DataDir, name, own)
			return err == nil
		})
	}
	quorum := &strongroomv1.KMSQuorum{Approvers: []string{"ann", "bob"}, Needed: 2, Destroy: true, Export: true}
	eventually(t, "the group has a quorum", func() bool {
		g, err := client.Call(t.Context(), local.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: FirstGroup})
		if err == nil && g.GetQuorum().GetNeeded() == 0 {
			_, err = client.Call(t.Context(), local.KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: FirstGroup, Quorum: quorum})
		}
		return err == nil
	})
	// refused waits for an answer that is a refusal for want of approval.
	refused := func(at *site) (request string) {
		t.Helper()
		eventually(t, "node "+at.name+" refuses", func() bool {
			item, err := n.do(at, &payloads.GetRequestPayload{UniqueIdentifier: id})
			if err == nil {
				t.Fatalf("node %s gives out a key without approval", at.name)
			}
			if item.ResultReason == kmip.ResultReasonPermissionDenied {
				request = requestIn(t, item.ResultMessage)
			}
			return request != ""
		})
		return request
	}
	request := refused(b) // from the next request on, at every node
	kill(b)
	if again := refused(c); again != request {
		t.Errorf("nodes b and c: requests %s and %s", request, again)
	}
	approve := func(at *site, name, state string) {
		t.Helper()
		eventually(t, name+" approves at node "+at.name, func() bool {
			p, err := tryLogin(t, at.cfg.APIListen, at.cfg.DataDir, name, passwords[name])
			if err != nil {
				return false
			}
			got, err := p.approve(t, request)
			if errs.KindOf(err) == errs.Exists { // the first answer was lost
				return true
			}
			if err == nil && got.GetState() != state {
				t.Fatalf("%s approved: %v", name, got)
			}
			return err == nil
		})
		kill(at)
	}
	approve(c, "ann", "pending")
	if again := refused(a); again != request {
		t.Errorf("after one approval: request %s, not %s", again, request)
	}
	approve(b, "bob", "approved")
	// Once, by whichever node.
	var given atomic.Int32
	var all sync.WaitGroup
	for i := range 9 {
		at := n.sites[i%3]
		all.Go(func() {
			if got, err := n.get(at, id); err == nil && len(got) > 0 {
				given.Add(1)
			}
		})
	}
	all.Wait()
	if given.Load() > 1 {
		t.Errorf("given out %d times", given.Load())
	}
	eventually(t, "it is used", func() bool { // also if all nine met a node that looks for a leader
		got, err := client.Call(t.Context(), local.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: request})
		if err != nil || got.GetState() == "used" {
			return err == nil
		}
		n.get(a, id)
		return false
	})
	if next := refused(c); next == request {
		t.Error("an approval is used twice")
	}
	// No quorum again, for what comes after.
	change := &strongroomv1.SetKMSGroupQuorumRequest{Name: FirstGroup}
	eventually(t, "the quorum is asked to go", func() bool {
		_, err = client.Call(t.Context(), local.KMS().SetKMSGroupQuorum, change)
		return errs.KindOf(err) == errs.Denied
	})
	request = requestIn(t, err.Error())
	approve(a, "ann", "pending")
	approve(c, "bob", "approved")
	eventually(t, "the quorum goes", func() bool {
		_, err := client.Call(t.Context(), local.KMS().SetKMSGroupQuorum, change)
		return err == nil
	})
	n.has(b, id, nil)
}

// testStale has a node that was asked nothing for a while make a group which another
// has made meanwhile: that is refused, and harms nothing of it. After testQuorum, ann
// can approve.
func (n *trio) testStale(t *testing.T) {
	stale, other := n.sites[0], n.sites[1]
	at := func(s *site) *client.Client {
		c, err := client.New(client.Config{Server: "unix:" + s.cfg.LocalSocket})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	kms := at(other).KMS()
	do(t, kms.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "meanwhile"})
	do(t, kms.SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "meanwhile", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1, Export: true}})
	do(t, kms.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "meanwhile", Group: "meanwhile"})
	as := user("meanwhile", string(do(t, kms.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "meanwhile"}).GetPassword()))
	conn := dial(t, other.cfg.Listen, tlsOf(t, other.cfg.DataDir))
	id := ask(t, conn, as, newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	request := requestIn(t, ask(t, conn, as, &payloads.GetRequestPayload{UniqueIdentifier: id}).ResultMessage)

	_, err := client.Call(t.Context(), at(stale).KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "meanwhile", Group: "meanwhile"})
	wantKind(t, "an application that another node has made", err, errs.Exists)
	_, err = client.Call(t.Context(), at(stale).KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "meanwhile"})
	wantKind(t, "a group that another node has made", err, errs.Exists)
	if got := requestIn(t, ask(t, conn, as, &payloads.GetRequestPayload{UniqueIdentifier: id}).ResultMessage); got != request {
		t.Errorf("request %s is gone: now there is %s", request, got)
	}
}
