package kms

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
)

const (
	auditPage    = 100
	auditPageMax = 1000
	// auditLooks bounds the records that are looked at for one page.
	auditLooks = 100_000
	// auditTextMax bounds what records are searched for, in bytes.
	auditTextMax = 256
	// clockStep is how far a server's clock may have been put back: records are in
	// the order in which they were written, not of their times.
	clockStep = time.Hour
	// stranger stands for a user or application of an account that is not the
	// caller's to know of.
	stranger = "somebody of another account"
)

// accountOfRecord returns the account that a record is about; false if it is about
// none, but the whole KMS.
func accountOfRecord(r audit.Record) (string, bool) {
	if name, ok := strings.CutPrefix(r.Object, userFolder); ok && access.Home(name) == access.Root {
		return "", false // whatever an earlier release wrote
	}
	if account, ok := r.Details["account"]; ok {
		return account, account != ""
	}
	// What a user of an account does about nothing in particular.
	return accountOfActor(r.Actor)
}

// accountOfActor returns the account that an actor's name names; false for one of
// none, or of the account default.
func accountOfActor(actor string) (string, bool) {
	kind, name, _ := strings.Cut(actor, ":")
	account, _, ok := strings.Cut(name, "/")
	return account, ok && (kind == "user" || kind == "application")
}

// groupOfRecord returns the group that a record of an account is about, or "".
func groupOfRecord(r audit.Record, account string) string {
	rest, ok := strings.CutPrefix(r.Object, "group/")
	if ok && account != directory.DefaultAccount {
		rest, ok = strings.CutPrefix(rest, account+"/")
	}
	own, _, _ := strings.Cut(rest, "/")
	if !ok || own == "" {
		return ""
	}
	return directory.FullName(account, own)
}

// auditView is what a caller may see of the log.
type auditView struct {
	scope     access.Scope
	directory *directory.Directory
}

// show returns a record as the caller may see it; false if not at all. What was done
// before an account or a group was made is of another that had its name.
func (v auditView) show(r audit.Record) (audit.Record, bool) {
	if v.scope.Has(access.Root) {
		return r, true
	}
	name, ok := accountOfRecord(r)
	if !ok {
		return r, false
	}
	account, err := v.directory.Account(name)
	if err != nil || r.Time.Before(account.Created) {
		return r, false
	}
	on := accountObject(name)
	if group := groupOfRecord(r, name); group != "" {
		if g, err := v.directory.Group(group); err == nil && !r.Time.Before(g.Created) {
			on = groupObject(group)
		}
	}
	if !v.scope.Has(on) {
		return r, false
	}
	if of, ok := accountOfActor(r.Actor); ok && of != name {
		r.Actor = stranger
	}
	return r, true
}

func (a *api) ListKMSAudit(ctx context.Context, req *connect.Request[strongroomv1.ListKMSAuditRequest]) (*connect.Response[strongroomv1.ListKMSAuditResponse], error) {
	m := req.Msg
	for _, text := range []string{m.GetAccount(), m.GetSubject(), m.GetOperation(), m.GetObject(), m.GetOutcome()} {
		if len(text) > auditTextMax {
			return nil, errs.New(errs.Invalid, "cannot list the audit log: a text to look for has at most %d bytes", auditTextMax)
		}
	}
	limit := int(m.GetLimit())
	if limit == 0 {
		limit = auditPage
	}
	if limit < 1 || limit > auditPageMax {
		return nil, errs.New(errs.Invalid, "cannot list the audit log: a page of %d records is not of 1 to %d", limit, auditPageMax)
	}
	scope, err := a.k.users().May(ctx, "Audit.Read")
	if err != nil {
		return nil, err
	}
	view := auditView{scope, a.k.directory}
	out, looked := &strongroomv1.ListKMSAuditResponse{}, 0
	err = audit.Scan(ctx, a.k.auditDir(), m.GetBefore(), func(r audit.Record) bool {
		if m.GetSince() != nil && r.Time.Before(m.GetSince().AsTime().Add(-clockStep)) {
			out.Next = 0
			return false
		}
		looked++
		out.Next = r.Seq
		if r, ok := view.show(r); ok && matches(m, r) {
			out.Records = append(out.Records, recordToAPI(r))
		}
		if len(out.Records) == limit || looked == auditLooks {
			return false
		}
		out.Next = 0
		return true
	})
	if err != nil {
		return nil, errs.Wrap(err, "cannot list the audit log")
	}
	if out.Next == 1 {
		out.Next = 0
	}
	return connect.NewResponse(out), nil
}

// matches reports whether a record is of those that were asked for.
func matches(m *strongroomv1.ListKMSAuditRequest, r audit.Record) bool {
	if m.GetAccount() != "" {
		if account, ok := accountOfRecord(r); !ok || account != m.GetAccount() {
			return false
		}
	}
	switch {
	case m.GetSince() != nil && r.Time.Before(m.GetSince().AsTime()), m.GetUntil() != nil && !r.Time.Before(m.GetUntil().AsTime()):
		return false
	case m.GetOutcome() != "" && r.Outcome != m.GetOutcome():
		return false
	}
	return strings.Contains(r.Actor, m.GetSubject()) && strings.Contains(r.Action, m.GetOperation()) && strings.Contains(r.Object, m.GetObject())
}

func recordToAPI(r audit.Record) *strongroomv1.KMSAuditRecord {
	return &strongroomv1.KMSAuditRecord{
		Seq: r.Seq, Time: timestamppb.New(r.Time), Subject: r.Actor, Operation: r.Action, Object: r.Object, Outcome: r.Outcome, Details: r.Details,
	}
}

func (a *api) VerifyKMSAudit(ctx context.Context, req *connect.Request[strongroomv1.VerifyKMSAuditRequest]) (*connect.Response[strongroomv1.VerifyKMSAuditResponse], error) {
	// It reads all that there is: one at a time.
	if !a.k.verifying.TryLock() {
		return nil, errs.New(errs.Unavailable, "the audit log is being verified already; try again later")
	}
	defer a.k.verifying.Unlock()
	// What is in the log now must be in its files; and what was noted, too.
	heads := []audit.Head{a.k.audit.Head()}
	if text := req.Msg.GetHead(); text != "" {
		noted, err := headOf(text)
		if err != nil {
			return nil, err
		}
		heads = append(heads, noted)
	}
	var rep audit.Report
	for _, head := range heads {
		var err error
		rep, err = audit.Verify(a.k.auditDir(), audit.Expect{Key: a.k.auditKey, Head: head, AllowPruned: req.Msg.GetAllowPruned()}, func(audit.Record) error { return ctx.Err() })
		if err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&strongroomv1.VerifyKMSAuditResponse{
		Log: rep.Log, Files: int32(rep.Files), First: rep.First, Last: rep.Last, Head: fmt.Sprintf("%d:%s", rep.Head.Seq, rep.Head.Hash),
		Checkpoints: int32(rep.Checkpoints), Unsigned: rep.Unsigned,
	}), nil
}

// headOf reads "SEQ:HASH".
func headOf(text string) (h audit.Head, err error) {
	seq, hash, ok := strings.Cut(text, ":")
	h.Seq, err = strconv.ParseUint(seq, 10, 64)
	if !ok || err != nil || h.Seq == 0 || h.Hash.UnmarshalText([]byte(hash)) != nil {
		return audit.Head{}, errs.New(errs.Invalid, `head %.100q is not "SEQ:HASH"`, text)
	}
	return h, nil
}

func (k *KMS) auditDir() string { return filepath.Join(k.cfg.DataDir, auditName) }
