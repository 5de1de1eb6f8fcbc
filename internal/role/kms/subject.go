package kms

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/guard"
)

// subject returns what a call is about, as all nodes know it. Where this one cannot
// learn that, it is about everything, with its name on record.
func (k *KMS) subject(ctx context.Context, procedure string, message any) guard.Subject {
	err := k.directory.Refresh(ctx)
	s := k.subjectOf(ctx, procedure, message)
	if err != nil {
		s.On = access.Root
	}
	if m, ok := message.(interface{ GetDisabled() bool }); ok && s.Details != nil {
		s.Details["disabled"] = strconv.FormatBool(m.GetDisabled())
	}
	return s
}

// subjectOf returns what a call is about. A method that is not named here is about
// everything: its privilege is needed on [access.Root].
func (k *KMS) subjectOf(ctx context.Context, procedure string, message any) guard.Subject {
	switch m := message.(type) {
	case *strongroomv1.GetKMSRequest, *strongroomv1.ListKMSAccountsRequest, *strongroomv1.ListKMSGroupsRequest, *strongroomv1.ListKMSApplicationsRequest,
		*strongroomv1.ListKMSApprovalsRequest, *strongroomv1.ListKMSAuditRequest, *strongroomv1.ListUsersRequest, *strongroomv1.ListRolesRequest:
		return guard.Subject{On: guard.Anywhere, Name: "kms"}

	// An account's limits are not its own to change.
	case *strongroomv1.CreateKMSAccountRequest, *strongroomv1.SetKMSAccountQuotaRequest, *strongroomv1.SetKMSAccountDisabledRequest, *strongroomv1.DeleteKMSAccountRequest:
		name := m.(interface{ GetName() string }).GetName()
		return of(name, access.Root, "account/"+short(name))
	case *strongroomv1.GetKMSAccountRequest:
		return of(m.GetName(), accountObject(m.GetName()), "account/"+short(m.GetName()))
	case *strongroomv1.DescribeKMSAccountRequest:
		return of(m.GetName(), accountObject(m.GetName()), "account/"+short(m.GetName()))

	case *strongroomv1.CreateKMSGroupRequest:
		account := directory.AccountOf(m.GetName())
		return of(account, accountObject(account), "group/"+short(m.GetName()))
	case *strongroomv1.CreateKMSApplicationRequest:
		return of(directory.AccountOf(m.GetGroup()), groupObject(m.GetGroup()), applicationFolder+short(m.GetName()))

	case *strongroomv1.GrantRolesRequest:
		return ofRoles(m.GetName(), m.GetRoles(), m.GetObject())
	case *strongroomv1.RevokeRolesRequest:
		return ofRoles(m.GetName(), m.GetRoles(), m.GetObject())

	case *strongroomv1.RevokeKMSCredentialRequest:
		s := k.ofApplication(m.GetApplication())
		s.Details[credentialDetail] = short(m.GetId())
		return s
	case interface{ GetApplication() string }:
		return k.ofApplication(m.GetApplication())
	case interface{ GetName() string }:
		name := m.GetName()
		switch {
		case strings.Contains(procedure, ".AccessService/"):
			return ofUser(name, access.Home(name))
		case strings.Contains(procedure, "KMSGroup"):
			return of(directory.AccountOf(name), groupObject(name), "group/"+short(name))
		case strings.Contains(procedure, "KMSApplication"):
			return k.ofApplication(name)
		case strings.Contains(procedure, "KMSMember"):
			return guard.Subject{On: access.Root, Name: "node/" + short(name)}
		}
	case interface{ GetUser() string }:
		return ofUser(m.GetUser(), access.Root)
	case interface{ GetId() string }:
		if strings.Contains(procedure, ".KMSApprovalService/") {
			return k.ofApproval(ctx, m.GetId())
		}
	}
	return guard.Subject{On: access.Root, Name: "kms"}
}

// ofRoles is the subject of a change of a user's roles: the user. The handler looks
// at the object.
func ofRoles(name string, roles []string, object string) guard.Subject {
	s := ofUser(name, access.Home(name))
	s.Details["roles"], s.Details["on"] = strings.Join(roles, ","), cmp.Or(object, string(access.Home(name)))
	return s
}

// userFolder is in front of a user's name on record.
const userFolder = "user/"

// ofUser is a user as a subject. One whose name names no account is of none.
func ofUser(name string, on access.Object) guard.Subject {
	s := of(directory.AccountOf(name), on, userFolder+short(name))
	if access.Home(name) == access.Root {
		delete(s.Details, "account")
	}
	return s
}

// of is a subject that belongs to an account.
func of(account string, on access.Object, name string) guard.Subject {
	return guard.Subject{On: on, Name: name, Details: map[string]string{"account": short(account)}}
}

// applicationFolder is in front of an application's name on record, and its credential
// stands in this detail.
const (
	applicationFolder = "application/"
	credentialDetail  = "credential"
)

func (k *KMS) ofApplication(name string) guard.Subject {
	return of(directory.AccountOf(name), k.applicationObject(name), applicationFolder+short(name))
}

// ofApproval is the subject of a request for approval: its group's. Of one that
// there is not nobody but who may see all requests learns that.
func (k *KMS) ofApproval(ctx context.Context, id string) guard.Subject {
	name := "approval/" + short(id)
	asked, err := k.approvals.Get(ctx, id)
	if err != nil {
		return guard.Subject{On: access.Root, Name: name}
	}
	return of(directory.AccountOf(asked.Group), groupObject(asked.Group), name)
}

// nameMax bounds a name on record: an account's, a slash and another.
const nameMax = 128

// short cuts a name that a stranger may have made up.
func short(name string) string { return fmt.Sprintf("%.*s", nameMax, name) }
