package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyprovider"
)

// call posts JSON to a method of the controller's API, as a script does.
func (s *site) call(t *testing.T, token, method string, request any) (status int, answer []byte) {
	t.Helper()
	ca, err := os.ReadFile(s.controller.CA())
	must(t, err)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("the CA's file has no certificate")
	}
	body, err := json.Marshal(request)
	must(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.controller.Address+"/strongroom.v1."+method, bytes.NewReader(body))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	res, err := transport.RoundTrip(req)
	must(t, err)
	defer res.Body.Close()
	answer, err = io.ReadAll(res.Body)
	must(t, err)
	return res.StatusCode, answer
}

// backupByAPI exports a provider without the command line: 108, 221. And what
// listens speaks TLS only, a host to its controller only: 62, 100.
func backupByAPI(t *testing.T, s *site) {
	var token struct{ Token string }
	must(t, s.ok(t, "token", "create", "--description", "backup script", "-o", "json").JSON(&token))
	request := map[string]any{"name": "kp-1", "password": []byte(password)}
	for _, bad := range []string{"", "sr1.invalid", token.Token + "x"} {
		if status, answer := s.call(t, bad, "ProviderService/ExportProvider", request); status != http.StatusUnauthorized && status != http.StatusForbidden {
			t.Errorf("with token %q: status %d %s", bad, status, answer)
		}
	}
	status, answer := s.call(t, token.Token, "ProviderService/ExportProvider", request)
	var export struct {
		FileName, ExportID string
		P12                []byte
	}
	must(t, json.Unmarshal(answer, &export))
	if status != http.StatusOK || export.FileName != "kp-1.p12" || export.ExportID == "" {
		t.Fatalf("status %d, file %q, export %q", status, export.FileName, export.ExportID)
	}
	secret, err := keymem.Take([]byte(password))
	must(t, err)
	defer secret.Close()
	native, _, err := keyprovider.Import(export.P12, secret)
	must(t, err)
	defer native.Close()
	if !native.SameKeys(openBackup(t, s.backupOf("kp-1"))) {
		t.Error("the backup made by the API holds another key than that of the command line")
	}

	for name, address := range s.listeners(t) {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}) // for what it is to refuse
		if err == nil {
			conn.Close()
			t.Errorf("the %s speaks TLS 1.2", name)
		}
		res, err := http.Post("http://"+address+"/strongroom.v1.VMService/ListVMs", "application/json", strings.NewReader("{}"))
		if err == nil {
			res.Body.Close()
			if res.StatusCode != http.StatusBadRequest {
				t.Errorf("the %s answers without TLS: %s", name, res.Status)
			}
		}
	}
	conn, err := tls.Dial("tcp", s.listeners(t)["host"], &tls.Config{InsecureSkipVerify: true}) // no certificate of ours
	if err == nil {
		defer conn.Close()
		if _, err = conn.Read(make([]byte, 1)); err == nil {
			t.Error("a host talks to somebody without a certificate")
		}
	}
	if err == nil || !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("a host refuses a client without a certificate with %v", err)
	}
}

// listeners returns the addresses of controller and host, which are all that
// they listen on.
func (s *site) listeners(t *testing.T) map[string]string {
	t.Helper()
	var h struct{ Address string }
	must(t, s.ok(t, "host", "show", s.host.Name, "-o", "json").JSON(&h))
	found := map[string]string{"controller": s.controller.Address, "host": h.Address}
	for name, pid := range map[string]int{"controller": s.controller.PID(), "host": s.host.PID()} {
		_, port, err := net.SplitHostPort(found[name])
		must(t, err)
		if ports := listening(t, pid); !slices.Equal(ports, []string{port}) {
			t.Errorf("the %s listens on %v, want %s only", name, ports, port)
		}
	}
	return found
}
