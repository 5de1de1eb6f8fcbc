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

// rekeyDir returns a folder with an encrypted disk of three zones under KEK "1".
func rekeyDir(t *testing.T, keys keyring) (recrypt.Dir, []byte) {
	t.Helper()
	disk := bytes.Repeat([]byte("data"), 12<<20/4)
	dir := newDir(t, disk)
	check(t, recrypt.Encrypt(t.Context(), dir, plainName, luksName, reference("1"), keys.get, nil))
	check(t, dir.Remove(plainName))
	return dir, disk
}

// TestDeepRekeyGoesOn: a deep rekey that was stopped keeps everything else away
// from the disk, and goes on under whatever KEK the next call names.
func TestDeepRekeyGoesOn(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1", "2", "3")
	dir, want := rekeyDir(t, keys)
	reason := errors.New("the operator has changed his mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := recrypt.DeepRekey(ctx, dir, luksName, reference("2"), keys.get, nil, func(int64, int64) { cancel(reason) })
	if !errors.Is(err, reason) {
		t.Errorf("error %v", err)
	}
	info, safes, err := recrypt.Inspect(dir, luksName)
	check(t, err)
	if info.Rekey == nil || info.Rekey.Done != 4<<20 || safes.Current.KEK != reference("1") || safes.Next == nil || safes.Next.KEK != reference("2") {
		t.Errorf("rekey %+v, safes %+v", info.Rekey, safes)
	}
	vol, _, err := recrypt.OpenRekeying(t.Context(), dir, luksName, keys.get)
	check(t, err)
	got := make([]byte, len(want))
	_, err = vol.ReadAt(got, 0)
	check(t, errors.Join(err, vol.Close()))
	if !bytes.Equal(got, want) {
		t.Error("contents differ in the middle of a rekey")
	}
	before := readFile(t, dir, luksName)
	for what, err := range map[string]error{
		"decrypt":       recrypt.Decrypt(t.Context(), dir, luksName, plainName, keys.get, nil),
		"shallow rekey": recrypt.ShallowRekey(t.Context(), dir, luksName, reference("3"), keys.get),
	} {
		if !errors.Is(err, volume.ErrRekeying) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, missing := range []string{"1", "2"} { // it needs both KEKs
		only := keyring{"1": keys["1"], "2": keys["2"], "3": keys["3"]}
		delete(only, missing)
		if err := recrypt.DeepRekey(t.Context(), dir, luksName, reference("3"), only.get, nil, nil); !errors.Is(err, errNoKEK) {
			t.Errorf("without KEK %s: %v", missing, err)
		}
	}
	if !bytes.Equal(readFile(t, dir, luksName), before) {
		t.Error("the disk was changed")
	}
	check(t, recrypt.DeepRekey(t.Context(), dir, luksName, reference("3"), keys.get, nil, nil))
	check(t, recrypt.Decrypt(t.Context(), dir, luksName, plainName, keyring{"3": keys["3"]}.get, nil))
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("contents differ")
	}
}

// TestDeepRekeyUndone: a deep rekey that is stopped before it has moved anything
// leaves the disk to others.
func TestDeepRekeyUndone(t *testing.T) {
	t.Parallel()
	keys := newKeyring(t, "1", "2", "3")
	dir, want := rekeyDir(t, keys)
	reason := errors.New("the operator has changed his mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := recrypt.DeepRekey(ctx, dir, luksName, reference("2"), func(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
		if ref == reference("2") {
			cancel(reason) // the last moment before the header tells of the rekey
		}
		return keys.get(context.WithoutCancel(ctx), ref)
	}, nil, nil)
	if !errors.Is(err, reason) {
		t.Errorf("error %v", err)
	}
	info, safes, err := recrypt.Inspect(dir, luksName)
	check(t, err)
	if info.Rekey != nil || safes.Current.KEK != reference("1") || safes.Next != nil {
		t.Errorf("rekey %+v, safes %+v", info.Rekey, safes)
	}
	check(t, recrypt.ShallowRekey(t.Context(), dir, luksName, reference("3"), keys.get))
	check(t, recrypt.Decrypt(t.Context(), dir, luksName, plainName, keys.get, nil))
	if !bytes.Equal(readFile(t, dir, plainName), want) {
		t.Error("contents differ")
	}
}
