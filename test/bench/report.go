package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// The generators.
const (
	ownGenerator   = "own" // over NBD
	fioGenerator   = "fio" // over NBD
	vhostGenerator = "own, vhost-user"
)

func generators() []string { return []string{ownGenerator, fioGenerator, vhostGenerator} }

// result is the median of the rounds of one load on one server.
type result struct {
	Server    string `json:"server"`
	Generator string `json:"generator"`
	Load      string `json:"load"`

	RequestsPerSecond float64 `json:"requests_per_second"`
	MiBPerSecond      float64 `json:"mib_per_second"`
	P99Microseconds   float64 `json:"p99_us"`
	CPUSecondsPerGiB  float64 `json:"cpu_seconds_per_gib"` // of the server
	GeneratorCPU      float64 `json:"generator_cpu"`       // processors that ours used; 0 for fio's
	Rounds            int     `json:"rounds"`
}

// report is what a run has found, and under which circumstances.
type report struct {
	Time     string            `json:"time"`
	Machine  string            `json:"machine"`
	Load     string            `json:"load_average_before"`
	Versions map[string]string `json:"versions"`
	Commands []string          `json:"commands"`
	Duration string            `json:"duration"`
	Size     int64             `json:"size"`
	Results  results           `json:"results"`
	Disk     results           `json:"disk,omitempty"`
	Cipher   []cipherSpeed     `json:"cipher,omitempty"`
	Rekey    []rekeySpeed      `json:"rekey,omitempty"`
	Starts   []start           `json:"starts,omitempty"`
	KMS      []kmsSpeed        `json:"kms,omitempty"`
	Scale    *kmsScale         `json:"kms_scale,omitempty"`
	Later    map[string]origin `json:"later,omitempty"` // sections of a later run
}

// origin is where a section comes from that was measured later than the rest.
type origin struct {
	Time       string `json:"time"`
	Load       string `json:"load_average_before"`
	Strongroom string `json:"strongroom"`
}

// The sections that can be measured later.
const (
	sectionDisk   = "disk"
	sectionCipher = "cipher"
	sectionRekey  = "rekey"
	sectionStarts = "starts"
	sectionKMS    = "kms"
	sectionScale  = "kms_scale"
)

// update puts the sections of r into the report that is in file, in place of
// those.
func (r *report) update(file string) (*report, error) {
	if len(r.Results) > 0 {
		return nil, errors.New("what is measured on a tmpfs cannot be put into another run's tables")
	}
	text, err := os.ReadFile(figuresOf(file))
	if err != nil {
		return nil, err
	}
	var all report
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", figuresOf(file), err)
	}
	if all.Later == nil {
		all.Later = map[string]origin{}
	}
	take := func(section string, measured bool, put func()) {
		if measured {
			put()
			all.Later[section] = origin{Time: r.Time, Load: r.Load, Strongroom: r.Versions["strongroom"]}
		}
	}
	take(sectionDisk, len(r.Disk) > 0, func() { all.Disk, all.Commands = r.Disk, append(all.Commands, r.Commands...) })
	take(sectionCipher, len(r.Cipher) > 0, func() { all.Cipher = r.Cipher })
	take(sectionRekey, len(r.Rekey) > 0, func() { all.Rekey = r.Rekey })
	take(sectionStarts, len(r.Starts) > 0, func() { all.Starts = r.Starts })
	take(sectionKMS, len(r.KMS) > 0, func() { all.KMS = r.KMS })
	take(sectionScale, r.Scale != nil, func() { all.Scale = r.Scale })
	return &all, nil
}

// later tells where a section comes from, if not from the run of the rest.
func (r *report) later(section string) string {
	o, ok := r.Later[section]
	if !ok {
		return ""
	}
	return fmt.Sprintf(" Measured later than the rest, with\nstrongroom %s; load average before: %s.", o.Strongroom, o.Load)
}

// figuresOf returns the name of the file of figures beside the page in file.
func figuresOf(file string) string { return strings.TrimSuffix(file, ".md") + ".json" }

// results of several loads on several servers.
type results []result

// measure loads the servers on a tmpfs and on a disk.
func measure(ctx context.Context, o options) (*report, error) {
	r, err := newReport(ctx, o)
	if err != nil {
		return nil, err
	}
	if r.Results, err = r.measureServers(ctx, o, medium{dir: o.dir}); err != nil {
		return nil, fmt.Errorf("cannot measure on a tmpfs: %w", err)
	}
	if r.Disk, err = r.measureServers(ctx, o, medium{dir: o.disk, direct: true}); err != nil {
		return nil, fmt.Errorf("cannot measure on a disk: %w", err)
	}
	return r, nil
}

// measureServers loads each server in turn, in several rounds.
func (r *report) measureServers(ctx context.Context, o options, m medium) (_ results, err error) {
	type key struct{ server, generator, load string }
	wanted := func(s *server, generator string, l load) bool {
		switch {
		case generator == fioGenerator && (m.direct || l.random && l.depth != 32), generator == vhostGenerator && s.vhost == "":
			return false
		}
		return o.only.MatchString(m.String() + s.name + "/" + generator + "/" + l.name)
	}

	dir, err := os.MkdirTemp(m.dir, "strongroom-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	m.dir = dir
	servers, err := startServers(ctx, m, o.size)
	if err != nil {
		return nil, err
	}
	defer stopServers(servers)
	var commands []string
	for _, s := range servers {
		program := filepath.Base(s.command[0])
		commands = append(commands, strings.ReplaceAll(program+" "+strings.Join(s.command[1:], " "), dir+"/", "$DIR/"))
		if err := fill(ctx, s); err != nil {
			return nil, fmt.Errorf("cannot fill the image of %s: %w", s.name, err)
		}
	}

	samples := map[key][]sample{}
	for round := range o.rounds {
		fmt.Fprintf(os.Stderr, "%sround %d of %d\n", m, round+1, o.rounds)
		for _, l := range loads() {
			for i := range servers {
				// Another one begins each time, so that none is always measured
				// after the same neighbour.
				s := servers[(i+round)%len(servers)]
				for _, generator := range generators() {
					if !wanted(s, generator, l) {
						continue
					}
					var one sample
					if generator == fioGenerator {
						one, err = withFio(ctx, s, l, o.size, o.duration)
					} else {
						one, err = withOurs(ctx, s, generator, l, o.duration)
					}
					if err != nil {
						return nil, fmt.Errorf("cannot measure %s with %s, %s: %w\n%s", l.name, generator, s.name, err, s.errors.String())
					}
					k := key{s.name, generator, l.name}
					samples[k] = append(samples[k], one)
				}
			}
		}
	}
	var all results
	for _, generator := range generators() {
		for _, l := range loads() {
			for _, s := range servers {
				if found := samples[key{s.name, generator, l.name}]; len(found) > 0 {
					all = append(all, summarize(s.name, generator, l, found))
				}
			}
		}
	}
	if len(all) > 0 {
		r.Commands = append(r.Commands, commands...)
	}
	return all, nil
}

func summarize(server, generator string, l load, all []sample) result {
	middle := func(of func(sample) float64) float64 {
		var values []float64
		for _, s := range all {
			values = append(values, of(s))
		}
		return median(values)
	}
	requests := middle(func(s sample) float64 { return s.requests })
	return result{
		Server: server, Generator: generator, Load: l.name,
		RequestsPerSecond: requests,
		MiBPerSecond:      requests * float64(l.bytes) / (1 << 20),
		P99Microseconds:   middle(func(s sample) float64 { return s.p99 }),
		CPUSecondsPerGiB:  middle(func(s sample) float64 { return s.cpu }),
		GeneratorCPU:      middle(func(s sample) float64 { return s.own }),
		Rounds:            len(all),
	}
}

func newReport(ctx context.Context, o options) (*report, error) {
	r := &report{
		Time:     time.Now().UTC().Format(time.RFC3339),
		Duration: o.duration.String(), Size: o.size,
		Versions: map[string]string{"Go": runtime.Version()},
	}
	for name, command := range map[string][]string{
		"qemu-storage-daemon": {"qemu-storage-daemon", "--version"},
		"nbdkit":              {"nbdkit", "--version"},
		"fio":                 {"fio", "--version"},
		"cryptsetup":          {"cryptsetup", "--version"},
		"Linux":               {"uname", "-r"},
		"strongroom":          {"git", "describe", "--always", "--dirty"},
	} {
		out, err := exec.CommandContext(ctx, command[0], command[1:]...).Output()
		if err != nil {
			return nil, fmt.Errorf("cannot tell the version of %s: %w", name, err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		r.Versions[name] = first
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return nil, err
	}
	r.Load = strings.Join(strings.Fields(string(load))[:3], " ")
	r.Machine, err = machine()
	return r, err
}

// machine describes the processor and its number.
func machine() (string, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	model := "unknown processor"
	flags := ""
	for line := range strings.Lines(string(info)) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "model name":
			model = strings.TrimSpace(value)
		case "flags":
			flags = " " + strings.TrimSpace(value) + " "
		}
	}
	var has []string
	for _, f := range []string{"aes", "vaes", "avx2", "avx512f", "hypervisor"} {
		if strings.Contains(flags, " "+f+" ") {
			has = append(has, f)
		}
	}
	return fmt.Sprintf("%s, %d processors (%s), %s/%s", model, runtime.NumCPU(), strings.Join(has, " "), runtime.GOOS, runtime.GOARCH), nil
}

// find returns the result of a load on a server, or nil.
func (r results) find(server, generator, load string) *result {
	for i := range r {
		if x := &r[i]; x.Server == server && x.Generator == generator && x.Load == load {
			return x
		}
	}
	return nil
}

// write writes the tables to file, and the figures beside it.
func (r *report) write(file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	figures, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(figuresOf(file), append(figures, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte(r.markdown()), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "written: %s\n", file)
	return nil
}

// markdown is the page of the reference.
func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Performance of served volumes

Written by `+"`make bench`"+`; do not edit. Figures of one run on one machine, for comparing with
each other; the same figures are in performance.json.

Each load was measured %d times for %s on each server in turn; medians are shown. Images of %d MiB on a
tmpfs, filled before. All peers encrypt with AES-256-XTS and plain64 tweaks. "peers" is the better
of the two peers; CPU is the server's processor seconds per GiB moved, user and system.

- machine: %s
- load average before: %s
`, r.Results.rounds(), r.Duration, r.Size>>20, r.Machine, r.Load)
	for _, name := range []string{"strongroom", "Go", "qemu-storage-daemon", "nbdkit", "fio", "Linux"} {
		fmt.Fprintf(&b, "- %s: %s\n", name, r.Versions[name])
	}

	r.Results.tables(&b, "##")
	b.WriteString(`
"` + ceiling + `" is our server on a device that does nothing: no server can be seen to be faster than
that with the same generator. A ratio between rows that come close to it says little about the
servers. Ours uses one thread for load; where it used that wholly, it was the limit.

`)
	if rows := r.Results.generator(); len(rows) > 0 {
		table(&b, append([][]string{{"load", "generator", "our generator's end, requests/s", "processors it used for that", "and for ours, encrypted", "fio's end, requests/s"}}, rows...))
	}
	if len(r.Disk) > 0 {
		b.WriteString("\n## On a disk\n\nThe same with images on a disk and direct I/O, so that no request ends in the page cache: ours with Direct,\nqemu-storage-daemon with cache.direct=on. nbdkit's file plugin has no direct I/O." + r.later(sectionDisk) + "\n")
		r.Disk.tables(&b, "###")
	}
	if len(r.Cipher) > 0 {
		b.WriteString("\n## The cipher\n\nXTS-AES-256 on sectors of 512 bytes, each with its own tweak, on one core, by processor time. OpenSSL has one sector in\na call, whatever its size. The C loop is test/bench/xts_vaes512.c." + r.later(sectionCipher) + "\n\n")
		cipherTable(&b, r.Cipher)
	}
	if len(r.Rekey) > 0 {
		fmt.Fprintf(&b, "\n## Deep rekey\n\nOf a full disk of %d MiB on a disk, in MiB/s. A journal makes each byte written twice, so that half of the disk's speed is its bound.%s\n\n", r.Size>>20, r.later(sectionRekey))
		rows := [][]string{{"work", "MiB/s", "of the disk's write speed"}}
		for _, s := range r.Rekey {
			rows = append(rows, []string{s.What, fmt.Sprintf("%.0f", s.MiBPerSecond), fmt.Sprintf("%.2f", s.OfDisk)})
		}
		table(&b, rows)
	}
	if len(r.Starts) > 0 {
		b.WriteString("\n## Starts\n\nOf the binary, with etcd and QEMU." + r.later(sectionStarts) + "\n\n")
		rows := [][]string{{"what", "ms, median", "rounds"}}
		for _, s := range r.Starts {
			rows = append(rows, []string{s.What, fmt.Sprintf("%.0f", s.Milliseconds), fmt.Sprint(s.Rounds)})
		}
		table(&b, rows)
	}
	if len(r.KMS) > 0 {
		b.WriteString("\n## Key management servers\n\nKMIP over mutual TLS from one client process on the same machine; keys are on disk when they are acknowledged. 1000 keys with names\nwere there before, and those made meanwhile." + r.later(sectionKMS) + "\n\n")
		rows := [][]string{{"load", "connections", "server", "a second", "p50, ms", "p99, ms"}}
		for _, s := range r.KMS {
			rows = append(rows, []string{s.Load, fmt.Sprint(s.Connections), s.Server, rate(s.PerSecond), fmt.Sprintf("%.2f", s.P50), fmt.Sprintf("%.2f", s.P99)})
		}
		table(&b, rows)
	}
	if s := r.Scale; s != nil {
		made := fmt.Sprintf("made over KMIP in %.0f s, then started anew", s.LoadSeconds)
		if s.LoadSeconds == 0 {
			made = "made by an earlier run"
		}
		fmt.Fprintf(&b, "\n## A key management server with %d keys\n\nOurs, with a name for each key, all in one group; %s. Memory is the process's own,\nand pages of its database's file that the kernel can take back.%s\n\n", s.Keys, made, r.later(sectionScale))
		table(&b, [][]string{
			{"what", "value"},
			{"database, MiB", fmt.Sprintf("%.0f", s.DatabaseMiB)},
			{"start to the first answer, s", fmt.Sprintf("%.1f", s.StartSeconds)},
			{"work after a start, s; processor s with the start", fmt.Sprintf("%.1f; %.1f", s.SettleSecs, s.SettleCPU)},
			{"memory after a start, MiB: own; file", fmt.Sprintf("%.0f; %.0f", s.AnonStartMiB, s.FileStartMiB)},
			{"memory after the loads, MiB: own; file", fmt.Sprintf("%.0f; %.0f", s.AnonLoadMiB, s.FileLoadMiB)},
			{"list of all keys in pages of 5000, s", fmt.Sprintf("%.1f", s.ListSeconds)},
		})
		b.WriteString("\n")
		rows := [][]string{{"load", "connections", "a second", "p50, ms", "p99, ms"}}
		for _, l := range s.Loads {
			rows = append(rows, []string{l.Load, fmt.Sprint(l.Connections), rate(l.PerSecond), fmt.Sprintf("%.2f", l.P50), fmt.Sprintf("%.2f", l.P99)})
		}
		table(&b, rows)
	}
	b.WriteString("\n## Commands\n\n```\n")
	for _, c := range r.Commands {
		b.WriteString(c + "\n")
	}
	b.WriteString("fio " + strings.Join(fioArguments("$DIR/....sock", "randread", load{bytes: 4096, depth: 32}, r.Size, 0)[:8], " ") + " ...\n```\n")
	return b.String()
}

// rate writes a number of operations a second.
func rate(n float64) string {
	if n < 10 {
		return fmt.Sprintf("%.1f", n)
	}
	return fmt.Sprintf("%.0f", n)
}

func (r results) rounds() int {
	n := 0
	for _, x := range r {
		n = max(n, x.Rounds)
	}
	return n
}

// tables writes the tables of all generators and the ratios, each under a
// heading of the level that hashes tell.
func (r results) tables(b *strings.Builder, hashes string) {
	for _, g := range []struct{ name, title string }{
		{ownGenerator, "NBD, with our own load generator"},
		{fioGenerator, "NBD, with fio's nbd engine"},
		{vhostGenerator, "vhost-user-blk, with our own load generator"},
	} {
		rows := r.rows(g.name)
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(b, "\n%s %s\n\n", hashes, g.title)
		table(b, append([][]string{{"load", "server", "requests/s", "MiB/s", "p99 µs", "CPU s/GiB", "ours : this"}}, rows...))
	}
	if rows := r.ratios(); len(rows) > 0 {
		fmt.Fprintf(b, "\n%s Ratios\n\n", hashes)
		table(b, append([][]string{{"load", "generator", "ours : peers", "p99, ours : peers", "CPU, ours : peers", "encrypted : not encrypted"}}, rows...))
	}
}

// rows is the table of one generator.
func (r results) rows(generator string) [][]string {
	var rows [][]string
	for _, x := range r {
		if x.Generator != generator {
			continue
		}
		ratio := ""
		if base := r.find(ours, generator, x.Load); base != nil && x.Server != ours {
			ratio = fmt.Sprintf("%.2f", base.RequestsPerSecond/x.RequestsPerSecond)
		}
		rows = append(rows, []string{
			x.Load, x.Server, fmt.Sprintf("%.0f", x.RequestsPerSecond), fmt.Sprintf("%.0f", x.MiBPerSecond),
			fmt.Sprintf("%.0f", x.P99Microseconds), fmt.Sprintf("%.2f", x.CPUSecondsPerGiB), ratio,
		})
	}
	return rows
}

// ratios compares ours with the better peer and with ourselves.
func (r results) ratios() [][]string {
	var rows [][]string
	for _, generator := range generators() {
		for _, l := range loads() {
			o, p := r.find(ours, generator, l.name), r.find(plain, generator, l.name)
			d, k := r.find(daemon, generator, l.name), r.find(kit, generator, l.name)
			if k == nil {
				k = d // nbdkit has neither vhost-user nor direct I/O
			}
			if o == nil || p == nil || d == nil || k == nil {
				continue
			}
			rows = append(rows, []string{
				l.name, generator,
				fmt.Sprintf("%.2f", o.RequestsPerSecond/max(d.RequestsPerSecond, k.RequestsPerSecond)),
				fmt.Sprintf("%.2f", o.P99Microseconds/min(d.P99Microseconds, k.P99Microseconds)),
				fmt.Sprintf("%.2f", o.CPUSecondsPerGiB/min(d.CPUSecondsPerGiB, k.CPUSecondsPerGiB)),
				fmt.Sprintf("%.2f", o.RequestsPerSecond/p.RequestsPerSecond),
			})
		}
	}
	return rows
}

// generator shows where the load generators end.
func (r results) generator() [][]string {
	var rows [][]string
	for _, generator := range []string{ownGenerator, vhostGenerator} {
		for _, l := range loads() {
			top, o := r.find(ceiling, generator, l.name), r.find(ours, generator, l.name)
			if top == nil || o == nil {
				continue
			}
			end := ""
			if fio := r.find(ceiling, fioGenerator, l.name); fio != nil && generator == ownGenerator {
				end = fmt.Sprintf("%.0f", fio.RequestsPerSecond)
			}
			rows = append(rows, []string{
				l.name, generator, fmt.Sprintf("%.0f", top.RequestsPerSecond), fmt.Sprintf("%.2f", top.GeneratorCPU), fmt.Sprintf("%.2f", o.GeneratorCPU), end,
			})
		}
	}
	return rows
}

// table writes rows as a Markdown table; the first is the head.
func table(b *strings.Builder, rows [][]string) {
	w := tabwriter.NewWriter(b, 0, 0, 1, ' ', 0)
	for i, row := range rows {
		fmt.Fprintf(w, "| %s\t|\n", strings.Join(row, "\t| "))
		if i == 0 {
			fmt.Fprintf(w, "|%s\t|\n", strings.Join(slices.Repeat([]string{"---"}, len(row)), "\t|"))
		}
	}
	_ = w.Flush() // a Builder does not fail
}
