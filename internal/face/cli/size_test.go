package cli

import (
	"math"
	"strings"
	"testing"

	"strongroom/internal/errs"
)

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"0": 0, "512": 512, "4K": 4096, "10G": 10 << 30, "10GiB": 10 << 30, "1T": 1 << 40,
		"7E": 7 << 60, "9223372036854775807": math.MaxInt64,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "-1", "1.5G", "10GB", "10g", "10 G", "1KK", "1iB", "1BiB", "8E", "9223372036854775808", "0x10", "1_000", "+5"} {
		if got, err := parseSize(text); errs.KindOf(err) != errs.Invalid || got != 0 {
			t.Errorf("%q is %d, %v; want an error", text, got, err)
		}
	}
}

func TestFormatSize(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 30: "10 GiB",
		1<<20 - 1: "1 MiB", 1023 << 10: "1023 KiB", math.MaxInt64: "8 EiB",
	} {
		if got := formatSize(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "10G", "512MiB", "8E", "1KK", "-1", "iB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			if n != 0 {
				t.Fatalf("an error with a size: %d", n)
			}
			return
		}
		if n < 0 {
			t.Fatalf("%q is %d", s, n)
		}
		// The same in the unit's long form, where there is a unit.
		if unit := s[len(s)-1:]; strings.Contains(sizeUnits, unit) {
			if same, err := parseSize(s + "iB"); err != nil || same != n {
				t.Fatalf("%q is %d, and with iB %d, %v", s, n, same, err)
			}
		}
	})
}

func FuzzParseDisk(f *testing.F) {
	for _, s := range []string{"10G", "size=1G,plain", "image=a/b.qcow2,format=qcow2,size=2G", "plain", "image=a", "=", ",", "image=a,format=luks,passphrase-file=-", "image=a,format=luks,key-file=k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, from, err := parseDisk(s)
		if err != nil {
			return
		}
		if from != (passphraseFrom{}) && (d.GetImageFormat() != formatLUKS || from.file != "" && from.keyFile != "") {
			t.Fatalf("%q is %v with %v", s, d, from)
		}
		if d.GetSizeBytes() < 0 || d.GetImage() == "" && d.GetImageFormat() != "" {
			t.Fatalf("%q is %v", s, d)
		}
	})
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	if got := printable("a\x1b[2J\u202eb\r\tc\nd é"); got != "a?[2J?b??c\nd é" {
		t.Errorf("%q", got)
	}
}
