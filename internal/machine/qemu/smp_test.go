package qemu

import "testing"

// TestSMP: under translation QEMU must believe that there can be a second CPU.
func TestSMP(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		accel Accel
		cpus  int
		want  string
	}{{TCG, 1, "1,maxcpus=2"}, {TCG, 2, "2"}, {KVM, 1, "1"}, {KVM, 4, "4"}} {
		if got := (&Config{CPUs: c.cpus}).smp(c.accel); got != c.want {
			t.Errorf("%s, %d CPUs: -smp %s, want %s", c.accel, c.cpus, got, c.want)
		}
	}
}
