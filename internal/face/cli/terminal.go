package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"

	"strongroom/internal/errs"
)

// The rules of the terminal, for every command:
//
//   - Standard output has the result and nothing else: a table or JSON or
//     YAML, or one line for each thing done.
//   - Standard error has all the rest. Errors are "strongroom: cannot ...",
//     followed by "hint: ..." if there is something to try.
//   - Questions and bars appear only where a person sits at standard input and
//     standard error. Elsewhere, a command that would ask fails and names the
//     flag that answers.
//   - Passwords are typed without echo or come from a file; never from an
//     argument or the environment, where others see them.
//   - --quiet leaves results and errors.
//   - Text from a server is printed without control characters, so that no
//     name can move the cursor.

// notef prints a line for the person at the terminal.
func (env *Env) notef(format string, args ...any) {
	if !env.flags.quiet {
		fmt.Fprintln(env.Stderr, printable(fmt.Sprintf(format, args...)))
	}
}

// donef prints the result of a command that has no object to show. With -o json
// or yaml the command prints an object instead.
func (env *Env) donef(format string, args ...any) {
	if !env.flags.quiet && env.flags.output == outputTable {
		fmt.Fprintln(env.Stdout, printable(fmt.Sprintf(format, args...)))
	}
}

func (env *Env) printError(err error) {
	if several, ok := err.(failures); ok {
		for _, e := range several {
			env.printError(e)
		}
		return
	}
	fmt.Fprintf(env.Stderr, "strongroom: %s\n", printable(err.Error()))
	if hint := errs.HintOf(err); hint != "" {
		fmt.Fprintf(env.Stderr, "hint: %s\n", printable(hint))
	}
}

// failures are the errors of a command that works on several objects: each is
// printed by itself, the first decides the exit code.
type failures []error

func (f failures) Error() string   { return errors.Join(f...).Error() }
func (f failures) Unwrap() []error { return f }

// cannot names the user's operation in front of err, unless err names it.
func cannot(err error, format string, args ...any) error {
	if err == nil || strings.HasPrefix(err.Error(), "cannot ") {
		return err
	}
	return errs.Wrap(err, "cannot "+format, args...)
}

// printable replaces control characters, other than line ends, by "?".
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
			return '?'
		}
		return r
	}, s)
}

// confirm asks a yes-or-no question before something that is hard to undo. yes
// is the flag that answers it.
func (env *Env) confirm(yes bool, format string, args ...any) error {
	if yes {
		return nil
	}
	question := fmt.Sprintf(format, args...)
	if !env.Interactive {
		return errs.New(errs.Invalid, "this needs a confirmation, and there is no terminal to ask: %s", question).
			WithHint("add --yes")
	}
	fmt.Fprintf(env.Stderr, "%s [y/N] ", printable(question))
	answer, err := bufio.NewReader(env.Stdin).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errs.New(errs.Canceled, "not confirmed, nothing was changed")
}

// passwordMax is the longest password, in bytes.
const passwordMax = 1024

// password returns a password from file if one is named ("-" is standard
// input), else from the terminal; typed twice if it is a new one. The caller
// wipes it.
func (env *Env) password(prompt, file string, isNew bool) ([]byte, error) {
	if file != "" {
		return env.passwordFile(file)
	}
	if !env.Interactive {
		return nil, errs.New(errs.Invalid, "a password is needed, and there is no terminal to ask").
			WithHint("use --password-file FILE")
	}
	pw, err := env.ReadPassword(prompt)
	if err != nil {
		return nil, err
	}
	if len(pw) > passwordMax {
		clear(pw)
		return nil, errs.New(errs.Invalid, "a password has at most %d bytes", passwordMax)
	}
	if !isNew {
		return pw, nil
	}
	again, err := env.ReadPassword(prompt + " (again)")
	defer clear(again)
	if err == nil && string(pw) != string(again) {
		err = errs.New(errs.Invalid, "the two passwords differ")
	}
	if err != nil {
		clear(pw)
		return nil, err
	}
	return pw, nil
}

// passwordFile reads the first line of a file.
func (env *Env) passwordFile(file string) ([]byte, error) {
	var r io.Reader = env.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, errs.New(errs.Invalid, "cannot read the password: %w", err)
		}
		defer f.Close()
		r = f
	}
	buf := make([]byte, passwordMax+3) // fixed: growing would leave copies
	n, err := io.ReadFull(r, buf)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(buf)
		return nil, errs.New(errs.Invalid, "cannot read the password: %w", err)
	}
	pw := buf[:n]
	for i, c := range pw {
		if c == '\n' || c == '\r' {
			clear(pw[i:])
			pw = pw[:i]
			break
		}
	}
	if len(pw) == 0 || len(pw) > passwordMax {
		clear(buf)
		return nil, errs.New(errs.Invalid, "the first line of %s must be a password of 1 to %d bytes", file, passwordMax)
	}
	return pw, nil
}

// passphraseFrom says where a passphrase of a LUKS volume is: at most one is
// set; neither: it is typed.
type passphraseFrom struct {
	file    string // whose first line it is; "-" is standard input
	keyFile string // whose whole content it is
}

// keyFileMax is the longest key file of a LUKS volume, in bytes.
const keyFileMax = 64 << 10

// passphrase returns the passphrase of a LUKS volume. The caller wipes it.
func (env *Env) passphrase(prompt string, from passphraseFrom) ([]byte, error) {
	if from.keyFile == "" {
		if from.file == "" && !env.Interactive {
			return nil, errs.New(errs.Invalid, "the passphrase of the LUKS volume is needed, and there is no terminal to ask").
				WithHint("name a passphrase-file or a key-file")
		}
		return env.password(prompt, from.file, false)
	}
	f, err := os.Open(from.keyFile)
	if err != nil {
		return nil, errs.New(errs.Invalid, "cannot read the key file: %w", err)
	}
	defer f.Close()
	buf := make([]byte, keyFileMax+1) // fixed: growing would leave copies
	n, err := io.ReadFull(f, buf)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(buf)
		return nil, errs.New(errs.Invalid, "cannot read the key file: %w", err)
	}
	if n == 0 || n > keyFileMax {
		clear(buf)
		return nil, errs.New(errs.Invalid, "key file %s must have 1 to %d bytes", from.keyFile, keyFileMax)
	}
	return buf[:n], nil
}

// resultf prints a line that is the result itself, also with --quiet.
func (env *Env) resultf(format string, args ...any) {
	fmt.Fprintln(env.Stdout, printable(fmt.Sprintf(format, args...)))
}
