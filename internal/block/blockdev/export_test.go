package blockdev

import "os"

// BreakFlush makes Flush fail until the returned function is called: fdatasync
// of a pipe is an error.
func BreakFlush(f *File) (restore func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	fd := f.fd
	f.fd = int(r.Fd())
	return func() {
		f.fd = fd
		r.Close()
		w.Close()
	}, nil
}
