package kms

import (
	"context"
	"crypto/tls"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
	"golang.org/x/time/rate"

	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/role/kms/usage"
)

// authenticate implements [kmipserver.Authenticator]: the account of a client
// is its application's group.
func (k *KMS) authenticate(ctx context.Context, state tls.ConnectionState, credentials []kmip.Credential) (kmipserver.Client, error) {
	p := directory.Proof{Interface: directory.KMIP}
	if len(state.PeerCertificates) > 0 {
		p.Certificate = state.PeerCertificates[0]
	}
	for _, c := range credentials {
		v := c.CredentialValue.UserPassword
		if v == nil || p.Password != nil {
			return kmipserver.Client{}, errs.New(errs.Denied, "a credential that is not one user name and password")
		}
		p.User, p.Password = v.Username, []byte(v.Password)
	}
	defer clear(p.Password)
	return k.clientOf(ctx, p)
}

// clientOf returns the client that a proof is of, when its next request is due.
func (k *KMS) clientOf(ctx context.Context, p directory.Proof) (kmipserver.Client, error) {
	client, app, err := k.provenClient(ctx, p)
	if err != nil {
		return client, err
	}
	waited, err := k.pace.wait(ctx, app, k.cfg.MaxRequestsPerSecond)
	if err != nil {
		return client, &kmipserver.Refusal{Reason: kmip.ResultReasonGeneralFailure, Message: "too many requests in a short time; try again later"}
	}
	if waited { // and what was proven may have been revoked meanwhile
		client, _, err = k.provenClient(ctx, p)
	}
	return client, err
}

// provenClient returns the client that a proof is of now, and its application.
func (k *KMS) provenClient(ctx context.Context, p directory.Proof) (client kmipserver.Client, application string, err error) {
	if k.cluster != nil {
		if err := k.directory.Refresh(ctx); err != nil {
			return kmipserver.Client{}, "", errs.New(errs.Unavailable, "this node does not reach a majority of the nodes: %w", err)
		}
	}
	who, err := k.directory.Authenticate(p)
	app, group := who.Application, who.Group
	client = kmipserver.Client{Account: group.Name, Name: "application:" + app.Name, Interface: string(p.Interface)}
	if errors.Is(err, directory.ErrAccountDisabled) {
		// KMIP 1.4 has no reason of its own for that.
		return client, "", &kmipserver.Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: "your account is disabled", Cause: causeDisabled}
	}
	if err != nil {
		return kmipserver.Client{}, "", err
	}
	account, err := k.directory.Account(directory.AccountOf(group.Name))
	if err != nil {
		return kmipserver.Client{}, "", err
	}
	policy, err := policyOf(group.Policy)
	if err != nil {
		return kmipserver.Client{}, "", errs.Wrap(err, "policy of group %s", group.Name)
	}
	client.Policy, client.Approvals = policy, k.approvalsOf(who)
	client.Admit = k.admit(usage.Client{Application: app, Group: group, Account: account, Groups: func() []string { return k.groupNamesOf(account.Name) }})
	return client, app.Name, nil
}

// The causes of refusals, for records, begin so.
const (
	causeDisabled = "account: disabled"
	causeQuota    = "quota: "
	causeApproval = "approval: "
)

// pace makes applications that ask too often wait. The zero value is ready.
type pace struct {
	mu       sync.Mutex
	limiters map[string]*rate.Limiter // by application
}

// wait returns when one more request of app is due at most so many a second (0:
// at once), and whether that was later, or an error if it is later than ctx ends.
func (p *pace) wait(ctx context.Context, app string, perSecond int) (waited bool, err error) {
	if perSecond == 0 {
		return false, nil
	}
	p.mu.Lock()
	l := p.limiters[app]
	if l == nil {
		if p.limiters == nil {
			p.limiters = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(rate.Limit(perSecond), perSecond)
		p.limiters[app] = l
	}
	p.mu.Unlock()
	if l.Allow() {
		return false, nil
	}
	return true, l.Wait(ctx)
}

// policyOf returns what a policy says in KMIP's terms. A name that is not known
// is an error, so that it cannot allow more than was meant.
func policyOf(p directory.Policy) (*kmipserver.Policy, error) {
	if len(p.Operations) == 0 && len(p.KeyTypes) == 0 && !p.NoExport {
		return nil, nil
	}
	out := &kmipserver.Policy{NoExport: p.NoExport}
	for _, name := range p.Operations {
		op, err := operationOf(name)
		if err != nil {
			return nil, err
		}
		out.Operations = append(out.Operations, op)
	}
	for _, name := range p.KeyTypes {
		t, err := keyTypeOf(name)
		if err != nil {
			return nil, err
		}
		out.KeyTypes = append(out.KeyTypes, t)
	}
	return out, nil
}

func operationOf(name string) (kmip.Operation, error) {
	for _, op := range kmipserver.Operations() {
		if strings.EqualFold(ttlv.EnumStr(op), name) {
			return op, nil
		}
	}
	return 0, errs.New(errs.Invalid, "there is no operation %.64q here", name).
		WithHint("such as Create, Get or Locate are; all of them are allowed without --operations")
}

// keyAlgorithms are those of keys that can be made, by the names that people use. It
// is read only.
var keyAlgorithms = map[string]kmip.CryptographicAlgorithm{
	"AES": kmip.CryptographicAlgorithmAES, "3DES": kmip.CryptographicAlgorithm3DES,
	"HMAC-SHA256": kmip.CryptographicAlgorithmHMACSHA256, "HMAC-SHA384": kmip.CryptographicAlgorithmHMACSHA384, "HMAC-SHA512": kmip.CryptographicAlgorithmHMACSHA512,
}

// keyTypeOf reads "AES-256", "AES" or "HMAC-SHA256".
func keyTypeOf(name string) (kmipserver.KeyType, error) {
	upper := strings.ToUpper(name)
	if a, ok := keyAlgorithms[upper]; ok {
		return kmipserver.KeyType{Algorithm: a}, nil
	}
	if at := strings.LastIndexByte(upper, '-'); at > 0 {
		a, ok := keyAlgorithms[upper[:at]]
		bits, err := strconv.ParseUint(upper[at+1:], 10, 16)
		if t := (kmipserver.KeyType{Algorithm: a, Bits: int32(bits)}); ok && err == nil && bits > 0 && t.Possible() {
			return t, nil
		}
	}
	return kmipserver.KeyType{}, errs.New(errs.Invalid, "there is no key type %.64q here", name).
		WithHint("such as AES-256, AES or HMAC-SHA256 are; all objects are allowed without --key-types")
}

// changes tells the operations that change what is stored: they are on record,
// durably, before they are acknowledged. Of the others the record follows
// within a second.
func changes(op kmip.Operation) bool {
	return !slices.Contains([]kmip.Operation{
		0, kmip.OperationLocate, kmip.OperationCheck, kmip.OperationGet, kmip.OperationGetAttributes, kmip.OperationGetAttributeList,
		kmip.OperationQuery, kmip.OperationDiscoverVersions, kmip.OperationObtainLease, kmip.OperationEncrypt, kmip.OperationDecrypt,
		kmip.OperationMAC, kmip.OperationMACVerify, kmip.OperationHash, kmip.OperationRNGRetrieve, kmip.OperationRNGSeed,
	}, op)
}

// trivial tells the operations that touch no object; they are counted and not
// put on record, for clients send them at every connection.
func trivial(op kmip.Operation) bool {
	return op == kmip.OperationQuery || op == kmip.OperationDiscoverVersions
}
