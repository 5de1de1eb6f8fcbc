package kms

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/control/guard"
)

// TestApplicationIsNoNode: a certificate that the KMS's CA has signed for an
// application is good for neither of the ports between nodes, whose database would
// give who gets in all of its records, and take any.
func TestApplicationIsNoNode(t *testing.T) {
	t.Parallel()
	n, _ := newNodes(t)
	a := n.sites[0]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	admin := strongroomv1connect.NewKMSServiceClient(&http.Client{Transport: a.conn}, "http://kms")
	signed, err := admin.SignKMSCertificate(t.Context(), connect.NewRequest(&strongroomv1.SignKMSCertificateRequest{Application: FirstApplication, Request: request}))
	if err != nil {
		t.Fatal(apierr.From(err))
	}
	cfg := tlsOf(t, a.cfg.DataDir, tls.Certificate{Certificate: [][]byte{signed.Msg.GetCertificate()}, PrivateKey: key})
	for _, c := range []struct{ address, path string }{
		{a.cfg.Cluster.StoreListen, "/members"},
		{a.cfg.Cluster.StoreListen, "/version"},
		{a.cfg.Cluster.Listen, strongroomv1connect.KMSMemberServiceFetchEpochsProcedure},
	} {
		transport := &http.Transport{TLSClientConfig: cfg}
		client := &http.Client{Transport: transport, Timeout: time.Minute}
		res, err := client.Get("https://" + c.address + c.path)
		if err == nil {
			res.Body.Close()
			t.Errorf("an application's certificate: %s%s answers %s", c.address, c.path, res.Status)
		}
		transport.CloseIdleConnections()
	}
}

// TestStrangersAtNodes: who is no node can neither take all connections of the port
// between nodes, nor fill the disk with what it asks for there.
func TestStrangersAtNodes(t *testing.T) {
	t.Parallel()
	n, _ := newNodes(t)
	a := n.sites[0]
	transport := &http.Transport{TLSClientConfig: tlsOf(t, a.cfg.DataDir), ForceAttemptHTTP2: true, DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext}
	defer transport.CloseIdleConnections()
	stranger := strongroomv1connect.NewKMSMemberServiceClient(&http.Client{Transport: transport}, "https://"+a.cfg.Cluster.Advertise)
	begun := time.Now()
	for range 300 {
		if _, err := stranger.Join(t.Context(), connect.NewRequest(&strongroomv1.KMSJoinRequest{Token: "none", Name: "x"})); err == nil {
			t.Fatal("joined without a token")
		}
	}
	most := refusedPerSecond * (2 + int(time.Since(begun)/time.Second))
	local, err := client.New(client.Config{Server: "unix:" + a.cfg.LocalSocket})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	records := do(t, local.KMSAudit().ListKMSAudit, &strongroomv1.ListKMSAuditRequest{Operation: "KMSMemberService/Join", Limit: 1000}).GetRecords()
	if len(records) == 0 || len(records) > most {
		t.Errorf("300 strangers are on record %d times, want 1 to %d", len(records), most)
	}
	for _, r := range records {
		if r.GetSubject() != guard.Anonymous {
			t.Errorf("a stranger is on record as %s", r.GetSubject())
			break
		}
	}

	for range 200 {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}).Dial("tcp", a.cfg.Cluster.Advertise)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	// Those refused are closed; what remains leaves no place for this one.
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}
	if c, err := tls.DialWithDialer(dialer, "tcp", a.cfg.Cluster.Advertise, tlsOf(t, a.cfg.DataDir)); err == nil {
		c.Close()
		t.Error("connection 201 of one address was served")
	}
	newSite(t, "b").join(a)
}
