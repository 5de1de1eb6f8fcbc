package kms

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"strongroom/internal/control/pki"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/filelock"
	"strongroom/internal/role/kms/cluster"
)

// joiningName is a file in the data folder from a join's first step until after
// its last one: with it there is no node in the folder.
const joiningName = "join.incomplete"

// Join makes this machine a node of the KMS that the node at server ("host:port")
// belongs to: it gets the key ring, the authority and a name. [Run] comes next.
// A folder in which a KMS has run is refused. After an error the folder is as it
// was; after a crash it has no KMS, and Join begins anew, with another token.
func Join(ctx context.Context, cfg Config, server, token string) error {
	return errs.Wrap(join(ctx, cfg, server, token, func(string) {}), "cannot join the KMS at %.128s", server)
}

// join calls done behind each step that a crash may follow.
func join(ctx context.Context, cfg Config, server, token string, done func(step string)) (err error) {
	if cfg.Cluster == nil {
		return errs.New(errs.Invalid, "the configuration has no [cluster]").WithHint("see docs/how-to/run-three-kms-nodes.md")
	}
	_, noKey := os.Lstat(cfg.KeyFile)
	marker, err := beginJoin(cfg)
	if err != nil {
		return err
	}
	defer marker.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, clearJoin(cfg), os.Remove(marker.Name()))
			if errors.Is(noKey, fs.ErrNotExist) {
				os.Remove(cfg.KeyFile)
			}
		}
	}()
	done("folder taken")
	joined, err := cluster.Join(ctx, server, token, cfg.self(""))
	if err != nil {
		return err
	}
	defer joined.Close()
	done("member")
	u, err := unlock(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer u.lock.Close()
	defer u.root.Close()
	done("root key made")
	secrets, err := openSecrets(cfg, u.root, joined.Ring)
	if err != nil {
		return err
	}
	defer secrets.Close()
	done("key ring stored")
	if _, err := pki.InstallCA(filepath.Join(cfg.DataDir, pkiName), joined.CA, joined.CAKey.Bytes(), secrets); err != nil {
		return err
	}
	done("authority stored")
	m := &membership{ID: joined.ID, Peers: joined.Peers}
	if err := m.write(filepath.Join(cfg.DataDir, membershipName)); err != nil {
		return err
	}
	done("membership stored")
	// Last: from here on there is a node.
	if err := os.Remove(marker.Name()); err != nil {
		return err
	}
	return durable.SyncDir(cfg.DataDir)
}

// beginJoin takes a data folder without a KMS, and returns the locked file that
// says that it holds none.
func beginJoin(cfg Config) (*os.File, error) {
	if err := checkRestored(cfg); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(cfg.DataDir, joiningName)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		for _, name := range []string{membershipName, vaultName, storeName, pkiName} {
			if _, err := os.Lstat(filepath.Join(cfg.DataDir, name)); !errors.Is(err, fs.ErrNotExist) {
				return nil, errs.New(errs.Exists, "there is a KMS in %s already: %s", cfg.DataDir, name).
					WithHint("join with another data_dir; what is there stays as it is")
			}
		}
	}
	marker, err := mark(path)
	if err != nil {
		return nil, errs.Wrap(err, "join")
	}
	if err := clearJoin(cfg); err != nil {
		marker.Close()
		return nil, err
	}
	return marker, nil
}

// mark makes the file at path, which says that its folder holds no KMS, durably,
// and locks it.
func mark(path string) (*os.File, error) {
	marker, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Take(marker); err != nil {
		marker.Close()
		return nil, errs.New(errs.Unavailable, "another one is under way in %s: %w", filepath.Dir(path), err)
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		marker.Close()
		return nil, err
	}
	return marker, nil
}

// clearJoin removes what a join that broke off has made. The root key is good for
// the next one.
func clearJoin(cfg Config) error {
	var err error
	for _, name := range []string{membershipName, vaultName, pkiName} {
		path := filepath.Join(cfg.DataDir, name)
		err = errors.Join(err, os.RemoveAll(path), os.RemoveAll(path+".new"))
	}
	return err
}

// checkJoined refuses the rest of a join that broke off: it must not become the
// first node of another KMS.
func checkJoined(cfg Config) error {
	if _, err := os.Lstat(filepath.Join(cfg.DataDir, joiningName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errs.New(errs.InvalidState, "%s holds a join that broke off", cfg.DataDir).
		WithHint("repeat strongroom kms join, with a new token: it begins anew")
}
