//go:build amd64 && !purego

package xts

import "slices"

func expectedImplementations(cpuFlags []string) []string {
	var want []string
	has := func(flags ...string) bool {
		return !slices.ContainsFunc(flags, func(f string) bool { return !slices.Contains(cpuFlags, f) })
	}
	if has("vaes", "vpclmulqdq", "avx512f", "avx512bw") {
		want = append(want, "vaes-avx512")
	}
	if has("vaes", "avx2") {
		want = append(want, "vaes-avx2")
	}
	if has("aes") {
		want = append(want, "aesni")
	}
	return append(want, "portable")
}
