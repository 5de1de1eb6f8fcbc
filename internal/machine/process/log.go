package process

import (
	"os"
	"strings"
)

// logTailMax is how much of a log is worth putting in an error, in bytes.
const logTailMax = 2 << 10

// LogTail returns the end of the log at path, at most 2 KiB; "" if there is
// none.
func LogTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	b := make([]byte, min(info.Size(), logTailMax))
	n, _ := f.ReadAt(b, max(0, info.Size()-logTailMax))
	return strings.TrimSpace(strings.ToValidUTF8(string(b[:n]), "?"))
}
