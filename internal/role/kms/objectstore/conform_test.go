package objectstore

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/kmip/kmiptest/conform"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vaultFile stands for the file of a key ring: what was saved last.
type vaultFile struct {
	content *keymem.Key
	fail    error
}

func (f *vaultFile) save(encoded *keymem.Key) (err error) {
	if f.fail != nil {
		return f.fail
	}
	f.content.Close()
	f.content, err = encoded.Clone()
	return err
}

// node is a store in a database of its own.
type node struct {
	dir  string
	file *vaultFile
	db   *store.DB
	ring *keyring.Ring
	*Store
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{dir: filepath.Join(t.TempDir(), "db"), file: &vaultFile{}}
	n.start(t)
	t.Cleanup(func() {
		n.stop(t)
		n.file.content.Close()
	})
	return n
}

func (n *node) start(t testing.TB) {
	t.Helper()
	var err error
	if n.db, err = store.Open(context.Background(), store.Config{Dir: n.dir, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}); err != nil {
		t.Fatal(err)
	}
	if n.file.content == nil {
		n.ring, err = keyring.New(n.file.save)
	} else {
		var used uint64
		if used, err = NewestEpoch(context.Background(), n.db); err == nil {
			n.ring, err = keyring.Load(n.file.content, used, n.file.save)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	n.Store = New(n.db, n.ring, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

func (n *node) stop(t testing.TB) {
	t.Helper()
	n.Close()
	n.ring.Close()
	if err := n.db.Close(); err != nil {
		t.Error(err)
	}
}

// restart is what a stop and a start leave of a node.
func (n *node) restart(t testing.TB) {
	t.Helper()
	n.stop(t)
	n.start(t)
}

// TestCases replays the OASIS cases on the durable store.
func TestCases(t *testing.T) {
	t.Parallel()
	conform.Cases(t, "../../../keys/kmip/kmiptest/testdata", newNode(t))
}
