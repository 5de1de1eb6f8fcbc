//go:build race

package blockdevtest

// raceDetector: under it a sync.Pool drops what it is given at random, so
// allocations cannot be counted.
const raceDetector = true
