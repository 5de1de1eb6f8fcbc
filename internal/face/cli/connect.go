package cli

import (
	"os"

	"github.com/spf13/cobra"

	"strongroom/client"
	"strongroom/internal/errs"
)

// serverURL returns the server that --server or the environment names, or "".
func (env *Env) serverURL() string {
	if env.flags.server != "" {
		return env.flags.server
	}
	return env.Getenv("STRONGROOM_SERVER")
}

// logins returns the logins and the path of their file.
func (env *Env) logins() (*client.Logins, string, error) {
	path, err := client.LoginsPath(env.Getenv)
	if err != nil {
		return nil, "", err
	}
	l, err := client.ReadLogins(path)
	if err != nil {
		return nil, "", cannot(err, "read the logins")
	}
	return l, path, nil
}

// caPEM returns the certificate authority that --ca or the environment names,
// or nil.
func (env *Env) caPEM() ([]byte, error) {
	file := env.flags.caFile
	if file == "" {
		file = env.Getenv("STRONGROOM_CA")
	}
	if file == "" {
		return nil, nil
	}
	ca, err := os.ReadFile(file)
	if err != nil {
		return nil, errs.New(errs.Invalid, "cannot read the certificate authority: %w", err)
	}
	return ca, nil
}

// connect returns a client of the server that the command is meant for. The
// caller closes it.
func (env *Env) connect() (*client.Client, error) {
	logins, _, err := env.logins()
	if err != nil {
		return nil, err
	}
	cfg := client.Config{Server: env.serverURL()}
	if known := logins.Find(cfg.Server); known != nil {
		cfg.Server, cfg.CA, cfg.Token = known.URL, []byte(known.CA), known.Token
	}
	if cfg.Server == "" {
		return nil, errs.New(errs.Invalid, "no server is known: nobody has logged in from here").
			WithHint("strongroom login --server https://HOST:PORT")
	}
	if ca, err := env.caPEM(); err != nil {
		return nil, err
	} else if ca != nil {
		cfg.CA = ca
	}
	if token := env.Getenv("STRONGROOM_TOKEN"); token != "" {
		cfg.Token = token
	}
	return env.NewClient(cfg)
}

// withClient makes a RunE of a function that needs a client. what names the
// operation: "list the VMs".
func (env *Env) withClient(what string, run func(cmd *cobra.Command, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := env.connect()
		if err != nil {
			return cannot(err, "%s", what)
		}
		defer c.Close()
		return cannot(run(cmd, c, args), "%s", what)
	}
}
