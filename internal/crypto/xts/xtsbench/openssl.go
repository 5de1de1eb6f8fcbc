package xtsbench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// runOpenSSL measures `openssl speed`, or nothing if there is no openssl and
// none was asked for. Without -elapsed it divides by its own processor time,
// as [rate] does.
func runOpenSSL(ctx context.Context, opts Options) ([]Result, error) {
	program := opts.OpenSSL
	if program == "" {
		var err error
		program, err = exec.LookPath("openssl")
		if errors.Is(err, exec.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	seconds := max(1, int((opts.Duration+time.Second-1)/time.Second))
	var results []Result
	for _, n := range Sizes() {
		for _, op := range []string{Encrypt, Decrypt} {
			r, err := runOpenSSLSize(ctx, program, seconds, n, op)
			if err != nil {
				return nil, err
			}
			results = append(results, r)
		}
	}
	return results, nil
}

func runOpenSSLSize(ctx context.Context, program string, seconds, n int, op string) (Result, error) {
	args := []string{"speed", "-mr", "-seconds", strconv.Itoa(seconds), "-bytes", strconv.Itoa(n), "-evp", "aes-256-xts"}
	if op == Decrypt {
		args = append(args, "-decrypt")
	}
	out, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return Result{}, fmt.Errorf("%s %s: %w", program, strings.Join(args, " "), err)
	}
	perS, err := parseSpeed(string(out))
	if err != nil {
		return Result{}, err
	}
	return Result{OpenSSL, n, op, perS / 1e9}, nil
}

// parseSpeed takes the bytes per second from the output of `openssl speed -mr`
// with one size, the last field of a line such as
//
//	+F:27:AES-256-XTS:4574797824.00
func parseSpeed(out string) (float64, error) {
	for line := range strings.Lines(out) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "+F:")
		if !ok {
			continue
		}
		fields := strings.Split(rest, ":")
		perS, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil || !(perS > 0) || math.IsInf(perS, 0) || len(fields) != 3 {
			return 0, fmt.Errorf("line %q is not a speed", strings.TrimSpace(line))
		}
		return perS, nil
	}
	return 0, errors.New("output has no line of figures (+F)")
}
