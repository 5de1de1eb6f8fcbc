package localvolume

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
)

// drainTimeout is how long users may take to finish after the end was asked for;
// then they are broken off.
const drainTimeout = 10 * time.Second

// ServeOptions say how a volume is served: over NBD, over vhost-user, as a file,
// or in several of these ways at once.
type ServeOptions struct {
	Storage
	KeyFile   string
	Socket    string // path of the NBD unix socket, removed at the end; "" for none
	TCP       TCP    // NBD with TLS
	VhostUser string // path of the vhost-user unix socket, removed at the end; "" for none
	Mount     string // path of the file that shows the data; "" for none
	ReadOnly  bool
	Direct    bool // File is read and written past the page cache
	// Ready, if not nil, is called with each NBD URI, vhost-user socket or file when
	// it can be used.
	Ready func(address string)
}

// front is one way in which a volume is served.
type front struct {
	address string                          // what its users need to know
	serve   func() error                    // until it ends
	stop    func(ctx context.Context) error // ends serve; in good order until ctx ends
}

// Serve serves the plain data of the volume until ctx ends, or until somebody
// unmounts the file. It then finishes the requests in work and makes what was
// written durable.
func Serve(ctx context.Context, opts ServeOptions) (err error) {
	if opts.Socket == "" && opts.TCP.Address == "" && opts.VhostUser == "" && opts.Mount == "" {
		return errs.New(errs.Invalid, "nothing says how to serve it").WithHint("give --nbd SOCKET, --vhost-user SOCKET or --fuse FILE")
	}
	if err := daemon.Harden(); err != nil { // plain data are in its memory
		return err
	}
	v, err := open(opts.Storage, opts.KeyFile, blockdev.FileOptions{ReadOnly: opts.ReadOnly, Direct: opts.Direct})
	if err != nil {
		return err
	}
	defer v.Close()
	fronts, err := start(ctx, v, opts)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	for _, f := range fronts {
		g.Go(func() error {
			defer cancel()
			return f.serve()
		})
		g.Go(func() error {
			<-ctx.Done()
			return f.end(ctx)
		})
		if opts.Ready != nil {
			opts.Ready(f.address)
		}
	}
	err = g.Wait()
	if !opts.ReadOnly {
		err = errors.Join(err, v.Flush())
	}
	return explain(err)
}

// start makes the fronts that are asked for, or none.
func start(ctx context.Context, v *volume.Volume, opts ServeOptions) (fronts []front, err error) {
	add := func(path string, make func(*volume.Volume, ServeOptions) (front, error)) {
		if path == "" || err != nil {
			return
		}
		var f front
		if f, err = make(v, opts); err == nil {
			fronts = append(fronts, f)
		}
	}
	add(opts.Socket, newNBD)
	add(opts.TCP.Address, newNBDTLS)
	add(opts.VhostUser, newVhostUser)
	add(opts.Mount, newFUSE)
	if err != nil {
		for _, f := range fronts {
			_ = f.end(ctx) // nobody has used it yet
		}
		return nil, err
	}
	return fronts, nil
}

// end stops a front, in drainTimeout at most.
func (f front) end(ctx context.Context) error {
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	return f.stop(drain)
}
