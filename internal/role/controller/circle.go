package controller

import (
	"cmp"
	"context"
	"net"
	"os"
	"strings"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// controllerNames returns the names by which this machine may be known as a VM.
func controllerNames(cfg Config) []string {
	var names []string
	if host, _, err := net.SplitHostPort(cfg.Advertise); err == nil {
		names = append(names, host)
	}
	if name, err := os.Hostname(); err == nil {
		names = append(names, name)
	}
	return names
}

// refuseCircle returns an error if the VM of args, with a new key of that provider,
// would wait for itself to be started; or notes so in args, if that is allowed.
func (c *Controller) refuseCircle(ctx context.Context, args *vmArgs, provider string) error {
	circle, err := c.inv.Circle(ctx, inventory.VM{ID: args.ID, Name: args.Name, Runs: args.Runs}, provider)
	if err != nil || circle == "" {
		return err
	}
	if args.AllowCircular {
		args.Circle = circle
		return nil
	}
	return errs.New(errs.InvalidState, "encrypted with key provider %s, VM %s could not be started after its host was: it would need %s", provider, args.Name, circle).
		WithReason(strongroomv1.ReasonCircularDependency).
		WithHint("leave it unencrypted, or name another provider with --provider, such as a native one; if you know a way to start it, --allow-circular")
}

// refuseNewCircle returns an error if a VM would wait for itself to be started once a
// standard provider is next, and does not now; or puts it on record, if that is allowed.
func (c *Controller) refuseNewCircle(ctx context.Context, provider string, next inventory.Standard, allow bool) error {
	vm, circle, err := c.inv.NewCircle(ctx, provider, next)
	if err != nil || vm == "" {
		return err
	}
	if !allow {
		return errs.New(errs.InvalidState, "VM %s could then not be started after its host was: it would need %s", vm, circle).
			WithReason(strongroomv1.ReasonCircularDependency).
			WithHint("strongroom vm rekey %s --provider NAME, such as a native one, before; if you know a way to start it, --allow-circular", vm)
	}
	_, err = c.audit.Append(audit.Entry{
		Actor: callerName(ctx), Action: "provider.update", Object: "/provider/" + provider, Outcome: audit.Success, Details: map[string]string{"circular": circle, "vm": vm},
	})
	return errs.Wrap(err, "cannot write the audit log")
}

// MarkVM also marks a VM that is encrypted with keys that come by way of what it
// runs: it does, whether that is known or not.
func (c vms) MarkVM(ctx context.Context, req *connect.Request[strongroomv1.MarkVMRequest]) (*connect.Response[strongroomv1.VM], error) {
	v, err := c.inv.VM(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	runs, err := c.inv.CheckParts(ctx, req.Msg.GetRuns())
	if err != nil {
		return nil, errs.Wrap(err, "cannot mark VM %s", v.Name)
	}
	var before string
	if v, err = c.inv.UpdateVM(ctx, v.ID, func(v *inventory.VM) error {
		before, v.Runs = strings.Join(v.Runs, " "), runs
		return nil
	}); err != nil {
		return nil, err
	}
	after := strings.Join(runs, " ")
	if _, err := c.audit.Append(audit.Entry{
		Actor: callerName(ctx), Action: "vm.mark", Object: "/vm/" + v.Name, Outcome: audit.Success, Details: map[string]string{"runs": after, "before": before},
	}); err != nil {
		return nil, errs.Wrap(err, "cannot write the audit log")
	}
	c.post(ctx, event.New{Type: event.VMMarked, Target: "vm/" + v.Name, Args: map[string]string{"parts": cmp.Or(after, "nothing")}})
	if err := c.events.Evaluate(ctx, c.inv); err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(vmToAPI(v, n)), nil
}
