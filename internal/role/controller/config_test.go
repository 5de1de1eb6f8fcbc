package controller

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const minimal = "data_dir = \"/var/lib/strongroom\"\nlisten = \"192.0.2.1:7443\"\n"

func TestParseConfig(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		text string
		want string // part of the error; empty: it is right
	}{
		"minimal":            {minimal, ""},
		"all addresses":      {"data_dir = \"/d\"\nlisten = \":7443\"\nadvertise = \"controller.example:7443\"\n", ""},
		"shortest interval":  {minimal + "[kms]\nremediation_interval = \"1s\"\n", ""},
		"longest interval":   {minimal + "[kms]\nremediation_interval = \"24h\"\n", ""},
		"interval too short": {minimal + "[kms]\nremediation_interval = \"999ms\"\n", "1s to 24h"},
		"interval too long":  {minimal + "[kms]\nremediation_interval = \"25h\"\n", "1s to 24h"},
		"negative interval":  {minimal + "[kms]\nremediation_interval = \"-5m\"\n", "1s to 24h"},
		"no duration":        {minimal + "[kms]\nremediation_interval = \"5\"\n", "missing unit"},
		"status too often":   {minimal + "[kms]\nstatus_interval = \"1ms\"\n", "status_interval"},
		"unknown field":      {minimal + "passwort = 1\n", "passwort"},
		"unknown section":    {minimal + "[kmip]\n", "kmip"},
		"wrong type":         {"data_dir = 1\n", "integer"},
		"twice":              {minimal + minimal, "already defined"},
		"nothing":            {"", "data_dir"},
		"relative data_dir":  {"data_dir = \"d\"\nlisten = \"192.0.2.1:7443\"\n", "absolute"},
		"relative key_file":  {minimal + "key_file = \"k\"\n", "absolute"},
		"no listen":          {"data_dir = \"/d\"\n", "listen"},
		"no port":            {"data_dir = \"/d\"\nlisten = \"192.0.2.1\"\n", "listen"},
		"everywhere":         {"data_dir = \"/d\"\nlisten = \"0.0.0.0:7443\"\n", "advertise"},
		"no TOML":            {"data_dir", "toml"},
	} {
		cfg, err := ParseConfig([]byte(c.text))
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got error %v, want one about %q", name, err, c.want)
		case err != nil && cfg != (Config{}):
			t.Errorf("%s: an error and %+v", name, cfg)
		}
	}
	want := Config{
		DataDir: "/var/lib/strongroom", Listen: "192.0.2.1:7443", Advertise: "192.0.2.1:7443", KeyFile: "/var/lib/strongroom/controller.key",
		MaxConnections: 4096, MaxConnectionsPerAddress: 64, MaxRequestsPerSecond: 100,
		KMS: KMSConfig{RemediationInterval: Duration(5 * time.Minute), StatusInterval: Duration(5 * time.Minute)},
	}
	got, err := ParseConfig([]byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(minimal + "[kms]\nremediation_interval = \"1h\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := ParseConfig(text)
		if err != nil {
			if cfg != (Config{}) {
				t.Errorf("an error and %+v", cfg)
			}
			return
		}
		// What was filled in is a configuration, too, and stays as it is.
		again, err := cfg.withDefaults()
		if err != nil || again != cfg {
			t.Errorf("%+v became %+v, %v", cfg, again, err)
		}
	})
}
