package controller

import (
	"context"
	"net/http"
	"strings"

	"strongroom/api/rule"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// self is what the controller is called in events and the audit log.
var self = access.Principal{Kind: access.InternalPrincipal, Name: controllerName}.String()

// callerName is how the caller is called in events and the audit log. What
// nobody asked for, the controller did itself.
func callerName(ctx context.Context) string {
	if name := guard.CallerOf(ctx).Name(); name != "" {
		return name
	}
	return self
}

func (c *Controller) newGuard(rules rule.Rules) *guard.Guard {
	return guard.New(guard.Config{
		Rules: rules, Access: c.access, Identify: c.identify, Self: self,
		Subject: func(_ context.Context, procedure string, message any) guard.Subject {
			on := objectOf(procedure, message)
			return guard.Subject{On: on, Name: string(on)}
		},
		Record: func(e audit.Entry) error {
			_, err := c.audit.Append(e)
			return err
		},
	})
}

// identify tells the caller by its token, or else by its certificate.
func (c *Controller) identify(ctx context.Context, header http.Header) (guard.Caller, error) {
	if who, ok, err := guard.ByToken(ctx, c.access, header); ok {
		return who, err
	}
	state := guard.VerifiedTLS(ctx)
	if state == nil {
		return guard.Caller{}, guard.NotLoggedIn()
	}
	id, err := pki.PeerIdentity(*state)
	if err != nil {
		return guard.Caller{}, errs.New(errs.Denied, "cannot tell who the certificate is for: %w", err)
	}
	switch id.Role {
	case pki.Host:
		h, err := c.inv.HostByID(ctx, id.Name)
		if err != nil || h.ClusterID != id.Cluster {
			return guard.Caller{}, errs.New(errs.Denied, "host %s is not in the inventory", id.Name).WithHint("strongroom host join")
		}
		return guard.Caller{Host: h.ID, Principal: access.Principal{Kind: access.CertificatePrincipal, Name: h.Name}}, nil
	case pki.Client:
		return guard.Caller{Principal: access.Principal{Kind: access.CertificatePrincipal, Name: id.Name}}, nil
	}
	return guard.Caller{}, errs.New(errs.Denied, "%s may not use the API", id)
}

// objectOf returns what a request is about, for permissions and the audit log:
// the root unless it names one object.
func objectOf(procedure string, message any) access.Object {
	var name string
	switch m := message.(type) {
	case interface{ GetName() string }:
		name = m.GetName()
	case interface{ GetUser() string }:
		name = m.GetUser()
	}
	if name == "" || len(name) > inventory.MaxName || strings.ContainsAny(name, "/\x00") {
		return access.Root
	}
	for service, folder := range map[string]string{
		"VMService": "/vm/", "ProviderService": "/provider/", "DatastoreService": "/datastore/", "ClusterService": "/cluster/",
		"HostService": "/host/", "EnrollService": "/host/", "AccessService": "/user/", "SessionService": "/user/",
	} {
		if strings.Contains(procedure, "."+service+"/") {
			return access.Object(folder + name)
		}
	}
	return access.Root
}

func vmObject(name string) access.Object { return access.Object("/vm/" + name) }
