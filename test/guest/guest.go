// Package guest builds and runs small Linux guests for the end-to-end tests and
// the demonstration: a Debian kernel, and an initramfs with busybox, the
// program of [strongroom/test/guest/agent] as first process, and a list of
// steps. A guest boots in about 2.5 seconds without KVM, runs its steps one
// after the other, tells the results on its serial console, and powers off.
//
// The kernel is the one that scripts/setup.sh unpacked into the cache folder
// ([CacheDir]), or the newest Debian cloud kernel in /boot.
package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"strongroom/test/guest/plan"
)

// Step is one command of a guest, run by busybox's sh. Its name is one word. It
// gets SIGTERM when the power button is pressed; later steps still run. If it
// fails, no further step does.
//
// PATH has busybox's applets, [Options.Programs], and `agent`, which prints
// what it can do when it is called without arguments. /mnt is an empty tmpfs.
type Step = plan.Step

// DMCrypt returns the modules that dm-crypt and cryptsetup need for AES-XTS,
// for [Options.Modules].
func DMCrypt() []string {
	return []string{"dm-mod", "dm-crypt", "xts", "ecb", "aesni-intel", "algif_skcipher"}
}

// baseModules returns the modules for virtio disks and the ACPI power button.
func baseModules() []string {
	return []string{"virtio_pci", "virtio_blk", "button", "evdev"}
}

// Options says what a guest is.
type Options struct {
	Steps    []Step
	Programs []string // such as "mke2fs"; copied from this machine with their libraries
	Modules  []string // kernel modules beyond those for virtio disks and the power button
	CacheDir string   // where the initramfs is kept; empty: CacheDir()
}

// Image is what QEMU boots.
type Image struct {
	Kernel string // path
	Initrd string // path
	Append string // kernel command line
}

// appendLine makes the serial console the only one, keeps the kernel quiet, and
// ends QEMU (with -no-reboot) if the guest crashes.
const appendLine = "console=ttyS0 quiet loglevel=3 panic=-1 rdinit=/init"

// CacheDir is where kernel and initramfs are kept: $STRONGROOM_CACHE, or
// .cache in the root of the repository.
func CacheDir() (string, error) {
	if dir := os.Getenv("STRONGROOM_CACHE"); dir != "" {
		return dir, nil
	}
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("cannot find the repository: %w", err)
	}
	return filepath.Join(filepath.Dir(strings.TrimSpace(string(out))), ".cache"), nil
}

// Build makes a guest, or finds the same one in the cache. It may be called
// concurrently, also by several processes.
func Build(ctx context.Context, opts Options) (Image, error) {
	image, err := build(ctx, opts)
	if err != nil {
		return Image{}, fmt.Errorf("cannot build test guest: %w", err)
	}
	return image, nil
}

func build(ctx context.Context, opts Options) (Image, error) {
	if opts.CacheDir == "" {
		dir, err := CacheDir()
		if err != nil {
			return Image{}, err
		}
		opts.CacheDir = dir
	}
	if err := os.MkdirAll(opts.CacheDir, 0o755); err != nil {
		return Image{}, err
	}
	k, err := findKernel(opts.CacheDir)
	if err != nil {
		return Image{}, err
	}
	root := newTree()
	if err := root.addSystem(); err != nil {
		return Image{}, err
	}
	if err := root.addAgent(ctx, opts.CacheDir); err != nil {
		return Image{}, err
	}
	for _, name := range opts.Programs {
		if err := root.addProgram(ctx, name); err != nil {
			return Image{}, err
		}
	}
	p := plan.Plan{Steps: withPrograms(opts.Steps, opts.Programs)}
	files, err := k.resolve(append(baseModules(), opts.Modules...))
	if err != nil {
		return Image{}, err
	}
	for _, file := range files {
		name := path.Join("/modules", filepath.Base(file))
		if err := root.addFile(name, file, 0o644); err != nil {
			return Image{}, err
		}
		p.Modules = append(p.Modules, name)
	}
	text, err := json.Marshal(p)
	if err != nil {
		return Image{}, err
	}
	root.add(plan.Path, 0o644, text)

	initrd, err := store(opts.CacheDir, "initrd-", root.archive())
	if err != nil {
		return Image{}, err
	}
	if err := prune(opts.CacheDir, "initrd-"); err != nil {
		return Image{}, err
	}
	return Image{Kernel: k.image, Initrd: initrd, Append: appendLine}, nil
}

// withPrograms returns the steps with a shell function in front for every
// program: Debian's busybox prefers its own applets to what is in PATH.
func withPrograms(steps []Step, programs []string) []Step {
	var functions strings.Builder
	for _, name := range programs {
		if strings.ContainsAny(name, ".-") { // no name of a function, nor of an applet
			continue
		}
		fmt.Fprintf(&functions, "%[1]s() { /usr/sbin/%[1]s \"$@\"; }\n", filepath.Base(name))
	}
	result := make([]Step, len(steps))
	for i, step := range steps {
		result[i] = Step{Name: step.Name, Command: functions.String() + step.Command}
	}
	return result
}

// store puts data into dir under a name made of prefix and its hash.
func store(dir, prefix string, data []byte) (string, error) {
	sum := sha256.Sum256(data)
	name := filepath.Join(dir, prefix+hex.EncodeToString(sum[:8]))
	if info, err := os.Stat(name); err == nil && info.Size() == int64(len(data)) {
		now := time.Now()
		return name, os.Chtimes(name, now, now) // for prune
	}
	f, err := os.CreateTemp(dir, prefix+"new-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return name, nil
}

// prune removes what was not used for a day.
func prune(dir, prefix string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) { // another process was quicker
			continue
		}
		if err != nil {
			return err
		}
		if time.Since(info.ModTime()) > 24*time.Hour {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// addSystem puts busybox and what /init needs before it runs into the tree.
func (t *tree) addSystem() error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w (Debian package busybox-static; scripts/setup.sh installs it)", err)
	}
	if err := t.addFile("/bin/busybox", busybox, 0o755); err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("cannot list busybox's applets: %w", err)
	}
	for name := range strings.Lines(string(applets)) {
		if name = strings.TrimSpace(name); name != "busybox" {
			t.link("/bin/"+name, "busybox")
		}
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run", "/tmp", "/mnt"} {
		t.mkdir(dir)
	}
	t.device("/dev/console", 5, 1)
	return nil
}

// addAgent compiles the agent. The build cache of Go makes it quick.
func (t *tree) addAgent(ctx context.Context, cache string) error {
	dir, err := os.MkdirTemp(cache, "agent-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "agent")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false", "-o", out, "strongroom/test/guest/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot compile the agent: %w\n%s", err, text)
	}
	if err := t.addFile("/init", out, 0o755); err != nil {
		return err
	}
	t.link("/bin/agent", "/init")
	return nil
}

// addProgram copies a program of this machine and the libraries that ldd(1)
// tells of.
func (t *tree) addProgram(ctx context.Context, name string) error {
	file, err := lookProgram(name)
	if err != nil {
		return err
	}
	if err := t.addFile("/usr/sbin/"+filepath.Base(name), file, 0o755); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "ldd", file).CombinedOutput()
	if bytes.Contains(out, []byte("not a dynamic executable")) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot tell the libraries of %s: %w\n%s", file, err, out)
	}
	for line := range strings.Lines(string(out)) {
		// "libc.so.6 => /lib/libc.so.6 (0x...)", "/lib64/ld-linux.so.2 (0x...)"
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				if err := t.addFile(word, word, 0o755); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func lookProgram(name string) (string, error) {
	if file, err := exec.LookPath(name); err == nil {
		return file, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in everybody's PATH
		if file, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("program %s: %w (scripts/setup.sh installs what tests need)", name, fs.ErrNotExist)
}
