package kms

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
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
