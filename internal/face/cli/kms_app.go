package cli

import (
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/crypto/clientcert"
	"strongroom/internal/errs"
)

func newKMSAppCmd(env *Env) *cobra.Command {
	return newGroup("app", "Applications: the programs that use keys",
		`An application is a client of KMIP or of the HTTP API ("REST"). It belongs to one
group and proves who it is by a credential.`,
		newKMSAppCreateCmd(env), newKMSAppLsCmd(env), newKMSAppShowCmd(env), newKMSAppQuotaCmd(env),
		newKMSAppStateCmd(env, "disable", "Have an application refused", true), newKMSAppStateCmd(env, "enable", "Accept an application again", false),
		newKMSAppDeleteCmd(env))
}

func newKMSAppCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateKMSApplicationRequest{}
	var account, group string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create an application",
		Long: `Create an application in a group of the same account. It can connect once it has a
credential. In an account its whole name is ACCOUNT/NAME: by that other commands
know it, and that is the user name of its passwords.

With --interface rest it makes and uses keys by HTTP and JSON on api_listen, and
not by KMIP. The interface never changes.`,
		Example: `  strongroom kms app create vcenter-1 --group vsphere
  strongroom kms credential create vcenter-1
  strongroom kms app create billing --group web --interface rest
  strongroom kms credential api-key billing
  strongroom kms app create vcenter-1 --account acme --group vsphere`,
		Args: exactArgs("the application's name"),
		RunE: env.withClient("create the application", func(cmd *cobra.Command, c *client.Client, args []string) (err error) {
			if req.Name, err = inAccount(account, args[0]); err != nil {
				return err
			}
			if req.Group, err = inAccount(account, group); err != nil {
				return err
			}
			a, err := client.Call(cmd.Context(), c.KMS().CreateKMSApplication, req)
			if err != nil {
				return err
			}
			if err := env.printDone(a, "application %s created", a.GetName()); err != nil {
				return err
			}
			kind := "create"
			if a.GetInterface() == "REST" {
				kind = "api-key"
			}
			env.notef("It needs a credential: strongroom kms credential %s %s", kind, a.GetName())
			return nil
		}),
	}
	cmd.Flags().StringVar(&group, "group", "", "the group whose keys it uses")
	addAccount(cmd, &account)
	cmd.Flags().StringVar(&req.Interface, "interface", "kmip", "how it asks: kmip or rest")
	cmd.Flags().StringVar(&req.Title, "title", "", "a title for people")
	cmd.Flags().StringVar(&req.Description, "description", "", "what it is")
	must(cmd.MarkFlagRequired("group"))
	return cmd
}

func newKMSAppLsCmd(env *Env) *cobra.Command {
	req := &strongroomv1.ListKMSApplicationsRequest{}
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List applications",
		Long:    "List the applications that you may see, and how many credentials they have. It\nchanges nothing.",
		Example: "  strongroom kms app ls",
		Args:    noArgs,
		RunE: env.withClient("list the applications", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMS().ListKMSApplications, req)
			if err != nil {
				return err
			}
			return printList(env, res, res.GetApplications(), []column[*strongroomv1.KMSApplication]{
				{"NAME", (*strongroomv1.KMSApplication).GetName},
				{"TITLE", (*strongroomv1.KMSApplication).GetTitle},
				{"GROUP", (*strongroomv1.KMSApplication).GetGroup},
				{"INTERFACE", (*strongroomv1.KMSApplication).GetInterface},
				{"DISABLED", func(a *strongroomv1.KMSApplication) string { return yesNo(a.GetDisabled()) }},
				{"CREDENTIALS", func(a *strongroomv1.KMSApplication) string { return fmt.Sprint(len(a.GetCredentials())) }},
				{"LAST USED", func(a *strongroomv1.KMSApplication) string { return env.when(a.GetUsage().GetLastUse()) }},
			})
		}),
	}
	cmd.Flags().StringVar(&req.Account, "account", "", "only those of one account")
	return cmd
}

func newKMSAppShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show an application and its credentials",
		Long: `Show an application, what it did, and its credentials without their secrets. After
a crash of the server the operations of its last 10 seconds are missing.

It changes nothing.`,
		Example: "  strongroom kms app show vcenter-1",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("show the application", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().GetKMSApplication, &strongroomv1.GetKMSApplicationRequest{Name: args[0]})
			if err != nil {
				return err
			}
			fields := []field{
				{"Name", a.GetName()},
				{"Title", a.GetTitle()},
				{"Description", a.GetDescription()},
				{"Group", a.GetGroup()},
				{"Interface", a.GetInterface()},
				{"Disabled", yesNo(a.GetDisabled())},
				{"Created", env.when(a.GetCreated())},
			}
			fields = append(fields, env.usageFields(a.GetUsage(), a.GetQuota(), "Keys made")...)
			for _, v := range a.GetCredentials() {
				fields = append(fields, field{"Credential " + v.GetId(), fmt.Sprintf("%s, %s, %s", v.GetKind(), knownBy(v), env.validity(v))})
			}
			return env.printOne(a, fields)
		}),
	}
}

// knownBy tells a credential from others of its kind.
func knownBy(c *strongroomv1.KMSCredential) string {
	switch c.GetKind() {
	case "password":
		return "user " + c.GetUser()
	case "certificate":
		return "sha256:" + c.GetFingerprint()
	}
	return apiKeyPrefix + c.GetId() + "_..."
}

// apiKeyPrefix begins every API key.
const apiKeyPrefix = "srk_"

func (e *Env) validity(c *strongroomv1.KMSCredential) string {
	if c.GetExpires() == nil {
		return "does not expire"
	}
	return "valid until " + e.when(c.GetExpires())
}

func newKMSAppStateCmd(env *Env, verb, short string, disabled bool) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " NAME",
		Short:   short,
		Long:    short + ", from its next request on.\nIts credentials and its group's keys stay.",
		Example: "  strongroom kms app " + verb + " vcenter-1",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient(verb+" the application", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().SetKMSApplicationDisabled, &strongroomv1.SetKMSApplicationDisabledRequest{Name: args[0], Disabled: disabled})
			if err != nil {
				return err
			}
			return env.printDone(a, "application %s %sd", args[0], verb)
		}),
	}
}

func newKMSAppDeleteCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete an application",
		Long: `Delete an application and its credentials. Its group's keys stay: another
application of the group can use them.`,
		Example: "  strongroom kms app delete vcenter-1",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("delete the application", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete application %s and its credentials?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.KMS().DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "application %s deleted", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}

func newKMSCredentialCmd(env *Env) *cobra.Command {
	return newGroup("credential", "Credentials of applications",
		`An application proves who it is by a client certificate or by a user name and
password; one whose interface is REST by an API key, too. To change one without a
gap, create the new one, give it to the application, and revoke the old one.`,
		newKMSCredentialCreateCmd(env), newKMSCredentialAPIKeyCmd(env), newKMSCredentialLsCmd(env), newKMSCredentialCertificateCmd(env), newKMSCredentialTrustCmd(env), newKMSCredentialSignCmd(env), newKMSCredentialRevokeCmd(env))
}

func newKMSCredentialCreateCmd(env *Env) *cobra.Command {
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "create APPLICATION",
		Short: "Make a password for an application",
		Long: `Make a password for an application and print it, once: it is not kept. The user
name is the application's name. Earlier passwords stay valid until they are revoked.`,
		Example: "  strongroom kms credential create vcenter-1 --lifetime 365d > password",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("create the credential", func(cmd *cobra.Command, c *client.Client, args []string) error {
			res, err := client.Call(cmd.Context(), c.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: args[0], LifetimeSeconds: int64(lifetime / time.Second)})
			if err != nil {
				return err
			}
			defer clear(res.GetPassword())
			return env.printSecret(res, string(res.GetPassword()), "user name "+res.GetCredential().GetUser()+", credential "+res.GetCredential().GetId()+"; the password is not shown again")
		}),
	}
	addDuration(cmd, &lifetime, "lifetime", 0, "how long it is valid (default: for ever)")
	return cmd
}

func newKMSCredentialAPIKeyCmd(env *Env) *cobra.Command {
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "api-key APPLICATION",
		Short: "Make an API key for an application",
		Long: `Make an API key for an application whose interface is REST and print it, once: it
is not kept. It begins with "srk_" and the credential's id. The application sends
it with each request: "Authorization: Bearer srk_...".

Earlier ones stay valid until they are revoked. To rotate without a gap: make the
new one, give it to the application, and revoke the old one, whose id
"kms credential ls" tells.`,
		Example: `  strongroom kms credential api-key billing --lifetime 365d > api-key
  strongroom kms credential ls billing
  strongroom kms credential revoke billing 0123456789ab`,
		Args: exactArgs("the application's name"),
		RunE: env.withClient("create the API key", func(cmd *cobra.Command, c *client.Client, args []string) error {
			res, err := client.Call(cmd.Context(), c.KMS().CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: args[0], LifetimeSeconds: int64(lifetime / time.Second)})
			if err != nil {
				return err
			}
			defer clear(res.GetKey())
			return env.printSecret(res, string(res.GetKey()), "API key, credential "+res.GetCredential().GetId()+", "+env.validity(res.GetCredential())+"; it is not shown again")
		}),
	}
	addDuration(cmd, &lifetime, "lifetime", 0, "how long it is valid (default: for ever)")
	return cmd
}

func newKMSCredentialLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:     "ls APPLICATION",
		Short:   "List an application's credentials",
		Long:    "List an application's credentials, without their secrets. It changes nothing.",
		Example: "  strongroom kms credential ls vcenter-1",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("list the credentials", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().GetKMSApplication, &strongroomv1.GetKMSApplicationRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return printList(env, a, a.GetCredentials(), []column[*strongroomv1.KMSCredential]{
				{"ID", (*strongroomv1.KMSCredential).GetId},
				{"KIND", (*strongroomv1.KMSCredential).GetKind},
				{"KNOWN BY", knownBy},
				{"CREATED", func(v *strongroomv1.KMSCredential) string { return env.when(v.GetCreated()) }},
				{"VALIDITY", env.validity},
			})
		}),
	}
}

func newKMSCredentialCertificateCmd(env *Env) *cobra.Command {
	var (
		certFile, keyFile string
		lifetime          time.Duration
	)
	cmd := &cobra.Command{
		Use:   "certificate APPLICATION",
		Short: "Make a client certificate for an application",
		Long: `Make a key and a client certificate for an application, here, and have the server
know it. The key is in one file of mode 0600 and nowhere else; the server gets the
certificate only. Files that exist are not replaced.`,
		Example: "  strongroom kms credential certificate array-7 --cert array-7.pem --key array-7.key",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("create the credential", func(cmd *cobra.Command, c *client.Client, args []string) error {
			der, cert, key, err := clientcert.New(args[0], lifetime)
			if err != nil {
				return err
			}
			defer clear(key)
			if err := writeNew(keyFile, key); err != nil {
				return err
			}
			if err := writeNew(certFile, cert); err != nil {
				return errors.Join(err, os.Remove(keyFile))
			}
			made, err := client.Call(cmd.Context(), c.KMS().AddKMSCertificate, &strongroomv1.AddKMSCertificateRequest{Application: args[0], Certificate: der})
			if err != nil {
				return errors.Join(err, os.Remove(keyFile), os.Remove(certFile))
			}
			return env.printDone(made, "credential %s of %s: certificate in %s, its key in %s", made.GetId(), args[0], certFile, keyFile)
		}),
	}
	cmd.Flags().StringVar(&certFile, "cert", "client.pem", "`file` for the certificate")
	cmd.Flags().StringVar(&keyFile, "key", "client.key", "`file` for its key")
	addDuration(cmd, &lifetime, "lifetime", 365*24*time.Hour, "how long it is valid")
	return cmd
}

// writeNew makes a file of mode 0600, durably, unless there is one.
func writeNew(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return errs.New(errs.Exists, "%s exists already", path)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func newKMSCredentialTrustCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "trust APPLICATION CERTIFICATE.pem",
		Short: "Know an application by a certificate that it has",
		Long: `Have the server know an application by a client certificate that it has already,
whoever issued it: "make KMS trust vCenter". The certificate itself counts, not its
issuer; when the application gets another one, trust that as well.`,
		Example: "  strongroom kms credential trust vcenter-1 vcenter.pem",
		Args:    exactArgs("the application's name", "the certificate's file"),
		RunE: env.withClient("add the certificate", func(cmd *cobra.Command, c *client.Client, args []string) error {
			text, err := os.ReadFile(args[1])
			if err != nil {
				return err
			}
			block, _ := pem.Decode(text)
			if block == nil || block.Type != "CERTIFICATE" {
				return errs.New(errs.Invalid, "%s does not begin with a PEM certificate", args[1])
			}
			made, err := client.Call(cmd.Context(), c.KMS().AddKMSCertificate, &strongroomv1.AddKMSCertificateRequest{Application: args[0], Certificate: block.Bytes})
			if err != nil {
				return err
			}
			return env.printDone(made, "credential %s of %s: certificate sha256:%s", made.GetId(), args[0], made.GetFingerprint())
		}),
	}
}

func newKMSCredentialSignCmd(env *Env) *cobra.Command {
	var certFile string
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "sign APPLICATION REQUEST.csr",
		Short: "Sign an application's certificate request",
		Long: `Have the server sign a certificate request (PKCS#10, PEM) of an application, such
as vCenter makes with "New Certificate Signing Request", and know the application
by the certificate. Of the request only the key counts. A file that exists is not
replaced.`,
		Example: "  strongroom kms credential sign vcenter-1 vcenter.csr --cert vcenter.pem",
		Args:    exactArgs("the application's name", "the request's file"),
		RunE: env.withClient("sign the certificate", func(cmd *cobra.Command, c *client.Client, args []string) error {
			text, err := os.ReadFile(args[1])
			if err != nil {
				return err
			}
			block, _ := pem.Decode(text)
			if block == nil || !strings.HasSuffix(block.Type, "CERTIFICATE REQUEST") {
				return errs.New(errs.Invalid, "%s does not begin with a PEM certificate request", args[1])
			}
			if _, err := os.Lstat(certFile); !errors.Is(err, os.ErrNotExist) {
				return errs.New(errs.Exists, "%s exists already", certFile)
			}
			made, err := client.Call(cmd.Context(), c.KMS().SignKMSCertificate, &strongroomv1.SignKMSCertificateRequest{
				Application: args[0], Request: block.Bytes, LifetimeSeconds: int64(lifetime / time.Second),
			})
			if err != nil {
				return err
			}
			if err := writeNew(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: made.GetCertificate()})); err != nil {
				return errs.New(errs.InvalidState, "the certificate is made, and not written: %w", err).WithHint("strongroom kms credential revoke %s %s", args[0], made.GetCredential().GetId())
			}
			return env.printDone(made, "credential %s of %s: certificate in %s", made.GetCredential().GetId(), args[0], certFile)
		}),
	}
	cmd.Flags().StringVar(&certFile, "cert", "client.pem", "`file` for the certificate")
	addDuration(cmd, &lifetime, "lifetime", 365*24*time.Hour, "how long it is valid")
	return cmd
}

func newKMSCredentialRevokeCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke APPLICATION ID",
		Short: "Revoke a credential",
		Long: `Have a credential refused from the next request on, also on connections that are
open.`,
		Example: "  strongroom kms credential revoke vcenter-1 0123456789ab",
		Args:    exactArgs("the application's name", "the credential's id"),
		RunE: env.withClient("revoke the credential", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: args[0], Id: args[1]})
			if err != nil {
				return err
			}
			return env.printDone(a, "credential %s of %s revoked", args[1], args[0])
		}),
	}
}
