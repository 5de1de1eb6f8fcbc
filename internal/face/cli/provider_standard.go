package cli

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// serverFlags say which key servers, and which of their certificates are right.
type serverFlags struct {
	servers      []string
	fingerprints []string
	proxy        string
	timeout      uint32
}

func (f *serverFlags) add(cmd *cobra.Command, required bool) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.servers, "server", nil, "`HOST:PORT` of a key server, in order of preference; repeat it for more")
	flags.StringArrayVar(&f.fingerprints, "trust-fingerprint", nil, "trust the certificate with this `sha256:...`, without asking; repeat it for more")
	flags.StringVar(&f.proxy, "proxy", "", "`HOST:PORT` of an HTTP proxy in front of the servers, or none")
	flags.Uint32Var(&f.timeout, "timeout", 0, "`seconds` for connecting, for the TLS handshake, and for each request, 1 to 60 (default 5)")
	if required {
		must(cmd.MarkFlagRequired("server"))
	}
}

// confirmServers shows the certificates of the servers, and has them confirmed.
func (env *Env) confirmServers(ctx context.Context, c *client.Client, f serverFlags) ([]*strongroomv1.TrustedServer, error) {
	proxy := f.proxy
	if proxy == "none" {
		proxy = ""
	}
	res, err := client.Call(ctx, c.Provider().InspectKeyServers, &strongroomv1.InspectKeyServersRequest{Servers: f.servers, Proxy: proxy, TimeoutSeconds: f.timeout})
	if err != nil {
		return nil, err
	}
	var trusted []*strongroomv1.TrustedServer
	for _, s := range res.GetServers() {
		cert := s.GetCertificate()
		if s.GetProblem() != "" || cert == nil {
			return nil, errs.New(errs.Unavailable, "key server %s: %s", s.GetAddress(), s.GetMessage()).WithReason(s.GetProblem()).
				WithHint("see that the address is right and the server runs, then repeat the command; nothing was changed")
		}
		trusted = append(trusted, &strongroomv1.TrustedServer{Address: s.GetAddress(), Fingerprint: cert.GetFingerprint()})
		known := slices.ContainsFunc(f.fingerprints, func(text string) bool { return sameFingerprint(text, cert.GetFingerprint()) })
		if known {
			continue
		}
		if len(f.fingerprints) > 0 {
			return nil, errs.New(errs.Denied, "key server %s shows the certificate %s, which is none of those to trust", s.GetAddress(), cert.GetFingerprint()).
				WithHint("compare it with what the server's administrator says")
		}
		env.notef("Key server %s shows this certificate:\n  subject      %s\n  issuer       %s\n  valid        %s to %s\n  fingerprint  %s", s.GetAddress(),
			cert.GetSubject(), cert.GetIssuer(), env.when(cert.GetNotBefore()), env.when(cert.GetNotAfter()), cert.GetFingerprint())
		if !env.Interactive {
			return nil, errs.New(errs.Invalid, "the certificate must be confirmed, and there is no terminal to ask").
				WithHint("compare it with what the server's administrator says, then add --trust-fingerprint %s", cert.GetFingerprint())
		}
		if err := env.confirm(false, "Is that what the administrator of %s says? Trust it?", s.GetAddress()); err != nil {
			return nil, err
		}
	}
	return trusted, nil
}

// sameFingerprint compares as people write them: in capitals, with colons.
func sameFingerprint(a, b string) bool {
	plain := func(s string) string {
		return strings.ReplaceAll(strings.TrimPrefix(strings.ToLower(s), "sha256:"), ":", "")
	}
	return plain(a) == plain(b)
}

// clientFlags say how the key server knows the controller.
type clientFlags struct {
	method, cert, key string
}

const clientHelp = `How the key server knows the controller (--client-method):
  self-signed    a certificate that the key server is given (the default)
  controller-ca  the controller's own certificate; the key server is given the CA
  csr            a request, for which the key server gives a certificate
  upload         a certificate and private key that the key server made
                 (--client-cert and --client-key)`

func (f *clientFlags) add(cmd *cobra.Command, prefix string) {
	flags := cmd.Flags()
	flags.StringVar(&f.method, prefix+"method", "", "self-signed, controller-ca, csr or upload")
	flags.StringVar(&f.cert, prefix+"cert", "", "PEM `file` of a certificate and its chain, from the key server")
	flags.StringVar(&f.key, prefix+"key", "", "PEM `file` of the private key, with the method upload")
	must(cmd.RegisterFlagCompletionFunc(prefix+"method", cobra.FixedCompletions([]string{"self-signed", "controller-ca", "csr", "upload"}, cobra.ShellCompDirectiveNoFileComp)))
}

// read puts the flags into s; what is secret in s must be cleared.
func (f *clientFlags) read(s *strongroomv1.StandardSettings) error {
	s.ClientMethod = f.method
	if f.method == "" && f.cert != "" {
		s.ClientMethod = "csr"
		if f.key != "" {
			s.ClientMethod = "upload"
		}
	}
	var err error
	if f.cert != "" {
		if s.ClientCertificate, err = readSmall(f.cert); err != nil {
			return err
		}
	}
	if f.key != "" {
		s.ClientKey, err = readSmall(f.key)
	}
	return err
}

// pemMax is the largest file of certificates or of a key, in bytes.
const pemMax = 64 << 10

func readSmall(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot read the file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > pemMax {
		return nil, errs.New(errs.Invalid, "%s is no file of a certificate or key", file)
	}
	return os.ReadFile(file)
}

// credentialFlags are user name and password at the key server.
type credentialFlags struct{ user, passwordFile string }

func (f *credentialFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.user, "user", "", "user `name` that the key server gave out, if it gave one")
	cmd.Flags().StringVar(&f.passwordFile, "password-file", "", "`file` with the password; - is standard input")
}

func (env *Env) readCredential(f credentialFlags, s *strongroomv1.StandardSettings) (err error) {
	if f.user == "" {
		if f.passwordFile != "" {
			return errs.New(errs.Invalid, "a password needs a user name").WithHint("add --user NAME")
		}
		return nil
	}
	s.User = f.user
	s.Password, err = env.password("Password of "+f.user+" at the key server", f.passwordFile, false)
	return err
}

// addHostAccess adds the flag that says how hosts get keys.
func addHostAccess(cmd *cobra.Command, access *string) {
	cmd.Flags().StringVar(access, "host-access", "", "how hosts get keys: brokered or direct")
	must(cmd.RegisterFlagCompletionFunc("host-access", cobra.FixedCompletions([]string{"brokered", "direct"}, cobra.ShellCompDirectiveNoFileComp)))
}

const hostAccessHelp = `How hosts get the provider's keys (--host-access):
  brokered  from the controller only, which alone has credentials for the key
            server (the default)
  direct    a host that lacks a key also asks the key server itself, so that it
            powers VMs on after its restart while the controller is away; each
            host keeps the credentials, sealed`

func clearSettings(s *strongroomv1.StandardSettings) {
	clear(s.GetPassword())
	clear(s.GetClientKey())
}

func newProviderAddStandardCmd(env *Env) *cobra.Command {
	var servers serverFlags
	var own clientFlags
	var credential credentialFlags
	var access string
	var keys keysFlags
	cmd := &cobra.Command{
		Use:   "add-standard NAME --server HOST:PORT",
		Short: "Add a standard key provider: a key server (KMS)",
		Long: `Add a standard key provider, whose keys a key management server (KMS) makes and
keeps. It is asked over KMIP 1.1 or newer. Several servers of one provider must
share their keys; they are asked in the order given.

The certificate of each server is shown and must be confirmed: compare its
fingerprint with what the server's administrator says.

` + clientHelp + `

` + hostAccessHelp + `

The provider gives keys once "strongroom provider check NAME" has seen the
server make, give and destroy one; that is tried at once.

The key server makes a key for each VM. With --wrapping-key it makes one that wraps
the keys of all VMs, for a key server that counts or charges keys; --rotate-every
has it replaced at intervals.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider add-standard kms-1 --server kms-a.example:5696 --server kms-b.example:5696
  strongroom provider client-cert kms-1 --out kms-1-client.pem
  strongroom provider check kms-1
  strongroom provider add-standard kms-2 --server kms-a.example:5696 --wrapping-key --rotate-every 90d`,
		Args: exactArgs("the provider's name"),
		RunE: env.withClient("add the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			settings := &strongroomv1.StandardSettings{Proxy: servers.proxy, TimeoutSeconds: servers.timeout, HostAccess: access}
			defer clearSettings(settings)
			if err := own.read(settings); err != nil {
				return err
			}
			if err := keys.read(cmd, settings); err != nil {
				return err
			}
			var err error
			if settings.Servers, err = env.confirmServers(cmd.Context(), c, servers); err != nil {
				return err
			}
			if err := env.readCredential(credential, settings); err != nil {
				return err
			}
			p, err := client.Call(cmd.Context(), c.Provider().AddStandardProvider, &strongroomv1.AddStandardProviderRequest{Name: args[0], Settings: settings})
			if err != nil {
				return err
			}
			checked, err := client.Call(cmd.Context(), c.Provider().CheckProvider, &strongroomv1.CheckProviderRequest{Name: args[0]})
			if err == nil {
				return env.printDone(checked, "provider %s added, %s", args[0], checked.GetState())
			}
			// It is added all the same: mostly the key server is to be told of us first.
			if err := env.printDone(p, "provider %s added, %s", args[0], p.GetState()); err != nil {
				return err
			}
			env.notef("It gives no keys yet: %v\nGive the key server's administrator what this writes, then check again:\n  strongroom provider client-cert %s --out FILE\n  strongroom provider check %s", err, args[0], args[0])
			return nil
		}),
	}
	servers.add(cmd, true)
	credential.add(cmd)
	keys.add(cmd, false)
	own.add(cmd, "client-")
	addHostAccess(cmd, &access)
	return cmd
}

func newProviderTrustCmd(env *Env) *cobra.Command {
	var servers serverFlags
	var circular bool
	cmd := &cobra.Command{
		Use:   "trust NAME",
		Short: "Confirm the certificates of a standard provider's key servers anew",
		Long: `Show the certificates of a standard provider's key servers, and trust those that
are confirmed instead of the ones before. Use it when a server has a new
certificate, and with --server when the servers have new addresses: the list
given replaces the one before.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider trust kms-1
  strongroom provider trust kms-1 --server kms-c.example:5696`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("trust the key servers", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.Provider().GetProvider, &strongroomv1.GetProviderRequest{Name: args[0]})
			if err != nil {
				return err
			}
			ask := servers
			for _, s := range v.GetStandard().GetServers() {
				if len(servers.servers) == 0 {
					ask.servers = append(ask.servers, s.GetAddress())
				}
			}
			if ask.proxy == "" {
				ask.proxy = v.GetStandard().GetProxy()
			}
			if ask.timeout == 0 {
				ask.timeout = v.GetStandard().GetTimeoutSeconds()
			}
			settings := &strongroomv1.StandardSettings{Proxy: servers.proxy, TimeoutSeconds: servers.timeout}
			if settings.Servers, err = env.confirmServers(cmd.Context(), c, ask); err != nil {
				return err
			}
			return env.updateAndCheck(cmd.Context(), c, &strongroomv1.UpdateStandardProviderRequest{Name: args[0], Settings: settings, AllowCircular: circular})
		}),
	}
	servers.add(cmd, false)
	addAllowNewCircle(cmd, &circular)
	return cmd
}

// updateAndCheck changes a provider, and has it give a key again.
func (env *Env) updateAndCheck(ctx context.Context, c *client.Client, req *strongroomv1.UpdateStandardProviderRequest) error {
	if _, err := client.Call(ctx, c.Provider().UpdateStandardProvider, req); err != nil {
		return err
	}
	p, err := client.Call(ctx, c.Provider().CheckProvider, &strongroomv1.CheckProviderRequest{Name: req.GetName()})
	if err != nil {
		return errs.Wrap(err, "provider %s is changed, but gives no key", req.GetName())
	}
	return env.printDone(p, "provider %s changed, %s", req.GetName(), p.GetState())
}

// addAllowNewCircle adds the flag that has a provider changed although a VM would wait
// for itself then.
func addAllowNewCircle(cmd *cobra.Command, allow *bool) {
	cmd.Flags().BoolVar(allow, "allow-circular", false, "change it even if a VM could then not be started after its host was, as its keys come by way of it")
}

func newProviderUpdateCmd(env *Env) *cobra.Command {
	var credential credentialFlags
	var keys keysFlags
	var proxy, access string
	var timeout uint32
	var circular bool
	cmd := &cobra.Command{
		Use:   "update NAME",
		Short: "Change the credential, proxy, timeout, host access or keys of a standard provider",
		Long: `Change how a standard provider's key servers are reached and by whom, the user name
and password for them, and whether each VM has a key at the key server or one
wrapping key is for all. What is not given stays. Addresses and certificates are
changed with "strongroom provider trust".

When the keys change, new VMs get theirs the new way, and the others follow in the
background, while they run: "strongroom provider show" tells how many are to.

` + hostAccessHelp + `

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider update kms-1 --user app-1 --password-file pw
  strongroom provider update kms-1 --proxy none --timeout 10
  strongroom provider update kms-1 --host-access direct
  strongroom provider update kms-1 --wrapping-key --rotate-every 90d
  strongroom provider update kms-1 --key-per-vm`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("change the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			settings := &strongroomv1.StandardSettings{Proxy: proxy, TimeoutSeconds: timeout, HostAccess: access}
			defer clearSettings(settings)
			if err := keys.read(cmd, settings); err != nil {
				return err
			}
			if err := env.readCredential(credential, settings); err != nil {
				return err
			}
			return env.updateAndCheck(cmd.Context(), c, &strongroomv1.UpdateStandardProviderRequest{Name: args[0], Settings: settings, AllowCircular: circular})
		}),
	}
	credential.add(cmd)
	addAllowNewCircle(cmd, &circular)
	addHostAccess(cmd, &access)
	keys.add(cmd, true)
	cmd.Flags().StringVar(&proxy, "proxy", "", "`HOST:PORT` of an HTTP proxy in front of the servers, or none")
	cmd.Flags().Uint32Var(&timeout, "timeout", 0, "`seconds` for connecting, for the TLS handshake, and for each request, 1 to 60")
	return cmd
}

func newProviderSetClientCmd(env *Env) *cobra.Command {
	var own clientFlags
	cmd := &cobra.Command{
		Use:   "set-client NAME",
		Short: "Change how a standard provider's key server knows the controller",
		Long: `Change or renew the certificate by which the key server knows the controller.

` + strings.ReplaceAll(clientHelp, "--client-", "--") + `

With the methods self-signed and controller-ca, give the key server what
"strongroom provider client-cert" writes, then "strongroom provider check". With
csr, run this a second time with --cert and the certificate that came back.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider set-client kms-1 --method csr
  strongroom provider client-cert kms-1 --out kms-1.csr
  strongroom provider set-client kms-1 --cert kms-1.pem
  strongroom provider check kms-1`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("change the client certificate", func(cmd *cobra.Command, c *client.Client, args []string) error {
			settings := &strongroomv1.StandardSettings{}
			defer clearSettings(settings)
			if err := own.read(settings); err != nil {
				return err
			}
			if settings.GetClientMethod() == "" {
				return usageError(cmd, "%s needs --method, or --cert with the certificate that was requested", cmd.CommandPath())
			}
			p, err := client.Call(cmd.Context(), c.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: args[0], Settings: settings})
			if err != nil {
				return err
			}
			return env.printDone(p, "provider %s changed, %s", args[0], p.GetState())
		}),
	}
	own.add(cmd, "")
	return cmd
}

func newProviderClientCertCmd(env *Env) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "client-cert NAME",
		Short: "Write what a key server needs to know the controller",
		Long: `Write the file that the administrator of a key server needs: the controller's
certificate, with the method csr the certificate request, with the method
controller-ca the certificate of the controller's CA. It holds no private key.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example:           "  strongroom provider client-cert kms-1 --out kms-1-client.pem",
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("write the client certificate", func(cmd *cobra.Command, c *client.Client, args []string) error {
			id, err := client.Call(cmd.Context(), c.Provider().GetClientIdentity, &strongroomv1.GetClientIdentityRequest{Name: args[0]})
			if err != nil {
				return err
			}
			what, text := "certificate", id.GetCertificate()
			switch {
			case len(id.GetAuthority()) > 0:
				what, text = "CA's certificate", id.GetAuthority()
			case len(id.GetRequest()) > 0:
				what, text = "certificate request", id.GetRequest()
			}
			if err := os.WriteFile(out, text, 0o644); err != nil {
				return errs.New(errs.Invalid, "%w", err)
			}
			return env.printDone(id, "%s written to %s", what, out)
		}),
	}
	cmd.Flags().StringVar(&out, "out", "", "the `file` to write")
	must(cmd.MarkFlagRequired("out"))
	return cmd
}

func newProviderCheckCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "check NAME",
		Short: "Look at a provider now",
		Long: `Look at a provider now. The key servers of a standard provider are connected to,
and one makes, gives and destroys a key: this finds a wrong region or account,
which answers and gives no key. Of a native provider the hosts are put right.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example:           "  strongroom provider check kms-1",
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("check the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			p, err := client.Call(cmd.Context(), c.Provider().CheckProvider, &strongroomv1.CheckProviderRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(p, "provider %s: %s", args[0], p.GetState())
		}),
	}
}

// standardFields are what `provider show` tells of a standard provider.
func (env *Env) standardFields(s *strongroomv1.StandardProvider) []field {
	if s == nil {
		return nil
	}
	fields := []field{{"Established", env.when(s.GetEstablished())}, {"Client method", s.GetClientMethod()}}
	if c := s.GetClientCertificate(); c != nil {
		fields = append(fields, field{"Client certificate", fmt.Sprintf("%s, valid to %s", c.GetFingerprint(), env.when(c.GetNotAfter()))})
	}
	if s.GetUser() != "" {
		fields = append(fields, field{"User", s.GetUser()})
	}
	if s.GetProxy() != "" {
		fields = append(fields, field{"Proxy", s.GetProxy()})
	}
	fields = append(fields, field{"Timeout", fmt.Sprintf("%d s", s.GetTimeoutSeconds())}, field{"Host access", s.GetHostAccess()})
	fields = append(fields, env.wrappingFields(s.GetWrapping())...)
	for _, server := range s.GetServers() {
		state := server.GetStatus()
		if server.GetProblem() != "" {
			state += " " + server.GetProblem()
		}
		fields = append(fields,
			field{"Key server", server.GetAddress() + ", " + state},
			field{"  connected", yesNo(server.GetConnected())},
			field{"  client trusts server", yesNo(server.GetClientTrustServer())},
			field{"  server trusts client", yesNo(server.GetServerTrustClient())},
			field{"  trusted certificate", server.GetFingerprint()},
		)
		if c := server.GetCertificate(); c != nil {
			fields = append(fields, field{"  valid to", env.when(c.GetNotAfter())})
		}
		if server.GetMessage() != "" {
			fields = append(fields, field{"  message", server.GetMessage()})
		}
	}
	return fields
}
