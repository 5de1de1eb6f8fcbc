// Package xtsbench measures AES-XTS on this machine: every implementation of
// package xts, memory copying as what no cipher can beat, and OpenSSL, where
// it is installed, as the measure that other software is known by.
//
// All figures are for XTS-AES-256 and for one core, in bytes per second of
// processor time, so that a machine that is busy with something else gives the
// same figures as an idle one. Ours are for sectors of 512 bytes, each with
// its own tweak, and OpenSSL's are for one sector of the whole size, as
// `openssl speed` measures it.
//
// Run must not be called twice at the same time: the runs would share caches.
package xtsbench

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

// Names of implementations that are not of package xts.
const (
	Memcpy  = "memcpy"
	OpenSSL = "openssl"
)

// Operations.
const (
	Encrypt = "encrypt"
	Decrypt = "decrypt"
)

const sectorSize = 512 // bytes

// Sizes are the request sizes that are measured, in bytes.
func Sizes() []int { return []int{512, 4096, 65536, 1 << 20} }

// Result is one figure. For [Memcpy], both operations have the same.
type Result struct {
	Implementation string  `json:"implementation"` // of xts.Implementations, Memcpy or OpenSSL
	Bytes          int     `json:"bytes"`          // in one call
	Op             string  `json:"op"`             // Encrypt or Decrypt
	GBPerS         float64 `json:"gb_per_s"`       // 10^9 bytes per second of one core
}

// Report is the shape of the JSON output.
type Report struct {
	Results []Result `json:"results"`
}

// Options for [Run]. The zero value is useful.
type Options struct {
	// Duration is how long one figure is measured; 0 means 250 ms. OpenSSL
	// takes whole seconds, at least one.
	Duration time.Duration
	// OpenSSL is the program to run; empty means the one in PATH, if any.
	OpenSSL string
	// Implementations are those of package xts to measure; nil means all, and
	// a list that is empty none.
	Implementations []string
}

// Run measures one figure after the other, in the order implementation, size,
// operation. It stops early with ctx's error.
func Run(ctx context.Context, opts Options) ([]Result, error) {
	if opts.Duration <= 0 {
		opts.Duration = 250 * time.Millisecond
	}
	names := opts.Implementations
	if names == nil {
		names = xts.Implementations()
	}
	largest := Sizes()[len(Sizes())-1]
	dst, src := make([]byte, largest), make([]byte, largest)

	var results []Result
	for _, name := range names {
		r, err := runOne(ctx, opts, name, dst)
		if err != nil {
			return nil, fmt.Errorf("cannot measure AES-XTS %s: %w", name, err)
		}
		results = append(results, r...)
	}
	for _, n := range Sizes() {
		perS, err := rate(ctx, n, opts.Duration, func() { copy(dst[:n], src[:n]) })
		if err != nil {
			return nil, fmt.Errorf("cannot measure memory copying: %w", err)
		}
		for _, op := range []string{Encrypt, Decrypt} {
			results = append(results, Result{Memcpy, n, op, perS / 1e9})
		}
	}
	r, err := runOpenSSL(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("cannot measure OpenSSL: %w", err)
	}
	return append(results, r...), nil
}

// runOne measures one implementation, in place in buf, as the data path does.
func runOne(ctx context.Context, opts Options, name string, buf []byte) ([]Result, error) {
	key, err := keymem.Random(xts.KeySize256)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	c, err := xts.NewWith(name, key)
	if err != nil {
		return nil, err
	}
	defer c.Close()

	var results []Result
	for _, n := range Sizes() {
		for _, op := range []string{Encrypt, Decrypt} {
			work := func() { c.Encrypt(buf[:n], buf[:n], 0, sectorSize) }
			if op == Decrypt {
				work = func() { c.Decrypt(buf[:n], buf[:n], 0, sectorSize) }
			}
			perS, err := rate(ctx, n, opts.Duration, work)
			if err != nil {
				return nil, err
			}
			results = append(results, Result{name, n, op, perS / 1e9})
		}
	}
	return results, nil
}

// WriteTable writes results to w for people to read, with each figure's ratio
// to OpenSSL's where there is one.
func WriteTable(w io.Writer, results []Result) error {
	type at struct {
		bytes int
		op    string
	}
	openssl := map[at]float64{}
	for _, r := range results {
		if r.Implementation == OpenSSL {
			openssl[at{r.Bytes, r.Op}] = r.GBPerS
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "IMPLEMENTATION\tBYTES\tOP\tGB/S\tx OPENSSL\t")
	for _, r := range results {
		ratio := "-"
		if o := openssl[at{r.Bytes, r.Op}]; o > 0 {
			ratio = fmt.Sprintf("%.2f", r.GBPerS/o)
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%.2f\t%s\t\n", r.Implementation, r.Bytes, r.Op, r.GBPerS, ratio)
	}
	return t.Flush()
}
