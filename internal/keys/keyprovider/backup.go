package keyprovider

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"strongroom/internal/crypto/keymem"
)

// Limits of a backup: docs/spec/native-backup.md.
const (
	BackupMax         = 4096 // bytes of a backup file that are looked at
	BackupPasswordMax = 1024 // bytes of a password in UTF-8

	// backupIterations is the cost of trying one password, about 0.2 s.
	backupIterations = 600_000
	// backupIterationsMax bounds what a hostile file makes us spend: seconds.
	backupIterationsMax = 5_000_000
)

var (
	// ErrPasswordNeeded is reported when a backup is protected by a password
	// and none was given.
	ErrPasswordNeeded = errors.New("backup is protected by a password")
	// ErrWrongPassword is reported when a password does not open a backup.
	// Damage to the few bytes that take part in checking it looks the same.
	ErrWrongPassword = errors.New("wrong password, or the backup is damaged")
	// ErrCorruptBackup is reported for bytes that are no backup of a native
	// provider in a version that this program knows, or that were altered.
	ErrCorruptBackup = errors.New("not a backup of a native key provider, or damaged")
	// ErrInvalidPassword is reported for a password that no backup can have.
	ErrInvalidPassword = errors.New("password is not 1 to 1024 bytes of UTF-8 without NUL")
)

// BackupInfo is what a backup says about itself.
type BackupInfo struct {
	NativeInfo
	Exported          time.Time // in UTC, whole seconds
	PasswordProtected bool      // false: whoever has the file has the KDK
}

// Export returns a backup of the provider: a PKCS#12 file (.p12) with the KDK,
// protected by password, which is UTF-8 and stays the caller's. A nil password
// is allowed; the file then holds the KDK for everyone to read.
//
// It returns an error wrapping [ErrInvalidPassword], [ErrInvalidNative] if the
// time is outside the years 1970 to 9999, or [ErrClosed].
func (n *Native) Export(password *keymem.Key, now time.Time) ([]byte, error) {
	data, err := n.export(password, now, backupIterations)
	if err != nil {
		return nil, fmt.Errorf("cannot back up key provider %s: %w", n.info.Name, err)
	}
	return data, nil
}

func (n *Native) export(password *keymem.Key, now time.Time, iterations int) ([]byte, error) {
	if err := validatePassword(password); err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	if !validTime(now) {
		return nil, fmt.Errorf("%w: exported in the year %d", ErrInvalidNative, now.Year())
	}
	kdk, err := n.KDK()
	if err != nil {
		return nil, err
	}
	defer kdk.Close()

	f := &p12File{name: n.info.Name, description: describe(n.info, now), iterations: iterations, macIterations: iterations}
	rand.Read(f.salt[:]) // never fails: it ends the process instead
	rand.Read(f.iv[:])
	rand.Read(f.macSalt[:])
	if err := f.encrypt(password, kdk); err != nil {
		return nil, err
	}
	if f.mac, err = f.computeMAC(password); err != nil {
		return nil, err
	}
	return f.encode(), nil
}

// Import returns the provider in a backup. password is nil if none was given;
// it stays the caller's. To see what is in a backup without using it, close
// the provider.
//
// It returns an error wrapping [ErrPasswordNeeded] if the backup has a password
// and none was given, [ErrWrongPassword] if the password does not open it,
// [ErrCorruptBackup], or [ErrInvalidPassword]. It takes up to some seconds, if
// whoever made the file wanted that.
func Import(data []byte, password *keymem.Key) (*Native, BackupInfo, error) {
	n, info, err := importBackup(data, password)
	if err != nil {
		return nil, BackupInfo{}, fmt.Errorf("cannot import key provider: %w", err)
	}
	return n, info, nil
}

func importBackup(data []byte, password *keymem.Key) (*Native, BackupInfo, error) {
	if err := validatePassword(password); err != nil {
		return nil, BackupInfo{}, err
	}
	f, err := parseP12(data)
	if err != nil {
		return nil, BackupInfo{}, err
	}
	native, exported, err := parseDescription(f.name, f.description)
	if err != nil {
		return nil, BackupInfo{}, err
	}
	kdk, err := f.open(password)
	if errors.Is(err, ErrWrongPassword) {
		switch {
		case password == nil:
			err = ErrPasswordNeeded
		case f.isOpen():
			err = fmt.Errorf("%w: it has none", ErrWrongPassword)
		}
	}
	if err != nil {
		return nil, BackupInfo{}, fmt.Errorf("backup of %s: %w", f.name, err)
	}
	n, err := newNative(native, kdk)
	if err != nil {
		return nil, BackupInfo{}, fmt.Errorf("%w: %w", ErrCorruptBackup, err)
	}
	return n, BackupInfo{NativeInfo: n.info, Exported: exported, PasswordProtected: password != nil}, nil
}

// isOpen reports whether no password protects the file.
func (f *p12File) isOpen() bool {
	kdk, err := f.open(nil)
	kdk.Close()
	return err == nil
}

// describe returns the text in a backup that says what it is.
func describe(info NativeInfo, exported time.Time) string {
	tpm := "no"
	if info.TPMRequired {
		tpm = "yes"
	}
	return fmt.Sprintf("strongroom native-backup v1; key-id=%s; created=%s; exported=%s; tpm-required=%s",
		info.KeyID, info.Created.Format(time.RFC3339), exported.Format(time.RFC3339), tpm)
}

// parseDescription is the reverse of describe.
func parseDescription(name, text string) (NativeInfo, time.Time, error) {
	values := [5]string{}
	parts := strings.Split(text, "; ")
	if len(parts) != len(values) {
		return NativeInfo{}, time.Time{}, fmt.Errorf("%w: description", ErrCorruptBackup)
	}
	for i, part := range parts {
		_, values[i], _ = strings.Cut(part, "=")
	}
	keyID, errID := parseUUID(values[1])
	created, errCreated := time.Parse(time.RFC3339, values[2])
	exported, errExported := time.Parse(time.RFC3339, values[3])
	if err := errors.Join(errID, errCreated, errExported); err != nil || !validTime(created) || !validTime(exported) {
		return NativeInfo{}, time.Time{}, fmt.Errorf("%w: description", ErrCorruptBackup)
	}
	info := NativeInfo{Name: name, KeyID: keyID, TPMRequired: values[4] == "yes", Created: created}
	info, err := info.normalise()
	exported = exported.UTC()
	if err != nil || describe(info, exported) != text {
		return NativeInfo{}, time.Time{}, fmt.Errorf("%w: description", ErrCorruptBackup)
	}
	return info, exported, nil
}

func validatePassword(password *keymem.Key) error {
	if password == nil {
		return nil
	}
	b := password.Bytes()
	if len(b) > BackupPasswordMax || !utf8.Valid(b) {
		return ErrInvalidPassword
	}
	for _, c := range b {
		if c == 0 {
			return ErrInvalidPassword
		}
	}
	return nil
}
