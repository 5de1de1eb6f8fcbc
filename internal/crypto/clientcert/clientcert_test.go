package clientcert

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"
)

func TestNew(t *testing.T) {
	t.Parallel()
	der, cert, key, err := New("backup-1", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil || !leaf.Equal(pair.Leaf) {
		t.Fatalf("DER and PEM differ: %v", err)
	}
	if leaf.Subject.CommonName != "backup-1" || leaf.IsCA || time.Until(leaf.NotAfter) > time.Hour || time.Until(leaf.NotAfter) < 50*time.Minute {
		t.Errorf("certificate of %s, valid until %v", leaf.Subject.CommonName, leaf.NotAfter)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("it passes as a server's")
	}
	if other, _, _, err := New("backup-1", time.Hour); err != nil || string(other) == string(der) {
		t.Errorf("a second one is the same: %v", err)
	}
}
