package audit

import (
	"bufio"
	"crypto/ed25519"
	"errors"
	"io"
	"os"
	"path/filepath"

	"strongroom/internal/errs"
)

// Expect is what [Verify] holds a log against.
type Expect struct {
	// Key is the public key of the log's signer.
	Key ed25519.PublicKey
	// Head is a place that was noted elsewhere: the log must have it. Zero means
	// that none was noted.
	Head Head
	// AllowPruned accepts that old files were removed from the front.
	AllowPruned bool
}

// Report is what [Verify] found in a log that is intact.
type Report struct {
	Log         string // its id
	Files       int
	First, Last uint64 // numbers of the records there are; 0 if none
	Head        Head
	Checkpoints int
	// Unsigned records follow the last checkpoint: they are chained, but who
	// could write the file could have replaced or cut them off.
	Unsigned uint64
	// TornBytes at the end are a line that a crash left unfinished.
	TornBytes int64
}

// Verify checks the whole log in dir. It returns a report, or an error of kind
// Corrupt that says in which file, and after which record, it is not what was
// written. visit, if not nil, is called with every record; its error ends the
// check.
func Verify(dir string, want Expect, visit func(Record) error) (Report, error) {
	rep, err := verify(dir, want, visit)
	if err != nil {
		return Report{}, errs.Wrap(err, "audit log in %s does not verify", dir)
	}
	return rep, nil
}

func verify(dir string, want Expect, visit func(Record) error) (Report, error) {
	names, err := files(dir)
	if err != nil {
		return Report{}, err
	}
	if len(names) == 0 {
		return Report{}, errs.New(errs.NotFound, "there is no log")
	}
	c := chain{key: want.Key, visit: visit, want: want.Head}
	rep := Report{Files: len(names)}
	for i, name := range names {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return Report{}, err
		}
		var prev *Head
		if i > 0 {
			prev = &Head{Seq: c.head.Seq, Hash: c.head.Hash}
		}
		torn, err := c.read(f, name, prev)
		f.Close()
		if err != nil {
			return Report{}, errs.Wrap(err, "%s, after record %d", name, c.head.Seq)
		}
		if torn > 0 && i < len(names)-1 {
			return Report{}, errs.New(errs.Corrupt, "%s ends in the middle of a line", name)
		}
		rep.TornBytes = torn
		if i == 0 && c.first != 1 && !want.AllowPruned {
			return Report{}, errs.New(errs.Corrupt, "it begins at record %d: earlier files are missing", c.first)
		}
	}
	switch {
	case want.Head.Seq > c.head.Seq:
		return Report{}, errs.New(errs.Corrupt, "it is truncated: record %d was written, and the log ends with %d", want.Head.Seq, c.head.Seq).WithReason("Truncated")
	case want.Head.Seq >= c.first && want.Head.Seq > 0 && !c.met:
		return Report{}, errs.New(errs.Corrupt, "it is altered: record %d is not the one that was written", want.Head.Seq).WithReason("Altered")
	}
	rep.Log, rep.Head, rep.Checkpoints = c.log, c.head, c.checkpoints
	if c.records > 0 {
		rep.First, rep.Last = c.first, c.head.Seq
		rep.Unsigned = min(c.head.Seq-c.signed, c.records)
	}
	return rep, nil
}

// chain follows a log from line to line.
type chain struct {
	key   ed25519.PublicKey // nil: signatures are not checked
	visit func(Record) error
	want  Head // a head to meet

	log         string
	first       uint64 // number of the first record of the first file
	head        Head
	signed      uint64
	records     uint64
	checkpoints int
	met         bool
}

// read follows one file, which must go on behind prev if prev is not nil. It
// returns how many bytes a torn last line has.
func (c *chain) read(r io.Reader, name string, prev *Head) (torn int64, err error) {
	br := bufio.NewReaderSize(r, MaxLine)
	for n := 0; ; n++ {
		b, err := readLine(br)
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return 0, errs.New(errs.Corrupt, "it has no header")
			}
			return int64(len(b)), nil
		}
		if err != nil {
			return 0, err
		}
		l, err := parseLine(b)
		if err != nil {
			return 0, errs.Wrap(err, "line %d", n+1)
		}
		if err := c.take(l, n == 0, name, prev); err != nil {
			return 0, errs.Wrap(err, "line %d", n+1)
		}
	}
}

func (c *chain) take(l line, isFirst bool, name string, prev *Head) error {
	if isFirst != (l.header != nil) {
		return errs.New(errs.Corrupt, "a header must be on the first line, and only there")
	}
	switch {
	case l.header != nil:
		return c.takeHeader(*l.header, name, prev)
	case l.record != nil:
		r := *l.record
		if r.Seq != c.head.Seq+1 || r.Prev != c.head.Hash {
			return errs.New(errs.Corrupt, "record %d does not follow record %d: something between was removed, moved or put in", r.Seq, c.head.Seq)
		}
		c.head = Head{Seq: r.Seq, Hash: r.Hash}
		c.records++
		if c.head == c.want {
			c.met = true
		}
		if c.visit != nil {
			return c.visit(r)
		}
		return nil
	default:
		cp := *l.checkpoint
		if cp.Checkpoint != c.head.Seq || cp.Hash != c.head.Hash || c.records == 0 {
			return errs.New(errs.Corrupt, "the checkpoint of record %d does not fit record %d", cp.Checkpoint, c.head.Seq)
		}
		if c.key != nil {
			if err := cp.verify(c.log, c.key); err != nil {
				return errs.Wrap(err, "checkpoint of record %d", cp.Checkpoint)
			}
		}
		c.signed = cp.Checkpoint
		c.checkpoints++
		return nil
	}
}

func (c *chain) takeHeader(h header, name string, prev *Head) error {
	if first, _ := firstOf(name); first != h.First {
		return errs.New(errs.Corrupt, "the header is of another file, which begins with record %d", h.First)
	}
	if prev == nil {
		c.log, c.first = h.Log, h.First
		c.head = Head{Seq: h.First - 1, Hash: h.Prev}
		// A file is begun behind a checkpoint.
		c.signed = h.First - 1
		if h.First == 1 && h.Prev != genesis(h.Log) {
			return errs.New(errs.Corrupt, "the beginning does not fit the log's id")
		}
		return nil
	}
	if h.Log != c.log || h.First != prev.Seq+1 || h.Prev != prev.Hash {
		return errs.New(errs.Corrupt, "it does not follow the file before it, which ends with record %d", prev.Seq)
	}
	return nil
}
