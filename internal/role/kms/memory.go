package kms

import (
	"context"
	"os"
	"path/filepath"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

const (
	// With many keys most of the memory is etcd's index, which lives on, and to
	// keep as much again for garbage is too much. With few, less garbage would only
	// cost time.
	largeHeap    = 128 << 20 // bytes in use
	largeFile    = 256 << 20 // bytes of the database, which make a large heap
	collectLarge = 33        // per cent of what is in use, of garbage until it is collected
	collectSmall = 100

	heapEvery = time.Minute
)

// collectFor sets how much garbage there may be for a heap, unless the environment
// says it.
func collectFor(large bool) {
	if _, told := os.LookupEnv("GOGC"); told {
		return
	}
	percent := collectSmall
	if large {
		percent = collectLarge
	}
	debug.SetGCPercent(percent)
}

// collectAtStart does so for the database that is about to be opened.
func collectAtStart(cfg Config) {
	info, err := os.Stat(filepath.Join(cfg.DataDir, storeName, "member", "snap", "db"))
	collectFor(err == nil && info.Size() > largeFile)
}

// keepHeap does so for the heap as it grows and shrinks, until ctx ends. First it
// gives back what a start with many keys left: started returns when that is over.
func keepHeap(ctx context.Context, started func(context.Context) error) error {
	if err := started(ctx); err == nil && liveHeap() > largeHeap {
		debug.FreeOSMemory()
	}
	tick := time.NewTicker(heapEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			collectFor(liveHeap() > largeHeap)
		}
	}
}

// liveHeap returns how many bytes the last collection found in use.
func liveHeap() uint64 {
	sample := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}}
	runtimemetrics.Read(sample)
	return sample[0].Value.Uint64()
}
