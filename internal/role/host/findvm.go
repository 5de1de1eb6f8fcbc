package host

import (
	"context"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
)

func (a *agent) FindVM(ctx context.Context, req *connect.Request[strongroomv1.AgentFindVMRequest]) (*connect.Response[strongroomv1.AgentFindVMResponse], error) {
	res, err := a.host.findVM(ctx, req.Msg.GetId(), req.Msg.GetDatastore(), req.Msg.GetFolder())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// findVM looks on all datastores for the folder of the VM with that id, which was
// in that folder. One that is there under its old name is told whatever is in it,
// and so is each of which it cannot be told which VM it holds.
func (h *Host) findVM(ctx context.Context, id, datastore, folder string) (*strongroomv1.AgentFindVMResponse, error) {
	res := &strongroomv1.AgentFindVMResponse{}
	for _, d := range h.secrets.snapshot().Datastores {
		entries, err := os.ReadDir(d.Path)
		if err != nil {
			return nil, errs.New(errs.Unavailable, "cannot look for VMs on datastore %s of host %s: %w", d.Name, h.secrets.identity.Name, err)
		}
		if d.Name == datastore {
			res.HasDatastore, res.DatastoreEmpty = true, len(entries) == 0
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			was := d.Name == datastore && e.Name() == folder
			if !was && (!e.IsDir() || !bundle.ValidName(e.Name())) {
				continue // it cannot be registered
			}
			vm, err := bundle.Read(filepath.Join(d.Path, e.Name()))
			found := &strongroomv1.FoundFolder{Datastore: d.Name, Folder: e.Name()}
			switch {
			case err == nil && vm.ID == id:
			case err == nil && was:
				found.Problem = "it holds another VM, " + vm.Name
			case err == nil, errs.KindOf(err) == errs.NotFound && !was:
				continue
			default:
				found.Problem = err.Error()
			}
			res.Folders = append(res.Folders, found)
		}
	}
	return res, nil
}
