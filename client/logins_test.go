package client_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pelletier/go-toml/v2"

	"strongroom/client"
	"strongroom/internal/errs"
)

func TestLoginsRoundTrip(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a", "b", "config.toml")
	none, err := client.ReadLogins(path)
	if err != nil || none.Find("") != nil {
		t.Fatalf("no file: %v, %v", none, err)
	}
	l := &client.Logins{}
	l.Set(client.Login{URL: "https://a:1", CA: "-----BEGIN\nX\n-----END\n", User: "admin", Token: "t", Expires: time.Unix(1e9, 0).UTC()})
	l.Set(client.Login{URL: "https://b:1", User: "bob"})
	l.Set(client.Login{URL: "https://a:1", CA: "pem", User: "alice", Token: "u"})
	if err := l.Write(path); err != nil {
		t.Fatal(err)
	}
	got, err := client.ReadLogins(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(l, got); diff != "" {
		t.Error(diff)
	}
	if got.Current != "https://a:1" || got.Find("").User != "alice" || got.Find("https://b:1").User != "bob" || got.Find("https://c:1") != nil {
		t.Errorf("found the wrong server in %+v", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestLoginsRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"not TOML":             "=",
		"unknown field":        "colour = 'red'",
		"twice":                "[[server]]\nurl = 'https://a:1'\n[[server]]\nurl = 'https://a:1'",
		"no URL":               "[[server]]\nuser = 'x'",
		"current server is no": "current = 'https://a:1'",
		"long":                 "# " + strings.Repeat("x", 1<<20),
	} {
		if l, err := client.ParseLogins([]byte(text)); errs.KindOf(err) != errs.Invalid || l != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(t.TempDir(), "open.toml")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := client.ReadLogins(path); errs.KindOf(err) != errs.Denied || !strings.HasPrefix(errs.HintOf(err), "chmod 600 ") {
		t.Errorf("a file that others may read: %v", err)
	}
}

func TestLoginsPath(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{"STRONGROOM_CONFIG": "/x/y", "HOME": "/h"}, "/x/y"},
		{map[string]string{"XDG_CONFIG_HOME": "/c", "HOME": "/h"}, "/c/strongroom/config.toml"},
		{map[string]string{"HOME": "/h"}, "/h/.config/strongroom/config.toml"},
		{nil, ""},
	} {
		got, err := client.LoginsPath(func(k string) string { return tt.env[k] })
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%v: %q, %v", tt.env, got, err)
		}
	}
}

func FuzzParseLogins(f *testing.F) {
	f.Add([]byte("current = 'https://a:1'\n[[server]]\nurl = 'https://a:1'\nca = '''\nPEM\n'''\nuser = 'admin'\ntoken = 't'\nexpires = 2026-11-23T00:00:00Z\n"))
	f.Add([]byte(""))
	f.Add([]byte("[[server]]\nurl = 'unix:/s'"))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := client.ParseLogins(text)
		if err != nil {
			if l != nil {
				t.Fatal("an error with a result")
			}
			return
		}
		again, err := toml.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		same, err := client.ParseLogins(again)
		if err != nil {
			t.Fatalf("what was read is not written so that it can be read: %v\n%s", err, again)
		}
		if diff := cmp.Diff(l, same, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) })); diff != "" {
			t.Fatal(diff)
		}
	})
}
