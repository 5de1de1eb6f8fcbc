// Package audit keeps a tamper-evident log of who did what: append-only files of
// JSON lines, each record chained to the one before by SHA-256, signed with
// Ed25519 at intervals, and verifiable offline. Format: docs/spec/audit-log.md.
//
// Invariants: a record that [Log.Append] acknowledged is in the log, and with
// [SyncAlways] on disk; a log whose end is not what it was when it was written
// is not written on. No secrets belong into a record. A Log is safe for
// concurrent use; one process at a time writes a directory.
package audit

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"strongroom/internal/control/groupcommit"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/filelock"
)

// Sync says when records are forced to disk.
type Sync uint8

// The policies.
const (
	SyncAlways     Sync = iota // with every record
	SyncCheckpoint             // with checkpoints only
)

// Defaults of [Config].
const (
	DefaultMaxFile           = 64 << 20
	DefaultCheckpointRecords = 100
	DefaultCheckpointEvery   = time.Minute
)

// Config of a [Log].
type Config struct {
	Dir string
	// Signer is an Ed25519 key that the role keeps sealed.
	Signer crypto.Signer
	Sync   Sync
	// MaxFileBytes, CheckpointRecords and CheckpointEvery: 0 means the default.
	MaxFileBytes      int64
	CheckpointRecords int
	CheckpointEvery   time.Duration
}

// Entry is what the caller says of an operation. Fields that are too long are
// cut.
type Entry struct {
	Actor   string
	Action  string
	Object  string
	Outcome string // [Success], [Denied] or [Failed]
	Details map[string]string
}

// Head is a place in the log: note it elsewhere to notice a cut end.
type Head struct {
	Seq  uint64 `json:"seq"` // 0: before the first record
	Hash Hash   `json:"hash"`
}

// file is what the log needs of an *os.File.
type file interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Close() error
}

// Log is an open log.
type Log struct {
	cfg  Config
	key  string // id of the signing key
	open func(path string) (file, error)
	now  func() time.Time

	flushes *groupcommit.Queue[*flush]

	mu       sync.Mutex // guards all below
	lock     *os.File
	f        file
	size     int64
	id       string // of the log
	head     Head
	signed   uint64    // the last record under a checkpoint
	synced   uint64    // the last record that is known to be on disk
	signedAt time.Time // when
	broken   error     // why nothing is written any more
	closed   bool
}

var errClosed = errs.New(errs.Unavailable, "audit log is closed")

// Open opens the log in cfg.Dir for writing, or begins one. A last line that a
// crash has torn is cut off, and that is noted in the log. Anything else that is
// wrong with the newest file is an error; [Verify] checks them all.
func Open(cfg Config) (*Log, error) {
	l, err := openLog(cfg, openFile)
	if err != nil {
		return nil, errs.Wrap(err, "cannot open audit log in %s", cfg.Dir)
	}
	return l, nil
}

func openFile(path string) (file, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600)
}

func openLog(cfg Config, open func(string) (file, error)) (_ *Log, err error) {
	pub, ok := cfg.Signer.Public().(ed25519.PublicKey)
	if !ok {
		return nil, errs.New(errs.Invalid, "the signing key is not Ed25519")
	}
	if cfg.MaxFileBytes <= 0 {
		cfg.MaxFileBytes = DefaultMaxFile
	}
	if cfg.CheckpointRecords <= 0 {
		cfg.CheckpointRecords = DefaultCheckpointRecords
	}
	if cfg.CheckpointEvery <= 0 {
		cfg.CheckpointEvery = DefaultCheckpointEvery
	}
	l := &Log{cfg: cfg, key: KeyID(pub), open: open, now: time.Now}
	l.flushes = groupcommit.New(func([]*flush, *flush) bool { return true }, l.flushAll)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if l.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.lock.Close()
			if l.f != nil {
				l.f.Close()
			}
		}
	}()
	names, err := files(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		l.id = uuid.Must(uuid.NewRandom()).String()
		l.head.Hash = genesis(l.id)
		l.signedAt = l.now()
		return l, l.begin()
	}
	return l, l.resume(names[len(names)-1])
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Take(f); err != nil {
		f.Close()
		return nil, errs.New(errs.InvalidState, "%w", err)
	}
	return f, nil
}

func fileName(first uint64) string { return fmt.Sprintf("audit-%020d.jsonl", first) }

// files returns the names of the log's files, in order.
func files(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, ok := firstOf(e.Name()); ok {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// firstOf returns the number in a file's name.
func firstOf(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(strings.TrimSuffix(name, ".jsonl"), "audit-")
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, ok && err == nil && name == fileName(n)
}

// begin starts a file behind the current head: its header is written aside and
// renamed, so that a file always has one.
func (l *Log) begin() error {
	b, err := encodeLine(header{Format: format, Log: l.id, First: l.head.Seq + 1, Prev: l.head.Hash})
	if err != nil {
		return err
	}
	path := filepath.Join(l.cfg.Dir, fileName(l.head.Seq+1))
	tmp := path + ".new"
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		return err
	}
	f, err := l.open(tmp)
	if err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = durable.SyncDir(l.cfg.Dir)
	}
	if err != nil {
		f.Close()
		return err
	}
	if l.f != nil {
		l.f.Close() // synced by its last checkpoint
	}
	l.f, l.size = f, int64(len(b))
	return nil
}

// resume goes on with the newest file.
func (l *Log) resume(name string) error {
	path := filepath.Join(l.cfg.Dir, name)
	r, err := os.Open(path)
	if err != nil {
		return err
	}
	defer r.Close()
	c := chain{}
	torn, err := c.read(r, name, nil)
	if err != nil {
		return errs.Wrap(err, "%s", name)
	}
	info, err := r.Stat()
	if err != nil {
		return err
	}
	l.id, l.head, l.signed, l.synced = c.log, c.head, c.signed, c.signed
	l.size = info.Size() - torn
	l.signedAt = l.now()
	if l.f, err = l.open(path); err != nil {
		return err
	}
	if torn == 0 {
		return nil
	}
	if err := l.f.Truncate(l.size); err != nil {
		return err
	}
	return l.append(Entry{
		Actor: "internal:controller", Action: "audit.recover", Object: "audit", Outcome: Success,
		Details: map[string]string{"bytes": strconv.FormatInt(torn, 10)},
	})
}

// Append adds a record and returns its place. When it returns nil the record is
// in the log. After an error it may or may not be; what follows is chained to
// what is.
func (l *Log) Append(e Entry) (Head, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.append(e); err != nil {
		return Head{}, errs.Wrap(err, "cannot write audit log")
	}
	return l.head, nil
}

func (l *Log) append(e Entry) error {
	if err := l.usable(); err != nil {
		return err
	}
	if l.size >= l.cfg.MaxFileBytes {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	r := Record{
		Seq: l.head.Seq + 1, Time: l.now().UTC().Round(0),
		Actor: cut(e.Actor, maxField), Action: cut(e.Action, maxField), Object: cut(e.Object, maxField), Outcome: cut(e.Outcome, maxField),
		Prev: l.head.Hash,
	}
	for k, v := range e.Details {
		if len(r.Details) == maxDetails {
			break
		}
		if r.Details == nil {
			r.Details = map[string]string{}
		}
		r.Details[cut(k, maxDetailKey)] = cut(v, maxDetailText)
	}
	r.Hash = r.digest()
	b, err := encodeLine(r)
	if err != nil {
		return err
	}
	if err := l.write(b); err != nil {
		return err
	}
	// In the file from here: the chain goes on from it, whatever comes.
	l.head = Head{Seq: r.Seq, Hash: r.Hash}
	if l.head.Seq-l.signed >= uint64(l.cfg.CheckpointRecords) || l.now().Sub(l.signedAt) >= l.cfg.CheckpointEvery {
		return l.checkpoint()
	}
	if l.cfg.Sync == SyncAlways {
		return l.sync()
	}
	return nil
}

func (l *Log) usable() error {
	if l.closed {
		return errClosed
	}
	return l.broken
}

// write adds a line, or nothing: what a failed write left is cut off.
func (l *Log) write(b []byte) error {
	n, err := l.f.Write(b)
	if err == nil {
		l.size += int64(len(b))
		return nil
	}
	if n > 0 {
		if terr := l.f.Truncate(l.size); terr != nil {
			l.broken = errs.New(errs.Unavailable, "an earlier write failed and could not be taken back: %w", terr)
		}
	}
	if errors.Is(err, unix.ENOSPC) {
		return errs.New(errs.NoSpace, "%w", err)
	}
	return errs.New(errs.Unavailable, "%w", err)
}

// sync forces the file to disk. A failed sync may have dropped what was written,
// and a second one would not say so: nothing is written after it.
func (l *Log) sync() error {
	if err := l.f.Sync(); err != nil {
		l.broken = errs.New(errs.Unavailable, "an earlier sync failed: %w", err)
		return l.broken
	}
	l.synced = l.head.Seq
	return nil
}

// flush is a caller's wish that all up to head be on disk.
type flush struct {
	head Head
	err  error
}

// AppendDurably is [Log.Append] and then [Log.Flush]: it returns when the record is
// on disk.
func (l *Log) AppendDurably(e Entry) error {
	head, err := l.Append(e)
	if err != nil {
		return err
	}
	return l.Flush(head)
}

// Flush returns when all up to head is on disk. Calls at the same time share
// the disk's work: for logs with [SyncCheckpoint] some of whose records must be
// durable before what they tell is acknowledged.
func (l *Log) Flush(head Head) error {
	f := &flush{head: head}
	if err := l.flushes.Do(context.Background(), f); err != nil {
		return err
	}
	return errs.Wrap(f.err, "cannot write audit log")
}

func (l *Log) flushAll(group []*flush) {
	var last Head
	for _, f := range group {
		if f.head.Seq > last.Seq {
			last = f.head
		}
	}
	err := l.flush(last)
	for _, f := range group {
		f.err = err
	}
}

// flush is for one caller at a time.
func (l *Log) flush(head Head) error {
	l.mu.Lock()
	f, upTo, err := l.f, l.head.Seq, l.usable()
	done := l.synced >= head.Seq
	l.mu.Unlock()
	if err != nil || done {
		return err
	}
	syncErr := f.Sync() // others append meanwhile, to be synced next time
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.synced >= head.Seq: // by a checkpoint, after which f may have been closed
		return nil
	case syncErr != nil:
		l.broken = errs.New(errs.Unavailable, "an earlier sync failed: %w", syncErr)
		return l.broken
	}
	l.synced = max(l.synced, upTo)
	return nil
}

// Checkpoint signs all records so far and forces them to disk. Without new
// records it does nothing.
func (l *Log) Checkpoint() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.usable()
	if err == nil {
		err = l.checkpoint()
	}
	return errs.Wrap(err, "cannot sign audit log")
}

func (l *Log) checkpoint() error {
	l.signedAt = l.now()
	if l.signed == l.head.Seq {
		return nil
	}
	c := checkpoint{Checkpoint: l.head.Seq, Time: l.now().UTC().Round(0), Hash: l.head.Hash, Key: l.key}
	sig, err := l.cfg.Signer.Sign(rand.Reader, c.signed(l.id), crypto.Hash(0))
	if err != nil {
		return errs.New(errs.Unavailable, "signing: %w", err)
	}
	c.Sig = base64.StdEncoding.EncodeToString(sig)
	b, err := encodeLine(c)
	if err != nil {
		return err
	}
	if err := l.write(b); err != nil {
		return err
	}
	l.signed = l.head.Seq
	return l.sync()
}

// rotate ends the file with a checkpoint and begins the next.
func (l *Log) rotate() error {
	if err := l.checkpoint(); err != nil {
		return err
	}
	return l.begin()
}

// Head returns the last place in the log.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Close signs what is not signed and closes the log. Later calls do nothing.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	err := l.broken
	if err == nil {
		err = l.checkpoint()
	}
	if cerr := l.f.Close(); err == nil {
		err = cerr
	}
	l.lock.Close()
	return errs.Wrap(err, "cannot close audit log")
}

// readLine returns the next line with its LF; a last line without LF is
// returned with io.EOF, an over-long one is an error.
func readLine(r *bufio.Reader) ([]byte, error) {
	b, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, errs.New(errs.Corrupt, "a line is longer than %d bytes", MaxLine)
	}
	return b, err
}
