// Package daemon is what the roles that run as services have in common: they
// read a strict configuration file, keep their memory to themselves, and serve
// until they are told to end.
//
// Roles do not import each other; this package, below them, knows none of them.
// All functions are safe for concurrent use.
package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// configMax bounds a configuration file, in bytes.
	configMax = 64 << 10
	// shutdownTimeout is how long requests that are running get at the end.
	shutdownTimeout = 10 * time.Second

	// HeaderTimeout bounds a request's header, so that a silent client costs a
	// connection for a short time only.
	HeaderTimeout = 10 * time.Second
	// HeaderMax bounds a request's header, in bytes.
	HeaderMax = 64 << 10
)

// LoadConfig reads the configuration file of a role, at most 64 KiB, and has parse
// decode ([DecodeConfig]) and check it. role is its name in errors.
func LoadConfig[Config any](path, role string, parse func(text []byte) (Config, error)) (Config, error) {
	text, err := readConfig(path)
	if err != nil {
		return *new(Config), fmt.Errorf("cannot read %s configuration: %w", role, err)
	}
	c, err := parse(text)
	if err != nil {
		return *new(Config), fmt.Errorf("cannot read %s configuration %s: %w", role, path, err)
	}
	return c, nil
}

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, configMax+1))
	if err == nil && len(text) > configMax {
		err = fmt.Errorf("%s has more than %d bytes", path, configMax)
	}
	return text, err
}

// DecodeConfig decodes TOML into a configuration. A field that it does not have
// is an error: a misspelt one would silently not hold.
func DecodeConfig(text []byte, into any) error {
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(into)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		line, _ := unknown.Errors[0].Position()
		return fmt.Errorf("line %d: unknown field %.64q", line, strings.Join(unknown.Errors[0].Key(), "."))
	}
	return err
}

// CheckAddresses checks where a role listens and under which address others
// reach it, both "host:port", and returns the latter; if it is empty, listen
// stands for both.
func CheckAddresses(listen, advertise string) (string, error) {
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return "", fmt.Errorf("listen %q is not host:port", listen)
	}
	if advertise == "" {
		advertise = listen
	}
	host, port, err := net.SplitHostPort(advertise)
	if err != nil || host == "" || port == "0" || net.ParseIP(host).IsUnspecified() {
		return "", fmt.Errorf("advertise %q is not an address that others can reach; set advertise = \"host:port\"", advertise)
	}
	return advertise, nil
}

// Harden keeps the memory of this process out of core dumps and from other
// processes of the same user.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	return nil
}

// Serve serves on l, with TLS if the server has a configuration for it, until
// ctx ends, and returns nil then. The requests' contexts end with ctx; requests
// get a while to come to an end.
func Serve(ctx context.Context, server *http.Server, l net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	server.BaseContext = func(net.Listener) context.Context { return ctx }
	group.Go(func() error {
		var err error
		if server.TLSConfig != nil {
			err = server.ServeTLS(l, "", "")
		} else {
			err = server.Serve(l)
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
	group.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if err := server.Shutdown(grace); err != nil {
			return errors.Join(err, server.Close())
		}
		return nil
	})
	return group.Wait()
}
