package kms

import (
	"context"
	"log/slog"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

const (
	// datesEvery is the time between two looks for what dates and rotation ask
	// for. A look reads every object: what took long is not repeated before a
	// hundred times as long has passed.
	datesEvery = 10 * time.Minute
	datesRatio = 100
	day        = 24 * time.Hour
)

// scheduler is the actor of what dates and rotation ask for, in records.
const scheduler = "scheduler"

// keepDates does what dates and rotation ask for until ctx ends. It keeps no
// state of its own: what is due stands in the objects, so that what a process
// did not come to the next one does.
func (k *KMS) keepDates(ctx context.Context, server *kmipserver.Server) error {
	for {
		began := time.Now()
		if err := k.keepDatesOnce(ctx, server); err != nil && ctx.Err() == nil {
			k.log.LogAttrs(ctx, slog.LevelError, "scheduled steps not done", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(datesEvery, datesRatio*time.Since(began))):
		}
	}
}

// keepDatesOnce does what is due now, for the groups as all nodes have them.
func (k *KMS) keepDatesOnce(ctx context.Context, server *kmipserver.Server) error {
	if err := k.directory.Refresh(ctx); err != nil {
		return err
	}
	for _, g := range k.directory.Groups() {
		if err := k.keepDatesOf(ctx, server, g); err != nil && ctx.Err() == nil {
			k.log.LogAttrs(ctx, slog.LevelError, "scheduled steps of a group not done", slog.String("group", g.Name), slog.Any("err", err))
		}
	}
	return nil
}

func (k *KMS) keepDatesOf(ctx context.Context, server *kmipserver.Server, g directory.Group) error {
	rot := kmipserver.Rotation{Every: time.Duration(g.Rotation.EveryDays) * day, DeactivateAfter: time.Duration(g.Rotation.DeactivateAfterDays) * day}
	return server.Maintain(ctx, g.Name, rot,
		func(step kmipserver.Step) error { return k.recordStep(g.Name, step, audit.Success, "begins") },
		func(step kmipserver.Step, err error) error {
			result := audit.Success
			if err != nil {
				result = audit.Failed
			}
			k.metrics.steps.WithLabelValues(string(step.Kind), result).Inc()
			return k.recordStep(g.Name, step, result, "ended")
		})
}

// recordStep puts a step on record, durably: before it is tried, so that it is
// there whatever happens, and with what came of it.
func (k *KMS) recordStep(group string, step kmipserver.Step, result, phase string) error {
	details := map[string]string{"account": directory.AccountOf(group), "phase": phase, "date": step.Date.UTC().Format(time.RFC3339)}
	if step.Replacement != "" {
		details["replacement"] = step.Replacement
	}
	return errs.Wrap(k.audit.AppendDurably(audit.Entry{
		Actor: scheduler, Action: "scheduler." + string(step.Kind), Object: "group/" + group + "/key/" + step.Object, Outcome: result, Details: details,
	}), "cannot write the audit log")
}

func (a *api) SetKMSGroupRotation(ctx context.Context, req *connect.Request[strongroomv1.SetKMSGroupRotationRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	r := req.Msg.GetRotation()
	if err := a.k.directory.SetRotation(ctx, req.Msg.GetName(), directory.Rotation{EveryDays: int(r.GetEveryDays()), DeactivateAfterDays: int(r.GetDeactivateAfterDays())}); err != nil {
		return nil, err
	}
	return a.group(ctx, req.Msg.GetName())
}
