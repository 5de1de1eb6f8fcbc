package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
	"strongroom/internal/role/controller"
	"strongroom/internal/role/host"
)

// Names and addresses of `strongroom dev`, which is for one machine and one
// person.
const (
	devCluster    = "dev"
	devHost       = "local"
	devDatastore  = "local"
	devController = "127.0.0.1:7443"
	devAgent      = "127.0.0.1:7444"
	devTimeout    = 30 * time.Second
)

// runDev runs a controller and one host in this process. The first time it
// makes a cluster, joins the host to it and makes a datastore; each time it logs
// the caller in.
func runDev(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	for _, address := range []string{devController, devAgent} {
		if listens(address) {
			return errs.New(errs.InvalidState, "something listens at %s already: another `strongroom dev`?", address)
		}
	}
	datastore := filepath.Join(dir, "datastore")
	if err := os.MkdirAll(datastore, 0o700); err != nil {
		return err
	}
	logFile, err := os.OpenFile(filepath.Join(dir, "strongroom.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	log := slog.New(slog.NewTextHandler(logFile, nil))
	slog.SetDefault(log)

	controllerConfig, err := controller.ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = %q\n", filepath.Join(dir, "controller"), devController))
	if err != nil {
		return err
	}
	hostConfig, err := host.ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = %q\n", filepath.Join(dir, "host"), devAgent))
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return controller.Run(ctx, controllerConfig, log) })
	group.Go(func() error {
		c, err := devLogin(ctx, controllerConfig.DataDir)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := devJoin(ctx, c, hostConfig); err != nil {
			return err
		}
		group.Go(func() error { return host.Run(ctx, hostConfig, log) })
		if err := devPopulate(ctx, c, datastore); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, `strongroom runs; its log is %s
datastore %s is %s
next: strongroom provider create-native kp-1
      strongroom provider backup kp-1 --out kp-1.p12
      strongroom provider default kp-1
      strongroom vm create web-1 --datastore %s --disk 1G --encrypt
`, logFile.Name(), devDatastore, datastore, devDatastore)
		return nil
	})
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// devLogin waits for the controller, logs in as its first administrator, and
// leaves the login where the command line finds it.
func devLogin(ctx context.Context, dataDir string) (*client.Client, error) {
	wait, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	for !listens(devController) {
		select {
		case <-wait.Done():
			return nil, errs.New(errs.Unavailable, "the controller did not start: %w", context.Cause(wait))
		case <-time.After(20 * time.Millisecond):
		}
	}
	ca, err := os.ReadFile(filepath.Join(dataDir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	password, err := os.ReadFile(filepath.Join(dataDir, "initial-admin-password"))
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot log in: %w", err).
			WithHint("the first password was changed; use strongroom login and `controller run`, `host run` instead of dev")
	}
	defer clear(password)
	config := client.Config{Server: "https://" + devController, CA: ca}
	c, err := client.New(config)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	session, err := client.Call(wait, c.Session().Login, &strongroomv1.LoginRequest{User: "administrator", Password: password})
	if err != nil {
		return nil, err
	}
	path, err := client.LoginsPath(os.Getenv)
	if err != nil {
		return nil, err
	}
	logins, err := client.ReadLogins(path)
	if err != nil {
		return nil, err
	}
	logins.Set(client.Login{URL: config.Server, CA: string(ca), User: "administrator", Token: session.GetToken(), Expires: session.GetExpires().AsTime()})
	if err := logins.Write(path); err != nil {
		return nil, err
	}
	config.Token = session.GetToken()
	return client.New(config)
}

func listens(address string) bool {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// devJoin makes this machine the host of the cluster, unless it is already.
func devJoin(ctx context.Context, c *client.Client, cfg host.Config) error {
	_, err := client.Call(ctx, c.Cluster().CreateCluster, &strongroomv1.CreateClusterRequest{Name: devCluster})
	if err != nil && errs.KindOf(err) != errs.Exists {
		return err
	}
	if _, err := client.Call(ctx, c.Host().GetHost, &strongroomv1.GetHostRequest{Name: devHost}); errs.KindOf(err) != errs.NotFound {
		return err
	}
	token, err := client.Call(ctx, c.Host().CreateJoinToken, &strongroomv1.CreateJoinTokenRequest{Cluster: devCluster})
	if err != nil {
		return err
	}
	return host.Join(ctx, cfg, host.JoinRequest{Controller: devController, Token: token.GetToken(), Name: devHost})
}

// devPopulate makes the datastore when the host answers.
func devPopulate(ctx context.Context, c *client.Client, path string) error {
	wait, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	for {
		h, err := client.Call(wait, c.Host().GetHost, &strongroomv1.GetHostRequest{Name: devHost})
		if err != nil {
			return err
		}
		if h.GetConnectionState() == "connected" {
			break
		}
		select {
		case <-wait.Done():
			return errs.New(errs.Unavailable, "the host did not come up: %w", context.Cause(wait))
		case <-time.After(50 * time.Millisecond):
		}
	}
	_, err := client.Call(ctx, c.Datastore().CreateDatastore, &strongroomv1.CreateDatastoreRequest{Name: devDatastore, Cluster: devCluster, Path: path})
	if err != nil && errs.KindOf(err) != errs.Exists {
		return err
	}
	return nil
}
