package kms

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/access"
)

// TestGuesserStopsNobody: somebody floods the API with connections and with guesses
// at the administrator's password; the administrator, elsewhere, is served.
func TestGuesserStopsNobody(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	addr := b.apiAddress.String()
	for range 500 {
		c, err := dialer.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	// Those refused are closed; what remains leaves no place for this one.
	if c, err := tls.DialWithDialer(dialer, "tcp", addr, tlsOf(t, dir)); err == nil {
		c.Close()
		t.Error("connection 501 of one address was served")
	}
	admin := b.administrator(t)

	guesser := &http.Transport{TLSClientConfig: tlsOf(t, dir), ForceAttemptHTTP2: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}
		return d.DialContext(ctx, network, addr)
	}}
	defer guesser.CloseIdleConnections()
	outcomes := map[string]int{}
	for range 400 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+addr+strongroomv1connect.SessionServiceLoginProcedure,
			strings.NewReader(`{"user":"`+access.FirstUser+`","password":"Z3Vlc3MgZ3Vlc3MgZ3Vlc3M="}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := guesser.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(res.Body)
		res.Body.Close()
		for _, code := range []string{"permission_denied", "resource_exhausted"} {
			if strings.Contains(string(text), `"code":"`+code+`"`) {
				outcomes[code]++
			}
		}
	}
	// Slow machines may give a guesser a wait's end.
	if outcomes["permission_denied"] < 5 || outcomes["permission_denied"] > 20 || outcomes["resource_exhausted"] < 300 {
		t.Errorf("400 guesses: %v", outcomes)
	}
	password, err := os.ReadFile(filepath.Join(dir, FirstPasswordName))
	if err != nil {
		t.Fatal(err)
	}
	login(t, addr, dir, access.FirstUser, string(password))
	admin.change(t, "a password that nobody guesses")
}
