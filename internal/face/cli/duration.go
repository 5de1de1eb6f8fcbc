package cli

import (
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"strongroom/internal/errs"
)

const day = 24 * time.Hour

// parseDuration returns the duration of a text such as "90d", "36h" or "90m". A
// day has 24 hours.
func parseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > uint64(math.MaxInt64/day) {
			return 0, errs.New(errs.Invalid, `duration %q: want days, such as "90d"`, s)
		}
		return time.Duration(n) * day, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, errs.New(errs.Invalid, `duration %q: want days, hours or minutes, such as "90d", "36h" or "90m"`, s)
	}
	return d, nil
}

// formatDuration is a duration for a person, in days where it has whole days.
func formatDuration(d time.Duration) string {
	if d >= day && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	text := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(text, zero) {
			text = strings.TrimSuffix(text, zero[1:])
		}
	}
	return text
}

// durationValue is a flag that holds a duration.
type durationValue time.Duration

func (v *durationValue) Set(s string) error {
	d, err := parseDuration(s)
	*v = durationValue(d)
	return err
}

func (v *durationValue) String() string {
	if *v == 0 {
		return ""
	}
	return formatDuration(time.Duration(*v))
}

func (v *durationValue) Type() string { return "duration" }

// addDuration adds a flag that holds a duration, def unless it is given.
func addDuration(cmd *cobra.Command, d *time.Duration, name string, def time.Duration, usage string) {
	*d = def
	cmd.Flags().Var((*durationValue)(d), name, usage)
}

// daysValue is a flag that holds a number of whole days.
type daysValue int32

func (v *daysValue) Set(s string) error {
	d, err := parseDuration(s)
	if err == nil && (d%day != 0 || d/day > math.MaxInt32) {
		err = errs.New(errs.Invalid, `duration %q: want whole days, such as "90d"`, s)
	}
	*v = daysValue(d / day)
	return err
}

func (v *daysValue) String() string {
	d := durationValue(time.Duration(*v) * day)
	return d.String()
}

func (v *daysValue) Type() string { return "duration" }
