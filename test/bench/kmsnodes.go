package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"strongroom/test/port"
)

// prepareNodes starts a key management server of ours on three nodes, all on this
// machine and its disk. Clients ask the first one.
func prepareNodes(ctx context.Context, dir, binary string) (*kmsServer, error) {
	dir = filepath.Join(dir, "n")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s, err := prepareOurs(ctx, dir, binary)
	if err != nil {
		return nil, err
	}
	// Alone it makes the first client's certificate.
	begin := func(p *exec.Cmd) (*exec.Cmd, error) {
		p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		return p, p.Start()
	}
	if _, err = begin(s.process); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	if err = until(ctx, func() error { _, err := os.Stat(filepath.Join(dir, "kms", "client.pem")); return err }); err != nil {
		return nil, err
	}
	if err = s.stop(); err != nil {
		return nil, err
	}
	first := ""
	for i, name := range []string{"kms", "b", "c"} {
		var addresses [3]string
		for i := range addresses {
			if addresses[i], err = port.Reserve(); err != nil {
				return nil, err
			}
		}
		if name == "kms" {
			addresses[0], first = s.addr, addresses[1]
		}
		config := filepath.Join(dir, name+".toml")
		text := fmt.Sprintf("data_dir = %q\nlisten = %q\n[cluster]\nname = \"node-%d\"\nlisten = %q\nstore_listen = %q\n",
			filepath.Join(dir, name), addresses[0], i+1, addresses[1], addresses[2])
		if err = os.WriteFile(config, []byte(text), 0o600); err != nil {
			return nil, err
		}
		if name != "kms" {
			if err = join(ctx, binary, dir, config, first); err != nil {
				return nil, err
			}
		}
		var p *exec.Cmd
		p, err = begin(exec.Command(binary, "kms", "run", "--config", config))
		if err != nil {
			return nil, err
		}
		if name == "kms" {
			s.process = p
		} else {
			s.others = append(s.others, p)
		}
		socket := filepath.Join(dir, name, "kms.sock")
		if err = until(ctx, func() error { return execute(ctx, binary, "--server", "unix:"+socket, "kms", "member", "ls") }); err != nil {
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
	}
	s.name = "strongroom kms, three nodes"
	return s, nil
}

// join makes a node with that configuration one of the KMS whose first node is
// reached at an address.
func join(ctx context.Context, binary, dir, config, first string) error {
	token, err := exec.CommandContext(ctx, binary, "--server", "unix:"+filepath.Join(dir, "kms", "kms.sock"), "kms", "member", "join-token").Output()
	if err != nil {
		return fmt.Errorf("cannot make a join token: %w", err)
	}
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, token, 0o600); err != nil {
		return err
	}
	return execute(ctx, binary, "kms", "join", "--config", config, "--node", first, "--token-file", file)
}

// execute runs a command; what it says is part of the error.
func execute(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w: %s", args, err, out)
	}
	return nil
}

// until repeats f until it succeeds, for [kmsStartMax].
func until(ctx context.Context, f func() error) error {
	for begin := time.Now(); ; {
		err := f()
		if err == nil || time.Since(begin) > kmsStartMax {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// limitOperations gives the first application of a server in dir, and its group,
// quotas that are never reached, or takes them away.
func limitOperations(ctx context.Context, binary, dir string, on bool) error {
	for _, of := range [][]string{{"group", "quota", "default"}, {"app", "quota", "first"}} {
		args := append([]string{"--server", "unix:" + filepath.Join(dir, "kms", "kms.sock"), "kms"}, of...)
		if on {
			args = append(args, "--operations", "1000000000000", "--period", "1h")
		}
		if err := execute(ctx, binary, args...); err != nil {
			return err
		}
	}
	return nil
}
