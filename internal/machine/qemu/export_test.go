package qemu

// TryTCG runs the probe's guest by translation, which works everywhere.
func TryTCG() error { return TryWith("qemu-system-x86_64") }

// TryWith does it with another program in the place of QEMU.
func TryWith(binary string) error { return try(binary, TCG) }
