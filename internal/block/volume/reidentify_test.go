package volume_test

import (
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
)

// TestReidentify: a copy of a volume becomes one of its own, which the same DEK
// opens, and neither key safe is taken for the other's.
func TestReidentify(t *testing.T) {
	t.Parallel()
	const other = "0f5c2c2e-7a86-4f6a-9f0a-0d3f1b2c4d5e"
	dek := keymemtest.Random(t, keysafe.DEKSize)
	dev := blockdev.NewMemory(0, 512)
	format(t, dev, volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: newSafe(t, dek, "old", 3)})
	vol := openVolume(t, dev, dek)
	_, err := vol.WriteAt([]byte("data"), 0)
	check(t, err)

	safe := func(uuid string) *keysafe.Safe {
		s, err := keysafe.Wrap(keymemtest.Random(t, keysafe.KEKSize), dek, keysafe.Ref{Provider: "kp-1", KeyID: "new"}, volume.Owner(uuid), 1)
		check(t, err)
		return s
	}
	wantError(t, volume.Reidentify(dev, other, safe(testUUID)), volume.ErrWrongSafe)
	wantError(t, volume.Reidentify(dev, other, nil), volume.ErrWrongSafe)
	if err := volume.Reidentify(dev, "not a UUID", safe("not a UUID")); err == nil {
		t.Error("a UUID that is none was taken")
	}
	info, err := volume.Inspect(dev)
	check(t, err)
	if info.UUID != testUUID || info.Safes[0].KEK.KeyID != "old" {
		t.Fatalf("a refused call changed the header: %+v", info)
	}

	check(t, volume.Reidentify(dev, other, safe(other)))
	for _, copy := range []int64{0, 16 << 10} { // each header copy alone
		damaged := blockdev.NewMemory(dev.Size(), 512)
		all := make([]byte, dev.Size())
		_, err := dev.ReadAt(all, 0)
		check(t, err)
		clear(all[copy : copy+4096])
		_, err = damaged.WriteAt(all, 0)
		check(t, err)
		info, err := volume.Inspect(damaged)
		check(t, err)
		if info.UUID != other || len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != "new" || info.Safes[0].Owner != volume.Owner(other) {
			t.Errorf("without the copy at %d: %+v", copy, info)
		}
	}
	// The volume that is open is not this one any more.
	wantError(t, vol.ReplaceSafe(safe(testUUID)), volume.ErrChanged)
	got := make([]byte, 4)
	_, err = openVolume(t, dev, dek).ReadAt(got, 0)
	check(t, err)
	if string(got) != "data" {
		t.Errorf("the data are %q", got)
	}
}
