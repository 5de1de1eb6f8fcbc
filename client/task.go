package client

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
)

// Tasks survive a restart of the controller, so waiting for one does too: a
// lost connection is tried again every retryEvery, and given up after
// retryFor without an answer.
const (
	retryEvery = 500 * time.Millisecond
	retryFor   = 2 * time.Minute
)

// TaskEnded reports whether nothing more will happen to t.
func TaskEnded(t *strongroomv1.Task) bool {
	switch t.GetState() {
	case "success", "error", "canceled":
		return true
	}
	return false
}

// TaskError returns why t did not succeed, or nil if it succeeded or has not
// ended.
func TaskError(t *strongroomv1.Task) error {
	if !TaskEnded(t) || t.GetState() == "success" {
		return nil
	}
	kind := errs.ParseKind(t.GetErrorDetail().GetKind())
	text := t.GetError()
	if t.GetState() == "canceled" {
		kind = errs.Canceled
	}
	if text == "" {
		text = "task " + t.GetId() + " ended as " + t.GetState()
	}
	return &errs.Error{
		Kind:   kind,
		Reason: t.GetErrorDetail().GetReason(),
		Hint:   t.GetErrorDetail().GetHint(),
		Err:    errors.New(text),
	}
}

// WaitTask follows the task until it has ended and returns its last state,
// with [TaskError] as the error. If progress is not nil it is called with
// every state that is seen, on the caller's goroutine. Ending ctx ends the
// wait, not the task.
func (c *Client) WaitTask(ctx context.Context, id string, progress func(*strongroomv1.Task)) (*strongroomv1.Task, error) {
	giveUp := time.Now().Add(retryFor)
	for {
		last, err := c.watchTask(ctx, id, progress)
		if last != nil {
			if TaskEnded(last) {
				return last, TaskError(last)
			}
			giveUp = time.Now().Add(retryFor)
		}
		if err != nil && errs.KindOf(err) != errs.Unavailable || time.Now().After(giveUp) {
			if err == nil {
				err = errs.New(errs.Unavailable, "%s ends the watch of task %s before the task has ended", c.server, id)
			}
			return last, err
		}
		select {
		case <-ctx.Done():
			return last, errs.New(errs.Canceled, "wait for task %s: %w", id, context.Cause(ctx))
		case <-time.After(retryEvery):
		}
	}
}

// watchTask follows the task until it has ended or the stream breaks.
func (c *Client) watchTask(ctx context.Context, id string, progress func(*strongroomv1.Task)) (*strongroomv1.Task, error) {
	stream, err := c.Task().WatchTask(ctx, connect.NewRequest(&strongroomv1.WatchTaskRequest{Id: id}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var last *strongroomv1.Task
	for stream.Receive() {
		last = stream.Msg()
		if progress != nil {
			progress(last)
		}
		if TaskEnded(last) {
			return last, nil
		}
	}
	return last, stream.Err()
}
