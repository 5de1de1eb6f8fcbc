package qemu

// TryTCG runs the probe's guest by translation, which works everywhere.
func TryTCG() error { return try("qemu-system-x86_64", TCG) }
