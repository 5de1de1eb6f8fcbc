//go:build race

package blockdevtest

// RaceDetector tells that the tests run under it. A sync.Pool then drops what it
// is given at random, so allocations cannot be counted, and all is ten times as
// slow.
const RaceDetector = true

// FaultStep is how far a test that fails every operation in turn goes from one to
// the next. Every one fails in the run without the race detector, which does the
// same.
const FaultStep = 7
