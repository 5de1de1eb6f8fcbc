// Package rootkey says where the root key of a vault comes from: a key file, a
// passphrase, shares that several people hold, a TPM or an HSM (docs/spec/root-key.md). A
// [Source] is one such way; a [Lock] is what one vault has, through changes.
//
// The package knows no role: whoever has a vault (package vault) can have a Lock
// beside it.
//
// Invariants: root keys, passphrases and shares are in keymem only, and never in
// the root file; a root key is wrapped by one source only: another source is
// another root key, so that what opened the old vault does not open the new one;
// the old source is retired only after the vault was sealed anew and read back.
// Argon2's work memory, which lives for one call, is ordinary memory.
package rootkey

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/shamir"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// Size is that of a root key, in bytes.
const Size = sealed.KeySize

const (
	version     = 1
	fileMax     = 64 << 10 // bytes of a root file
	wrapContext = "strongroom/root-key/v1"
	sourcesMax  = 2 // the one in force and the one that is to replace it
)

// Source is one way to a root key. Exactly one of its parts is set. It holds no
// secret: what is wrapped in it opens with the source only.
type Source struct {
	KeyFile    *KeyFile    `json:"keyFile,omitempty"`
	Passphrase *Passphrase `json:"passphrase,omitempty"`
	Shares     *Shares     `json:"shares,omitempty"`
	TPM        *TPM        `json:"tpm,omitempty"`
	HSM        *HSM        `json:"hsm,omitempty"`
}

// Given is what people gave to open a source. Its owner closes it.
type Given struct {
	Passphrase *keymem.Key
	Shares     []shamir.Share
}

// Close wipes what was given.
func (g *Given) Close() {
	g.Passphrase.Close()
	shamir.Close(g.Shares)
	*g = Given{}
}

// KeyFile is a root key that lies in a file as it is (package keyfile).
type KeyFile struct {
	Path string `json:"path"`
}

// NewKeyFile makes the file at path with root in it. There must be none.
func NewKeyFile(path string, root *keymem.Key) (Source, error) {
	if !filepath.IsAbs(path) {
		return Source{}, errs.New(errs.Invalid, "key file %q is not an absolute path", path)
	}
	if err := keyfile.Write(path, root); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = errs.New(errs.Exists, "%w", err)
		}
		return Source{}, err
	}
	return Source{KeyFile: &KeyFile{path}}, nil
}

// People returns how many secrets people must give before [Source.Open]; 0 for a
// source that opens by itself.
func (s Source) People() int {
	switch {
	case s.Passphrase != nil:
		return 1
	case s.Shares != nil:
		return s.Shares.Threshold
	}
	return 0
}

// String describes the source to an administrator.
func (s Source) String() string {
	switch {
	case s.KeyFile != nil:
		return "key file " + s.KeyFile.Path
	case s.Passphrase != nil:
		return "passphrase"
	case s.Shares != nil:
		return fmt.Sprintf("%d of %d shares", s.Shares.Threshold, s.Shares.Count)
	case s.TPM != nil:
		return fmt.Sprintf("TPM %s, PCRs %v", s.TPM.Device, s.TPM.Sealed.PCRs)
	case s.HSM != nil:
		return "HSM, " + s.HSM.String()
	}
	return "none"
}

// Open returns the root key, which the caller closes. given must hold what the
// source needs, and stays the caller's. It returns an error of kind
// [errs.Denied] for a wrong passphrase or wrong shares; those of a TPM are
// [tpm.Unseal]'s, those of an HSM [hsm.Key.Unwrap]'s.
func (s Source) Open(ctx context.Context, given Given) (*keymem.Key, error) {
	switch {
	case s.KeyFile != nil:
		return keyfile.Read(s.KeyFile.Path, Size)
	case s.Passphrase != nil:
		return s.Passphrase.open(given.Passphrase)
	case s.Shares != nil:
		return s.Shares.open(given.Shares)
	case s.TPM != nil:
		return s.TPM.open(ctx)
	case s.HSM != nil:
		return s.HSM.open(ctx)
	}
	return nil, errs.New(errs.Corrupt, "the root key has no source")
}

// Retire removes what the source has outside the root file. It is called when
// the source is not in force any more, and idempotent.
func (s Source) Retire() error {
	if s.KeyFile == nil {
		return nil
	}
	if err := os.Remove(s.KeyFile.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Check refuses a source out of a file that is not one whole, or whose limits are
// not those of docs/spec/root-key.md.
func (s Source) Check() error {
	parts := 0
	var err error
	if s.KeyFile != nil {
		parts++
		if !filepath.IsAbs(s.KeyFile.Path) {
			err = fmt.Errorf("key file %.256q is not an absolute path", s.KeyFile.Path)
		}
	}
	if s.Passphrase != nil {
		parts++
		err = s.Passphrase.check()
	}
	if s.Shares != nil {
		parts++
		err = s.Shares.check()
	}
	if s.TPM != nil {
		parts++
		err = s.TPM.check()
	}
	if s.HSM != nil {
		parts++
		err = s.HSM.check()
	}
	if parts != 1 {
		return fmt.Errorf("a source of %d kinds", parts)
	}
	return err
}

// file is a root file.
type file struct {
	Version int      `json:"version"`
	Sources []Source `json:"sources"`
}

// decode accepts what encode makes.
func decode(text []byte) ([]Source, error) {
	var f file
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, errs.New(errs.Corrupt, "it is no root file: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errs.New(errs.Corrupt, "there is something behind its end")
	}
	if f.Version != version {
		return nil, errs.New(errs.InvalidState, "root file of unknown version %d", f.Version)
	}
	if len(f.Sources) < 1 || len(f.Sources) > sourcesMax {
		return nil, errs.New(errs.Corrupt, "%d sources of a root key", len(f.Sources))
	}
	for _, s := range f.Sources {
		if err := s.Check(); err != nil {
			return nil, errs.New(errs.Corrupt, "%w", err)
		}
	}
	return f.Sources, nil
}

func encode(sources []Source) ([]byte, error) {
	text, err := json.MarshalIndent(file{version, sources}, "", "  ")
	if err != nil {
		return nil, err
	}
	text = append(text, '\n')
	_, err = decode(text)
	return text, err
}

// readFile returns the sources of the root file at path. It returns an error of
// kind [errs.NotFound] if there is none.
func readFile(path string) ([]Source, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "%w", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, fileMax+1))
	if err != nil {
		return nil, err
	}
	if len(text) > fileMax {
		return nil, errs.New(errs.Corrupt, "cannot read root file %s: it has more than %d bytes", path, fileMax)
	}
	sources, err := decode(text)
	return sources, errs.Wrap(err, "cannot read root file %s", path)
}

// writeFile replaces the root file at path, durably.
func writeFile(path string, sources []Source) error {
	text, err := encode(sources)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, text)
}

// wrap returns root sealed under kek, for a source of that kind.
func wrap(kind string, kek, root *keymem.Key) ([]byte, error) {
	return sealed.Seal(kek, wrapContext+"/"+kind, root.Bytes())
}

// unwrap is the reverse of wrap. Its errors are those of [sealed.NewReader].
func unwrap(kind string, kek *keymem.Key, wrapped []byte) (*keymem.Key, error) {
	r, err := sealed.NewReader(bytes.NewReader(wrapped), int64(len(wrapped)), kek, wrapContext+"/"+kind)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() != Size {
		return nil, errs.New(errs.Corrupt, "a root key of %d bytes", r.Size())
	}
	return keymem.Read(r, Size)
}

// wrappedMax bounds a wrapped root key, in bytes.
const wrappedMax = 4096

func checkWrapped(wrapped []byte) error {
	if len(wrapped) == 0 || len(wrapped) > wrappedMax {
		return fmt.Errorf("a wrapped root key of %d bytes", len(wrapped))
	}
	return nil
}
