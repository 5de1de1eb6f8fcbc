package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"strongroom/test/guest"
)

// console follows what guests print on their serial console, which is the VM's
// vm.log.
type console struct {
	path string
	seen int // events passed on to the caller
}

// await returns the first event that the caller has not had yet and that fits,
// and fails when the guest says that a step failed. Events before it are passed
// over.
func (c *console) await(ctx context.Context, kind guest.Kind, step, text string) (guest.Event, error) {
	for {
		events, err := c.events()
		if err != nil {
			return guest.Event{}, err
		}
		for _, e := range events[min(c.seen, len(events)):] {
			c.seen++
			if e.Kind == guest.Fail || e.Kind == guest.Failed {
				return e, fmt.Errorf("guest: step %s failed: %s", e.Step, e.Text)
			}
			if e.Kind == kind && (step == "" || e.Step == step) && strings.Contains(e.Text, text) {
				return e, nil
			}
		}
		select {
		case <-ctx.Done():
			return guest.Event{}, fmt.Errorf("guest did not say %s %s %q: %w", kind, step, text, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// later is await for what the guest says from now on. What it said before is
// passed over, if no step failed.
func (c *console) later(ctx context.Context, kind guest.Kind, step, text string) (guest.Event, error) {
	events, err := c.events()
	if err != nil {
		return guest.Event{}, err
	}
	for ; c.seen < len(events); c.seen++ {
		if e := events[c.seen]; e.Kind == guest.Fail || e.Kind == guest.Failed {
			break // await tells
		}
	}
	return c.await(ctx, kind, step, text)
}

func (c *console) events() ([]guest.Event, error) {
	f, err := os.Open(c.path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []guest.Event
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if e, ok := guest.ParseEvent(strings.TrimRight(lines.Text(), "\r")); ok {
			all = append(all, e)
		}
	}
	return all, nil
}
