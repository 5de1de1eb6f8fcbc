package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
	"strongroom/test/guest"
	"strongroom/test/lab"
)

// patience bounds every wait, on a machine that is busy with other tests.
const patience = 2 * time.Minute

// await polls until check says true.
func await(t *testing.T, what string, check func() bool) {
	t.Helper()
	awaitEvery(t, 50*time.Millisecond, what, check)
}

func awaitEvery(t *testing.T, every time.Duration, what string, check func() bool) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for !check() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited more than %v for %s", patience, what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newLab returns a lab in a folder with a short path. When the test ends all of
// its processes are ended and the folder is removed; if it failed, the end of
// each role's log is shown.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sr")
	must(t, err)
	l := lab.New(dir, binary)
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, dir)
		}
		l.Close()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return l
}

func showLogs(t *testing.T, dir string) {
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	guests, _ := filepath.Glob(filepath.Join(dir, "*", "*", "vm.log"))
	volumes, _ := filepath.Glob(filepath.Join(dir, "*", "run", "*", "volumed.log"))
	for _, path := range slices.Concat(logs, guests, volumes) {
		text, _ := os.ReadFile(path)
		t.Logf("end of %s:\n%s", path, text[max(0, len(text)-6000):])
	}
}

// site is a controller with a cluster "lab", the host "host-1" and the datastore
// "ds".
type site struct {
	lab        *lab.Lab
	controller *lab.Controller
	host       *lab.Host
	store      string           // folder of the datastore
	keys       *keyprovider.Set // the providers that were backed up, from their backups
}

// newSite starts a site without providers. Its parts are called by name, so that
// there can be two in one lab.
func newSite(t *testing.T, l *lab.Lab, name string) *site {
	t.Helper()
	s := &site{lab: l, store: filepath.Join(l.Dir, name+"ds"), keys: keyprovider.NewSet()}
	t.Cleanup(func() { s.keys.Close() })
	var err error
	began := time.Now()
	s.controller, err = l.StartController(t.Context(), name+"controller")
	must(t, err)
	t.Logf("cold start: controller started and logged in to after %v", time.Since(began).Round(time.Millisecond))
	s.ok(t, "cluster", "create", "lab")
	began = time.Now()
	s.host, err = s.controller.StartHost(t.Context(), name+"host-1", "lab")
	must(t, err)
	t.Cleanup(func() { _ = s.host.Crash() }) // before the lab's end, which does not know its children
	t.Logf("cold start: host joined, started and connected after %v", time.Since(began).Round(time.Millisecond))
	must(t, os.MkdirAll(filepath.Join(s.store, "images"), 0o755))
	s.ok(t, "datastore", "create", "ds", "--cluster", "lab", "--path", s.store)
	return s
}

// newReadySite starts a site with the default provider kp-1.
func newReadySite(t *testing.T) *site {
	t.Helper()
	s := newSite(t, newLab(t), "")
	s.provider(t, "kp-1")
	s.ok(t, "provider", "default", "kp-1")
	return s
}

// ok runs a command as the administrator, which has to succeed.
func (s *site) ok(t *testing.T, args ...string) lab.Result {
	t.Helper()
	r, err := s.controller.Must(t.Context(), args...)
	must(t, err)
	return r
}

// refusal is how a command fails: with this exit code, saying these words, and
// giving this hint.
type refusal struct {
	code int
	says string
	hint string // part of the hint; empty: not looked at
}

// refused runs a command as the administrator, which has to fail that way.
func (s *site) refused(t *testing.T, want refusal, args ...string) lab.Result {
	t.Helper()
	r, err := s.controller.CLI(t.Context(), args...)
	must(t, err)
	want.check(t, r, args)
	return r
}

func (want refusal) check(t *testing.T, r lab.Result, args []string) {
	t.Helper()
	said, hint, _ := strings.Cut(r.Stderr, "\nhint: ")
	if r.Code != want.code || !strings.Contains(said, want.says) || !strings.Contains("\n"+said, "\nstrongroom: ") || !strings.Contains(hint, want.hint) {
		t.Errorf("strongroom %s: exit code %d, want %d with %q, hint %q:\n%s%s", strings.Join(args, " "), r.Code, want.code, want.says, want.hint, r.Stdout, r.Stderr)
	}
}

// begin starts a task and returns its id.
func (s *site) begin(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(s.ok(t, append(args, "--no-wait")...).Stdout)
}

type taskState struct {
	ID, Kind, Target, State, Error string
	ErrorDetail                    struct{ Kind, Hint string }
}

func (s *site) task(t *testing.T, id string) taskState {
	t.Helper()
	var state taskState
	must(t, s.ok(t, "task", "show", id, "-o", "json").JSON(&state))
	return state
}

type diskState struct {
	Name, File, UUID, Interface, SizeBytes string
	Encrypted                              bool
	Key                                    struct{ Provider, KeyID string }
	Rekey                                  *struct {
		Key                   struct{ Provider, KeyID string }
		DoneBytes, TotalBytes string
	}
	Encryption *struct{ DoneBytes, TotalBytes string }
}

type vmState struct {
	ID, PowerState, CryptoState, LockReason string
	Encrypted                               bool
	Key                                     struct{ Provider, KeyID string }
	Disks                                   []diskState
}

func (s *site) show(t *testing.T, name string) vmState {
	t.Helper()
	var v vmState
	must(t, s.ok(t, "vm", "show", name, "-o", "json").JSON(&v))
	return v
}

type providerState struct {
	Name, State, KeyID string
	IsDefault, InUse   bool
	Details            []string
}

func (s *site) showProvider(t *testing.T, name string) providerState {
	t.Helper()
	var p providerState
	must(t, s.ok(t, "provider", "show", name, "-o", "json").JSON(&p))
	return p
}

// alarms returns the active alarms, "name target".
func (s *site) alarms(t *testing.T) []string {
	t.Helper()
	var list struct {
		Alarms []struct{ Name, Target, Message string }
	}
	must(t, s.ok(t, "alarm", "ls", "-o", "json").JSON(&list))
	var names []string
	for _, a := range list.Alarms {
		names = append(names, strings.TrimSpace(a.Name+" "+a.Target))
	}
	return names
}

// password protects the backups.
const password = "pässword of backups, 24 characters"

// writeFile makes a file in the lab and returns its path.
func (s *site) writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(s.lab.Dir, name)
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (s *site) passwordFile(t *testing.T) string { return s.writeFile(t, "backups/password", password) }

// backupOf is where the backup of a provider is.
func (s *site) backupOf(name string) string {
	return filepath.Join(s.lab.Dir, "backups", name+".p12")
}

// provider makes a native provider and backs it up.
func (s *site) provider(t *testing.T, name string) {
	t.Helper()
	s.ok(t, "provider", "create-native", name)
	s.backUp(t, name)
}

func (s *site) backUp(t *testing.T, name string) {
	t.Helper()
	s.ok(t, "provider", "backup", name, "--out", s.backupOf(name), "--password-file", s.passwordFile(t))
	must(t, s.keys.Add(openBackup(t, s.backupOf(name))))
}

// image makes a raw image of random bytes on the datastore, with a hole in its
// middle, and returns the SHA-256 of its content.
func (s *site) image(t *testing.T, name string, mib int) (sum string) {
	t.Helper()
	f, err := os.Create(filepath.Join(s.store, "images", name))
	must(t, err)
	defer f.Close()
	h := sha256.New()
	random := rand.NewChaCha8([32]byte{byte(mib)})
	part := make([]byte, 1<<20)
	for i := range mib {
		if i == mib/2 {
			clear(part)
		} else {
			random.Read(part)
			_, err := f.WriteAt(part, int64(i)<<20)
			must(t, err)
		}
		h.Write(part)
	}
	must(t, f.Truncate(int64(mib)<<20))
	return hex.EncodeToString(h.Sum(nil))
}

// folder is a VM's folder.
func (s *site) folder(vm string) string { return filepath.Join(s.store, vm) }

// content returns the SHA-256 of what a guest would read from a disk.
func (s *site) content(t *testing.T, vm, disk string) string {
	t.Helper()
	dev := s.openDisk(t, vm, disk)
	defer dev.Close()
	h := sha256.New()
	_, err := io.Copy(h, io.NewSectionReader(dev, 0, dev.Size()))
	must(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// openDisk opens a disk of a VM that is powered off, as a guest sees it, by the
// keys in the backups.
func (s *site) openDisk(t *testing.T, vm, disk string) blockdev.Device {
	t.Helper()
	dir := recrypt.Dir{Path: s.folder(vm)}
	v, err := bundle.Read(dir.Path)
	must(t, err)
	i := slices.IndexFunc(v.Disks, func(d bundle.Disk) bool { return d.Name == disk })
	if i < 0 {
		t.Fatalf("VM %s has no disk %s", vm, disk)
	}
	if d := v.Disks[i]; d.Format == bundle.FormatRaw {
		dev, err := dir.Open(d.File)
		must(t, err)
		return dev
	}
	vol, _, err := recrypt.OpenRekeying(t.Context(), dir, v.Disks[i].File, s.keys.KEK)
	must(t, err)
	return vol
}

// allocated returns how many bytes a file has on disk, 0 if there is none.
func allocated(path string) int64 {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// leftovers returns what an unfinished operation left on the datastore.
func (s *site) leftovers(t *testing.T) []string {
	t.Helper()
	var found []string
	must(t, filepath.WalkDir(s.store, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if strings.HasSuffix(path, ".new") || strings.Contains(path, ".creating-") || strings.Contains(path, ".cloning-") {
			found = append(found, path)
		}
		return err
	}))
	return found
}

// bootFiles puts a guest on the datastore and returns the arguments of `vm
// create` that boot it.
func (s *site) bootFiles(t *testing.T, name string, opts guest.Options) []string {
	t.Helper()
	image, err := guest.Build(t.Context(), opts)
	must(t, err)
	boot := filepath.Join(s.store, "boot")
	must(t, os.MkdirAll(boot, 0o755))
	copyFile(t, filepath.Join(boot, "vmlinuz"), image.Kernel)
	copyFile(t, filepath.Join(boot, name), image.Initrd)
	// With loglevel 4 the kernel tells of I/O errors.
	line := strings.ReplaceAll(image.Append, "loglevel=3", "loglevel=4")
	return []string{"--memory", "192M", "--kernel", "boot/vmlinuz", "--initrd", "boot/" + name, "--append", line}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o644))
}

// console follows what a VM's guests print, over all its boots.
type console struct {
	path string
	seen int // events passed on
}

func (s *site) console(vm string) *console {
	return &console{path: filepath.Join(s.folder(vm), "vm.log")}
}

// await returns the first event not passed on yet that fits. It fails the test
// when the guest says that a step failed.
func (c *console) await(t *testing.T, kind guest.Kind, step, text string) guest.Event {
	t.Helper()
	var found guest.Event
	await(t, fmt.Sprintf("the guest to say %s %s %q", kind, step, text), func() bool {
		events := c.events(t)
		for c.seen < len(events) {
			e := events[c.seen]
			c.seen++
			if e.Kind == guest.Fail || e.Kind == guest.Failed {
				t.Fatalf("guest: step %s failed: %s\n%s", e.Step, e.Text, c.text(t))
			}
			if e.Kind == kind && (step == "" || e.Step == step) && strings.Contains(e.Text, text) {
				found = e
				return true
			}
		}
		return false
	})
	return found
}

func (c *console) text(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(c.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

func (c *console) events(t *testing.T) []guest.Event {
	t.Helper()
	var all []guest.Event
	for line := range strings.Lines(c.text(t)) {
		if !strings.HasSuffix(line, "\n") {
			break // not whole yet
		}
		if e, ok := guest.ParseEvent(line); ok {
			all = append(all, e)
		}
	}
	return all
}

// writes waits for two further reports of a guest that churns: it makes
// progress.
func (c *console) writes(t *testing.T) {
	t.Helper()
	c.seen = len(c.events(t))
	c.await(t, guest.Note, "churn", "churned")
	c.await(t, guest.Note, "churn", "churned")
}

// noIOErrors fails if the guest's kernel ever complained about its disks.
func (c *console) noIOErrors(t *testing.T) {
	t.Helper()
	for line := range strings.Lines(c.text(t)) {
		for _, bad := range []string{"I/O error", "EXT4-fs error", "Buffer I/O", "Aborting journal", "Remounting filesystem"} {
			if strings.Contains(line, bad) {
				t.Errorf("the guest noticed: %s", strings.TrimSpace(line))
			}
		}
	}
}

// powerOn powers a VM on and returns its console, from here on.
func (s *site) powerOn(t *testing.T, vm string) *console {
	t.Helper()
	c := s.console(vm)
	c.seen = len(c.events(t))
	s.ok(t, "vm", "power-on", vm)
	return c
}

// process is one of a host's children.
type process struct {
	pid  int
	args []string
}

// children returns the volume processes ("volumed") or QEMUs ("qemu") of the
// site's host.
func (s *site) children(t *testing.T, what string) []process {
	t.Helper()
	pids, err := s.host.Children()
	must(t, err)
	var found []process
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // ended meanwhile
		}
		args := strings.Split(string(bytes.TrimRight(text, "\x00")), "\x00")
		if slices.ContainsFunc(args[:min(2, len(args))], func(a string) bool { return strings.Contains(a, what) }) {
			found = append(found, process{pid, args})
		}
	}
	return found
}

// only returns the one of those processes.
func (s *site) only(t *testing.T, what string) process {
	t.Helper()
	found := s.children(t, what)
	if len(found) != 1 {
		t.Fatalf("there are %d processes %s, want 1: %v", len(found), what, found)
	}
	return found[0]
}
