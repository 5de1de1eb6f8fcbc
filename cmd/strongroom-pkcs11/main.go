// Command strongroom-pkcs11 loads a PKCS #11 library, does one thing with a key
// in its token, and ends. It is no command for people: strongroom starts it, so
// that a vendor's library does not run in a process that has keys to lose
// (package hsm).
package main

import (
	"fmt"
	"os"

	"strongroom/internal/daemon"
	"strongroom/internal/keys/hsm"
	"strongroom/internal/keys/hsm/token"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "strongroom-pkcs11:", err)
		os.Exit(1)
	}
}

func run() error {
	if err := daemon.Harden(); err != nil {
		return err
	}
	// What a library prints must not stand among the answers.
	answers := os.Stdout
	os.Stdout = os.Stderr
	return hsm.Serve(os.Stdin, answers, token.Wrap, token.Unwrap)
}
