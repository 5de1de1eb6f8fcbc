package kms

import (
	"net"

	"strongroom/internal/daemon"
	"strongroom/internal/errs"
)

// listeners are where a KMS is reached.
type listeners struct{ kmip, local, api, metrics, members net.Listener }

func (l *listeners) close() {
	for _, one := range []net.Listener{l.kmip, l.local, l.api, l.metrics, l.members} {
		if one != nil {
			one.Close()
		}
	}
}

// listen opens all that cfg names. The caller closes them.
func listen(cfg Config) (l listeners, err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.kmip, err = listenFor("KMIP clients", cfg.Listen); err != nil {
		return l, err
	}
	if l.local, err = daemon.ListenLocal(cfg.LocalSocket); err != nil {
		return l, err
	}
	if cfg.APIListen != "" {
		if l.api, err = listenFor("users", cfg.APIListen); err != nil {
			return l, err
		}
	}
	if cfg.MetricsListen != "" {
		if l.metrics, err = listenFor("metrics", cfg.MetricsListen); err != nil {
			return l, err
		}
	}
	if cfg.Cluster != nil {
		l.members, err = listenFor("other nodes", cfg.Cluster.Listen)
	}
	return l, err
}

func listenFor(whom, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "cannot listen for %s: %w", whom, err).
			WithHint("end what listens there (ss -ltnp), or give the KMS another address in its configuration")
	}
	return l, nil
}

// tryListening returns what would keep a node from serving later on: one that others
// count on and that cannot run costs them their majority.
func tryListening(cfg Config) error {
	l, err := listen(cfg)
	if err != nil {
		return err
	}
	defer l.close()
	store, err := listenFor("the other nodes' databases", cfg.Cluster.StoreListen)
	if err != nil {
		return err
	}
	return store.Close()
}
