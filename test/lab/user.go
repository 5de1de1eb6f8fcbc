package lab

import (
	"context"
	"path/filepath"
)

// User is a command line that belongs to one of a controller's users.
type User struct {
	Name       string
	controller *Controller
}

// User returns the command line of a user, who has yet to log in.
func (c *Controller) User(name string) *User { return &User{Name: name, controller: c} }

// CLI runs a command as that user.
func (u *User) CLI(ctx context.Context, args ...string) (Result, error) {
	return u.controller.lab.run(ctx, filepath.Join(u.controller.dir, "cli-"+u.Name+".toml"), args...)
}

// Login logs the user in with the password in a file.
func (u *User) Login(ctx context.Context, passwordFile string) (Result, error) {
	return u.CLI(ctx, "login", "--server", "https://"+u.controller.Address, "--ca", u.controller.CA(), "--user", u.Name, "--password-file", passwordFile)
}

// CA is the file with the certificate authority that the controller proves.
func (c *Controller) CA() string { return filepath.Join(c.dir, "data", "ca.pem") }
