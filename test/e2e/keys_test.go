package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/machine/recrypt"
	"strongroom/test/keyscan"
)

// openBackup returns the provider in a backup made with [password].
func openBackup(t *testing.T, path string) *keyprovider.Native {
	t.Helper()
	p12, err := os.ReadFile(path)
	must(t, err)
	secret, err := keymem.Take([]byte(password))
	must(t, err)
	defer secret.Close()
	native, _, err := keyprovider.Import(p12, secret)
	must(t, err)
	return native
}

// inspect reads the header of an encrypted disk, which a VM may have open.
func inspect(t *testing.T, path string) volume.Info {
	t.Helper()
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	must(t, err)
	defer file.Close()
	info, err := volume.Inspect(file)
	must(t, err)
	if _, err := recrypt.SafesOf(info); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return info
}

// dek returns the DEK of an encrypted disk, by the keys in the backups.
func (s *site) dek(t *testing.T, path string) *keymem.Key {
	t.Helper()
	info := inspect(t, path)
	kek, err := s.keys.KEK(t.Context(), info.Safes[0].KEK)
	must(t, err)
	defer kek.Close()
	dek, err := info.Safes[0].Unwrap(kek, volume.Owner(info.UUID))
	must(t, err)
	t.Cleanup(func() { dek.Close() })
	return dek
}

// addKeys makes a scanner look for every KDK, and for the KEKs and DEKs of all
// disks on the datastore. It returns how many disks there are.
func (s *site) addKeys(t *testing.T, scan *keyscan.Scanner) int {
	t.Helper()
	for _, name := range s.keys.Names() {
		p, err := s.keys.Lookup(name)
		must(t, err)
		kdk, err := p.(*keyprovider.Native).KDK()
		must(t, err)
		scan.AddKey("KDK of "+name, kdk.Bytes())
		kdk.Close()
	}
	disks, err := filepath.Glob(filepath.Join(s.store, "*", "*.luks"))
	must(t, err)
	for _, path := range disks {
		name := strings.TrimPrefix(path, s.store+"/")
		kek, err := s.keys.KEK(t.Context(), inspect(t, path).Safes[0].KEK)
		must(t, err)
		scan.AddKey("KEK of "+name, kek.Bytes())
		kek.Close()
		scan.AddKey("DEK of "+name, s.dek(t, path).Bytes())
	}
	return len(disks)
}

// scan looks for keys and the marker in every file of the lab: datastore, data
// of controller and host, sockets' folders, logs, backups. It leaves out what
// the guest boots from, which knows the marker, and has no data of the guest.
func (s *site) scan(t *testing.T, scan *keyscan.Scanner) []keyscan.Finding {
	t.Helper()
	found, read, err := scan.Tree(s.lab.Dir, 10, filepath.Join(s.store, "boot"))
	must(t, err)
	if read < 1<<20 {
		t.Fatalf("only %d bytes were read", read)
	}
	return found
}

// scanner returns one that looks for all keys in play.
func (s *site) scanner(t *testing.T) *keyscan.Scanner {
	t.Helper()
	scan := new(keyscan.Scanner)
	s.addKeys(t, scan)
	return scan
}
