package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
)

// count writes 1, 2, 3 ... to the first sector of a device and, when that is
// durable, to that of another, as a program does with a log and its data. At first it
// tells what is there ("found A B"), which must be of one moment, and goes on from
// there; then it tells how far both are ("counted N"), again and again.
func count(ctx context.Context, args []string) error {
	var devices [2]*os.File
	var found [2]uint64
	sector := make([]byte, 512)
	for i, name := range args {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.ReadAt(sector, 0); err != nil {
			return err
		}
		devices[i], found[i] = f, binary.BigEndian.Uint64(sector)
	}
	note("found %d %d", found[0], found[1])
	if found[0] != found[1] && found[0] != found[1]+1 {
		return fmt.Errorf("%d and %d were there at no one moment", found[0], found[1])
	}
	shown := time.Now()
	for n := found[0]; ctx.Err() == nil; {
		n++
		binary.BigEndian.PutUint64(sector, n)
		for _, f := range devices {
			_, err := f.WriteAt(sector, 0)
			if err := errors.Join(err, f.Sync()); err != nil {
				return err
			}
		}
		if time.Since(shown) > 100*time.Millisecond {
			shown = time.Now()
			note("counted %d", n)
		}
	}
	return nil
}
