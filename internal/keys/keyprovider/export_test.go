package keyprovider

import (
	"time"

	"strongroom/internal/crypto/keymem"
)

// ExportQuick is [Native.Export] at a cost that tests can pay often.
func (n *Native) ExportQuick(password *keymem.Key, now time.Time) ([]byte, error) {
	return n.export(password, now, testIterations)
}
