package guest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"strongroom/test/guest"
	"strongroom/test/guest/plan"
)

func newDisk(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// start runs a guest with a time limit.
func start(t *testing.T, m guest.Machine) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	return guest.Run(ctx, m)
}

func build(t *testing.T, opts guest.Options) guest.Image {
	t.Helper()
	image, err := guest.Build(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// TestWorkload boots a disk twice, and presses the power button each time.
func TestWorkload(t *testing.T) {
	t.Parallel()
	const marker = "MARKER-in-plain-text"
	disk := newDisk(t, 64<<20)
	image := build(t, guest.Workload(marker))
	for boot, verified := range []string{"verified 0 files", "verified 21 files"} {
		socket := filepath.Join(t.TempDir(), "qmp")
		pressed := false
		var failed error
		console, err := start(t, guest.Machine{
			Image:  image,
			Drives: []string{"format=raw,file=" + disk},
			Args:   []string{"-qmp", "unix:" + socket + ",server=on,wait=off"},
			OnEvent: func(e guest.Event) {
				if e.Kind == guest.Note && e.Step == "churn" && !pressed {
					pressed = true
					failed = press(socket)
				}
			},
		})
		if err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		for _, want := range []string{verified, "power button", "blocks read as written last", "ok unmount"} {
			if !strings.Contains(console, want) {
				t.Errorf("boot %d: console does not say %q:\n%s", boot, want, console)
			}
		}
	}
	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), marker) {
		t.Error("the marker is not on the disk")
	}
}

// TestFailureIsReported changes one byte of a pattern: the guest must see it,
// and run no further step.
func TestFailureIsReported(t *testing.T) {
	t.Parallel()
	disk := newDisk(t, 8<<20)
	b := make([]byte, 4_000_000)
	plan.Fill(b, 4096, 7)
	b[1<<20-4096] ^= 1
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 4096); err != nil {
		t.Fatal(err)
	}
	image := build(t, guest.Options{Steps: []guest.Step{
		{Name: "good", Command: "agent verify-pattern /dev/vda 4096 1044480 7"},
		{Name: "bad", Command: "agent verify-pattern /dev/vda 4096 4000000 7"},
		{Name: "never", Command: "true"},
	}})
	var steps []string
	console, err := start(t, guest.Machine{Image: image, Drives: []string{"format=raw,file=" + disk}, OnEvent: func(e guest.Event) {
		if e.Kind != guest.Note {
			steps = append(steps, string(e.Kind)+" "+e.Step)
		}
	}})
	if err == nil || !strings.Contains(console, "the sector at offset 1048576 differs") {
		t.Errorf("a changed byte is not reported: %v\n%s", err, console)
	}
	if want := []string{"start good", "ok good", "start bad", "fail bad", "failed -"}; !slices.Equal(steps, want) {
		t.Errorf("events %q, want %q", steps, want)
	}
}

// press presses a machine's power button.
func press(socket string) error {
	qmp, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer qmp.Close()
	if _, err := io.WriteString(qmp, `{"execute":"qmp_capabilities"}{"execute":"system_powerdown"}`); err != nil {
		return err
	}
	// The answers: a greeting, two results.
	answers := json.NewDecoder(qmp)
	for range 3 {
		var answer map[string]any
		if err := answers.Decode(&answer); err != nil {
			return err
		}
		if answer["error"] != nil {
			return fmt.Errorf("QEMU refuses: %v", answer["error"])
		}
	}
	return nil
}

func TestParseEvent(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]guest.Event{
		"STRONGROOM ok write 1.5s\r\n":               {Kind: guest.OK, Step: "write", Text: "1.5s"},
		"[ 2.1] clocksource: STRONGROOM start mount": {Kind: guest.Start, Step: "mount"},
		"STRONGROOM done -":                          {Kind: guest.Done, Step: "-"},
		"STRONGROOM note write 3 of 5 files":         {Kind: guest.Note, Step: "write", Text: "3 of 5 files"},
	} {
		if got, ok := guest.ParseEvent(line); !ok || got != want {
			t.Errorf("%q: %+v, %v; want %+v", line, got, ok, want)
		}
	}
	for _, line := range []string{"", "login:", "STRONGROOM", "STRONGROOM perhaps x"} {
		if got, ok := guest.ParseEvent(line); ok {
			t.Errorf("%q: %+v", line, got)
		}
	}
}
