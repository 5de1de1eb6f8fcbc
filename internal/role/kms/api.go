package kms

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/usage"
)

const (
	// requestMax bounds one request, in bytes.
	requestMax = 1 << 20
	// certificateMax bounds a client certificate, in bytes of DER.
	certificateMax = 16 << 10
	// lifetimeMax bounds the life of a password or API key.
	lifetimeMax = 20 * 365 * 24 * time.Hour
	// usualLifetime is that of a certificate which is signed here.
	usualLifetime = 365 * 24 * time.Hour
)

// api serves the administration of a KMS.
type api struct {
	strongroomv1connect.UnimplementedKMSServiceHandler
	strongroomv1connect.UnimplementedKMSApprovalServiceHandler
	strongroomv1connect.UnimplementedKMSAuditServiceHandler
	strongroomv1connect.UnimplementedKMSClusterServiceHandler
	strongroomv1connect.UnimplementedKMSRootServiceHandler
	strongroomv1connect.UnimplementedKMSBackupServiceHandler
	strongroomv1connect.UnimplementedSessionServiceHandler
	k *KMS
}

func fingerprint(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

func (a *api) WhoAmI(context.Context, *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	return connect.NewResponse(&strongroomv1.WhoAmIResponse{Principal: "local administrator of the KMS", ServerVersion: Version}), nil
}

func (a *api) GetKMS(context.Context, *connect.Request[strongroomv1.GetKMSRequest]) (*connect.Response[strongroomv1.KMS], error) {
	leaf := a.k.certificate.Leaf
	return connect.NewResponse(&strongroomv1.KMS{
		Address: a.k.cfg.Advertise, CertificateSha256: fmt.Sprintf("%x", fingerprint(leaf)), CertificateExpires: timestamppb.New(leaf.NotAfter),
		Ca: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.k.ca.Certificate().Raw})), Version: Version,
	}), nil
}

// checkPolicy reads a policy off the wire; names that are not known are refused.
func checkPolicy(p *strongroomv1.KMSPolicy) (directory.Policy, error) {
	out := directory.Policy{Operations: p.GetOperations(), NoExport: p.GetNoExport(), KeyTypes: p.GetKeyTypes()}
	_, err := policyOf(out)
	return out, err
}

func (a *api) CreateKMSGroup(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSGroupRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	m := req.Msg
	policy, err := checkPolicy(m.GetPolicy())
	if err != nil {
		return nil, errs.Wrap(err, "cannot create group %.100s", m.GetName())
	}
	err = a.k.forgetEarlier(ctx, func() error {
		_, err := a.k.directory.Group(m.GetName())
		return err
	}, func() error { return a.k.forgetGroup(ctx, m.GetName()) })
	if err != nil {
		return nil, err
	}
	if err := a.k.directory.CreateGroup(ctx, directory.Group{Name: m.GetName(), Title: m.GetTitle(), Description: m.GetDescription(), Policy: policy}); err != nil {
		return nil, err
	}
	return a.group(ctx, m.GetName())
}

func (a *api) group(ctx context.Context, name string) (*connect.Response[strongroomv1.KMSGroup], error) {
	g, err := a.k.directory.Group(name)
	if err != nil {
		return nil, err
	}
	out, err := a.groupOf(ctx, g)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

func (a *api) groupOf(ctx context.Context, g directory.Group) (*strongroomv1.KMSGroup, error) {
	out := &strongroomv1.KMSGroup{
		Name: g.Name, Account: directory.AccountOf(g.Name), Title: g.Title, Description: g.Description, Created: timestamppb.New(g.Created),
		Policy:   policyToAPI(g.Policy),
		Rotation: &strongroomv1.KMSRotation{EveryDays: int32(g.Rotation.EveryDays), DeactivateAfterDays: int32(g.Rotation.DeactivateAfterDays)},
		Quota:    quotaOf(g.Quota), Usage: usageOf(a.k.usage.Of(usage.Group(g.Name)), g.Quota),
		Quorum: quorumOf(g.Quorum),
	}
	var err error
	out.Usage.Keys, err = a.k.objects.Keys(ctx, g.Name)
	return out, err
}

func (a *api) GetKMSGroup(ctx context.Context, req *connect.Request[strongroomv1.GetKMSGroupRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	if err := a.k.directory.Refresh(ctx); err != nil {
		return nil, err
	}
	return a.group(ctx, req.Msg.GetName())
}

func (a *api) ListKMSGroups(ctx context.Context, req *connect.Request[strongroomv1.ListKMSGroupsRequest]) (*connect.Response[strongroomv1.ListKMSGroupsResponse], error) {
	seen, err := a.seen(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.ListKMSGroupsResponse{}
	for _, g := range a.k.directory.Groups() {
		if account := req.Msg.GetAccount(); !seen.Has(groupObject(g.Name)) || account != "" && account != directory.AccountOf(g.Name) {
			continue
		}
		one, err := a.groupOf(ctx, g)
		if err != nil {
			return nil, err
		}
		out.Groups = append(out.Groups, one)
	}
	return connect.NewResponse(out), nil
}

func (a *api) CreateKMSApplication(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSApplicationRequest]) (*connect.Response[strongroomv1.KMSApplication], error) {
	m := req.Msg
	i, err := interfaceOf(m.GetInterface())
	if err != nil {
		return nil, errs.Wrap(err, "cannot create application %.100s", m.GetName())
	}
	err = a.k.forgetEarlier(ctx, func() error {
		_, err := a.k.directory.Application(m.GetName())
		return err
	}, func() error {
		return errors.Join(a.k.approvals.Forget(ctx, m.GetGroup(), "application:"+m.GetName()), a.k.usage.Forget(ctx, usage.Application(short(m.GetName()))))
	})
	if err != nil {
		return nil, err
	}
	app := directory.Application{Name: m.GetName(), Title: m.GetTitle(), Description: m.GetDescription(), Group: m.GetGroup(), Interface: i}
	if err := a.k.directory.CreateApplication(ctx, app); err != nil {
		return nil, err
	}
	return a.application(m.GetName())
}

// interfaceOf reads an interface off the wire.
func interfaceOf(name string) (directory.Interface, error) {
	for _, i := range []directory.Interface{directory.KMIP, directory.REST} {
		if strings.EqualFold(name, i.String()) {
			return i, nil
		}
	}
	if name == "" {
		return directory.KMIP, nil
	}
	return "", errs.New(errs.Invalid, "there is no interface %.16q: it is %v or %v", name, directory.KMIP, directory.REST)
}

func (a *api) application(name string) (*connect.Response[strongroomv1.KMSApplication], error) {
	app, err := a.k.directory.Application(name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(a.applicationOf(app)), nil
}

func (a *api) applicationOf(app directory.Application) *strongroomv1.KMSApplication {
	out := &strongroomv1.KMSApplication{
		Name: app.Name, Account: directory.AccountOf(app.Name), Title: app.Title, Description: app.Description, Group: app.Group, Interface: app.Interface.String(), Disabled: app.Disabled, Created: timestamppb.New(app.Created),
		Quota: quotaOf(app.Quota), Usage: usageOf(a.k.usage.Of(usage.Application(app.Name)), app.Quota),
	}
	for _, c := range app.Credentials {
		out.Credentials = append(out.Credentials, credentialOf(c))
	}
	return out
}

func credentialOf(c directory.Credential) *strongroomv1.KMSCredential {
	out := &strongroomv1.KMSCredential{Id: c.ID, Kind: string(c.Kind), User: c.User, Fingerprint: c.Fingerprint, Created: timestamppb.New(c.Created)}
	if !c.Expires.IsZero() {
		out.Expires = timestamppb.New(c.Expires)
	}
	return out
}

func (a *api) ListKMSApplications(ctx context.Context, req *connect.Request[strongroomv1.ListKMSApplicationsRequest]) (*connect.Response[strongroomv1.ListKMSApplicationsResponse], error) {
	seen, err := a.seen(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.ListKMSApplicationsResponse{}
	for _, app := range a.k.directory.Applications() {
		if account := req.Msg.GetAccount(); seen.Has(groupObject(app.Group)) && (account == "" || account == directory.AccountOf(app.Name)) {
			out.Applications = append(out.Applications, a.applicationOf(app))
		}
	}
	return connect.NewResponse(out), nil
}

func (a *api) GetKMSApplication(ctx context.Context, req *connect.Request[strongroomv1.GetKMSApplicationRequest]) (*connect.Response[strongroomv1.KMSApplication], error) {
	if err := a.k.directory.Refresh(ctx); err != nil {
		return nil, err
	}
	return a.application(req.Msg.GetName())
}

func (a *api) SetKMSApplicationDisabled(ctx context.Context, req *connect.Request[strongroomv1.SetKMSApplicationDisabledRequest]) (*connect.Response[strongroomv1.KMSApplication], error) {
	if err := a.k.directory.SetDisabled(ctx, req.Msg.GetName(), req.Msg.GetDisabled()); err != nil {
		return nil, err
	}
	return a.application(req.Msg.GetName())
}

func (a *api) DeleteKMSApplication(ctx context.Context, req *connect.Request[strongroomv1.DeleteKMSApplicationRequest]) (*connect.Response[strongroomv1.DeleteKMSApplicationResponse], error) {
	if err := a.k.directory.Refresh(ctx); err != nil {
		return nil, err
	}
	app, err := a.k.directory.Application(req.Msg.GetName())
	if err != nil {
		return nil, errs.Wrap(err, "cannot delete application %.100s", req.Msg.GetName())
	}
	if err := a.k.directory.DeleteApplication(ctx, app.Name); err != nil {
		return nil, err
	}
	// Another one of that name has nothing approved.
	if err := a.k.approvals.Forget(ctx, app.Group, "application:"+app.Name); err != nil {
		return nil, err
	}
	if err := a.k.usage.Forget(ctx, usage.Application(req.Msg.GetName())); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.DeleteKMSApplicationResponse{}), nil
}

func (a *api) CreateKMSPassword(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSPasswordRequest]) (*connect.Response[strongroomv1.CreateKMSPasswordResponse], error) {
	life, err := lifetimeOf(req.Msg.GetLifetimeSeconds())
	if err != nil {
		return nil, err
	}
	c, password, err := a.k.directory.AddPassword(ctx, req.Msg.GetApplication(), life)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateKMSPasswordResponse{Credential: credentialOf(c), Password: password}), nil
}

func lifetimeOf(seconds int64) (time.Duration, error) {
	if seconds < 0 || seconds > int64(lifetimeMax/time.Second) {
		return 0, errs.New(errs.Invalid, "a lifetime of %d seconds is not 0 to %d", seconds, int64(lifetimeMax/time.Second))
	}
	return time.Duration(seconds) * time.Second, nil
}

func (a *api) CreateKMSAPIKey(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSAPIKeyRequest]) (*connect.Response[strongroomv1.CreateKMSAPIKeyResponse], error) {
	life, err := lifetimeOf(req.Msg.GetLifetimeSeconds())
	if err != nil {
		return nil, err
	}
	c, key, err := a.k.directory.AddAPIKey(ctx, req.Msg.GetApplication(), life)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateKMSAPIKeyResponse{Credential: credentialOf(c), Key: key}), nil
}

func (a *api) AddKMSCertificate(ctx context.Context, req *connect.Request[strongroomv1.AddKMSCertificateRequest]) (*connect.Response[strongroomv1.KMSCredential], error) {
	if len(req.Msg.GetCertificate()) > certificateMax {
		return nil, errs.New(errs.Invalid, "a certificate of more than %d bytes", certificateMax)
	}
	cert, err := x509.ParseCertificate(req.Msg.GetCertificate())
	if err != nil {
		return nil, errs.New(errs.Invalid, "that is no certificate: %w", err)
	}
	c, err := a.k.directory.AddCertificate(ctx, req.Msg.GetApplication(), cert)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(credentialOf(c)), nil
}

func (a *api) SignKMSCertificate(ctx context.Context, req *connect.Request[strongroomv1.SignKMSCertificateRequest]) (*connect.Response[strongroomv1.SignKMSCertificateResponse], error) {
	life, err := lifetimeOf(req.Msg.GetLifetimeSeconds())
	if err != nil {
		return nil, err
	}
	if _, err := a.k.directory.Application(req.Msg.GetApplication()); err != nil {
		return nil, err
	}
	cert, err := a.k.ca.SignClient(req.Msg.GetRequest(), req.Msg.GetApplication(), cmp.Or(life, usualLifetime))
	if err != nil {
		return nil, err
	}
	c, err := a.k.directory.AddCertificate(ctx, req.Msg.GetApplication(), cert)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.SignKMSCertificateResponse{Credential: credentialOf(c), Certificate: cert.Raw}), nil
}

func (a *api) RevokeKMSCredential(ctx context.Context, req *connect.Request[strongroomv1.RevokeKMSCredentialRequest]) (*connect.Response[strongroomv1.KMSApplication], error) {
	if err := a.k.directory.Revoke(ctx, req.Msg.GetApplication(), req.Msg.GetId()); err != nil {
		return nil, err
	}
	return a.application(req.Msg.GetApplication())
}
