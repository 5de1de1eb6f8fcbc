package cli

import (
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"90d": 90 * day, "0d": 0, "36h": 36 * time.Hour, "1h30m": 90 * time.Minute, "90m": 90 * time.Minute, "106751d": 106751 * day,
	} {
		if got, err := parseDuration(text); got != want || err != nil {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "d", "-1d", "1.5d", "-1h", "90", "1w", "106752d", "99999999999d"} {
		if got, err := parseDuration(text); err == nil {
			t.Errorf("%q is taken for %v", text, got)
		}
	}
	for d, want := range map[time.Duration]string{30 * day: "30d", 36 * time.Hour: "36h", 90 * time.Minute: "1h30m", 10 * time.Minute: "10m", 5 * time.Second: "5s"} {
		if got := formatDuration(d); got != want {
			t.Errorf("%d is told as %q, want %q", d, got, want)
		}
		if again, err := parseDuration(formatDuration(d)); again != d || err != nil {
			t.Errorf("%v comes back as %v, %v", d, again, err)
		}
	}
}

func TestDays(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]daysValue{"90d": 90, "0d": 0, "48h": 2} {
		var v daysValue
		if err := v.Set(text); v != want || err != nil {
			t.Errorf("%q: %d, %v; want %d", text, v, err, want)
		}
	}
	for _, text := range []string{"90", "36h", "-1d", "106751d12h"} {
		var v daysValue
		if err := v.Set(text); err == nil {
			t.Errorf("%q is taken for %d days", text, v)
		}
	}
}
