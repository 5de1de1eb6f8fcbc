// Package volumectl is the protocol of docs/spec/volume-control.md, by which a
// host controls the volume process of a VM: [Client] is the host's side,
// [Server] the volume process's.
//
// Invariants: a DEK crosses in a packet of its own, from locked memory into
// locked memory; a message is bounded and checked before anything is done; a
// request that breaks the rules ends its connection.
//
// Client and Server are safe for concurrent use.
package volumectl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// Limits of docs/spec/volume-control.md.
const (
	Version        = 1
	MessageMax     = 64 << 10 // bytes
	KeySize        = 64       // bytes of a DEK: XTS-AES-256
	ConnectionsMax = 8
	SuspendMax     = time.Minute
	textMax        = 4096 // bytes of an error's text, reason or hint
)

// stepTimeout bounds the time in which a peer must complete what it has begun:
// take our message, or send the key that it has announced.
const stepTimeout = 10 * time.Second

// ErrProtocol: the peer does not keep to the protocol.
var ErrProtocol = errors.New("volume control protocol violated")

// Format is how a disk lies in its file.
type Format string

// The formats.
const (
	Raw  Format = "raw"  // plain
	LUKS Format = "luks" // encrypted
)

// Disk says how a disk is added.
type Disk struct {
	Name     string // also of its NBD export: 1 to 63 of a-z, 0-9, '.', '_', '-'
	Format   Format
	ReadOnly bool
	SizeMin  int64 // bytes that it must have at least
}

// Status is what a volume process is doing.
type Status struct {
	Listening bool         `json:"listening"` // NBD is served
	Disks     []DiskStatus `json:"disks"`     // sorted by name
	Sandbox   Sandbox      `json:"sandbox"`
}

// Sandbox says how a volume process is locked down; zero from one that tells
// nothing of it.
type Sandbox struct {
	Landlock int      `json:"landlock"`          // version of the kernel's Landlock; 0: none
	Seccomp  bool     `json:"seccomp"`           // system calls are filtered
	Missing  []string `json:"missing,omitempty"` // what the kernel lacks, for people
}

// DiskStatus is the state of one disk. Counters start when it is added.
type DiskStatus struct {
	Disk         string   `json:"disk"`
	Format       Format   `json:"format"`
	ReadOnly     bool     `json:"read_only"`
	Size         int64    `json:"size"`       // bytes
	VhostUser    bool     `json:"vhost_user"` // it is served over vhost-user
	UUID         string   `json:"uuid,omitempty"`
	ReadBytes    uint64   `json:"read_bytes"`
	WrittenBytes uint64   `json:"written_bytes"` // zeros and discards not included
	Reads        uint64   `json:"reads"`
	Writes       uint64   `json:"writes"` // zeros and discards included
	Flushes      uint64   `json:"flushes"`
	Failures     uint64   `json:"failures"`         // requests that failed
	Damage       []string `json:"damage,omitempty"` // header copies that are bad
	HeaderError  string   `json:"header_error,omitempty"`
	Rekey        *Rekey   `json:"rekey,omitempty"` // nil without a deep rekey
	// Conversion is the one under way, or that has failed; nil: there is none.
	Conversion *Conversion `json:"conversion,omitempty"`
}

// Rekey is how far the deep rekey of a disk has come.
type Rekey struct {
	Running bool  `json:"running"` // it is at work in this process
	Done    int64 `json:"done"`    // bytes, holes included
	Total   int64 `json:"total"`   // bytes; grows with the disk
	Rate    int64 `json:"rate"`    // bytes a second that it may rewrite; 0: any number
	Speed   int64 `json:"speed"`   // bytes a second by which Done has grown since this process began
	// Failure is why it stopped by itself.
	Failure *Failure `json:"error,omitempty"`
}

// Phase is how far a live conversion has come.
type Phase string

// The phases, in order; from any but held a conversion can fail.
const (
	Copying Phase = "copying" // and comparing
	Synced  Phase = "synced"  // both files have all that was written
	Held    Phase = "held"    // and nothing can change that
	Failed  Phase = "failed"  // the new file was given up; the disk works on
)

// Conversion is how far the live conversion of a disk has come.
type Conversion struct {
	Phase   Phase    `json:"phase"`
	Done    int64    `json:"done"`  // bytes, copied and compared
	Total   int64    `json:"total"` // bytes
	Failure *Failure `json:"error,omitempty"`
}

// The operations.
const (
	opHello       = "hello"
	opAddDisk     = "add-disk"
	opRemoveDisk  = "remove-disk"
	opListen      = "listen"
	opListenVhost = "listen-vhost-user"
	opReplaceSafe = "replace-safe"
	opRekey       = "rekey"
	opStopRekey   = "stop-rekey"
	opConvert     = "convert"
	opHold        = "hold-conversion"
	opSwitch      = "switch-conversion"
	opStopConvert = "stop-conversion"
	opResize      = "resize"
	opFlush       = "flush"
	opSuspend     = "suspend"
	opResume      = "resume"
	opStatus      = "status"
	opShutdown    = "shutdown"
)

type request struct {
	Op           string        `json:"op"`
	Disk         string        `json:"disk,omitempty"`
	Version      int           `json:"version,omitempty"`
	Format       Format        `json:"format,omitempty"`
	ReadOnly     bool          `json:"read_only,omitempty"`
	KeyBytes     int           `json:"key_bytes,omitempty"`
	NextKeyBytes int           `json:"next_key_bytes,omitempty"`
	Size         int64         `json:"size,omitempty"`
	Safe         *keysafe.Safe `json:"safe,omitempty"`
	Rate         int64         `json:"rate,omitempty"`
	Limit        int64         `json:"limit,omitempty"` // milliseconds
}

type reply struct {
	Error   *Failure `json:"error,omitempty"`
	Version int      `json:"version,omitempty"`
	VM      string   `json:"vm,omitempty"`
	PID     int      `json:"pid,omitempty"`
	Status  *Status  `json:"status,omitempty"`
}

// Failure is an error as it crosses.
type Failure struct {
	Text   string `json:"text"`
	Kind   string `json:"kind"`
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
}

var diskName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// descriptors returns how many come with the request.
func (r *request) descriptors() int {
	switch r.Op {
	case opAddDisk, opConvert, opListen, opListenVhost:
		return 1
	}
	return 0
}

// validate checks that r has the members of its operation and no others.
func (r *request) validate() error {
	allowed := request{Op: r.Op}
	wantDisk := true
	switch r.Op {
	case opHello:
		allowed.Version = r.Version
		wantDisk = false
		if r.Version < 1 {
			return errors.New("version is missing")
		}
	case opAddDisk:
		allowed.Format, allowed.ReadOnly, allowed.KeyBytes, allowed.NextKeyBytes, allowed.Size = r.Format, r.ReadOnly, r.KeyBytes, r.NextKeyBytes, r.Size
		keyBytes := map[Format]int{Raw: 0, LUKS: KeySize}
		want, ok := keyBytes[r.Format]
		if !ok || r.KeyBytes != want || r.NextKeyBytes != 0 && r.NextKeyBytes != want || r.Size < 0 {
			return errors.New("format, key length or size is invalid")
		}
	case opConvert:
		allowed.Format, allowed.KeyBytes, allowed.Rate = r.Format, r.KeyBytes, r.Rate
		keyBytes := map[Format]int{Raw: 0, LUKS: KeySize}
		if want, ok := keyBytes[r.Format]; !ok || r.KeyBytes != want || r.Rate < 0 {
			return errors.New("format, key length or rate is invalid")
		}
	case opReplaceSafe:
		allowed.Safe = r.Safe
		if r.Safe == nil {
			return errors.New("safe is missing")
		}
	case opResize:
		allowed.Size = r.Size
		if r.Size < 512 || r.Size%512 != 0 {
			return errors.New("size is invalid")
		}
	case opRekey:
		allowed.NextKeyBytes, allowed.Safe, allowed.Rate = r.NextKeyBytes, r.Safe, r.Rate
		if r.NextKeyBytes != 0 && r.NextKeyBytes != KeySize || r.Rate < 0 {
			return errors.New("key length or rate is invalid")
		}
		if r.NextKeyBytes != 0 && r.Safe == nil {
			return errors.New("safe is missing: the new key would be nowhere but in memory")
		}
	case opRemoveDisk, opListenVhost, opFlush, opStopRekey, opHold, opSwitch, opStopConvert:
	case opSuspend:
		allowed.Limit = r.Limit
		wantDisk = false
		if r.Limit < 1 || r.Limit > SuspendMax.Milliseconds() {
			return errors.New("limit is invalid")
		}
	case opListen, opResume, opStatus, opShutdown:
		wantDisk = false
	default:
		return fmt.Errorf("unknown operation %.32q", r.Op)
	}
	if wantDisk {
		allowed.Disk = r.Disk
		if !diskName.MatchString(r.Disk) {
			return fmt.Errorf("disk name %.64q is invalid", r.Disk)
		}
	}
	if *r != allowed {
		return fmt.Errorf("%s has members that it does not take", r.Op)
	}
	return nil
}

// parseRequest decodes and validates a request.
func parseRequest(message []byte) (*request, error) {
	r := new(request)
	err := decode(message, r)
	if err == nil {
		err = r.validate()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: request: %w", ErrProtocol, err)
	}
	return r, nil
}

// parseReply decodes a reply. Unknown members are allowed: a volume process may
// be newer than its host.
func parseReply(message []byte) (*reply, error) {
	r := new(reply)
	err := json.Unmarshal(message, r)
	if err == nil && r.Error != nil && !r.Error.valid() {
		err = errors.New("its error has no text, or a long one")
	}
	if err == nil && r.Status != nil {
		for _, d := range r.Status.Disks {
			if d.Rekey != nil && d.Rekey.Failure != nil && !d.Rekey.Failure.valid() {
				err = errors.New("the error of a rekey has no text, or a long one")
			}
			if d.Conversion != nil && d.Conversion.Failure != nil && !d.Conversion.Failure.valid() {
				err = errors.New("the error of a conversion has no text, or a long one")
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: reply: %w", ErrProtocol, err)
	}
	return r, nil
}

func (f *Failure) valid() bool {
	return f.Text != "" && len(f.Text) <= textMax && len(f.Reason) <= textMax && len(f.Hint) <= textMax
}

func decode(message []byte, v any) error {
	decoder := json.NewDecoder(bytes.NewReader(message))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil {
		return err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return errors.New("something follows the object")
	}
	return nil
}

// FailureOf makes err fit for the wire; nil for nil.
func FailureOf(err error) *Failure {
	if err == nil {
		return nil
	}
	cut := func(s string) string { return strings.ToValidUTF8(s[:min(len(s), textMax)], "") }
	return &Failure{
		Text: cut(err.Error()), Kind: errs.KindOf(err).String(),
		Reason: cut(errs.ReasonOf(err)), Hint: cut(errs.HintOf(err)),
	}
}

// Err is the reverse of [FailureOf].
func (f *Failure) Err() error {
	if f == nil {
		return nil
	}
	return &errs.Error{Kind: errs.ParseKind(f.Kind), Reason: f.Reason, Hint: f.Hint, Err: errors.New(f.Text)}
}

// link is one connection, used by one goroutine at a time.
type link struct {
	conn   *net.UnixConn
	buffer []byte
}

func newLink(conn *net.UnixConn) *link {
	// One byte more than allowed shows what is too long.
	return &link{conn: conn, buffer: make([]byte, MessageMax+1)}
}

// send sends one message, with a descriptor unless file is nil.
func (l *link) send(v any, file *os.File) error {
	message, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(message) > MessageMax {
		return fmt.Errorf("message of %d bytes is too long", len(message))
	}
	if file == nil {
		_, err = l.conn.Write(message)
		return err
	}
	// Not file.Fd, which would make the file blocking.
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) {
		_, _, sendErr = l.conn.WriteMsgUnix(message, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	return sendErr
}

// receive returns the next message, valid until the next call, and the
// descriptors that came with it, which are the caller's. It returns [io.EOF] if
// the peer has left.
func (l *link) receive() (message []byte, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := l.conn.ReadMsgUnix(l.buffer, oob)
	if err != nil {
		return nil, nil, err
	}
	fds, err = descriptors(oob[:oobn])
	if err == nil && (n > MessageMax || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = fmt.Errorf("%w: message is too long or has too many descriptors", ErrProtocol)
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return l.buffer[:n], fds, nil
}

// descriptors unpacks control messages. It returns what it got also with an
// error.
func descriptors(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for i := range messages {
		rights, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return fds, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		fds = append(fds, rights...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// sendKey sends a key from where it lies.
func (l *link) sendKey(key *keymem.Key) error {
	_, err := l.conn.Write(key.Bytes())
	return err
}

// receiveKey receives a key of n bytes to where it stays.
func (l *link) receiveKey(n int) (*keymem.Key, error) {
	key, err := keymem.New(n)
	if err != nil {
		return nil, err
	}
	got, _, flags, _, err := l.conn.ReadMsgUnix(key.Bytes(), nil)
	if err == nil && (got != n || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = fmt.Errorf("%w: a key of another length than announced", ErrProtocol)
	}
	if err != nil {
		key.Close()
		return nil, err
	}
	return key, nil
}

// checkPeer refuses peers of other users and returns the peer's process: for a
// client, the one that listens.
func checkPeer(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	if int(cred.Uid) != os.Getuid() && cred.Uid != 0 {
		return 0, fmt.Errorf("%w: the peer belongs to user %d", ErrProtocol, cred.Uid)
	}
	return int(cred.Pid), nil
}
