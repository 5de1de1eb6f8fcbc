package xts

import (
	"bytes"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
)

// TestRegistered asks Linux, not package cpu, what the processor can do: a
// machine that has the instructions and not the implementation fails here,
// instead of testing and running the slow one.
func TestRegistered(t *testing.T) {
	t.Parallel()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	want := expectedImplementations(strings.Fields(string(info)))
	if got := Implementations(); !slices.Equal(got, want) {
		t.Errorf("implementations are %v, and should be %v on this processor (%s)", got, want, runtime.GOARCH)
	}
}

// TestScheduleIsWiped checks that the expanded key is there, in locked memory,
// and gone after Close.
func TestScheduleIsWiped(t *testing.T) {
	for _, name := range Implementations() {
		key, err := keymem.Random(KeySize256)
		if err != nil {
			t.Fatal(err)
		}
		c, err := NewWith(name, key)
		if err != nil {
			t.Fatal(err)
		}
		schedule := c.key.Bytes()
		if name != "portable" && !bytes.Contains(schedule, key.Bytes()[:16]) {
			t.Errorf("%s: the first round key is not in the schedule", name)
		}
		if bytes.Equal(schedule, make([]byte, len(schedule))) {
			t.Errorf("%s: the schedule is empty", name)
		}
		if c.impl == portable {
			b := c.bitsliced()
			if b.words != [len(b.words)]uint32{} || b.sub != ([8]uint64{}) || b.block != (blocks{}) {
				t.Error("the working space of the key expansion is not wiped")
			}
		}
		c.Close()
		if !bytes.Equal(schedule, make([]byte, len(schedule))) {
			t.Errorf("%s: the schedule is not wiped", name)
		}
		key.Close()
	}
}
