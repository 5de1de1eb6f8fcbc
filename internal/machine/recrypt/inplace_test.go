package recrypt_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/recrypt"
)

// inPlaceSize is that of a disk of three zones, in bytes.
const inPlaceSize = 3 << 20

func inPlaceDir(t *testing.T) (recrypt.Dir, []byte) {
	t.Helper()
	disk := bytes.Repeat([]byte("data"), inPlaceSize/4)
	return newDir(t, disk), disk
}

// TestEncryptInPlaceGoesOn: an encryption in place that was stopped keeps everything
// else away from the disk, and goes on under whatever KEK the next call names.
func TestEncryptInPlaceGoesOn(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1", "2")
	dir, want := inPlaceDir(t)
	reason := errors.New("the operator has changed his mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	undone, err := recrypt.EncryptInPlace(ctx, dir, plainName, luksName, inPlaceSize, reference("1"), keys.get, 0, func(int64, int64) { cancel(reason) })
	if undone || !errors.Is(err, reason) {
		t.Errorf("undone: %v, error %v", undone, err)
	}
	before := readFile(t, dir, plainName)
	for what, err := range map[string]error{
		"decrypt":       recrypt.Decrypt(t.Context(), dir, plainName, "other", keys.get, nil),
		"shallow rekey": recrypt.ShallowRekey(t.Context(), dir, plainName, reference("2"), keys.get),
		"deep rekey":    recrypt.DeepRekey(t.Context(), dir, plainName, reference("2"), keys.get, nil, nil),
	} {
		if !errors.Is(err, volume.ErrEncrypting) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if undone, err := recrypt.EncryptInPlace(t.Context(), dir, plainName, luksName, inPlaceSize, reference("2"), keyring{"2": keys["2"]}.get, 0, nil); undone || !errors.Is(err, errNoKEK) {
		t.Errorf("without its KEK: undone %v, error %v", undone, err)
	}
	if !bytes.Equal(readFile(t, dir, plainName), before) {
		t.Error("the disk was changed")
	}
	for range 2 { // the second finds it done, and renamed
		_, err = recrypt.EncryptInPlace(t.Context(), dir, plainName, luksName, inPlaceSize, reference("2"), keys.get, 0, nil)
		check(t, err)
	}
	check(t, recrypt.Decrypt(t.Context(), dir, luksName, plainName, keyring{"2": keys["2"]}.get, nil))
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("contents differ")
	}
	// Both names: one of the files is somebody's.
	if undone, err := recrypt.EncryptInPlace(t.Context(), dir, plainName, luksName, inPlaceSize, reference("2"), keys.get, 0, nil); undone || err == nil {
		t.Errorf("with a file in the way: undone %v, error %v", undone, err)
	}
}

// TestEncryptInPlaceUndone: an encryption in place that is stopped before it has
// encrypted anything leaves the disk plain, as it was, whatever it had begun.
func TestEncryptInPlaceUndone(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1")
	dir, want := inPlaceDir(t)
	reason := errors.New("the operator has changed his mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	undone, err := recrypt.EncryptInPlace(ctx, dir, plainName, luksName, inPlaceSize, reference("1"), func(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
		cancel(reason) // the last moment before the disk is changed
		return keys.get(context.WithoutCancel(ctx), ref)
	}, 0, nil)
	if !undone || !errors.Is(err, reason) {
		t.Errorf("undone: %v, error %v", undone, err)
	}
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("the disk was changed")
	}
}
