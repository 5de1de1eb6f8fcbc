package xtsbench

import (
	"context"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// rate returns how many bytes a second of processor time work gets through;
// one call of work handles n bytes. It is the median of rounds, which together
// take about d; if one takes longer than that, there are fewer.
func rate(ctx context.Context, n int, d time.Duration, work func()) (float64, error) {
	const rounds = 7
	// The thread's clock counts only its own work, so that other processes on
	// the machine do not change the result.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	work() // touches the memory
	calls := 1
	for {
		t, err := timed(calls, work)
		if err != nil {
			return 0, err
		}
		if t >= d/rounds/4 {
			calls = max(1, int(float64(calls)*float64(d/rounds)/float64(t)))
			break
		}
		calls *= 2
	}
	rates := make([]float64, 0, rounds)
	for total := time.Duration(0); len(rates) < rounds && total < 2*d; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		t, err := timed(calls, work)
		if err != nil {
			return 0, err
		}
		total += t
		rates = append(rates, float64(n)*float64(calls)/t.Seconds())
	}
	slices.Sort(rates)
	return rates[len(rates)/2], nil
}

// timed returns the processor time of this thread that calls of work take.
func timed(calls int, work func()) (time.Duration, error) {
	start, err := threadTime()
	if err != nil {
		return 0, err
	}
	for range calls {
		work()
	}
	end, err := threadTime()
	if err != nil {
		return 0, err
	}
	return max(end-start, 1), nil
}

func threadTime() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0, err
	}
	return time.Duration(t.Nano()), nil
}
