package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"strongroom/internal/errs"
)

const sizeUnits = "KMGTPE"

// parseSize returns the bytes of a text such as "10G", "512MiB" or "4096".
// Units are powers of 1024: K, M, G, T, P, E, alone or with "iB". "GB" is not
// accepted, because it means 10^9 to some and 2^30 to others.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTPEiB")
	unit := strings.TrimSuffix(s[len(digits):], "iB")
	shift := 0
	if unit != "" || len(digits) != len(s) {
		i := strings.Index(sizeUnits, unit)
		if len(unit) != 1 || i < 0 {
			return 0, errs.New(errs.Invalid, `size %q: want bytes, or a number with K, M, G, T, P or E (powers of 1024), such as "10G"`, s)
		}
		shift = 10 * (i + 1)
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil {
		return 0, errs.New(errs.Invalid, `size %q: want a number such as "10G"`, s)
	}
	if n > math.MaxInt64>>shift {
		return 0, errs.New(errs.Invalid, "size %q: too large", s)
	}
	return int64(n) << shift, nil
}

// formatSize is a size for a person: three digits or so, in powers of 1024.
func formatSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1023.95 && i < len(sizeUnits)-1 {
		f, i = f/1024, i+1
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + sizeUnits[i:i+1] + "iB"
}

// sizeValue is a flag that holds a size.
type sizeValue int64

func (v *sizeValue) Set(s string) error {
	n, err := parseSize(s)
	*v = sizeValue(n)
	return err
}

func (v *sizeValue) String() string {
	if *v == 0 {
		return ""
	}
	return formatSize(int64(*v))
}

func (*sizeValue) Type() string { return "size" }
