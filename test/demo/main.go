// Command demo shows the main job on real QEMU guests: an encrypted VM from its
// first boot through rekeys, crashes, a move to another installation, and the
// loss and return of a key server. It does everything by the strongroom binary,
// as an operator would, and ends with an error at the first claim that is not
// true.
//
// It is run by `make demo`. $STRONGROOM is the binary; KEEP=1 leaves the system
// running.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"strongroom/test/guest"
	"strongroom/test/lab"
)

// marker is what the guest writes in plain text at the head of its files.
const marker = "STRONGROOM-DEMO-PLAINTEXT-MARKER"

// timeLimit bounds the whole demonstration on a slow machine.
const timeLimit = 10 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, timeLimit)
	err := run(ctx, os.Getenv("STRONGROOM"), os.Getenv("KEEP") == "1")
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo: FAILED:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, binary string, keep bool) (err error) {
	if binary == "" {
		return errors.New("$STRONGROOM does not name the binary; run: make demo")
	}
	dir, err := os.MkdirTemp("", "sr-demo-") // short: socket paths are limited
	if err != nil {
		return err
	}
	d := &demo{lab: lab.New(dir, binary), begin: time.Now()}
	defer func() {
		switch {
		case err != nil:
			fmt.Fprintln(os.Stderr, "\nlogs are in", dir)
			d.end()
		case !keep:
			d.end()
			err = os.RemoveAll(dir)
		}
	}()
	steps := []struct {
		title string
		do    func(context.Context) error
	}{
		{"A controller and a host start", d.start},
		{"A native key provider, unusable before its backup", d.provider},
		{"A VM with an encrypted disk boots and writes files", d.firstBoot},
		{"Shallow rekey to a second provider while the guest writes", d.liveRekey},
		{"Deep rekey while the guest writes: the old DEK opens nothing any more", d.deepRekey},
		{"Host killed and started again with the controller down", d.crash},
		{"A copy of the VM on a second installation", d.elsewhere},
		{"A key server (KMS) in the loop, and killed: the VM goes on", d.keyServerDies},
		{"The host restarts without the KMS, then the KMS returns", d.keyServerReturns},
		{"Away from the KMS while the guest writes", d.leaveKeyServer},
	}
	for i, s := range steps {
		fmt.Printf("\n%d. %s\n", i+1, s.title)
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, s.title, err)
		}
	}
	fmt.Printf("\nAll of it was true, in %.0f s.\n", time.Since(d.begin).Seconds())
	d.next(keep)
	return nil
}

// demo is what one step leaves to the next.
type demo struct {
	lab        *lab.Lab
	begin      time.Time
	controller *lab.Controller
	host       *lab.Host
	store      string // folder of the datastore
	image      guest.Image
	keys       *keys
	console    *console
	second     *lab.Host
	kms        *lab.KMS
}

// say prints one readable line.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("   %6.1f s  %s\n", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

// end ends everything, the VMs too.
func (d *demo) end() {
	for _, h := range []*lab.Host{d.host, d.second} {
		if h != nil {
			_ = h.Crash() // nothing is left to lose
		}
	}
	d.lab.Close()
}

func (d *demo) next(keep bool) {
	if !keep {
		fmt.Print(`
Everything was stopped and removed. To keep it running and look around:
    make demo KEEP=1
To begin with a system of your own:
    bin/strongroom dev --dir ~/strongroom
`)
		return
	}
	fmt.Printf(`
The system runs; it is in %s. Try:
    export STRONGROOM_CONFIG=%s
    %[3]s vm ls
    %[3]s vm show web-1
    %[3]s provider usage kp-2
    %[3]s event ls
    %[3]s health
    %[3]s vm power-on web-1      # then: tail -f %[4]s
To end it: kill %[5]s
`, d.lab.Dir, d.controller.CLIConfig(), d.lab.Binary, filepath.Join(d.store, "web-1", "vm.log"), strings.Join(d.lab.PIDs(), " "))
}
