package cli

import (
	"context"
	"crypto/x509"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newLoginCmd(env *Env) *cobra.Command {
	var user, passwordFile, fingerprint string
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Log in to a controller or a key management server",
		Long: `Log in to a controller, or to a key management server, as a local user, and
remember it, its certificate authority and the session for the commands that
follow, in a file that only you can read.

The first time, say whom to trust: --ca FILE with the server's ca.pem, or
--ca-fingerprint with its fingerprint. At a terminal you are otherwise shown the
fingerprint and asked.`,
		Example: `  strongroom login --server https://controller.example:7443 --user administrator --ca ca.pem
  strongroom login --server https://controller.example:7443 --ca-fingerprint sha256:9f86d0...`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(env.login(cmd.Context(), user, passwordFile, fingerprint), "log in")
		},
	}
	f := cmd.Flags()
	f.StringVar(&user, "user", "", "who logs in (default: the last one, else administrator)")
	f.StringVar(&passwordFile, "password-file", "", "`file` with the password; - is standard input")
	f.StringVar(&fingerprint, "ca-fingerprint", "", "trust the authority with this fingerprint, `sha256:HEX`")
	return cmd
}

func (env *Env) login(ctx context.Context, user, passwordFile, fingerprint string) error {
	logins, path, err := env.logins()
	if err != nil {
		return err
	}
	login := client.Login{URL: env.serverURL()}
	if known := logins.Find(login.URL); known != nil {
		login = *known
	}
	if login.URL == "" {
		return errs.New(errs.Invalid, "no server is named").WithHint("strongroom login --server https://HOST:PORT")
	}
	if user != "" {
		login.User = user
	}
	if login.User == "" {
		login.User = "administrator"
	}
	if err := env.establishTrust(ctx, &login, fingerprint); err != nil {
		return err
	}
	c, err := env.NewClient(client.Config{Server: login.URL, CA: []byte(login.CA)})
	if err != nil {
		return err
	}
	defer c.Close()
	password, err := env.password("Password of "+login.User, passwordFile, false)
	if err != nil {
		return err
	}
	defer clear(password)
	res, err := client.Call(ctx, c.Session().Login, &strongroomv1.LoginRequest{User: login.User, Password: password})
	if err != nil {
		return err
	}
	login.Token, login.Expires = res.GetToken(), res.GetExpires().AsTime()
	logins.Set(login)
	if err := logins.Write(path); err != nil {
		return err
	}
	env.donef("logged in to %s as %s until %s", login.URL, login.User, env.when(res.GetExpires()))
	return nil
}

// establishTrust sets login.CA: from a file, from the server if its fingerprint
// is right or a person says so, or as it was.
func (env *Env) establishTrust(ctx context.Context, login *client.Login, fingerprint string) error {
	ca, err := env.caPEM()
	switch {
	case err != nil:
		return err
	case ca != nil && fingerprint != "":
		return errs.New(errs.Invalid, "--ca and --ca-fingerprint exclude each other")
	case ca != nil:
		if !x509.NewCertPool().AppendCertsFromPEM(ca) {
			return errs.New(errs.Invalid, "the file of the certificate authority holds no PEM certificate")
		}
		login.CA = string(ca)
		return nil
	case strings.HasPrefix(login.URL, "unix:"), login.CA != "" && fingerprint == "":
		return nil
	}
	if fingerprint != "" {
		if fingerprint, err = client.ParseFingerprint(fingerprint); err != nil {
			return err
		}
	} else if !env.Interactive {
		return errs.New(errs.Denied, "the certificate authority of %s is not known here", login.URL).
			WithHint("use --ca FILE or --ca-fingerprint sha256:HEX")
	}
	cert, pem, err := client.FetchCA(ctx, login.URL)
	if err != nil {
		return err
	}
	presented := client.Fingerprint(cert)
	if fingerprint == "" {
		env.notef("The certificate authority of %s is not known here. Its fingerprint is\n  %s", login.URL, presented)
		if err := env.confirm(false, "Is this the fingerprint of the right server?"); err != nil {
			return err
		}
	} else if presented != fingerprint {
		return errs.New(errs.Denied, "the certificate authority of %s has the fingerprint %s, not the one given: somebody may be in between", login.URL, presented)
	}
	login.CA = string(pem)
	return nil
}

func newLogoutCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "logout",
		Short: "End the session",
		Long: `End the session on the server and forget it here. Whom to trust is remembered.
API tokens stay valid.`,
		Example: "  strongroom logout",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(env.logout(cmd.Context()), "log out")
		},
	}
}

func (env *Env) logout(ctx context.Context) error {
	logins, path, err := env.logins()
	if err != nil {
		return err
	}
	login := logins.Find(env.serverURL())
	if login == nil || login.Token == "" {
		return errs.New(errs.InvalidState, "nobody is logged in from here")
	}
	c, err := env.NewClient(client.Config{Server: login.URL, CA: []byte(login.CA), Token: login.Token})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = client.Call(ctx, c.Session().Logout, &strongroomv1.LogoutRequest{})
	if err != nil && errs.KindOf(err) != errs.Denied { // denied: the session had ended
		return err
	}
	login.Token = ""
	if err := logins.Write(path); err != nil {
		return err
	}
	env.donef("logged out of %s", login.URL)
	return nil
}

func newWhoAmICmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "whoami",
		Short: "Show who is logged in, and what they may do",
		Long: `Show the server, the user, the roles and the privileges that commands are run
with. It changes nothing, and needs a session only.`,
		Example: "  strongroom whoami",
		Args:    noArgs,
		RunE: env.withClient("ask who is logged in", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Session().WhoAmI, &strongroomv1.WhoAmIRequest{})
			if err != nil {
				return err
			}
			return env.printOne(res, append([]field{
				{"Server", c.Server()},
				{"Version", res.GetServerVersion()},
				{"User", res.GetPrincipal()},
				{"Roles", strings.Join(res.GetRoles(), ", ")},
			}, privilegeFields(res.GetPrivileges())...))
		}),
	}
}

// privilegeFields groups privileges, which are sorted, by what they are about.
func privilegeFields(all []string) []field {
	var fields []field
	for _, p := range all {
		i := strings.LastIndexByte(p, '.')
		if i < 0 {
			i = 0
		}
		group, name := p[:i], strings.TrimPrefix(p[i:], ".")
		if n := len(fields); n > 0 && fields[n-1].title == group {
			fields[n-1].text += ", " + name
			continue
		}
		fields = append(fields, field{group, name})
	}
	return fields
}
