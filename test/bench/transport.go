package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"strongroom/internal/block/nbd"
	"strongroom/internal/block/vhostuser/vhostusertest"
)

// transport is a connection of our generator with a server, with requests of one
// length, at most its depth at a time. Their data are not looked at.
type transport interface {
	size() int64 // of the disk, in bytes
	idle() int   // how many more requests may be put under way
	// start puts a request under way and returns its number, from 0 on.
	start(write bool, off int64) int
	// next waits for a request that is done and returns its number.
	next() (int, error)
	close()
}

// overNBD is a transport with one connection.
type overNBD struct {
	pipe *nbd.Pipeline
	bufs [][]byte
	turn int
}

func dialNBD(ctx context.Context, socket string, length, depth int) (transport, error) {
	pipe, err := nbd.DialPipeline(ctx, "unix", socket, "", depth)
	if err != nil {
		return nil, err
	}
	t := &overNBD{pipe: pipe}
	for range depth {
		t.bufs = append(t.bufs, make([]byte, length))
		randomize(t.bufs[len(t.bufs)-1])
	}
	return t, nil
}

// randomize fills p with data that are the same in each run, and no zeros, which
// some servers would not send.
func randomize(p []byte) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

func (t *overNBD) size() int64 { return t.pipe.Size() }
func (t *overNBD) idle() int   { return t.pipe.Idle() }

func (t *overNBD) start(write bool, off int64) int {
	// It does not matter that a buffer may still be in use by an earlier request.
	buf := t.bufs[t.turn]
	t.turn = (t.turn + 1) % len(t.bufs)
	if write {
		return t.pipe.Write(buf, off)
	}
	return t.pipe.Read(buf, off)
}

func (t *overNBD) next() (int, error) { return t.pipe.Next() }
func (t *overNBD) close()             { t.pipe.Close() }

// overVhost is a transport with one queue: what a guest with one processor does.
type overVhost struct {
	front  *vhostusertest.Frontend
	queue  *vhostusertest.Queue
	bytes  int64
	length int
	kicked bool
}

func dialVhost(_ context.Context, socket string, length, depth int) (transport, error) {
	front, err := vhostusertest.Dial(socket, vhostusertest.Options{Slots: depth, DataSize: length, Whole: true})
	if err != nil {
		return nil, err
	}
	t := &overVhost{front: front, queue: front.Queues[0], length: length, kicked: true}
	if t.bytes, err = front.Size(); err != nil {
		front.Close()
		return nil, err
	}
	data := make([]byte, length)
	randomize(data)
	for slot := range depth {
		t.queue.Fill(slot, data)
	}
	return t, nil
}

func (t *overVhost) size() int64 { return t.bytes }
func (t *overVhost) idle() int   { return t.queue.Idle() }

func (t *overVhost) start(write bool, off int64) int {
	slot, op := t.queue.Slot(), uint32(vhostusertest.Read)
	if write {
		op = vhostusertest.Write
	}
	t.queue.Submit(slot, op, uint64(off)/512, t.length)
	t.kicked = false
	return slot
}

func (t *overVhost) next() (int, error) {
	if !t.kicked {
		if err := t.queue.Kick(); err != nil {
			return -1, err
		}
		t.kicked = true
	}
	slot, status, err := t.queue.Next()
	if err == nil && status != vhostusertest.OK {
		err = errors.New(fmt.Sprint("request failed with status ", status))
	}
	return slot, err
}

func (t *overVhost) close() { t.front.Close() }
