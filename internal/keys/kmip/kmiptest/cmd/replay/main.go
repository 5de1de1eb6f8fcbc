// Command replay plays OASIS KMIP test cases against a server and prints a
// line for each:
//
//	replay -addr HOST:PORT -ca FILE -cert FILE -key FILE FOLDER
//
// It exits with 1 if a case failed and with 2 if it could not run.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"strongroom/internal/keys/kmip/kmiptest"
)

func main() {
	failed, err := run(os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(2)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) (failed int, err error) {
	flags := flag.NewFlagSet("replay", flag.ContinueOnError)
	addr := flags.String("addr", "127.0.0.1:5696", "address of the server")
	ca := flags.String("ca", "", "PEM file with the authority of the server's certificate")
	cert := flags.String("cert", "", "PEM file with the client's certificate")
	key := flags.String("key", "", "PEM file with the client's private key")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	if flags.NArg() != 1 {
		return 0, errors.New("cannot replay: name one folder of test cases")
	}
	pem, err := os.ReadFile(*ca)
	if err != nil {
		return 0, fmt.Errorf("cannot read the authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return 0, fmt.Errorf("cannot use %s: it holds no certificate", *ca)
	}
	pair, err := tls.LoadX509KeyPair(*cert, *key)
	if err != nil {
		return 0, fmt.Errorf("cannot load the client's certificate: %w", err)
	}
	dialer := &tls.Dialer{Config: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}}
	dial := func(ctx context.Context) (*tls.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		conn, err := dialer.DialContext(ctx, "tcp", *addr)
		if err != nil {
			return nil, err
		}
		return conn.(*tls.Conn), nil
	}
	files, err := kmiptest.Files(flags.Arg(0))
	if err != nil {
		return 0, err
	}
	if len(files) == 0 {
		return 0, fmt.Errorf("cannot replay: no test case in %s", flags.Arg(0))
	}
	passed, skipped := 0, 0
	for _, file := range files {
		r, err := kmiptest.Replay(context.Background(), file, dial)
		switch {
		case err != nil:
			return failed, fmt.Errorf("cannot replay %s: %w", file, err)
		case r.NotClient:
			skipped++
			fmt.Fprintf(out, "n/a   %s: the server speaks first\n", r.Name)
		case r.Passed():
			passed++
			note := ""
			if r.AtOnce {
				note = ": answered at once, nothing to poll for"
			}
			fmt.Fprintf(out, "pass  %s%s\n", r.Name, note)
		default:
			failed++
			fmt.Fprintf(out, "FAIL  %s: %s\n", r.Name, r.Reason)
		}
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d not applicable\n", passed, failed, skipped)
	return failed, nil
}
