//go:build !purego

package xts

import (
	"encoding/binary"
	"os"
)

// expectedImplementations reads the capabilities that the kernel gave this
// process: an emulator of single programs replaces them, and not always
// /proc/cpuinfo.
func expectedImplementations([]string) []string {
	const hwcap, aes = 16, 1 << 3 // AT_HWCAP, HWCAP_AES
	auxv, err := os.ReadFile("/proc/self/auxv")
	for ; err == nil && len(auxv) >= 16; auxv = auxv[16:] {
		if binary.LittleEndian.Uint64(auxv) == hwcap && binary.LittleEndian.Uint64(auxv[8:])&aes != 0 {
			return []string{"armv8-ce", "portable"}
		}
	}
	return []string{"portable"}
}
