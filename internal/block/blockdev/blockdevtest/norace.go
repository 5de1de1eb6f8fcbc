//go:build !race

package blockdevtest

// RaceDetector: see race.go.
const RaceDetector = false
