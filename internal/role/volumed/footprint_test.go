package volumed

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

// smaps is shortened from a real one.
const smaps = `00400000-012e0000 r-xp 00000000 fe:00 2098290                            /usr/bin/strongroom
Size:              15232 kB
Rss:               10688 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
012e0000-02500000 r--p 00ee0000 fe:00 2098290                            /usr/bin/strongroom
Anonymous:             0 kB
VmFlags: rd mr mw me
02500000-02600000 r--p 02100000 fe:00 2098290                            /usr/bin/strongroom (deleted)
Anonymous:             4 kB
02600000-02700000 rw-p 02200000 fe:00 2098290                            /usr/bin/strongroom
Anonymous:             0 kB
2e68d8800000-2e68d9000000 r--p 00000000 00:00 0
Anonymous:             0 kB
7ffd1000-7ffd2000 r-xp 00000000 00:00 0                                  [vdso]
Anonymous:             0 kB
`

func TestCleanMappings(t *testing.T) {
	t.Parallel()
	got, err := cleanMappings(strings.NewReader(smaps))
	if want := (program{{0x400000, 0x12e0000}, {0x12e0000, 0x2500000}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %x (%v), want %x: changed, writable, nameless and the kernel's are not the program's", got, err, want)
	}
	for _, bad := range []string{"zz-ff r-xp 0 0:0 0 /x\n", "ff r-xp 0 0:0 0 /x\n", "ff-fe r-xp 0 0:0 0 /x\n"} {
		if got, err := cleanMappings(strings.NewReader(bad)); err == nil {
			t.Errorf("%q gives %x", bad, got)
		}
	}
}

// TestDropProgram: the program still runs without its pages, which come back.
func TestDropProgram(t *testing.T) {
	t.Parallel()
	p, err := findProgram()
	if err != nil || len(p) == 0 {
		t.Fatalf("program found at %x, %v", p, err)
	}
	p.drop()
	if _, err := os.Stat("/proc/self/exe"); err != nil {
		t.Error(err)
	}
}
