package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"

	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"strongroom/internal/filelock"
)

// lockDir takes an exclusive lock on dir and returns its release.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Take(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// zapTo returns a zap logger whose warnings and errors go to log. Below that
// etcd narrates its every step, which tells an operator nothing.
func zapTo(log *slog.Logger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	return zap.New(&slogCore{log: log.With(slog.String("component", "etcd"))})
}

// slogCore is a zap core that writes to slog.
type slogCore struct{ log *slog.Logger }

func (c *slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: slog.New(c.log.Handler().WithAttrs(attrsOf(fields)))}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	switch {
	case isNoise(e.Message), isClosing(fields), isEarly(e.Message, fields):
		level = slog.LevelDebug
	case e.Level >= zapcore.ErrorLevel:
		level = slog.LevelError
	}
	c.log.LogAttrs(context.Background(), level, e.Message, attrsOf(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

// isNoise reports whether etcd raises its voice for nothing: a new database has
// no schema version yet, a refused request has its error returned, and of
// listeners and their tokens there are none.
func isNoise(msg string) bool {
	switch msg {
	case "Failed to detect schema version", "failed to update storage version", "failed to apply request",
		"rejecting member add request; local member has not been connected to majority peers, reconfigure breaks active quorum",
		"rejecting member remove request; local member has not been connected to all peers, reconfigure breaks active quorum",
		"simple token is not cryptographically signed",
		"Running http and grpc server on single port. This is not recommended for production.":
		return true
	}
	return false
}

// isClosing reports whether a message tells that a listener was closed, which is
// how a member ends.
func isClosing(fields []zapcore.Field) bool {
	return slices.ContainsFunc(fields, func(f zapcore.Field) bool {
		err, ok := f.Interface.(error)
		return ok && errors.Is(err, net.ErrClosed)
	})
}

// isEarly reports whether a message tells that a member could not make itself known
// yet, because it is still reading its log. It tries again without a pause, hundreds
// of times.
func isEarly(msg string, fields []zapcore.Field) bool {
	return msg == "failed to publish local member to cluster through raft" && slices.ContainsFunc(fields, func(f zapcore.Field) bool {
		err, ok := f.Interface.(error)
		return ok && errors.Is(err, etcderrors.ErrTooManyRequests)
	})
}

// textMax bounds a text in the log, in bytes: a slow request is told with all keys
// of all transactions that were committed together.
const textMax = 512

func attrsOf(fields []zapcore.Field) []slog.Attr {
	attrs := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		enc := zapcore.NewMapObjectEncoder()
		f.AddTo(enc)
		for k, v := range enc.Fields {
			if text, ok := v.(string); ok && len(text) > textMax {
				v = fmt.Sprintf("%s... (%d bytes)", text[:textMax], len(text))
			}
			attrs = append(attrs, slog.Any(k, v))
		}
	}
	return attrs
}
