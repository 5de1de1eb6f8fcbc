package kms

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"path/filepath"
	"testing"

	"github.com/ovh/kmip-go"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// TestSignCertificate signs the certificate requests of an application: it is known by
// the certificate, which says nothing that the request asked for and is of no part of
// the KMS.
func TestSignCertificate(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	local := b.local(t).KMS()
	do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "vcenter", Group: FirstGroup})
	request := func(key crypto.Signer) []byte {
		t.Helper()
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "kms node-1"}, DNSNames: []string{"localhost"}}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for what, key := range map[string]crypto.Signer{"RSA": strong, "P-384": curve} {
		made := do(t, local.SignKMSCertificate, &strongroomv1.SignKMSCertificateRequest{Application: "vcenter", Request: request(key), LifetimeSeconds: 3600})
		cert, err := x509.ParseCertificate(made.GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(b.ca.Certificate()); err != nil || cert.Subject.CommonName != "vcenter" || len(cert.DNSNames) != 0 || cert.IsCA {
			t.Errorf("%s: %v, subject %s, names %q, authority %v", what, err, cert.Subject, cert.DNSNames, cert.IsCA)
		}
		if id, err := pki.IdentityOf(cert); err == nil {
			t.Errorf("%s: the certificate is one of %v", what, id)
		}
		conn := dial(t, b.addr, tlsOf(t, dir, tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}))
		if item := ask(t, conn, nil, newAES("key of "+what)); item.Err() != nil {
			t.Errorf("%s: %s", what, item.ResultMessage)
		}
		do(t, local.RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: "vcenter", Id: made.GetCredential().GetId()})
		if item := ask(t, conn, nil, newAES("another")); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
			t.Errorf("%s, revoked: %v", what, item.ResultReason)
		}
	}
	forged := request(curve)
	forged[len(forged)-1] ^= 1
	for what, c := range map[string]struct {
		app     string
		request []byte
		kind    errs.Kind
	}{
		"a weak key": {"vcenter", request(weak), errs.Invalid}, "not signed by its key": {"vcenter", forged, errs.Invalid}, "no request": {"vcenter", []byte("x"), errs.Invalid},
		"too large": {"vcenter", make([]byte, 1<<16), errs.Invalid}, "no such application": {"other", request(curve), errs.NotFound},
	} {
		_, err := client.Call(t.Context(), local.SignKMSCertificate, &strongroomv1.SignKMSCertificateRequest{Application: c.app, Request: c.request})
		wantKind(t, what, err, c.kind)
	}
}
