// Package plan is what a test guest and the program that starts it agree on:
// the steps to run and the bytes of a pattern.
package plan

import (
	"encoding/binary"
	"encoding/json"
	"os"
)

// Path is where the plan is in the guest's initramfs.
const Path = "/plan.json"

// Plan is what the guest does.
type Plan struct {
	Modules []string // kernel modules to load, in this order; paths in the initramfs
	Steps   []Step
}

// Step is one command of a guest.
type Step struct {
	Name    string // one word
	Command string // for sh -c; SIGTERM means that the power button was pressed
}

// Read reads a plan from a file.
func Read(path string) (*Plan, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p := new(Plan)
	if err := json.Unmarshal(text, p); err != nil {
		return nil, err
	}
	return p, nil
}

// Fill fills p with the pattern of a seed for offset off, a multiple of 8, of a
// disk. The pattern of a byte depends on its offset and the seed only, no two
// words of it are alike, and it is fast under emulation.
func Fill(p []byte, off int64, seed uint64) {
	word := uint64(off) / 8
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, mix(word+seed*0x9e3779b97f4a7c15))
		p, word = p[8:], word+1
	}
	var last [8]byte
	binary.LittleEndian.PutUint64(last[:], mix(word+seed*0x9e3779b97f4a7c15))
	copy(p, last[:])
}

// mix is the finaliser of SplitMix64, a bijection.
func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
