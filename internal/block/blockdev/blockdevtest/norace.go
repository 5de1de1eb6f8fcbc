//go:build !race

package blockdevtest

// RaceDetector: see race.go.
const RaceDetector = false

// FaultStep: see race.go.
const FaultStep = 1
