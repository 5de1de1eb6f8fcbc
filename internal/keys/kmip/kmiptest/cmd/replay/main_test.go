package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ovh/kmip-go"

	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
)

func TestRun(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	server, err := kmipserver.New(kmipserver.Config{
		Store: store, TLS: kmipserver.TLSConfig(ca.Server(t), ca.Pool(), false), Log: slog.New(slog.DiscardHandler),
		Authenticate: func(context.Context, tls.ConnectionState, []kmip.Credential) (kmipserver.Client, error) {
			return kmipserver.Client{Account: "all"}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	dir := t.TempDir()
	cert, key := testca.KeyPEM(t, ca.Client(t, "replay"))
	for name, data := range map[string][]byte{"ca": ca.PEM(), "cert": cert, "key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"-addr", l.Addr().String(), "-ca", dir + "/ca", "-cert", dir + "/cert", "-key", dir + "/key"}
	var out bytes.Buffer
	failed, err := run(append(args, "../../testdata/v1.3"), &out)
	if err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if !strings.Contains(text, "pass  v1.3/SKLC-M-1-13\n") || !strings.Contains(text, "FAIL  v1.3/CS-BC-M-6-13: message 1: ") || failed == 0 {
		t.Errorf("%d failed:\n%s", failed, text)
	}
	if _, err := run(append(args, dir), &out); err == nil {
		t.Error("a folder without cases is no error")
	}
}
