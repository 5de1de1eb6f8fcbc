package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// hostileArch are the calls of this architecture that belong to hostile: none.
var hostileArch []uint32
