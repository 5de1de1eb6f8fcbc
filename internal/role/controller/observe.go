package controller

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/task"
)

// tasks serves TaskService.
type tasks struct{ *Controller }

// tasksMax bounds a list of tasks.
const tasksMax = 1000

func (c tasks) ListTasks(ctx context.Context, req *connect.Request[strongroomv1.ListTasksRequest]) (*connect.Response[strongroomv1.ListTasksResponse], error) {
	all, err := c.Controller.tasks.List(ctx, tasksMax, req.Msg.GetActive())
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListTasksResponse{}
	for _, t := range all {
		res.Tasks = append(res.Tasks, taskToAPI(t))
	}
	return connect.NewResponse(res), nil
}

func (c tasks) GetTask(ctx context.Context, req *connect.Request[strongroomv1.GetTaskRequest]) (*connect.Response[strongroomv1.Task], error) {
	t, err := c.Controller.tasks.Get(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(taskToAPI(t)), nil
}

func (c tasks) WatchTask(ctx context.Context, req *connect.Request[strongroomv1.WatchTaskRequest], out *connect.ServerStream[strongroomv1.Task]) error {
	return c.Controller.tasks.Watch(ctx, req.Msg.GetId(), func(t task.Task) error { return out.Send(taskToAPI(t)) })
}

func (c tasks) CancelTask(ctx context.Context, req *connect.Request[strongroomv1.CancelTaskRequest]) (*connect.Response[strongroomv1.Task], error) {
	t, err := c.Controller.tasks.Cancel(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(taskToAPI(t)), nil
}

// events serves EventService.
type events struct{ *Controller }

func eventToAPI(e event.Event) *strongroomv1.Event {
	return &strongroomv1.Event{
		Sequence: e.Sequence, Type: e.Type, Severity: string(e.Severity), Time: stamp(e.Time), Principal: e.Principal,
		Target: e.Target, Message: e.Message,
	}
}

func (c events) ListEvents(ctx context.Context, req *connect.Request[strongroomv1.ListEventsRequest]) (*connect.Response[strongroomv1.ListEventsResponse], error) {
	all, err := c.Controller.events.List(ctx, int(min(req.Msg.GetLimit(), event.DefaultKeep)))
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListEventsResponse{}
	for _, e := range all {
		res.Events = append(res.Events, eventToAPI(e))
	}
	return connect.NewResponse(res), nil
}

func (c events) WatchEvents(ctx context.Context, _ *connect.Request[strongroomv1.WatchEventsRequest], out *connect.ServerStream[strongroomv1.Event]) error {
	err := c.Controller.events.Watch(ctx, nil, func(e event.Event) error { return out.Send(eventToAPI(e)) })
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (c events) ListAlarms(ctx context.Context, _ *connect.Request[strongroomv1.ListAlarmsRequest]) (*connect.Response[strongroomv1.ListAlarmsResponse], error) {
	all, err := c.Controller.events.Alarms(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListAlarmsResponse{}
	for _, a := range all {
		message := a.Message
		if a.Hint != "" {
			message += "; " + a.Hint
		}
		res.Alarms = append(res.Alarms, &strongroomv1.Alarm{
			Name: a.ID, Severity: string(a.Severity), Target: a.Target, Message: message, Since: stamp(a.Since), Runbook: a.Runbook,
		})
	}
	return connect.NewResponse(res), nil
}

func (c events) GetHealth(ctx context.Context, _ *connect.Request[strongroomv1.GetHealthRequest]) (*connect.Response[strongroomv1.GetHealthResponse], error) {
	checks, err := c.Controller.events.Health(ctx, c.inv)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.GetHealthResponse{}
	for _, check := range checks {
		message := check.Message
		if check.Hint != "" && check.Status != event.Green {
			message += "; " + check.Hint
		}
		res.Checks = append(res.Checks, &strongroomv1.HealthCheck{Name: check.Name, Status: string(check.Status), Message: message, Checked: stamp(check.Checked)})
	}
	return connect.NewResponse(res), nil
}
