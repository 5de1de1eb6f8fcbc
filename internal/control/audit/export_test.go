package audit

import "time"

// Faults decides on the outcome of each operation on the log's file.
type Faults struct {
	// At is the number of the operation that fails, from 1; 0: none.
	At int
	// Torn: a failing write leaves half; a failing sync or truncate has taken
	// effect all the same.
	Torn bool
	N    int // operations so far
}

// ErrFault is what a failed operation returns.
type faultError struct{}

func (faultError) Error() string { return "injected fault" }

// ErrFault is what a failed operation returns.
var ErrFault error = faultError{}

type faultyFile struct {
	file
	*Faults
}

func (f faultyFile) fails() bool {
	f.N++
	return f.N == f.At
}

func (f faultyFile) Write(b []byte) (int, error) {
	if !f.fails() {
		return f.file.Write(b)
	}
	if f.Torn {
		n, _ := f.file.Write(b[:len(b)/2])
		return n, ErrFault
	}
	return 0, ErrFault
}

func (f faultyFile) Sync() error {
	if !f.fails() {
		return f.file.Sync()
	}
	if f.Torn {
		f.file.Sync()
	}
	return ErrFault
}

func (f faultyFile) Truncate(n int64) error {
	if !f.fails() {
		return f.file.Truncate(n)
	}
	if f.Torn {
		f.file.Truncate(n)
	}
	return ErrFault
}

// OpenFaulty is Open with faults.
func OpenFaulty(cfg Config, faults *Faults) (*Log, error) {
	return openLog(cfg, func(path string) (file, error) {
		f, err := openFile(path)
		if err != nil {
			return nil, err
		}
		return faultyFile{f, faults}, nil
	})
}

// SetClock and SetID make a log's bytes repeatable; SetID must come before the
// first record of a new log.
func (l *Log) SetClock(now func() time.Time) { l.now = now }

// SetID begins the log anew under that id.
func (l *Log) SetID(id string) error {
	l.id = id
	l.signedAt = l.now()
	l.head = Head{Hash: genesis(id)}
	return l.begin()
}

// ParseLine parses a line and encodes it again.
func ParseLine(b []byte) ([]byte, error) {
	l, err := parseLine(b)
	if err != nil {
		return nil, err
	}
	switch {
	case l.header != nil:
		return encodeLine(l.header)
	case l.record != nil:
		return encodeLine(l.record)
	default:
		return encodeLine(l.checkpoint)
	}
}
