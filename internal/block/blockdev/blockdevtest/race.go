//go:build race

package blockdevtest

// RaceDetector tells that the tests run under it. A sync.Pool then drops what it
// is given at random, so allocations cannot be counted, and all is ten times as
// slow.
const RaceDetector = true
