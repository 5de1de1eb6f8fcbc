package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"time"
)

// load is what a generator does.
type load struct {
	name   string
	write  bool
	random bool
	bytes  int // of a request
	depth  int
}

// loads are what is measured: 4 KiB at random at depth 1, 32 and 128, and 1 MiB in
// sequence at depth 8.
func loads() []load {
	return []load{
		{"4 KiB random read, depth 1", false, true, 4096, 1},
		{"4 KiB random write, depth 1", true, true, 4096, 1},
		{"4 KiB random read, depth 32", false, true, 4096, 32},
		{"4 KiB random write, depth 32", true, true, 4096, 32},
		{"4 KiB random read, depth 128", false, true, 4096, 128},
		{"4 KiB random write, depth 128", true, true, 4096, 128},
		{"1 MiB sequential read, depth 8", false, false, 1 << 20, 8},
		{"1 MiB sequential write, depth 8", true, false, 1 << 20, 8},
	}
}

// sample is one measurement.
type sample struct {
	requests float64 // per second
	p99      float64 // µs; 0: not measured
	cpu      float64 // processor seconds of the server per GiB moved
	own      float64 // processor time of our generator, as a share of the time
}

// generator drives one server at a time with requests from one thread.
type generator struct {
	transport
	began []time.Time // by number of the request
	took  []time.Duration
	rng   *rand.Rand
}

// dial connects the generator over NBD, or over vhost-user.
func dial(ctx context.Context, s *server, kind string, l load) (*generator, error) {
	connect, socket := dialNBD, s.socket
	if kind == vhostGenerator {
		connect, socket = dialVhost, s.vhost
	}
	t, err := connect(ctx, socket, l.bytes, l.depth)
	if err != nil {
		return nil, err
	}
	return &generator{transport: t, began: make([]time.Time, l.depth), took: make([]time.Duration, 0, 1<<20), rng: rand.New(rand.NewPCG(1, 2))}, nil
}

// run keeps l.depth requests under way for the duration, then waits for the
// last ones. It returns their number and the time they took.
func (g *generator) run(ctx context.Context, l load, duration time.Duration) (int, time.Duration, error) {
	g.took = g.took[:0]
	slots := int(g.size()) / l.bytes
	start := time.Now()
	now := start
	for sent, done := 0, 0; ; {
		for now.Sub(start) < duration && g.idle() > 0 {
			slot := sent % slots
			if l.random {
				slot = g.rng.IntN(slots)
			}
			g.began[g.start(l.write, int64(slot)*int64(l.bytes))] = now
			sent++
		}
		if done == sent {
			return done, now.Sub(start), ctx.Err()
		}
		n, err := g.next()
		if err != nil {
			return 0, 0, err
		}
		// One look at the clock serves the next request as well.
		now = time.Now()
		if len(g.took) < cap(g.took) {
			g.took = append(g.took, now.Sub(g.began[n]))
		}
		done++
	}
}

// withOurs measures a load with our generator, over NBD or vhost-user.
func withOurs(ctx context.Context, s *server, kind string, l load, duration time.Duration) (sample, error) {
	g, err := dial(ctx, s, kind, l)
	if err != nil {
		return sample{}, err
	}
	defer g.close()
	if _, _, err := g.run(ctx, l, duration/10); err != nil {
		return sample{}, err
	}
	before, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	own, err := ownTime()
	if err != nil {
		return sample{}, err
	}
	n, took, err := g.run(ctx, l, duration)
	if err != nil {
		return sample{}, err
	}
	ownAfter, err := ownTime()
	if err != nil {
		return sample{}, err
	}
	after, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	slices.Sort(g.took)
	return sample{
		requests: float64(n) / took.Seconds(),
		p99:      float64(g.took[len(g.took)*99/100].Nanoseconds()) / 1000,
		cpu:      (after - before).Seconds() / gib(n, l),
		own:      (ownAfter - own).Seconds() / took.Seconds(),
	}, nil
}

func gib(requests int, l load) float64 { return float64(requests) * float64(l.bytes) / (1 << 30) }

// ownTime returns the processor time of this process.
func ownTime() (time.Duration, error) { return processorTime(os.Getpid()) }

// fill writes the whole image once, so that nothing is measured on holes.
func fill(ctx context.Context, s *server) error {
	l := load{name: "fill", write: true, bytes: 1 << 20, depth: 8}
	g, err := dial(ctx, s, ownGenerator, l)
	if err != nil {
		return err
	}
	defer g.close()
	for off := int64(0); off < g.size(); { // of whole MiB
		for g.idle() > 0 && off < g.size() {
			g.start(true, off)
			off += int64(l.bytes)
		}
		if _, err := g.next(); err != nil {
			return err
		}
	}
	for g.idle() < l.depth {
		if _, err := g.next(); err != nil {
			return err
		}
	}
	return nil
}

// withFio measures a load with fio's nbd engine.
func withFio(ctx context.Context, s *server, l load, size int64, duration time.Duration) (sample, error) {
	rw := map[bool]string{false: "read", true: "write"}[l.write]
	if l.random {
		rw = "rand" + rw
	}
	before, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	cmd := exec.CommandContext(ctx, "fio", fioArguments(s.socket, rw, l, size, duration)...)
	out, err := cmd.Output()
	if err != nil {
		return sample{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	after, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	return parseFio(out, l, after-before)
}

func fioArguments(socket, rw string, l load, size int64, duration time.Duration) []string {
	return []string{
		"--name=bench", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket, "--rw=" + rw,
		fmt.Sprintf("--bs=%d", l.bytes), fmt.Sprintf("--iodepth=%d", l.depth), fmt.Sprintf("--size=%d", size),
		"--time_based", fmt.Sprintf("--runtime=%dms", duration.Milliseconds()), "--randrepeat=1", "--output-format=json",
	}
}

func parseFio(out []byte, l load, cpu time.Duration) (sample, error) {
	type side struct {
		IOPS  float64 `json:"iops"`
		Total float64 `json:"total_ios"`
		CLat  struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	// fio prints warnings before its JSON.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return sample{}, fmt.Errorf("cannot read fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return sample{}, fmt.Errorf("fio failed: %s", out)
	}
	r := report.Jobs[0].Read
	if l.write {
		r = report.Jobs[0].Write
	}
	if r.IOPS == 0 || r.Total == 0 {
		return sample{}, fmt.Errorf("fio has done nothing: %s", out)
	}
	return sample{
		requests: r.IOPS,
		p99:      r.CLat.Percentile["99.000000"] / 1000,
		cpu:      cpu.Seconds() / gib(int(r.Total), l),
	}, nil
}
