// Package keyscan searches files for key material that must not be there: a
// KEK, KDK or DEK, raw, in hexadecimal or in base64, whole or any 16 bytes of
// it. It is for tests and the demonstration, which know the keys in play.
package keyscan

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// chunk is how many bytes of a key count as a leak: half an AES-256 key.
const chunk = 16

// Scanner holds the patterns to look for. Add first, then scan; it is not safe
// for concurrent use.
type Scanner struct {
	patterns []pattern
	first    [1 << 16][]int // patterns by their first two bytes
	longest  int            // bytes
}

type pattern struct {
	text []byte
	name string
}

// Finding is one place where something was found.
type Finding struct {
	File   string
	Offset int64
	Name   string // as given to Add, and the encoding; never the bytes
}

// String tells the finding without the bytes.
func (f Finding) String() string { return fmt.Sprintf("%s at byte %d of %s", f.Name, f.Offset, f.File) }

// AddKey adds a key of at least 16 bytes. It keeps copies of key.
func (s *Scanner) AddKey(name string, key []byte) {
	for off := 0; off+chunk <= len(key); off += chunk {
		part := key[off : off+chunk]
		s.add(fmt.Sprintf("%s (raw, from byte %d)", name, off), part)
		lower := []byte(hex.EncodeToString(part))
		s.add(fmt.Sprintf("%s (hex, from byte %d)", name, off), lower)
		s.add(fmt.Sprintf("%s (HEX, from byte %d)", name, off), bytes.ToUpper(lower))
	}
	// In base64 the text depends on where in a group of three bytes the key
	// begins, and the characters at its ends on its neighbours.
	for shift := range 3 {
		padded := append(make([]byte, shift), key...)
		padded = padded[:len(padded)/3*3]
		for kind, enc := range map[string]*base64.Encoding{"base64": base64.StdEncoding, "base64url": base64.URLEncoding} {
			text := []byte(enc.EncodeToString(padded))
			s.add(fmt.Sprintf("%s (%s, shift %d)", name, kind, shift), text[4:])
		}
	}
}

// AddMarker adds plain bytes that must not be found, such as what a guest
// wrote to an encrypted disk. It must have at least two bytes.
func (s *Scanner) AddMarker(name string, marker []byte) { s.add(name, bytes.Clone(marker)) }

func (s *Scanner) add(name string, text []byte) {
	head := int(text[0])<<8 | int(text[1])
	s.first[head] = append(s.first[head], len(s.patterns))
	s.patterns = append(s.patterns, pattern{text, name})
	s.longest = max(s.longest, len(text))
}

// Tree scans every regular file below root but in the folders except, at most
// limit findings. A file that vanishes meanwhile is passed over. It returns how
// many bytes it read, so that a caller can tell a clean tree from an empty one.
func (s *Scanner) Tree(root string, limit int, except ...string) ([]Finding, int64, error) {
	var found []Finding
	var total int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() && slices.Contains(except, path) {
			return filepath.SkipDir
		}
		if err != nil || !d.Type().IsRegular() || len(found) >= limit {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := s.scan(f, func(off int64, name string) bool {
			found = append(found, Finding{path, off, name})
			return len(found) < limit
		})
		total += n
		if err != nil {
			return fmt.Errorf("cannot scan %s: %w", path, err)
		}
		return nil
	})
	return found, total, err
}

// scan reads r to its end and yields each match, until yield returns false.
func (s *Scanner) scan(r io.Reader, yield func(off int64, name string) bool) (int64, error) {
	const window = 1 << 20
	buf := make([]byte, 0, window+s.longest)
	var base int64 // offset of buf[0]
	for {
		n, err := io.ReadFull(r, buf[len(buf):len(buf)+window])
		buf = buf[:len(buf)+n]
		last := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !last {
			return base, err
		}
		// A match that might continue in the next window is looked for there.
		end := len(buf) - s.longest + 1
		if last {
			end = len(buf) - 1
		}
		for i := 0; i < end; i++ {
			for _, p := range s.first[int(buf[i])<<8|int(buf[i+1])] {
				if bytes.HasPrefix(buf[i:], s.patterns[p].text) && !yield(base+int64(i), s.patterns[p].name) {
					return base + int64(len(buf)), nil
				}
			}
		}
		if last {
			return base + int64(len(buf)), nil
		}
		end = max(end, 0)
		base += int64(end)
		buf = buf[:copy(buf, buf[end:])]
	}
}
