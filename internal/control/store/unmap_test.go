package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnmap drops the pages of an open database, whose records can be read all the
// same.
func TestUnmap(t *testing.T) {
	t.Parallel()
	db, err := Open(t.Context(), Config{Dir: filepath.Join(t.TempDir(), "a folder")})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	table := NewTable[string](db, "text", 1)
	for i := range 10 {
		if err := table.Put(t.Context(), fmt.Sprint(i), strings.Repeat("x", 10000)); err != nil {
			t.Fatal(err)
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(maps)) {
		if _, _, ok := mapping(line, db.file); ok {
			found++
		}
	}
	if found == 0 {
		t.Fatalf("%s is not among\n%s", db.file, maps)
	}
	unmap(db.file)
	if list, err := table.List(t.Context()); err != nil || len(list) != 10 {
		t.Errorf("%d records, %v", len(list), err)
	}
	unmap(filepath.Join(t.TempDir(), "none"))
}

func TestMapping(t *testing.T) {
	t.Parallel()
	const file = "/var/lib/a b/db"
	begin, end, ok := mapping("7f00-8f00 r--s 00000000 fe:00 123    "+file+"\n", file)
	if !ok || begin != 0x7f00 || end != 0x8f00 {
		t.Errorf("%x, %x, %v", begin, end, ok)
	}
	for _, line := range []string{
		"", "\n", "7f00-8f00 r--s 0 fe:00 123 /var/lib/a b/db2\n", "7f00-8f00 rw-p 0 fe:00 123 " + file + "\n", "7f00-8f00 r--s 0 00:00 0 \n",
		"7f00 r--s 0 fe:00 123 " + file + "\n", "8f00-7f00 r--s 0 fe:00 123 " + file + "\n", "x-y r--s 0 fe:00 123 " + file + "\n", "/",
	} {
		if _, _, ok := mapping(line, file); ok {
			t.Errorf("%q", line)
		}
	}
}
