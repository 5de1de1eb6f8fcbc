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
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
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

func TestFileSystemSurvivesPowerOff(t *testing.T) {
	t.Parallel()
	disk := newDisk(t, 64<<20)
	image := build(t, guest.Options{
		Programs: []string{"mke2fs"},
		Steps: []guest.Step{
			{Name: "format", Command: "if agent blank /dev/vda; then mke2fs -q -t ext4 /dev/vda; fi"},
			{Name: "mount", Command: "mount -t ext4 /dev/vda /mnt"},
			{Name: "verify", Command: "agent verify-files /mnt"},
			{Name: "write", Command: "agent write-files /mnt/$(date +%s) 10 100000 MARKER-in-plain-text"},
			{Name: "churn", Command: "agent churn /mnt/churn 1000000 5"},
			{Name: "unmount", Command: "umount /mnt"},
		},
	})
	for boot, want := range []string{"verified 0 files", "verified 11 files"} {
		console, err := start(t, guest.Machine{Image: image, Drives: []string{"format=raw,file=" + disk}})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(console, want) {
			t.Errorf("boot %d: console does not say %q:\n%s", boot, want, console)
		}
	}
	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "MARKER-in-plain-text") {
		t.Error("the marker is not on the disk")
	}
}

// TestFailureIsReported damages a disk between two guests: the second must see it.
func TestFailureIsReported(t *testing.T) {
	t.Parallel()
	disk := newDisk(t, 8<<20)
	drives := []string{"format=raw,file=" + disk}
	pattern := func(verb string) guest.Image {
		return build(t, guest.Options{Steps: []guest.Step{
			{Name: verb, Command: "agent " + verb + "-pattern /dev/vda 4096 4000000 7"},
			{Name: "again", Command: "true"},
		}})
	}
	if _, err := start(t, guest.Machine{Image: pattern("write"), Drives: drives}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0x55}, 1<<20); err != nil {
		t.Fatal(err)
	}
	var steps []string
	console, err := start(t, guest.Machine{Image: pattern("verify"), Drives: drives, OnEvent: func(e guest.Event) {
		steps = append(steps, string(e.Kind)+" "+e.Step)
	}})
	if err == nil || !strings.Contains(console, "the sector at offset 1048576 differs") {
		t.Errorf("a changed byte is not reported: %v\n%s", err, console)
	}
	if want := []string{"start verify", "fail verify", "failed -"}; !slices.Equal(steps, want) {
		t.Errorf("events %q, want %q", steps, want)
	}
}

// TestPowerButton ends a step that would run for ever, and the steps behind it
// still run.
func TestPowerButton(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "qmp")
	image := build(t, guest.Options{Steps: []guest.Step{
		{Name: "churn", Command: "mkdir /mnt/a && agent churn /mnt/a/churn 400000 0 && echo over"},
		{Name: "verify", Command: "agent verify-files /mnt"},
	}})
	pressed := false
	var failed error
	console, err := start(t, guest.Machine{
		Image: image,
		Args:  []string{"-qmp", "unix:" + socket + ",server=on,wait=off"},
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
	for _, want := range []string{"power button", "blocks read as written last", "verified 1 files, 397312 bytes"} {
		if !strings.Contains(console, want) {
			t.Errorf("console does not say %q:\n%s", want, console)
		}
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
