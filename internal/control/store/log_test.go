package store

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	"go.uber.org/zap"
)

// TestLog: what etcd says at length is cut, what it repeats while it starts is not
// told, and the rest is.
func TestLog(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	log := zapTo(slog.New(slog.NewTextHandler(&out, nil)))

	log.Warn("apply request took too long", zap.String("request", strings.Repeat("k", 8000)))
	if n := out.Len(); n < textMax || n > textMax+200 || !strings.Contains(out.String(), "(8000 bytes)") {
		t.Errorf("a long text is told in %d bytes: %s", n, out.String())
	}

	const publish = "failed to publish local member to cluster through raft"
	out.Reset()
	log.Warn(publish, zap.Error(etcderrors.ErrTooManyRequests))
	if out.Len() > 0 {
		t.Errorf("told: %s", out.String())
	}
	log.Warn(publish, zap.Error(errors.New("no leader")))
	if !strings.Contains(out.String(), "no leader") {
		t.Error("another reason is not told")
	}
}
