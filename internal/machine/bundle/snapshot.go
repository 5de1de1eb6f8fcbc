package bundle

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"strongroom/internal/errs"
)

// Limits of docs/spec/vm-folder.md.
const (
	SnapshotsMax   = 32
	DescriptionMax = 1024 // bytes
)

// Snapshot is a VM's disks and settings as they were at a time.
type Snapshot struct {
	ID          string    `json:"id"`   // UUID
	Name        string    `json:"name"` // unique in its VM
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	// Parent is the id of the snapshot that the disks then came from; empty if of
	// none.
	Parent   string   `json:"parent,omitempty"`
	Settings Settings `json:"settings"`
	Disks    []Disk   `json:"disks"` // their files are the snapshot's
}

// SnapshotFile returns the name of the file of a disk in the snapshot with an id.
func SnapshotFile(id, disk, format string) string {
	return "snapshot-" + id + "." + disk + "." + format
}

// RevertedFile returns the name of a disk's file after the revert with an id.
func RevertedFile(id, disk, format string) string { return disk + "." + id + "." + format }

const uuidPattern = `[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`

// madePattern is that of [SnapshotFile] and [RevertedFile].
var madePattern = regexp.MustCompile(`^(snapshot-` + uuidPattern + `\.[a-z0-9][a-z0-9._-]*|[a-z0-9][a-z0-9._-]*\.` + uuidPattern + `)\.(` + FormatRaw + `|` + FormatLUKS + `)$`)

// FindSnapshot returns the snapshot with that id, or nil. It is vm's.
func (vm *VM) FindSnapshot(id string) *Snapshot {
	i := slices.IndexFunc(vm.Snapshots, func(s Snapshot) bool { return s.ID == id })
	if i < 0 {
		return nil
	}
	return &vm.Snapshots[i]
}

// DropSnapshot takes the snapshot with that id out of vm and retires its files.
// Its parent becomes that of its children, and the current one in its place.
func (vm *VM) DropSnapshot(id string) {
	i := slices.IndexFunc(vm.Snapshots, func(s Snapshot) bool { return s.ID == id })
	if i < 0 {
		return
	}
	gone := vm.Snapshots[i]
	vm.Snapshots = slices.Delete(vm.Snapshots, i, i+1)
	for j := range vm.Snapshots {
		if vm.Snapshots[j].Parent == id {
			vm.Snapshots[j].Parent = gone.Parent
		}
	}
	if vm.Snapshot == id {
		vm.Snapshot = gone.Parent
	}
	for _, d := range gone.Disks {
		vm.Retired = append(vm.Retired, d.File)
	}
}

// OfSnapshot reports whether a file has the name of one of the snapshot with an
// id.
func OfSnapshot(file, id string) bool {
	return madePattern.MatchString(file) && strings.HasPrefix(file, "snapshot-"+id+".")
}

// Names reports whether vm names a file: as that of a disk, of a snapshot's, or
// as retired.
func (vm *VM) Names(file string) bool { return slices.Contains(vm.files(), file) }

// files returns the names of all files that vm names.
func (vm *VM) files() []string {
	var names []string
	for _, d := range vm.Disks {
		names = append(names, d.File)
		if d.Encrypting != "" {
			names = append(names, d.Encrypting)
		}
	}
	for _, s := range vm.Snapshots {
		for _, d := range s.Disks {
			names = append(names, d.File)
		}
	}
	return append(names, vm.Retired...)
}

// Strays returns the names of files in the folder at dir that a snapshot or a
// revert makes and vm does not name.
func Strays(dir string, vm *VM) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, errs.Wrap(err, "cannot list VM folder")
	}
	named := vm.files()
	var names []string
	for _, e := range entries {
		if madePattern.MatchString(e.Name()) && e.Type().IsRegular() && !slices.Contains(named, e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// validateSnapshots is the part of [VM.Validate] that is about snapshots. files
// are the names that are taken.
func (vm *VM) validateSnapshots(files map[string]bool) error {
	invalid := func(format string, args ...any) error { return errs.New(errs.Invalid, format, args...) }
	if len(vm.Snapshots) > SnapshotsMax {
		return invalid("%d snapshots are more than %d", len(vm.Snapshots), SnapshotsMax)
	}
	ids, names := map[string]bool{"": true}, map[string]bool{}
	for _, s := range vm.Snapshots {
		switch {
		case !canonicalUUID(s.ID) || ids[s.ID]:
			return invalid("snapshot id %.64q is not a UUID, or there are two", s.ID)
		case !ValidName(s.Name) || names[s.Name]:
			return invalid("snapshot name %.64q is not 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, or there are two", s.Name)
		case !ids[s.Parent]:
			return invalid("snapshot %s has a parent %.64q that is not before it", s.Name, s.Parent)
		}
		if err := ValidDescription(s.Description); err != nil {
			return errs.Wrap(err, "snapshot %s", s.Name)
		}
		if err := s.Settings.validate(); err != nil {
			return errs.Wrap(err, "snapshot %s", s.Name)
		}
		if err := validateDisks(s.Disks, files); err != nil {
			return errs.Wrap(err, "snapshot %s", s.Name)
		}
		ids[s.ID], names[s.Name] = true, true
	}
	if !ids[vm.Snapshot] {
		return invalid("there is no snapshot %.64q that the disks could come from", vm.Snapshot)
	}
	return nil
}

// ValidDescription returns an error of kind [errs.Invalid] unless text can be the
// description of a snapshot.
func ValidDescription(text string) error {
	if len(text) > DescriptionMax {
		return errs.New(errs.Invalid, "a description of %d bytes is longer than %d", len(text), DescriptionMax)
	}
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return errs.New(errs.Invalid, "a description has only printable characters, and no %q", r)
		}
	}
	return nil
}
