package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"strongroom/test/guest"
	"strongroom/test/lab"
)

// start is how long something takes to be there, as medians in milliseconds.
type start struct {
	What         string  `json:"what"`
	Milliseconds float64 `json:"ms"`
	Rounds       int     `json:"rounds"`
}

// measureStarts times the real binary: a controller's first start and later
// ones until it accepts connections, and power-on, beside QEMU's own start in
// it, as the host logs both.
func measureStarts(ctx context.Context, o options, binary string) (_ []start, err error) {
	dir, err := os.MkdirTemp("", "sr-bench-") // short: socket paths are limited
	if err != nil {
		return nil, err
	}
	l := lab.New(dir, binary)
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	defer l.Close()
	times := map[string][]float64{}
	const (
		first = "controller, first start, until it accepts connections"
		again = "controller, later start"
		whole = "power-on of a VM with an encrypted disk"
		qemu  = "of which QEMU's own start"
		added = "added to QEMU's start"
	)
	took := func(what string, d time.Duration) { times[what] = append(times[what], float64(d)/1e6) }

	var c *lab.Controller
	for round := range o.rounds {
		if c, err = l.StartController(ctx, fmt.Sprint("c", round)); err != nil {
			return nil, err
		}
		took(first, c.ReadyAfter)
		if err := c.Stop(); err != nil {
			return nil, err
		}
		if err := c.Start(); err != nil {
			return nil, err
		}
		took(again, c.ReadyAfter)
		if round < o.rounds-1 {
			if err := c.Stop(); err != nil {
				return nil, err
			}
		}
	}

	host, err := startVM(ctx, l, c)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, host.Crash()) }()
	for range o.rounds {
		if _, err := c.Must(ctx, "vm", "power-on", "web-1"); err != nil {
			return nil, err
		}
		if _, err := c.Must(ctx, "vm", "power-off", "web-1", "--hard"); err != nil {
			return nil, err
		}
	}
	log, err := os.ReadFile(host.Log)
	if err != nil {
		return nil, err
	}
	for _, m := range poweredOn.FindAllStringSubmatch(string(log), -1) {
		all, err := time.ParseDuration(m[1])
		if err != nil {
			return nil, err
		}
		own, err := time.ParseDuration(m[2])
		if err != nil {
			return nil, err
		}
		took(whole, all)
		took(qemu, own)
		took(added, all-own)
	}
	var starts []start
	for _, what := range []string{first, again, whole, qemu, added} {
		if len(times[what]) != o.rounds {
			return nil, fmt.Errorf("%s was measured %d times instead of %d", what, len(times[what]), o.rounds)
		}
		starts = append(starts, start{what, median(times[what]), o.rounds})
	}
	return starts, nil
}

var poweredOn = regexp.MustCompile(`msg="VM powered on" .*took=(\S+) qemu_took=(\S+)`)

// startVM makes a host with a VM that has an encrypted disk.
func startVM(ctx context.Context, l *lab.Lab, c *lab.Controller) (*lab.Host, error) {
	image, err := guest.Build(ctx, guest.Workload("benchmark"))
	if err != nil {
		return nil, err
	}
	if _, err := c.Must(ctx, "cluster", "create", "lab"); err != nil {
		return nil, err
	}
	host, err := c.StartHost(ctx, "host-1", "lab")
	if err != nil {
		return nil, err
	}
	store := filepath.Join(l.Dir, "ds1")
	if err := os.Mkdir(store, 0o700); err != nil {
		return nil, err
	}
	for name, source := range map[string]string{"vmlinuz": image.Kernel, "initrd": image.Initrd} {
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(store, name), data, 0o600); err != nil {
			return nil, err
		}
	}
	for _, command := range []string{
		"datastore create ds1 --cluster lab --path " + store,
		"provider create-native kp-1",
		"provider backup kp-1 --no-password --out " + filepath.Join(l.Dir, "kp-1.p12"),
		"provider default kp-1",
		"vm create web-1 --datastore ds1 --memory 192M --disk 192M --encrypt --kernel vmlinuz --initrd initrd --append",
	} {
		args := strings.Fields(command)
		if args[len(args)-1] == "--append" {
			args = append(args, image.Append)
		}
		if _, err := c.Must(ctx, args...); err != nil {
			return nil, err
		}
	}
	return host, nil
}

func median(values []float64) float64 {
	slices.Sort(values)
	return (values[(len(values)-1)/2] + values[len(values)/2]) / 2
}
