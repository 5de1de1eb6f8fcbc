package localvolume

import (
	"context"
	"errors"
	"strings"

	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/volume"
)

// newVhostUser serves the volume as a vhost-user-blk device on a unix socket. The
// guest finds it by its serial number, the first digits of the volume's UUID.
func newVhostUser(v *volume.Volume, opts ServeOptions) (front, error) {
	l, err := listen(opts.VhostUser)
	if err != nil {
		return front{}, err
	}
	serial := strings.ReplaceAll(v.UUID(), "-", "")
	server, err := vhostuser.NewServer(vhostuser.Config{
		Device: v, Name: opts.File, ReadOnly: opts.ReadOnly, Serial: serial[:min(len(serial), vhostuser.MaxSerial)],
	})
	if err != nil {
		l.Close()
		return front{}, err
	}
	return front{
		address: l.Addr().String(),
		serve: func() error {
			if err := server.Serve(context.Background(), l); !errors.Is(err, vhostuser.ErrClosed) {
				return err
			}
			return nil
		},
		stop: func(context.Context) error {
			defer l.Close() // if it was never served
			return server.Close()
		},
	}, nil
}
