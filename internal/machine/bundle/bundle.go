// Package bundle reads and writes the VM folder: vm.json and the names of the
// files beside it. The format is docs/spec/vm-folder.md.
//
// A VM folder is portable: copied, replicated or restored elsewhere it can be
// registered there. vm.json is plain and holds no secret; the key safe of an
// encrypted disk is in the disk's own header.
//
// Invariants: vm.json is replaced as a whole and durably, so a reader sees the
// old state or the new one; a file that vm.json names is complete; names in it
// are file names of the folder, never paths.
//
// Functions are safe for concurrent use; who changes a folder holds its [Lock].
package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// Names and limits of docs/spec/vm-folder.md.
const (
	Version    = 1
	FileName   = "vm.json"
	LogName    = "vm.log" // the guest's serial console; plain
	SizeMax    = 1 << 20  // bytes of vm.json
	DisksMax   = 64
	CPUsMax    = 255
	MemoryMin  = 16      // MiB
	MemoryMax  = 4 << 20 // MiB
	AppendMax  = 4096    // bytes of a kernel command line
	PathMax    = 1024    // bytes of a path on the datastore
	DiskMax    = 1 << 50 // bytes of a disk
	SectorSize = 512     // bytes; a disk's size is a multiple of it
)

// Formats of a disk.
const (
	FormatRaw  = "raw"  // plain
	FormatLUKS = "luks" // encrypted, docs/spec/volume.md
)

// Ways of a guest to its disks.
const (
	InterfaceVhostUser = "vhost-user"
	InterfaceNBD       = "nbd"
)

// VM is the content of vm.json.
type VM struct {
	Version  int       `json:"version"`
	ID       string    `json:"id"` // UUID; a copy of the folder has the same
	Name     string    `json:"name"`
	Created  time.Time `json:"created"`
	Settings Settings  `json:"settings"`
	// Key is the KEK under which the VM's disks are encrypted next; nil for a VM
	// that has no encrypted disk. The KEK of each disk is in its header.
	Key   *Key   `json:"key,omitempty"`
	Disks []Disk `json:"disks"`
	// Retired names files that disks had before and that are still to be deleted.
	Retired []string `json:"retired,omitempty"`
	// Snapshots are in an order in which each comes after its parent.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// Snapshot is the id of the one that the disks come from; empty if of none.
	Snapshot string `json:"snapshot,omitempty"`
}

// Key is the address of a KEK.
type Key struct {
	Provider string `json:"provider"`
	KeyID    string `json:"key_id"`
}

// KeyOf returns the form of ref in vm.json.
func KeyOf(ref keysafe.Ref) *Key { return &Key{ref.Provider, ref.KeyID} }

// Ref is the reverse of [KeyOf].
func (k Key) Ref() keysafe.Ref { return keysafe.Ref{Provider: k.Provider, KeyID: k.KeyID} }

// Settings is the machine that QEMU makes.
type Settings struct {
	CPUs      int    `json:"cpus"`       // 1 to [CPUsMax]
	MemoryMiB int    `json:"memory_mib"` // [MemoryMin] to [MemoryMax]
	Machine   string `json:"machine"`    // "q35" or "pc"
	Network   string `json:"network"`    // "none" or "user"
	// DiskInterface is how the guest reaches its disks: [InterfaceVhostUser],
	// [InterfaceNBD], or empty for what works best on the host.
	DiskInterface string `json:"disk_interface,omitempty"`
	// Direct boot: paths on the datastore, relative to its root; may be empty.
	Kernel string `json:"kernel,omitempty"`
	Initrd string `json:"initrd,omitempty"`
	Append string `json:"append,omitempty"`
}

// Disk is one virtual disk, in the order in which the guest sees them.
type Disk struct {
	Name      string `json:"name"` // "disk-0", ...
	File      string `json:"file"`
	Format    string `json:"format"`     // [FormatRaw] or [FormatLUKS]
	SizeBytes int64  `json:"size_bytes"` // of the disk that the guest sees
	// Encrypting is set while an encryption in place is not finished: the file has
	// this name until it is, then File, and nothing else may be done to the disk.
	Encrypting string `json:"encrypting,omitempty"`
}

// Encrypted reports whether any disk is.
func (vm *VM) Encrypted() bool {
	return slices.ContainsFunc(vm.Disks, func(d Disk) bool { return d.Format == FormatLUKS })
}

// HasFile reports whether file is that of a disk.
func (vm *VM) HasFile(file string) bool {
	return slices.ContainsFunc(vm.Disks, func(d Disk) bool { return d.File == file || d.Encrypting == file })
}

// Clone returns a copy that shares nothing with vm.
func (vm *VM) Clone() *VM {
	c := *vm
	c.Disks, c.Retired, c.Snapshots = slices.Clone(vm.Disks), slices.Clone(vm.Retired), slices.Clone(vm.Snapshots)
	for i := range c.Snapshots {
		c.Snapshots[i].Disks = slices.Clone(c.Snapshots[i].Disks)
	}
	if vm.Key != nil {
		key := *vm.Key
		c.Key = &key
	}
	return &c
}

// DiskFile returns the name of a disk's file in a format.
func DiskFile(disk, format string) string { return disk + "." + format }

var (
	namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	filePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,127}$`)
)

// ValidName reports whether s can be a VM's, a folder's or a disk's name.
func ValidName(s string) bool { return namePattern.MatchString(s) }

// ValidID reports whether s can be a VM's id.
func ValidID(s string) bool { return canonicalUUID(s) }

// Validate returns an error of kind [errs.Invalid] unless vm keeps every rule
// of the format.
func (vm *VM) Validate() error {
	invalid := func(format string, args ...any) error { return errs.New(errs.Invalid, format, args...) }
	switch {
	case vm.Version != Version:
		return errs.New(errs.InvalidState, "unknown version %d of %s", vm.Version, FileName)
	case !ValidName(vm.Name):
		return invalid("VM name %.64q is not 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit", vm.Name)
	case !canonicalUUID(vm.ID):
		return invalid("VM id %.64q is not a UUID", vm.ID)
	}
	if err := vm.Settings.validate(); err != nil {
		return err
	}
	if vm.Key != nil {
		if err := vm.Key.Ref().Validate(); err != nil {
			return invalid("%w", err)
		}
	}
	files := map[string]bool{}
	if err := validateDisks(vm.Disks, files); err != nil {
		return err
	}
	if err := vm.validateSnapshots(files); err != nil {
		return err
	}
	if err := vm.validateEncrypting(files); err != nil {
		return err
	}
	if len(vm.Retired) > DisksMax {
		return invalid("%d retired files are more than %d", len(vm.Retired), DisksMax)
	}
	for _, file := range vm.Retired {
		if !filePattern.MatchString(file) || files[file] || reserved(file) {
			return invalid("name %.64q of a retired file is not valid, or a disk has it, or there are two", file)
		}
		files[file] = true
	}
	return nil
}

func (s Settings) validate() error {
	invalid := func(format string, args ...any) error { return errs.New(errs.Invalid, format, args...) }
	switch {
	case s.CPUs < 1 || s.CPUs > CPUsMax:
		return invalid("%d CPUs are not 1 to %d", s.CPUs, CPUsMax)
	case s.MemoryMiB < MemoryMin || s.MemoryMiB > MemoryMax:
		return invalid("%d MiB of memory are not %d to %d", s.MemoryMiB, MemoryMin, MemoryMax)
	case s.Machine != "q35" && s.Machine != "pc":
		return invalid(`machine %.64q is neither "q35" nor "pc"`, s.Machine)
	case s.Network != "none" && s.Network != "user":
		return invalid(`network %.64q is neither "none" nor "user"`, s.Network)
	case s.DiskInterface != "" && s.DiskInterface != InterfaceVhostUser && s.DiskInterface != InterfaceNBD:
		return invalid(`disk interface %.64q is neither "vhost-user" nor "nbd"`, s.DiskInterface)
	case len(s.Append) > AppendMax || s.Kernel == "" && (s.Initrd != "" || s.Append != ""):
		return invalid("initrd and append need a kernel, and append has at most %d bytes", AppendMax)
	}
	for _, p := range []string{s.Kernel, s.Initrd} {
		if p != "" && (!filepath.IsLocal(p) || len(p) > PathMax || filepath.Clean(p) != p) {
			return invalid("path %.128q is not one on the datastore, relative to its root", p)
		}
	}
	return nil
}

// validateDisks checks the disks of a VM or of a snapshot, and adds the names of
// their files to those that are taken.
func validateDisks(disks []Disk, files map[string]bool) error {
	invalid := func(format string, args ...any) error { return errs.New(errs.Invalid, format, args...) }
	if len(disks) > DisksMax {
		return invalid("%d disks are more than %d", len(disks), DisksMax)
	}
	names := map[string]bool{}
	for _, d := range disks {
		switch {
		case !ValidName(d.Name) || names[d.Name]:
			return invalid("disk name %.64q is not valid, or there are two", d.Name)
		case !filePattern.MatchString(d.File) || files[d.File] || reserved(d.File):
			return invalid("file name %.64q of %s is not valid, or there are two", d.File, d.Name)
		case d.Format != FormatRaw && d.Format != FormatLUKS:
			return invalid(`format %.64q of %s is neither "raw" nor "luks"`, d.Format, d.Name)
		case d.SizeBytes < SectorSize || d.SizeBytes > DiskMax || d.SizeBytes%SectorSize != 0:
			return invalid("size %d of %s is not a multiple of %d from %d to %d", d.SizeBytes, d.Name, SectorSize, SectorSize, int64(DiskMax))
		}
		names[d.Name], files[d.File] = true, true
	}
	return nil
}

// validateEncrypting is the part of [VM.Validate] that is about disks which are being
// encrypted in place. files are the names that are taken.
func (vm *VM) validateEncrypting(files map[string]bool) error {
	invalid := func(format string, args ...any) error { return errs.New(errs.Invalid, format, args...) }
	for _, s := range vm.Snapshots {
		if slices.ContainsFunc(slices.Concat(s.Disks, vm.Disks), func(d Disk) bool { return d.Encrypting != "" }) {
			return invalid("a disk is being encrypted in place, and there is snapshot %s", s.Name)
		}
	}
	for _, d := range vm.Disks {
		if d.Encrypting == "" {
			continue
		}
		if !filePattern.MatchString(d.Encrypting) || files[d.Encrypting] || reserved(d.Encrypting) {
			return invalid("name %.64q of the file of %s, which is being encrypted in place, is not valid, or there are two", d.Encrypting, d.Name)
		}
		if d.Format != FormatLUKS || vm.Key == nil {
			return invalid(`%s is being encrypted in place, and its format is not "luks" or the VM has no key`, d.Name)
		}
		files[d.Encrypting] = true
	}
	return nil
}

// reserved reports whether a name is that of a file with another meaning.
func reserved(file string) bool {
	return file == FileName || file == LogName || filepath.Ext(file) == unfinished
}

// unfinished is the suffix of a file that is being written.
const unfinished = ".new"

func canonicalUUID(s string) bool {
	id, err := uuid.Parse(s)
	return err == nil && id.String() == s
}

// Parse decodes and validates the text of vm.json. Unknown and repeated fields
// are refused: what this program does not understand it must not drop, and what
// another one may understand in another way it must not use.
func Parse(text []byte) (*VM, error) {
	if len(text) > SizeMax {
		return nil, errs.New(errs.Invalid, "%s has %d bytes, more than %d", FileName, len(text), SizeMax)
	}
	var vm VM
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&vm); err != nil {
		return nil, errs.New(errs.Invalid, "%s: %w", FileName, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errs.New(errs.Invalid, "%s: something follows its end", FileName)
	}
	if err := checkFields(json.NewDecoder(bytes.NewReader(text))); err != nil {
		return nil, errs.New(errs.Invalid, "%s: %w", FileName, err)
	}
	if err := vm.Validate(); err != nil {
		return nil, err
	}
	return &vm, nil
}

// fieldPattern is that of all names of fields; [json.Unmarshal] takes other letters
// for the same.
var fieldPattern = regexp.MustCompile(`^[a-z_]+$`)

// checkFields refuses names of fields that are spelled in another way or occur twice
// in an object. The value that dec reads has been decoded, so it is not deep.
func checkFields(dec *json.Decoder) error {
	token, err := dec.Token()
	delim, nested := token.(json.Delim)
	if err != nil || !nested {
		return err
	}
	seen := map[string]bool{}
	for dec.More() {
		if delim == '{' {
			token, err := dec.Token()
			if err != nil {
				return err
			}
			name, _ := token.(string)
			if !fieldPattern.MatchString(name) || seen[name] {
				return fmt.Errorf("field %.64q is unknown or occurs twice", name)
			}
			seen[name] = true
		}
		if err := checkFields(dec); err != nil {
			return err
		}
	}
	_, err = dec.Token() // the closing delimiter
	return err
}

// Encode returns the text of vm.json.
func (vm *VM) Encode() ([]byte, error) {
	if err := vm.Validate(); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(vm, "", "  ")
	if err != nil {
		return nil, err
	}
	if text = append(text, '\n'); len(text) > SizeMax {
		return nil, errs.New(errs.Invalid, "%s would have %d bytes, more than %d", FileName, len(text), SizeMax)
	}
	return text, nil
}

// Read returns the VM in the folder at dir. It returns an error of kind
// [errs.NotFound] if there is none.
func Read(dir string) (*VM, error) {
	vm, err := read(filepath.Join(dir, FileName))
	return vm, errs.Wrap(err, "cannot read VM folder %s", dir)
}

func read(path string) (*VM, error) {
	// A link in a folder from elsewhere could point anywhere, and a FIFO would
	// keep us waiting.
	f, err := os.OpenFile(path, os.O_RDONLY|noFollow|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "it has no %s", FileName)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errs.New(errs.Invalid, "its %s is not a regular file", FileName)
	}
	text, err := io.ReadAll(io.LimitReader(f, SizeMax+1))
	if err != nil {
		return nil, err
	}
	return Parse(text)
}

// Write makes vm the VM in the folder at dir, durably. On an error vm.json is
// whole, and the old one or the new one.
func Write(dir string, vm *VM) error {
	if err := write(dir, vm); err != nil {
		return errs.Wrap(err, "cannot write VM folder %s", dir)
	}
	return nil
}

func write(dir string, vm *VM) error {
	text, err := vm.Encode()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, FileName+unfinished), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|noFollow, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, FileName)); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

// Unfinished returns the names of files in the folder that an interrupted
// operation left. They may be deleted by whoever holds the folder's [Lock].
func Unfinished(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot list VM folder: %w", err)
	}
	var names []string
	for _, e := range entries {
		if filepath.Ext(e.Name()) == unfinished && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Remove deletes the folder at dir with the files that vm.json names and those
// that a VM folder has by itself; vm.json goes first, so that what an
// interrupted call leaves is no VM any more. Other files are somebody's: then
// the folder stays, with them, and an error says so.
func Remove(dir string, vm *VM) error {
	names := append([]string{FileName}, vm.files()...)
	strays, err := Strays(dir, vm)
	if err != nil {
		return err
	}
	names = append(names, strays...)
	left, err := Unfinished(dir)
	if err != nil {
		return err
	}
	names = append(append(names, left...), LogName, lockName)
	for i, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot delete VM folder: %w", err)
		}
		if i == 0 {
			if err := durable.SyncDir(dir); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil {
		return errs.New(errs.InvalidState, "cannot delete VM folder: %w", err).
			WithHint("look at what is left in %s", dir)
	}
	return durable.SyncDir(filepath.Dir(dir))
}
