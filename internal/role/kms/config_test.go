package kms

import (
	"context"
	"strings"
	"testing"
	"time"
)

func TestParseConfig(t *testing.T) {
	t.Parallel()
	c, err := ParseConfig([]byte("data_dir = \"/d\"\nadvertise = \"kms.example:5696\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		DataDir: "/d", Listen: "0.0.0.0:5696", Advertise: "kms.example:5696", KeyFile: "/d/kms.key", LocalSocket: "/d/kms.sock",
		MaxConnections: 512, MaxConnectionsPerAddress: 256, BackupMaxAgeHours: 168,
		APIMaxConnections: 512, APIMaxConnectionsPerAddress: 64, APIMaxRequestsPerSecond: 1000,
	}
	if c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
	c, err = ParseConfig([]byte("data_dir = \"/d\"\nadvertise = \"kms.example:5696\"\n[cluster]\nname = \"a\"\nadvertise = \"a.example:5698\"\nstore_advertise = \"a.example:5699\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	node := ClusterConfig{Name: "a", Listen: "0.0.0.0:5698", Advertise: "a.example:5698", StoreListen: "0.0.0.0:5699", StoreAdvertise: "a.example:5699"}
	if c.Cluster == nil || *c.Cluster != node {
		t.Errorf("%+v, want %+v", c.Cluster, node)
	}
	const one = "data_dir = \"/d\"\nadvertise = \"a:1\"\n[cluster]\n"
	for text, wrong := range map[string]string{
		"data_dir = \"d\"\nadvertise = \"a:1\"":                                "data_dir",
		"data_dir = \"/d\"":                                                    "advertise",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nkey_file = \"k\"":             "key_file",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nlisten = \"x\"":               "listen",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nlisen = \"a:1\"":              "lisen",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nmetrics_listen = \"9\"":       "metrics_listen",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nmax_connections = -1":         "max_connections",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nmax_requests_per_second = -1": "max_requests_per_second",
		"data_dir = \"/d\"\nadvertise = \"a:1\"\nbackup_max_age_hours = -2":    "backup_max_age_hours",
		one: "name",
		one + "name = \"a=b\"\nadvertise = \"a:1\"\nstore_advertise = \"a:2\"": "name",
		one + "name = \"a\"\nstore_advertise = \"a:2\"":                        "advertise",
		one + "name = \"a\"\nadvertise = \"a:1\"":                              "store_advertise",
		one + "name = \"a\"\nadvertise = \"a:1\"\nstore_listen = \"kms:2\"":    "store_listen",
	} {
		if _, err := ParseConfig([]byte(text)); err == nil || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%q: %v, want an error about %s", text, err, wrong)
		}
	}
}

func TestPace(t *testing.T) {
	t.Parallel()
	var p pace
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	for range 1000 {
		if _, err := p.wait(ctx, "free", 0); err != nil {
			t.Fatal(err)
		}
	}
	// A burst of one second's worth, then one request every 20 ms.
	begin := time.Now()
	for range 60 {
		if _, err := p.wait(ctx, "a", 50); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begin); took < 150*time.Millisecond {
		t.Errorf("60 requests at 50 a second took %v", took)
	}
	if _, err := p.wait(ctx, "b", 50); err != nil {
		t.Errorf("another application: %v", err)
	}
	short, cancelShort := context.WithTimeout(ctx, time.Millisecond)
	defer cancelShort()
	for range 3 {
		if _, err := p.wait(short, "slow", 1); err != nil {
			return
		}
	}
	t.Error("a request that is due after its deadline was not refused")
}
