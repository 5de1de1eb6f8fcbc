package cli_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// wrappingProvider is one with a wrapping key as the fake controller tells of it.
var wrappingProvider = &strongroomv1.Provider{Name: "wrap-1", Type: "standard", State: "Active", Standard: &strongroomv1.StandardProvider{
	Wrapping: &strongroomv1.Wrapping{
		On: true, RotateDays: 90, Problem: "the key server is away", VmsToFollow: 1, NextRotation: stamp(0),
		Current: &strongroomv1.WrappingKey{KeyId: "k-2", Made: stamp(0), Vms: 3},
		Replaced: []*strongroomv1.WrappingKey{
			{KeyId: "k-0", Replaced: stamp(0), Ended: stamp(0)}, {KeyId: "k-1", Replaced: stamp(0), Vms: 1},
		},
	},
}}

func (c *controller) RotateProvider(_ context.Context, r *connect.Request[strongroomv1.RotateProviderRequest]) (*connect.Response[strongroomv1.Task], error) {
	return c.task("Rotate", r.Msg.GetName(), "")
}

// TestWrappingKeyCalls: what the flags of keys come to.
func TestWrappingKeyCalls(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"provider update kms-1 --wrapping-key":                    "keys wrapping",
		"provider update kms-1 --wrapping-key --rotate-every 90d": "keys wrapping, rotate 90",
		"provider update kms-1 --rotate-every 0d":                 "rotate -1",
		"provider update kms-1 --key-per-vm":                      "keys per-vm",
		"provider rotate kms-1":                                   "Rotate kms-1",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			if _, stderr, code := s.run(t, strings.Fields(args)...); code != 0 {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			if got := strings.Join(s.seen(), "\n"); !strings.Contains(got, want) {
				t.Errorf("calls %q, want %q", got, want)
			}
		})
	}
	for args, want := range map[string]string{
		"provider update kms-1 --wrapping-key --key-per-vm":     "none of the others can be",
		"provider update kms-1 --rotate-every 36h":              "whole days",
		"provider update kms-1 --rotate-every 4000d":            "30d to 3650d",
		"provider add-standard k --server a:1 --rotate-every x": "want days",
		"provider rotate": "the provider's name",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			_, stderr, code := s.run(t, strings.Fields(args)...)
			if code != 2 || !strings.Contains(stderr, want) || len(s.seen()) > 0 {
				t.Errorf("exit code %d, stderr %q, calls %q", code, stderr, s.seen())
			}
		})
	}
}

// TestWrappingFields: what `provider show` tells.
func TestWrappingFields(t *testing.T) {
	t.Parallel()
	since := now.Format(time.DateTime)
	for name, want := range map[string][]string{
		"kms-1": {"Keys: one for each VM"},
		"wrap-1": {
			"Keys: one wrapping key, replaced every 90 days", "Wrapping key: k-2, since " + since, "problem: the key server is away", "VMs to follow: 1",
			"replaced key: k-0, replaced " + since + ", ended " + since, "replaced key: k-1, replaced " + since + ", in use, VMs 1",
		},
	} {
		s := newSession(t)
		stdout, stderr, code := s.run(t, "provider", "show", name)
		if code != 0 {
			t.Fatalf("exit code %d: %s", code, stderr)
		}
		got := strings.Join(strings.Fields(stdout), " ")
		for _, line := range want {
			if !strings.Contains(got, line) {
				t.Errorf("%s: no %q in %q", name, line, got)
			}
		}
	}
}
