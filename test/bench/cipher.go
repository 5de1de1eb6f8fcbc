package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// cipherSpeed is the speed of one implementation of AES-XTS, the median of the
// rounds.
type cipherSpeed struct {
	Implementation string  `json:"implementation"`
	Bytes          int     `json:"bytes"`
	Op             string  `json:"op"`
	GBPerSecond    float64 `json:"gb_per_s"`
}

// yardstick is a plain C loop with VAES intrinsics.
const yardstick = "C, VAES on 512 bits"

// measureCipher runs `strongroom benchmark`, which has OpenSSL beside it, and
// the yardstick in turn. The yardstick is left out on a processor that cannot
// run it.
func measureCipher(ctx context.Context, o options, binary string) ([]cipherSpeed, error) {
	dir, err := os.MkdirTemp("", "sr-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "xts_vaes512")
	out, err := exec.CommandContext(ctx, "gcc", "-O3", "-march=icelake-client", "-o", program, filepath.FromSlash("test/bench/xts_vaes512.c")).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("cannot compile the yardstick: %w: %s", err, out)
	}
	type key struct {
		implementation string
		bytes          int
		op             string
	}
	var order []key
	speeds := map[key][]float64{}
	add := func(k key, speed float64) {
		if speeds[k] == nil {
			order = append(order, k)
		}
		speeds[k] = append(speeds[k], speed)
	}
	for range o.rounds {
		out, err := exec.CommandContext(ctx, binary, "benchmark", "--json").Output()
		if err != nil {
			return nil, fmt.Errorf("strongroom benchmark: %w", err)
		}
		var measured struct{ Results []cipherSpeed }
		if err := json.Unmarshal(out, &measured); err != nil {
			return nil, err
		}
		wide := false
		for _, m := range measured.Results {
			wide = wide || m.Implementation == "vaes-avx512"
			add(key{m.Implementation, m.Bytes, m.Op}, m.GBPerSecond)
		}
		if !wide {
			continue
		}
		if out, err = exec.CommandContext(ctx, program).Output(); err != nil {
			return nil, fmt.Errorf("the yardstick: %w", err)
		}
		for line := range bytes.Lines(out) {
			k := key{implementation: yardstick, op: "encrypt"}
			var speed float64
			if _, err := fmt.Sscan(string(line), &k.bytes, &speed); err != nil {
				return nil, fmt.Errorf("the yardstick printed %q: %w", line, err)
			}
			add(k, speed)
		}
	}
	var all []cipherSpeed
	for _, k := range order {
		all = append(all, cipherSpeed{k.implementation, k.bytes, k.op, median(speeds[k])})
	}
	return all, nil
}

// cipherTable compares every implementation with OpenSSL and the yardstick.
func cipherTable(b *strings.Builder, all []cipherSpeed) {
	against := func(m cipherSpeed, implementation string) string {
		for _, o := range all {
			if o.Implementation == implementation && o.Bytes == m.Bytes && o.Op == m.Op && m.Implementation != implementation {
				return fmt.Sprintf("%.2f", m.GBPerSecond/o.GBPerSecond)
			}
		}
		return ""
	}
	rows := [][]string{{"implementation", "bytes in a call", "op", "GB/s", ": OpenSSL", ": C loop"}}
	for _, m := range all {
		rows = append(rows, []string{m.Implementation, fmt.Sprint(m.Bytes), m.Op, fmt.Sprintf("%.2f", m.GBPerSecond), against(m, "openssl"), against(m, yardstick)})
	}
	table(b, rows)
}
