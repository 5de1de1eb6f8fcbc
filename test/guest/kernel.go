package guest

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// kernel is a kernel and its modules.
type kernel struct {
	image   string            // path of vmlinuz
	files   map[string]string // paths of modules by name, with underscores
	builtin map[string]bool   // names of modules that are part of the image
}

// findKernel looks in the cache and then in /boot.
func findKernel(cache string) (*kernel, error) {
	image, modules := filepath.Join(cache, "guest-kernel", "vmlinuz"), filepath.Join(cache, "guest-kernel", "modules")
	if _, err := os.Stat(image); errors.Is(err, fs.ErrNotExist) {
		const prefix, suffix = "/boot/vmlinuz-", "-cloud-amd64"
		found, err := filepath.Glob(prefix + "*" + suffix)
		if err != nil {
			return nil, err
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("there is no kernel in %s or /boot (scripts/setup.sh fetches one)", filepath.Dir(image))
		}
		sort.Slice(found, func(i, j int) bool { return newer(found[i], found[j]) })
		image = found[0]
		modules = "/lib/modules/" + strings.TrimPrefix(image, prefix)
	} else if err != nil {
		return nil, err
	}

	k := &kernel{image: image, files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(filepath.Join(modules, "kernel"), func(file string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(file, ".ko") {
			k.files[moduleName(file)] = file
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	list, err := os.ReadFile(filepath.Join(modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(list)) {
		k.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return k, nil
}

// newer compares the numbers in two paths: 6.1.0-56 is newer than 6.1.0-9.
func newer(a, b string) bool {
	numbers := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	}
	x, y := numbers(a), numbers(b)
	for i := range min(len(x), len(y)) {
		if len(x[i]) != len(y[i]) {
			return len(x[i]) > len(y[i])
		}
		if x[i] != y[i] {
			return x[i] > y[i]
		}
	}
	return len(x) > len(y)
}

func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

// resolve returns the files of modules and of what they depend on, in the
// order in which they must be loaded.
func (k *kernel) resolve(names []string) ([]string, error) {
	var files []string
	done := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		if done[name] || k.builtin[name] {
			return nil
		}
		done[name] = true
		file, ok := k.files[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", k.image, name)
		}
		needs, err := dependencies(file)
		if err != nil {
			return err
		}
		for _, need := range needs {
			if err := visit(need); err != nil {
				return err
			}
		}
		files = append(files, file)
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// dependencies reads what a module says about itself: modules.dep is only
// written when a kernel package is installed.
func dependencies(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read module %s: %w", file, err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s is not a kernel module", file)
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(field), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
