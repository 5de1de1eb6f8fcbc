package qemu

import "time"

// TryTCG runs the probe's guest by translation, which works everywhere, though on a
// busy machine not soon.
func TryTCG(dir string) error { return TryWith("qemu-system-x86_64", dir) }

// TryWith does it with another program in the place of QEMU.
func TryWith(binary, dir string) error { return try(binary, dir, TCG, 2*time.Minute) }
