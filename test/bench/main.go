// Command bench measures volumes served over NBD and vhost-user beside their
// peers, and writes docs/reference/performance.md and .json.
//
// In one run, in turn and in several rounds, it loads: an encrypted volume of
// ours, the same without encryption, qemu-storage-daemon serving a LUKS image,
// and nbdkit's luks filter; and once more a server that does nothing, to show
// where the load generators themselves end. All images are on a tmpfs. The same
// follows on a disk with direct I/O, for those that have that. Medians are
// reported. Then it measures the cipher beside OpenSSL and a loop in C, rekeys
// volumes on a disk beside cryptsetup, times how soon a controller and a VM are
// there, and loads our key management server beside PyKMIP, with the binary that
// $STRONGROOM names.
//
// Loads come from two generators: one of our own, one thread, over NBD
// ([nbd.Pipeline]) and over vhost-user (vhostusertest), which is fast enough not to
// be the limit, and fio's nbd engine, which everybody has and which ends near
// 75,000 requests a second.
//
// Run as `bench serve KIND cached|direct FILE KEYFILE SOCKET VHOSTSOCKET`, it
// is the server under test, in a process of its own so that its processor time
// can be told apart.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	rounds   int
	duration time.Duration // of one measurement
	size     int64         // of each image, in bytes
	dir      string        // a tmpfs
	out      string        // where the tables go; a .json beside it
	disk     string        // a folder on a disk
	kmsKeys  int           // with how many keys a KMS is measured; 0: with none
	kmsDir   string        // where it keeps them; "": nowhere
	only     *regexp.Regexp
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 7 && args[0] == "serve" {
		return serve(ctx, args[1], args[2], args[3], args[4], args[5], args[6])
	}
	var o options
	var only string
	var update bool
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&o.rounds, "rounds", 5, "how often each load is measured")
	flags.DurationVar(&o.duration, "duration", 600*time.Millisecond, "of one measurement")
	flags.Int64Var(&o.size, "size", 256<<20, "of each image, in bytes; a multiple of 1 MiB")
	flags.StringVar(&o.dir, "dir", "/dev/shm", "a tmpfs with room for four images")
	flags.StringVar(&o.disk, "disk", ".", "a folder on a disk with room for three images")
	flags.StringVar(&o.out, "out", filepath.FromSlash("docs/reference/performance.md"), "where the tables go")
	flags.IntVar(&o.kmsKeys, "kms-keys", 0, "also measure our key management server with so many keys, such as 1000000: some minutes")
	flags.StringVar(&o.kmsDir, "kms-dir", "", "where the key management server with -kms-keys keeps them, to be measured again")
	flags.StringVar(&only, "only", "", "measure only what matches: a regular expression on `[disk/]SERVER/GENERATOR/LOAD` and on 'cipher', 'rekey', 'starts' and 'kms'")
	flags.BoolVar(&update, "update", false, "put what -only selects, whole sections, into the page that is there, in place of printing it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if o.rounds < 1 || o.duration < 50*time.Millisecond || o.size < 16<<20 || o.size%(1<<20) != 0 {
		return errors.New("cannot measure: -rounds, -duration or -size is too small")
	}
	var err error
	if o.only, err = regexp.Compile(only); err != nil {
		return err
	}
	r, err := measure(ctx, o)
	if err != nil {
		return err
	}
	binary := os.Getenv("STRONGROOM")
	if o.only.MatchString("cipher") {
		if r.Cipher, err = measureCipher(ctx, o, binary); err != nil {
			return fmt.Errorf("cannot measure the cipher: %w", err)
		}
	}
	if o.only.MatchString("rekey") {
		if r.Rekey, err = measureRekey(ctx, o); err != nil {
			return fmt.Errorf("cannot measure a deep rekey: %w", err)
		}
	}
	if o.only.MatchString("starts") {
		if r.Starts, err = measureStarts(ctx, o, binary); err != nil {
			return fmt.Errorf("cannot measure starts: %w", err)
		}
	}
	if o.only.MatchString("kms") {
		if r.KMS, err = measureKMS(ctx, o, binary); err != nil {
			return fmt.Errorf("cannot measure key management servers: %w", err)
		}
	}
	if o.kmsKeys > 0 {
		if r.Scale, err = measureScale(ctx, o, binary); err != nil {
			return fmt.Errorf("cannot measure a key management server with %d keys: %w", o.kmsKeys, err)
		}
	}
	if update {
		if r, err = r.update(o.out); err != nil {
			return fmt.Errorf("cannot update %s: %w", o.out, err)
		}
	} else if only != "" {
		fmt.Print(r.markdown())
		return nil
	}
	return r.write(o.out)
}
