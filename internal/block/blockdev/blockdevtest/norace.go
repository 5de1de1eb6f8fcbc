//go:build !race

package blockdevtest

const raceDetector = false
