package controller

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// A VM that was unregistered keeps its keys from being orphans, as its folder can
// be registered again. Once that is gone the VM can be forgotten; but who says
// that it is gone may be wrong, so every host has to see that it is.

const (
	reasonFolderFound    = "FolderFound"
	reasonDatastoreEmpty = "DatastoreEmpty"
)

func (c vms) ListUnregisteredVMs(ctx context.Context, _ *connect.Request[strongroomv1.ListUnregisteredVMsRequest]) (*connect.Response[strongroomv1.ListUnregisteredVMsResponse], error) {
	kept, err := c.inv.KeptVMs(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListUnregisteredVMsResponse{}
	for _, v := range kept {
		res.Vms = append(res.Vms, keptToAPI(v))
	}
	return connect.NewResponse(res), nil
}

func keptToAPI(v inventory.KeptVM) *strongroomv1.UnregisteredVM {
	out := &strongroomv1.UnregisteredVM{Id: v.ID, Name: v.Name, Datastore: v.Datastore, Folder: v.Folder, Since: stamp(v.Since)}
	for _, k := range v.Keys {
		out.Keys = append(out.Keys, keyToAPI(&k))
	}
	return out
}

func (c vms) ForgetVM(ctx context.Context, req *connect.Request[strongroomv1.ForgetVMRequest]) (*connect.Response[strongroomv1.ForgetVMResponse], error) {
	datastore, folder := req.Msg.GetDatastore(), req.Msg.GetFolder()
	all, err := c.inv.KeptVMs(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(v inventory.KeptVM) bool { return v.Datastore == datastore && v.Folder == folder })
	if i < 0 {
		return nil, errs.New(errs.NotFound, "no unregistered VM is known to have had folder %q on datastore %q", folder, datastore).
			WithHint("strongroom vm ls --unregistered")
	}
	v := all[i]
	err = c.seenGone(ctx, v, req.Msg.GetEvenIfEmpty())
	if err == nil {
		err = c.inv.ForgetKept(ctx, v.ID, v.Datastore, v.Folder)
	}
	var keys []string
	for _, k := range v.Keys {
		keys = append(keys, k.Provider+"/"+k.KeyID)
	}
	details := map[string]string{"vm_id": v.ID, "datastore": v.Datastore, "folder": v.Folder, "keys": strings.Join(keys, " ")}
	outcome := audit.Success
	if err != nil {
		outcome, details["error"] = audit.Failed, err.Error()
	}
	if _, auditErr := c.audit.Append(audit.Entry{Actor: callerName(ctx), Action: "vm.forget", Object: "/vm/" + v.Name, Outcome: outcome, Details: details}); auditErr != nil {
		c.log.LogAttrs(ctx, slog.LevelError, "audit record not written", slog.Any("err", auditErr))
		if err == nil {
			err = errs.Wrap(auditErr, "cannot write the audit log")
		}
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot forget VM %s", v.Name)
	}
	c.post(ctx, event.New{Type: event.VMForgotten, Target: "vm/" + v.Name, Args: map[string]string{"folder": v.Datastore + "/" + v.Folder}})
	return connect.NewResponse(&strongroomv1.ForgetVMResponse{Vm: keptToAPI(v)}), nil
}

// seenGone asks all hosts for the folder of v. It returns an error unless each of
// them answers that it sees none, and one of them has the datastore where it was.
func (c *Controller) seenGone(ctx context.Context, v inventory.KeptVM, evenIfEmpty bool) error {
	hosts, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return err
	}
	var silent []string
	for _, h := range hosts {
		if h.State != inventory.Connected {
			silent = append(silent, h.Name)
		}
	}
	if len(silent) > 0 {
		return errs.New(errs.Unavailable, "host %s does not answer, and may see its folder", strings.Join(silent, ", ")).
			WithReason(reasonHostSilent).WithHint("strongroom host show %s", silent[0])
	}
	answers, failures := make([]*strongroomv1.AgentFindVMResponse, len(hosts)), make([]error, len(hosts))
	var group errgroup.Group
	group.SetLimit(syncsMax)
	for i, h := range hosts {
		group.Go(func() error {
			answers[i], failures[i] = callHost(ctx, h, c.agents.of(h).FindVM, &strongroomv1.AgentFindVMRequest{Id: v.ID, Datastore: v.Datastore, Folder: v.Folder})
			return nil
		})
	}
	_ = group.Wait()
	for i, h := range hosts {
		if failures[i] != nil {
			return errs.Wrap(failures[i], "host %s may see its folder", h.Name)
		}
	}
	registered, err := c.inv.VMs(ctx, "")
	if err != nil {
		return err
	}
	looked := false
	for i, h := range hosts {
		for _, f := range answers[i].GetFolders() {
			// A copy with the same id that is registered needs its keys itself.
			if !slices.ContainsFunc(registered, func(r inventory.VM) bool { return r.Datastore == f.GetDatastore() && r.Folder == f.GetFolder() }) {
				return folderFound(h, v, f)
			}
		}
		looked = looked || answers[i].GetHasDatastore()
		if answers[i].GetDatastoreEmpty() && !evenIfEmpty {
			return errs.New(errs.InvalidState, "host %s sees nothing at all on datastore %s, which may be because it is not mounted there", h.Name, v.Datastore).
				WithReason(reasonDatastoreEmpty).WithHint("see to that; if the datastore is really empty, add --even-if-empty")
		}
	}
	if !looked {
		return errs.New(errs.InvalidState, "no host has datastore %s, where its folder was", v.Datastore).WithHint("strongroom datastore ls")
	}
	return nil
}

func folderFound(h inventory.Host, v inventory.KeptVM, f *strongroomv1.FoundFolder) error {
	hint := fmt.Sprintf("strongroom vm register %s --datastore %s; to be rid of it, delete it after that", f.GetFolder(), f.GetDatastore())
	if f.GetProblem() != "" {
		return errs.New(errs.InvalidState, "host %s sees folder %s on datastore %s, which may hold it: %s", h.Name, f.GetFolder(), f.GetDatastore(), f.GetProblem()).
			WithReason(reasonFolderFound).WithHint("remove or rename that folder if nobody needs what is in it; else: %s", hint)
	}
	return errs.New(errs.InvalidState, "host %s sees its folder, %s on datastore %s", h.Name, f.GetFolder(), f.GetDatastore()).
		WithReason(reasonFolderFound).WithHint("%s", hint)
}
