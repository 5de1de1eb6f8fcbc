package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"hash"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"strongroom/internal/errs"
)

// Limits of docs/spec/audit-log.md.
const (
	MaxLine       = 64 << 10 // bytes, LF included
	maxField      = 512
	maxDetails    = 32
	maxDetailKey  = 64
	maxDetailText = 1024

	format        = 1
	domainGenesis = "strongroom/audit/v1\n"
	domainRecord  = "strongroom/audit-record/v1\n"
	domainCheck   = "strongroom/audit-checkpoint/v1\n"
)

// The outcomes of an operation.
const (
	Success = "success"
	Denied  = "denied"
	Failed  = "error"
)

// Hash is a link of the chain.
type Hash [sha256.Size]byte

// String returns 64 hex digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (h *Hash) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(h)) {
		return errs.New(errs.Corrupt, "a hash has %d digits", hex.EncodedLen(len(h)))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// Record is one entry of the log, as it is stored.
type Record struct {
	Seq     uint64            `json:"seq"`
	Time    time.Time         `json:"time"`
	Actor   string            `json:"actor"`  // a principal: "user:ann"
	Action  string            `json:"action"` // "provider.export"
	Object  string            `json:"object"` // "provider/kp-1"
	Outcome string            `json:"outcome"`
	Details map[string]string `json:"details,omitempty"`
	Prev    Hash              `json:"prev"`
	Hash    Hash              `json:"hash"`
}

// header is the first line of a file.
type header struct {
	Format int    `json:"format"`
	Log    string `json:"log"`
	First  uint64 `json:"first"`
	Prev   Hash   `json:"prev"`
}

// checkpoint is a signature over all up to a record.
type checkpoint struct {
	Checkpoint uint64    `json:"checkpoint"`
	Time       time.Time `json:"time"`
	Hash       Hash      `json:"hash"`
	Key        string    `json:"key"`
	Sig        string    `json:"sig"`
}

// hasher writes the binary encoding that hashes and signatures are over.
type hasher struct{ h hash.Hash }

func newHasher(domain string) hasher {
	h := hasher{sha256.New()}
	h.h.Write([]byte(domain))
	return h
}

func (h hasher) u32(n int)    { h.h.Write(binary.BigEndian.AppendUint32(nil, uint32(n))) }
func (h hasher) u64(n uint64) { h.h.Write(binary.BigEndian.AppendUint64(nil, n)) }

func (h hasher) str(s string) {
	h.u32(len(s))
	h.h.Write([]byte(s))
}

func (h hasher) sum() (out Hash) {
	h.h.Sum(out[:0])
	return out
}

// genesis is what the first record of a log is chained to.
func genesis(log string) Hash {
	h := newHasher(domainGenesis)
	h.str(log)
	return h.sum()
}

// digest is the hash of r, by all its other fields.
func (r Record) digest() Hash {
	h := newHasher(domainRecord)
	h.h.Write(r.Prev[:])
	h.u64(r.Seq)
	h.u64(uint64(r.Time.UnixNano()))
	for _, s := range []string{r.Actor, r.Action, r.Object, r.Outcome} {
		h.str(s)
	}
	h.u32(len(r.Details))
	for _, k := range slices.Sorted(maps.Keys(r.Details)) {
		h.str(k)
		h.str(r.Details[k])
	}
	return h.sum()
}

// signed is the message that a checkpoint's signature is over.
func (c checkpoint) signed(log string) []byte {
	b := []byte(domainCheck)
	b = binary.BigEndian.AppendUint32(b, uint32(len(log)))
	b = append(b, log...)
	b = binary.BigEndian.AppendUint64(b, c.Checkpoint)
	b = binary.BigEndian.AppendUint64(b, uint64(c.Time.UnixNano()))
	return append(b, c.Hash[:]...)
}

// KeyID names a public key in checkpoints.
func KeyID(pub ed25519.PublicKey) string {
	sum := sha256.Sum256(pub)
	return hex.EncodeToString(sum[:8])
}

// verify checks the checkpoint's signature.
func (c checkpoint) verify(log string, pub ed25519.PublicKey) error {
	sig, err := base64.StdEncoding.DecodeString(c.Sig)
	switch {
	case err != nil || len(sig) != ed25519.SignatureSize:
		return errs.New(errs.Corrupt, "signature is damaged")
	case c.Key != KeyID(pub):
		return errs.New(errs.Denied, "signed with key %s, not %s", c.Key, KeyID(pub))
	case !ed25519.Verify(pub, c.signed(log), sig):
		return errs.New(errs.Corrupt, "signature is wrong")
	}
	return nil
}

// encodeLine returns the line of a header, record or checkpoint, LF included.
func encodeLine(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	b = append(b, '\n')
	if len(b) > MaxLine {
		return nil, errs.New(errs.Invalid, "audit line has %d bytes, limit %d", len(b), MaxLine)
	}
	return b, nil
}

// line is one parsed line: exactly one field is set.
type line struct {
	header     *header
	record     *Record
	checkpoint *checkpoint
}

// parseLine parses one line, LF included, and only its canonical form.
func parseLine(b []byte) (line, error) {
	if len(b) > MaxLine || len(b) < 2 || b[len(b)-1] != '\n' || bytes.IndexByte(b, '\n') != len(b)-1 {
		return line{}, errs.New(errs.Corrupt, "not a line of at most %d bytes", MaxLine)
	}
	var l line
	var v any
	switch {
	case bytes.HasPrefix(b, []byte(`{"seq":`)):
		l.record = new(Record)
		v = l.record
	case bytes.HasPrefix(b, []byte(`{"checkpoint":`)):
		l.checkpoint = new(checkpoint)
		v = l.checkpoint
	case bytes.HasPrefix(b, []byte(`{"format":`)):
		l.header = new(header)
		v = l.header
	default:
		return line{}, errs.New(errs.Corrupt, "neither header, record nor checkpoint")
	}
	if err := json.Unmarshal(b, v); err != nil {
		return line{}, errs.New(errs.Corrupt, "%w", err)
	}
	again, err := encodeLine(v)
	if err != nil || !bytes.Equal(again, b) {
		return line{}, errs.New(errs.Corrupt, "not in canonical form")
	}
	return l, l.check()
}

// check checks what can be told from a line alone.
func (l line) check() error {
	switch {
	case l.header != nil:
		if l.header.Format != format {
			return errs.New(errs.InvalidState, "format %d is not known to this release", l.header.Format)
		}
		if l.header.First == 0 || l.header.Log == "" || len(l.header.Log) > maxField {
			return errs.New(errs.Corrupt, "header without number or log id")
		}
	case l.record != nil:
		r := l.record
		if r.Seq == 0 || !isCanonical(r.Time) || len(r.Details) > maxDetails {
			return errs.New(errs.Corrupt, "record without number, of no possible time or with too many details")
		}
		for _, s := range []string{r.Actor, r.Action, r.Object, r.Outcome} {
			if len(s) > maxField {
				return errs.New(errs.Corrupt, "a field is too long")
			}
		}
		for k, v := range r.Details {
			if len(k) > maxDetailKey || len(v) > maxDetailText {
				return errs.New(errs.Corrupt, "a detail is too long")
			}
		}
		if r.digest() != r.Hash {
			return errs.New(errs.Corrupt, "record %d does not match its hash", r.Seq)
		}
	case l.checkpoint != nil:
		if l.checkpoint.Checkpoint == 0 || !isCanonical(l.checkpoint.Time) {
			return errs.New(errs.Corrupt, "checkpoint without number or of no possible time")
		}
	}
	return nil
}

// isCanonical reports whether t is UTC and has a number of nanoseconds.
func isCanonical(t time.Time) bool {
	return t.Location() == time.UTC && t.Year() >= 1970 && t.Year() <= 2261
}

// cut shortens s to at most n bytes of valid UTF-8.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "�")
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
