package controller

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// export returns a provider's backup.
func (s *site) export(name, password string) *strongroomv1.ExportProviderResponse {
	s.t.Helper()
	return must[strongroomv1.ExportProviderResponse](s.t)(client.Call(s.t.Context(), s.admin.Provider().ExportProvider,
		&strongroomv1.ExportProviderRequest{Name: name, Password: []byte(password)}))
}

func (s *site) createProvider(name string, tpmRequired bool) (*strongroomv1.Provider, error) {
	return client.Call(s.t.Context(), s.admin.Provider().CreateNativeProvider, &strongroomv1.CreateNativeProviderRequest{Name: name, TpmRequired: tpmRequired})
}

func (s *site) confirm(name, exportID string, p12 []byte) (*strongroomv1.Provider, error) {
	sum := sha256.Sum256(p12)
	return client.Call(s.t.Context(), s.admin.Provider().ConfirmProviderBackup,
		&strongroomv1.ConfirmProviderBackupRequest{Name: name, ExportId: exportID, Sha256: sum[:]})
}

func (s *site) importProvider(p12 []byte, password string, dryRun bool) (*strongroomv1.ImportProviderResponse, error) {
	return client.Call(s.t.Context(), s.admin.Provider().ImportProvider,
		&strongroomv1.ImportProviderRequest{P12: slices.Clone(p12), Password: []byte(password), DryRun: dryRun})
}

func (s *site) deleteProvider(name string, force bool) error {
	_, err := client.Call(s.t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: name, Force: force})
	return err
}

func (s *site) getProvider(name string) *strongroomv1.Provider {
	s.t.Helper()
	return must[strongroomv1.Provider](s.t)(client.Call(s.t.Context(), s.admin.Provider().GetProvider, &strongroomv1.GetProviderRequest{Name: name}))
}

// provider makes a provider, backs it up and returns the backup.
func (s *site) provider(name string) []byte {
	s.t.Helper()
	must[strongroomv1.Provider](s.t)(s.createProvider(name, false))
	backup := s.export(name, "")
	must[strongroomv1.Provider](s.t)(s.confirm(name, backup.GetExportId(), backup.GetP12()))
	return backup.GetP12()
}

func TestProviderLife(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster("lab")
	must[strongroomv1.Provider](t)(s.createProvider("kp-1", false))
	_, err := s.createProvider("kp-1", false)
	wantKind(t, err, errs.Exists)
	_, err = s.createProvider("no/name", false)
	wantKind(t, err, errs.Invalid)
	h := s.host("lab", "host-1")

	// Not backed up: it cannot be used.
	if got := s.getProvider("kp-1").GetState(); got != "Not backed up" {
		t.Errorf("state %q", got)
	}
	_, err = client.Call(t.Context(), s.admin.VM().CreateVM, &strongroomv1.CreateVMRequest{Name: "web-1", Datastore: "lab", Encrypt: true, Provider: "kp-1"})
	if errs.ReasonOf(err) != "NotBackedUp" || !strings.Contains(errs.HintOf(err), "provider backup kp-1") {
		t.Errorf("create with a provider without backup: %v, hint %q", err, errs.HintOf(err))
	}

	// What is confirmed must be what was exported last.
	first := s.export("kp-1", "")
	backup := s.export("kp-1", testPassword)
	_, err = s.confirm("kp-1", first.GetExportId(), first.GetP12())
	wantKind(t, err, errs.InvalidState)
	_, err = s.confirm("kp-1", backup.GetExportId(), first.GetP12())
	wantKind(t, err, errs.Corrupt)
	if got := s.getProvider("kp-1").GetState(); got != "Not backed up" {
		t.Errorf("state after false confirmations %q", got)
	}
	p := must[strongroomv1.Provider](t)(s.confirm("kp-1", backup.GetExportId(), backup.GetP12()))
	if p.GetState() != "Active" {
		t.Errorf("state %q: %q", p.GetState(), p.GetDetails())
	}
	_, err = s.confirm("kp-1", backup.GetExportId(), backup.GetP12())
	wantKind(t, err, errs.InvalidState)

	// A host that cannot be reached has not got the key.
	second := s.host("lab", "host-2")
	second.failing("SyncHost", 1000, fault{vanish: true})
	if _, err := s.createProvider("kp-2", false); err != nil {
		t.Fatal(err)
	}
	backup2 := s.export("kp-2", "")
	p = must[strongroomv1.Provider](t)(s.confirm("kp-2", backup2.GetExportId(), backup2.GetP12()))
	if p.GetState() != "Warning" || !strings.Contains(strings.Join(p.GetDetails(), " "), "host-2") {
		t.Errorf("state %q: %q", p.GetState(), p.GetDetails())
	}
	second.failing("SyncHost", 0, fault{})
	s.c.poke()
	eventually(t, "kp-2 is on all hosts", func() bool { return s.getProvider("kp-2").GetState() == "Active" })

	// A key travels only to a host that does not have it.
	must[strongroomv1.SetDefaultProviderResponse](t)(client.Call(t.Context(), s.admin.Provider().SetDefaultProvider, &strongroomv1.SetDefaultProviderRequest{Name: "kp-2"}))
	if err := s.c.remediateOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	parcels := map[string]int{}
	for _, sync := range h.allSyncs() {
		for _, p := range sync.GetProviders() {
			if len(p.GetParcel()) > 0 {
				parcels[p.GetName()]++
			}
		}
	}
	if parcels["kp-1"] != 1 || parcels["kp-2"] != 1 {
		t.Errorf("parcels to host-1: %v, want one of each", parcels)
	}

	// A host that lost its keys gets them again.
	h.change(func() { clear(h.held) })
	h.beat()
	eventually(t, "host-1 has its keys again", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.held) == 2
	})

	// A removed host is told to forget, and is nobody.
	must[strongroomv1.RemoveHostResponse](t)(client.Call(t.Context(), s.admin.Host().RemoveHost, &strongroomv1.RemoveHostRequest{Name: "host-2"}))
	second.change(func() {
		if len(second.held) != 0 {
			t.Errorf("the removed host still holds %v", second.held)
		}
	})
	n := second.count("SyncHost")
	if err := s.c.remediateOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if second.count("SyncHost") != n {
		t.Error("the removed host still gets keys")
	}

	// A restarted controller has all keys.
	s.restart()
	for _, name := range []string{"kp-1", "kp-2"} {
		if _, err := s.c.keys.native(name); err != nil {
			t.Error(err)
		}
	}
	if got := s.getProvider("kp-2"); !got.GetIsDefault() {
		t.Error("kp-2 is not the default any more")
	}
}

func TestTPMRequired(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster("lab")
	h := s.host("lab", "host-1")
	must[strongroomv1.Provider](t)(s.createProvider("kp-tpm", true))
	backup := s.export("kp-tpm", "")
	p := must[strongroomv1.Provider](t)(s.confirm("kp-tpm", backup.GetExportId(), backup.GetP12()))
	if p.GetState() != "Warning" || !strings.Contains(strings.Join(p.GetDetails(), " "), "no TPM") {
		t.Errorf("state %q: %q", p.GetState(), p.GetDetails())
	}
	for _, sync := range h.allSyncs() {
		for _, p := range sync.GetProviders() {
			t.Errorf("a host without TPM got %s", p.GetName())
		}
	}
	_, err := client.Call(t.Context(), s.admin.VM().CreateVM, &strongroomv1.CreateVMRequest{Name: "web-1", Datastore: "lab", Encrypt: true, Provider: "kp-tpm"})
	wantKind(t, err, errs.InvalidState)
	if !strings.Contains(errs.HintOf(err), "TPM") {
		t.Errorf("hint %q", errs.HintOf(err))
	}
	h.change(func() { h.tpm = true })
	h.beat()
	eventually(t, "a host with TPM has the key", func() bool { return s.getProvider("kp-tpm").GetState() == "Active" })
}

func TestImport(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	plain, protected := s.export("kp-1", "").GetP12(), s.export("kp-1", testPassword).GetP12()

	_, err := s.importProvider(protected, "", false)
	if errs.ReasonOf(err) != apierr.ReasonPasswordNeeded {
		t.Errorf("without password: %v", err)
	}
	_, err = s.importProvider(protected, "a wrong password", false)
	wantKind(t, err, errs.Denied)
	damaged := slices.Clone(plain)
	damaged[len(damaged)/2] ^= 1
	_, err = s.importProvider(damaged, "", false)
	if err == nil {
		t.Error("a damaged backup was imported")
	}
	_, err = s.importProvider([]byte("no p12"), "", false)
	wantKind(t, err, errs.Corrupt)

	again := must[strongroomv1.ImportProviderResponse](t)(s.importProvider(plain, "", false))
	if again.GetImported() || again.GetProvider().GetName() != "kp-1" {
		t.Errorf("import of what is here: %v", again)
	}

	// In use: kept, unless it is forced.
	s.success(s.create("web-1", true))
	err = s.deleteProvider("kp-1", false)
	if errs.ReasonOf(err) != "ResourceInUse" || !strings.Contains(err.Error(), "web-1") {
		t.Errorf("delete of a provider in use: %v", err)
	}
	if err := s.deleteProvider("kp-1", true); err != nil {
		t.Fatal(err)
	}
	h.change(func() {
		if len(h.held) != 0 {
			t.Errorf("the host still holds %v", h.held)
		}
		for _, vm := range h.vms { // as a real host says then
			vm.CryptoState, vm.LockReason = "locked", "provider kp-1 is missing"
		}
	})
	h.beat()
	if got := s.alarms("provider/kp-1"); !slices.Equal(got, []string{"provider-missing"}) {
		t.Errorf("alarms: %q", got)
	}
	if _, _, err := s.c.inv.DefaultProvider(t.Context()); err != nil {
		t.Error(err)
	}
	if _, ok, _ := s.c.inv.DefaultProvider(t.Context()); ok {
		t.Error("there is a default provider after the default one was deleted")
	}
	_, err = s.createProvider("kp-1", false)
	if errs.ReasonOf(err) != "NameCollision" {
		t.Errorf("new key material under a used name: %v", err)
	}

	// Another installation's provider of that name has other keys.
	stranger, err := keyprovider.CreateNative("kp-1", false, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	foreign, err := stranger.Export(nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.importProvider(foreign, "", false)
	if errs.ReasonOf(err) != "NameCollision" {
		t.Errorf("import of other key material: %v", err)
	}

	dry := must[strongroomv1.ImportProviderResponse](t)(s.importProvider(protected, testPassword, true))
	if dry.GetImported() || dry.GetProvider().GetName() != "kp-1" || !dry.GetPasswordProtected() || dry.GetExported() == nil {
		t.Errorf("dry run: %v", dry)
	}
	if _, err := s.c.inv.Provider(t.Context(), "kp-1"); errs.KindOf(err) != errs.NotFound {
		t.Error("the dry run imported it")
	}

	// Back: the host gets it, and then says that the VM is unlocked.
	h.change(func() {
		for _, vm := range h.vms {
			vm.CryptoState, vm.LockReason = "unlocked", ""
		}
	})
	back := must[strongroomv1.ImportProviderResponse](t)(s.importProvider(protected, testPassword, false))
	if !back.GetImported() || !slices.Equal(back.GetUnlocked(), []string{"web-1"}) || back.GetProvider().GetState() != "Active" {
		t.Errorf("import: %v", back)
	}
	h.change(func() {
		if len(h.held) != 1 {
			t.Errorf("the host holds %v", h.held)
		}
	})
	if got := s.alarms("provider/kp-1"); len(got) != 0 {
		t.Errorf("alarms: %q", got)
	}
}

// TestProviderCutOff stops calls between their write to the key store and the
// one to the inventory, as a crash does, and repeats them.
func TestProviderCutOff(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	leave := func(name string, tpmRequired bool) *keyprovider.Native {
		t.Helper()
		native, err := keyprovider.CreateNative(name, tpmRequired, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.c.keys.add(native); err != nil {
			t.Fatal(err)
		}
		return native
	}
	consistent := func(name string) {
		t.Helper()
		s.restart()
		p := s.getProvider(name)
		native, err := s.c.keys.native(name)
		if err != nil {
			t.Fatal(err)
		}
		if info := native.Info(); info.KeyID.String() != p.GetKeyId() || info.TPMRequired != p.GetTpmRequired() {
			t.Errorf("the key store has %+v, the inventory %v", info, p)
		}
	}
	// A create that was cut off can be repeated, also with other wishes.
	leave("kp-1", false)
	must[strongroomv1.Provider](t)(s.createProvider("kp-1", true))
	consistent("kp-1")

	// What is left of one does not keep a backup of that name out.
	backup := s.provider("kp-2")
	if err := s.deleteProvider("kp-2", false); err != nil {
		t.Fatal(err)
	}
	leave("kp-2", false)
	must[strongroomv1.ImportProviderResponse](t)(s.importProvider(backup, "", false))
	consistent("kp-2")

	// A delete that was cut off can be repeated.
	if err := s.c.inv.DeleteProvider(t.Context(), "kp-2", false); err != nil {
		t.Fatal(err)
	}
	s.restart()
	if err := s.deleteProvider("kp-2", false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.c.keys.native("kp-2"); !errors.Is(err, keyprovider.ErrUnknownProvider) {
		t.Errorf("the deleted provider's key: %v", err)
	}
	wantKind(t, s.deleteProvider("kp-2", false), errs.NotFound)

	// Many at once, of one name: one is made, and the inventory has its key.
	var wg sync.WaitGroup
	results := make([]error, 8)
	for i := range results {
		wg.Go(func() { _, results[i] = s.createProvider("kp-3", i%2 == 0) })
	}
	wg.Wait()
	if made := len(slices.DeleteFunc(results, func(err error) bool { return err != nil })); made != 1 {
		t.Errorf("%d of 8 calls made the provider, want one", made)
	}
	consistent("kp-3")
}

// TestKeyStoreIsNeverReplaced damages what a controller needs to open its keys:
// it must not start, and must leave everything as it is.
func TestKeyStoreIsNeverReplaced(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.provider("kp-1")
	s.stop()
	vaultPath := filepath.Join(s.cfg.DataDir, vaultName)
	flip := func(t *testing.T, path string) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, spoil := range map[string]func(*testing.T){
		"wrong key file":   func(t *testing.T) { flip(t, s.cfg.KeyFile) },
		"no key file":      func(t *testing.T) { remove(t, s.cfg.KeyFile) },
		"damaged vault":    func(t *testing.T) { flip(t, vaultPath) },
		"no vault":         func(t *testing.T) { remove(t, vaultPath) },
		"neither":          func(t *testing.T) { remove(t, vaultPath); remove(t, s.cfg.KeyFile) },
		"key file is open": func(t *testing.T) { chmod(t, s.cfg.KeyFile, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			whole := read(t, s.cfg.KeyFile, vaultPath)
			defer restore(t, whole, s.cfg.KeyFile, vaultPath)
			spoil(t)
			before := read(t, s.cfg.KeyFile, vaultPath)
			c, err := open(t.Context(), s.cfg, testLog(), cheapHashing)
			if err == nil {
				c.close()
				t.Fatal("the controller starts")
			}
			if errs.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			if after := read(t, s.cfg.KeyFile, vaultPath); !slices.EqualFunc(before, after, bytes.Equal) {
				t.Error("something was written")
			}
		})
	}
	l, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	s.start(l)
	if got := s.getProvider("kp-1").GetState(); got != string(inventory.Warning) {
		t.Errorf("after all was put back: %q", got)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// read returns the contents of files, nil for one that is not there.
func read(t *testing.T, paths ...string) [][]byte {
	t.Helper()
	var all [][]byte
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func restore(t *testing.T, contents [][]byte, paths ...string) {
	t.Helper()
	for i, path := range paths {
		if err := os.WriteFile(path, contents[i], 0o600); err != nil {
			t.Fatal(err)
		}
		chmod(t, path, 0o600)
	}
}
