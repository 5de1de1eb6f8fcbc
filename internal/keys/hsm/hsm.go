// Package hsm wraps small secrets under an AES-256 key in a hardware security
// module, by PKCS #11. The key never leaves the module.
//
// The vendor's library runs in a process of its own, the program
// strongroom-pkcs11 beside this one (package token), one for each call: a library
// that crashes, hangs or leaks cannot take the caller down, and this program
// needs no C. They speak in bounded frames over the child's standard input and
// output.
//
// Invariants: PIN and secret go to the child in a frame, never by its command
// line or environment; the child is gone when a call returns. All functions are
// safe for concurrent use.
package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

const (
	// SecretMax and WrappedMax bound a secret and what is wrapped, in bytes.
	SecretMax  = 128
	WrappedMax = 512
	pinMax     = 256 // bytes
	nameMax    = 256 // bytes of a path or label

	program = "strongroom-pkcs11"
	// timeout bounds a call: a module in the network may have to be found.
	timeout = 60 * time.Second
	// textMax bounds what is told of the child's last words, in bytes.
	textMax = 512
)

// Key names a key in a module. It is no secret.
type Key struct {
	Module  string `json:"module"`  // path of the vendor's PKCS #11 library
	Token   string `json:"token"`   // label of the token
	Label   string `json:"label"`   // of the key, made with it if there is none
	PINFile string `json:"pinFile"` // its first line is the user's PIN
}

// Check refuses what names no key.
func (k Key) Check() error {
	for what, path := range map[string]string{"module": k.Module, "PIN file": k.PINFile} {
		if !filepath.IsAbs(path) || len(path) > nameMax {
			return errs.New(errs.Invalid, "%s %.256q is not an absolute path", what, path)
		}
	}
	for what, label := range map[string]string{"token": k.Token, "key": k.Label} {
		if label == "" || len(label) > nameMax {
			return errs.New(errs.Invalid, "the label of the %s has not 1 to %d bytes", what, nameMax)
		}
	}
	return nil
}

// String names the key to an administrator.
func (k Key) String() string {
	return fmt.Sprintf("key %s of token %s (%s)", k.Label, k.Token, k.Module)
}

// Wrap returns secret, which stays the caller's, wrapped under the key, which is
// made if the token has none of that label.
func (k Key) Wrap(ctx context.Context, secret *keymem.Key) ([]byte, error) {
	if secret.Len() > SecretMax {
		return nil, errs.New(errs.Invalid, "a secret of %d bytes is larger than %d", secret.Len(), SecretMax)
	}
	wrapped, err := k.call(ctx, operationWrap, secret.Bytes())
	if err != nil {
		return nil, errs.Wrap(err, "cannot wrap by the HSM's %s", k)
	}
	defer wrapped.Close()
	return bytes.Clone(wrapped.Bytes()), nil
}

// Unwrap is the reverse of [Key.Wrap]. The caller closes the secret. It returns
// an error of kind [errs.Denied] for a wrong PIN or key, [errs.NotFound] for a
// token or key that is not there, and [errs.Unavailable] if the library fails.
func (k Key) Unwrap(ctx context.Context, wrapped []byte) (*keymem.Key, error) {
	secret, err := k.call(ctx, operationOpen, wrapped)
	return secret, errs.Wrap(err, "cannot unwrap by the HSM's %s", k)
}

// call has a child do one operation.
func (k Key) call(ctx context.Context, operation string, data []byte) (*keymem.Key, error) {
	if err := k.Check(); err != nil {
		return nil, err
	}
	pin, err := readPIN(k.PINFile)
	if err != nil {
		return nil, err
	}
	defer pin.Close()
	path, err := programPath()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path)
	cmd.Dir = "/"
	cmd.WaitDelay = 5 * time.Second
	last := &bytes.Buffer{}
	cmd.Stderr = &limited{last}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, errs.New(errs.Unavailable, "cannot start %s: %w", path, err)
	}
	writeErr := writeFrame(in, []byte(operation), []byte(k.Module), []byte(k.Token), []byte(k.Label), pin.Bytes(), data)
	in.Close()
	frame, fields, readErr := readFrame(out, answerFields)
	late := ctx.Err()
	_ = cmd.Process.Kill() // it has nothing more to say; how it ended by itself stays known
	waitErr := cmd.Wait()
	if frame == nil {
		if late != nil {
			return nil, errs.New(errs.Unavailable, "the PKCS #11 library did not answer: %w", late)
		}
		return nil, errs.New(errs.Unavailable, "the PKCS #11 library ended its process: %w: %.*q", errors.Join(writeErr, readErr, waitErr), textMax, last.String())
	}
	defer frame.Close()
	if kind := string(fields[0]); kind != "" {
		return nil, errs.New(errs.ParseKind(kind), "%s", printable(fields[1]))
	}
	if len(fields[2]) == 0 || len(fields[2]) > WrappedMax {
		return nil, errs.New(errs.Unavailable, "the PKCS #11 library gave %d bytes", len(fields[2]))
	}
	answer, err := keymem.New(len(fields[2]))
	if err != nil {
		return nil, err
	}
	copy(answer.Bytes(), fields[2])
	return answer, nil
}

func printable(text []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, string(text[:min(len(text), textMax)]))
}

// limited keeps the beginning of what a child says.
type limited struct{ *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, textMax-l.Len()))])
	return len(p), nil
}

// programPath is that of the child's program, beside this one.
func programPath() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(self), program)
	if _, err := os.Stat(path); err != nil {
		return "", errs.New(errs.Unavailable, "the program for PKCS #11 is missing: %w", err).WithHint("install %s beside %s", program, self)
	}
	return path, nil
}

// readPIN returns the first line of the file at path, which only its owner may
// read.
func readPIN(path string) (*keymem.Key, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is refused, not waited for
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot read the PIN: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, errs.New(errs.Denied, "cannot read the PIN: %s is not a regular file that only its owner may use", path).WithHint("chmod 600 %s", path)
	}
	buffer, err := keymem.New(pinMax + 2)
	if err != nil {
		return nil, err
	}
	defer buffer.Close()
	n, err := io.ReadFull(f, buffer.Bytes())
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	line, _, _ := bytes.Cut(buffer.Bytes()[:n], []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 || len(line) > pinMax {
		return nil, errs.New(errs.Invalid, "the first line of %s is no PIN of 1 to %d bytes", path, pinMax)
	}
	pin, err := keymem.New(len(line))
	if err != nil {
		return nil, err
	}
	copy(pin.Bytes(), line)
	return pin, nil
}
