package host

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/machine/recrypt"
)

// luksImage encrypts a raw image, whose data end 16 MiB before it does, with
// cryptsetup or QEMU, passphrase "secret", and returns its name on the
// datastore.
func (b *bench) luksImage(t *testing.T, kind string, raw []byte) string {
	t.Helper()
	name := kind + ".luks"
	path, pass := filepath.Join(b.root, name), filepath.Join(t.TempDir(), "pass")
	check(t, os.WriteFile(path, raw, 0o600))
	check(t, os.WriteFile(pass, []byte("secret"), 0o600))
	cmd := exec.Command("cryptsetup", "reencrypt", "--encrypt", "--type", "luks2", "--batch-mode", "--key-file", pass, "--pbkdf", "argon2id",
		"--pbkdf-memory", "1024", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4", "--reduce-device-size", "16M", "--force-offline-reencrypt", path)
	if kind == "luks1" {
		check(t, os.Rename(path, path+".raw"))
		cmd = exec.Command("qemu-img", "convert", "--object", "secret,id=s,file="+pass, "-f", "raw", "-O", "luks", "-o", "key-secret=s,hash-alg=sha512,iter-time=10", path+".raw", path)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	check(t, errOf(os.Stat(path)))
	os.Remove(path + ".raw")
	return name
}

func errOf[T any](_ T, err error) error { return err }

// seal makes the parcel with the passphrase of a disk.
func (b *bench) seal(t *testing.T, req *strongroomv1.AgentCreateVMRequest, disk int, passphrase string) {
	t.Helper()
	key, err := keymem.Take([]byte(passphrase))
	check(t, err)
	defer key.Close()
	sealed, err := parcel.Seal(b.secrets.parcel.PublicKey(), parcel.ImageContext{Recipient: b.secrets.identity.HostID, VM: req.GetId(), Disk: disk}.String(), key)
	check(t, err)
	if req.Passphrases == nil {
		req.Passphrases = map[uint32][]byte{}
	}
	req.Passphrases[uint32(disk)] = sealed
}

// TestCreateFromLUKS: disks that QEMU and cryptsetup encrypted are taken over
// with their DEK and without their passphrases, in one VM.
func TestCreateFromLUKS(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	want := make([]byte, 20<<20) // with a header of 16 MiB for cryptsetup
	rng := rand.NewChaCha8(sha256.Sum256([]byte{byte(blockdevtest.Seed(t))}))
	rng.Read(want[:3<<20])
	images := []string{b.luksImage(t, "luks1", want), b.luksImage(t, "luks2", want)}
	before := list(t, b.root)
	ref := b.newRef(t)

	create := func(passphrase string, change func(*strongroomv1.AgentCreateVMRequest)) (*strongroomv1.AgentCreateVMRequest, error) {
		req := request("web-1", ref)
		req.Disks = nil
		for i, name := range images {
			req.Disks = append(req.Disks, &strongroomv1.NewDisk{Image: name, ImageFormat: "luks"})
			b.seal(t, req, i, passphrase)
		}
		change(req)
		return req, b.createVM(t.Context(), req, quiet)
	}
	damaged := filepath.Join(b.root, "damaged.luks")
	text, err := os.ReadFile(filepath.Join(b.root, images[0]))
	check(t, err)
	check(t, os.WriteFile(damaged, append([]byte("no LUKS"), text...), 0o600))
	defer os.Remove(damaged)
	before = append(before, "damaged.luks")
	slices.Sort(before)
	for name, c := range map[string]struct {
		passphrase string
		change     func(*strongroomv1.AgentCreateVMRequest)
		kind       errs.Kind
		want       string
	}{
		"wrong passphrase":  {"Secret", func(*strongroomv1.AgentCreateVMRequest) {}, errs.Denied, "opens no keyslot of image luks1.luks"},
		"wrong for another": {"secret", func(r *strongroomv1.AgentCreateVMRequest) { b.seal(t, r, 1, "x") }, errs.Denied, "opens no keyslot of image luks2.luks"},
		"of another disk":   {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Passphrases[1] = r.Passphrases[0] }, errs.Denied, "another context"},
		"no passphrase":     {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Passphrases = nil }, errs.Other, "invalid key parcel"},
		"no LUKS":           {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].Image = "damaged.luks" }, errs.Invalid, "damaged.luks: "},
		"no image":          {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].Image = "none.luks" }, errs.NotFound, "none.luks"},
		"plain":             {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].Plain = true }, errs.Invalid, "becomes an encrypted disk"},
		"thin":              {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].Thin = true }, errs.Invalid, "becomes an encrypted disk"},
		"not encrypted":     {"secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Key = nil }, errs.Invalid, "becomes an encrypted disk"},
	} {
		_, err := create(c.passphrase, c.change)
		wantKind(t, name, err, c.kind)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
		if got := list(t, b.root); !slices.Equal(got, before) {
			t.Fatalf("%s left %v", name, got)
		}
	}

	req, err := create("secret", func(r *strongroomv1.AgentCreateVMRequest) { r.Disks[0].SizeBytes = 24 << 20 })
	check(t, err)
	for i, disk := range []string{"disk-0", "disk-1"} {
		n := len(want)
		if i == 1 {
			n = 4 << 20 // the rest was given up for the header
		}
		if got := b.content(t, req.GetId(), disk, n); !bytes.Equal(got, want[:n]) {
			t.Errorf("%s does not hold its image", disk)
		}
		secret, err := keymem.Take([]byte("secret"))
		check(t, err)
		defer secret.Close()
		image, err := os.Open(filepath.Join(b.root, images[i]))
		check(t, err)
		defer image.Close()
		stat, err := image.Stat()
		check(t, err)
		foreign, err := luks.ReadForeign(image, stat.Size())
		check(t, err)
		was, err := foreign.Unlock(t.Context(), image, secret)
		check(t, err)
		defer was.Close()

		file, err := recrypt.Dir{Path: filepath.Join(b.root, "web-1")}.Open(disk + ".luks")
		check(t, err)
		defer file.Close()
		is, next, safes, err := recrypt.UnwrapDEKs(t.Context(), file, b.kek)
		check(t, err)
		defer is.Close()
		if !is.Equal(was) || next != nil || safes.Current.KEK != ref {
			t.Errorf("%s has another DEK, or its key safe is %v", disk, safes.Current)
		}
		h, err := luks.Read(file, file.Size())
		check(t, err)
		if _, err := h.UnlockPassphrase(file, secret); err == nil || !strings.Contains(err.Error(), luks.ErrNoPassphrase.Error()) {
			t.Errorf("%s with the old passphrase: %v", disk, err)
		}
	}
}
