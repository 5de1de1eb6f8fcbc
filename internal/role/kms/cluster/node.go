package cluster

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// renewEvery is how often a node looks whether its certificate is due.
const renewEvery = time.Hour

// PeerName stands in the certificate of every node, and in no other that the CA
// issues: those of applications are not to open the database's port.
const PeerName = "node.kms.strongroom.internal"

// Node is who a node is to others: a certificate that it issues itself, for each
// has the CA, and that is nowhere but in memory. It must be closed.
type Node struct {
	ca         *pki.CA
	cluster    string // the KMS's id in identities
	id         string
	names      []string
	credential *pki.Credential
	// The database takes its certificate from files only: these are in memory.
	cert, key, authority *os.File
}

// ClusterID returns what stands for the KMS in identities.
func ClusterID(ca *x509.Certificate) string {
	fingerprint := pki.FingerprintOf(ca)
	return fmt.Sprintf("%x", fingerprint[:8])
}

// NewNode returns who the node of that id is; names are those in its addresses.
func NewNode(ca *pki.CA, id string, names []string) (_ *Node, err error) {
	n := &Node{ca: ca, cluster: ClusterID(ca.Certificate()), id: id, names: append(slices.Clone(names), PeerName)}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	for name, f := range map[string]**os.File{"cert": &n.cert, "key": &n.key, "ca": &n.authority} {
		fd, err := unix.MemfdCreate("strongroom-"+name, unix.MFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("cannot make a file in memory: %w", err)
		}
		*f = os.NewFile(uintptr(fd), name)
	}
	if err := rewrite(n.authority, "CERTIFICATE", ca.Certificate().Raw); err != nil {
		return nil, err
	}
	return n, n.renew()
}

// Close is idempotent.
func (n *Node) Close() error {
	var err error
	for _, f := range []*os.File{n.cert, n.key, n.authority} {
		if f != nil {
			if closeErr := f.Close(); !errors.Is(closeErr, os.ErrClosed) {
				err = errors.Join(err, closeErr)
			}
		}
	}
	return err
}

// renew issues a certificate with a new key.
func (n *Node) renew() error {
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		return err
	}
	cert, err := n.ca.IssueFromCSR(csr, n.identity(n.id), n.names)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(der)
	if err := errors.Join(rewrite(n.cert, "CERTIFICATE", cert.Raw), rewrite(n.key, "PRIVATE KEY", der)); err != nil {
		return err
	}
	if n.credential == nil {
		n.credential, err = pki.NewCredential(cert, key, n.ca.Certificate())
		return err
	}
	return n.credential.Replace(cert, key, n.ca.Certificate())
}

func rewrite(f *os.File, kind string, der []byte) error {
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	defer clear(text)
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt(text, 0)
	return err
}

// identity is that of the node with an id.
func (n *Node) identity(id string) pki.Identity {
	return pki.Identity{Cluster: n.cluster, Role: pki.KMS, Name: id}
}

// accept lets nodes of this KMS through a handshake. Whether one is a member, and
// still is, each call asks the database.
func (n *Node) accept(id pki.Identity) error {
	if id != n.identity(id.Name) {
		return errs.New(errs.Denied, "%s is no node of this KMS", id)
	}
	return nil
}

// Files returns the paths of certificate, key and CA, readable in this process
// while the node is open.
func (n *Node) Files() (cert, key, ca string) {
	path := func(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
	return path(n.cert), path(n.key), path(n.authority)
}

// KeepFresh renews the certificate when it is due, until ctx ends.
func (n *Node) KeepFresh(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Now().Before(pki.RenewalDue(n.credential.Leaf())) {
			continue
		}
		if err := n.renew(); err != nil {
			log.LogAttrs(ctx, slog.LevelError, "the node's certificate was not renewed", slog.Any("err", err))
		}
	}
}
