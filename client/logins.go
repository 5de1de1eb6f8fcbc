package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pelletier/go-toml/v2"

	"strongroom/internal/errs"
)

// loginsMax bounds the file of logins, in bytes.
const loginsMax = 1 << 20

// Logins is the CLI's memory of servers: whom it trusts and as whom it is
// logged in. It is stored as TOML, readable by its owner only, because it
// holds tokens.
type Logins struct {
	// Current is the URL of the server that commands go to.
	Current string `toml:"current" comment:"The server that commands go to."`
	// Servers, one for each URL.
	Servers []Login `toml:"server"`
}

// Login is what is known about one server.
type Login struct {
	// URL is "https://HOST:PORT" or "unix:/PATH".
	URL string `toml:"url" comment:"https://HOST:PORT or unix:/PATH."`
	// CA is the PEM of the certificate authority that the server must prove.
	CA string `toml:"ca,multiline" comment:"The certificate authority that the server must prove, PEM."`
	// User is who logged in.
	User string `toml:"user" comment:"Who logged in."`
	// Token is the session; empty after a logout.
	Token string `toml:"token" comment:"The session. Whoever has it is that user until it expires."`
	// Expires is when the session ends.
	Expires time.Time `toml:"expires"`
}

// LoginsPath returns where the logins of the calling user are:
// $STRONGROOM_CONFIG, or config.toml in the folder strongroom of the user's
// configuration folder.
func LoginsPath(getenv func(string) string) (string, error) {
	if p := getenv("STRONGROOM_CONFIG"); p != "" {
		return p, nil
	}
	if d := getenv("XDG_CONFIG_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "strongroom", "config.toml"), nil
	}
	home := getenv("HOME")
	if home == "" {
		return "", errs.New(errs.Invalid, "cannot find the configuration: neither HOME nor STRONGROOM_CONFIG is set")
	}
	return filepath.Join(home, ".config", "strongroom", "config.toml"), nil
}

// ReadLogins returns the logins in the file at path, or none if there is no
// file. It refuses a file that others may read.
func ReadLogins(path string) (*Logins, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Logins{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, errs.New(errs.Denied, "%s holds tokens, and others than its owner may read it (mode %04o)", path, info.Mode().Perm()).
			WithHint("chmod 600 %s", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, loginsMax+1))
	if err != nil {
		return nil, err
	}
	l, err := ParseLogins(text)
	return l, errs.Wrap(err, "%s", path)
}

// ParseLogins decodes the file's text. Unknown fields, a server that is named
// twice and a current server that is not there are errors of kind
// [errs.Invalid].
func ParseLogins(text []byte) (*Logins, error) {
	if len(text) > loginsMax {
		return nil, errs.New(errs.Invalid, "longer than %d bytes", loginsMax)
	}
	var l Logins
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&l); err != nil {
		return nil, errs.New(errs.Invalid, "%v", err)
	}
	seen := make(map[string]bool, len(l.Servers))
	for _, s := range l.Servers {
		if s.URL == "" || seen[s.URL] {
			return nil, errs.New(errs.Invalid, "server %q is not named or named twice", s.URL)
		}
		seen[s.URL] = true
	}
	if l.Current != "" && !seen[l.Current] {
		return nil, errs.New(errs.Invalid, "the current server %q is not among the servers", l.Current)
	}
	return &l, nil
}

// Find returns what is known about the server with this URL; an empty URL
// means the current server. It returns nil if nothing is known.
func (l *Logins) Find(url string) *Login {
	if url == "" {
		url = l.Current
	}
	i := slices.IndexFunc(l.Servers, func(s Login) bool { return s.URL == url && url != "" })
	if i < 0 {
		return nil
	}
	return &l.Servers[i]
}

// Set replaces or adds what is known about login.URL and makes it current.
func (l *Logins) Set(login Login) {
	if old := l.Find(login.URL); old != nil {
		*old = login
	} else {
		l.Servers = append(l.Servers, login)
	}
	l.Current = login.URL
}

// Write stores l at path, mode 0600, in place of what was there: a reader sees
// the old file or the new one, whole. Missing folders are made, mode 0700.
func (l *Logins) Write(path string) (err error) {
	text, err := toml.Marshal(l)
	if err != nil {
		return fmt.Errorf("encode logins: %w", err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".config-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
