package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/test/keyscan"
	"strongroom/test/lab"
)

// password protects the demonstration's backups.
const password = "demo password: keep a real one elsewhere"

// keys knows every key in play, by the operator's own means: the backups of the
// providers and the key safes in the disks. So the demonstration can look for
// them where they must not be.
type keys struct {
	providers *keyprovider.Set
}

// addBackup takes in the provider in a backup file.
func (k *keys) addBackup(path string) error {
	p12, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	secret, err := keymem.Take([]byte(password))
	if err != nil {
		return err
	}
	defer secret.Close()
	native, _, err := keyprovider.Import(p12, secret)
	if err != nil {
		return err
	}
	return k.providers.Add(native)
}

// addKeyServer takes in the standard provider of that name, with the credentials
// that the key server gave out.
func (k *keys) addKeyServer(name string, server *lab.KMS) error {
	pair, err := tls.LoadX509KeyPair(server.File("client.pem"), server.File("client.key"))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(server.File("ca.pem"))
	if err != nil {
		return err
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(ca) {
		return fmt.Errorf("%s holds no certificate", server.File("ca.pem"))
	}
	p, err := standard.New(standard.Config{
		Name: name, Servers: []string{server.Address}, Authorities: authorities, Certificate: func() *tls.Certificate { return &pair },
	})
	if err != nil {
		return err
	}
	return k.providers.Add(p)
}

// dek returns the DEK of an encrypted disk.
func (k *keys) dek(ctx context.Context, path string) (*keymem.Key, error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := volume.Inspect(file)
	if err != nil {
		return nil, err
	}
	if len(info.Safes) != 1 {
		return nil, fmt.Errorf("%s has %d key safes", path, len(info.Safes))
	}
	kek, err := k.providers.KEK(ctx, info.Safes[0].KEK)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	return info.Safes[0].Unwrap(kek, volume.Owner(info.UUID))
}

// scanner returns one that looks for the KDKs, and the KEKs and DEKs of the
// disks, and for what the guest wrote.
func (k *keys) scanner(ctx context.Context, disks ...string) (*keyscan.Scanner, error) {
	var s keyscan.Scanner
	s.AddMarker("plain text of the guest", []byte(marker))
	for _, name := range k.providers.Names() {
		p, err := k.providers.Lookup(name)
		if err != nil {
			return nil, err
		}
		native, ok := p.(*keyprovider.Native)
		if !ok {
			continue // it has no KDK
		}
		kdk, err := native.KDK()
		if err != nil {
			return nil, err
		}
		s.AddKey("KDK of "+name, kdk.Bytes())
		kdk.Close()
	}
	for _, path := range disks {
		if err := k.addDisk(ctx, &s, path); err != nil {
			return nil, err
		}
	}
	return &s, nil
}

func (k *keys) addDisk(ctx context.Context, s *keyscan.Scanner, path string) error {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := volume.Inspect(file)
	if err != nil {
		return err
	}
	for _, safe := range info.Safes {
		kek, err := k.providers.KEK(ctx, safe.KEK)
		if err != nil {
			return err
		}
		s.AddKey("KEK of "+filepath.Base(path), kek.Bytes())
		kek.Close()
	}
	dek, err := k.dek(ctx, path)
	if err != nil {
		return err
	}
	s.AddKey("DEK of "+filepath.Base(path), dek.Bytes())
	return dek.Close()
}

// opens reports whether dek is the key of the encrypted disk.
func opens(path string, dek *keymem.Key) (bool, error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	if err != nil {
		return false, err
	}
	defer file.Close()
	header, err := luks.Read(file, file.Size())
	if err != nil {
		return false, err
	}
	err = header.VerifyKey(dek)
	return err == nil, nil
}

// selfTest proves that the scanner finds what it is to look for, in a file that
// holds it.
func selfTest(s *keyscan.Scanner, dir string) error {
	path := filepath.Join(dir, "self-test")
	if err := os.WriteFile(path, append(bytes.Repeat([]byte{0}, 12345), marker...), 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	found, _, err := s.Tree(dir, 1)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the scanner does not find the marker where it is")
	}
	return err
}
