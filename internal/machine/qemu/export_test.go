package qemu

// TryTCG runs the probe's guest by translation, which works everywhere.
func TryTCG(dir string) error { return TryWith("qemu-system-x86_64", dir) }

// TryWith does it with another program in the place of QEMU.
func TryWith(binary, dir string) error { return try(binary, dir, TCG) }
