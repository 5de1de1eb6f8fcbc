package cli

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

// atOnce is how many tasks of one command are started and watched at a time;
// the rest waits for these. The server runs only some of them at once anyway.
const atOnce = 16

// waitFlags says whether a command waits for the tasks that it starts.
type waitFlags struct{ noWait bool }

func (f *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.noWait, "no-wait", false, "print the task ids and do not wait for the tasks")
	cmd.Flags().Bool("wait", true, "wait until it is done")
	cmd.MarkFlagsMutuallyExclusive("wait", "no-wait")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		wait, err := cmd.Flags().GetBool("wait")
		f.noWait = f.noWait || !wait
		return err
	}
}

// verb is an operation on named objects, each of which is a task.
type verb struct {
	infinitive string // "encrypt VM": "cannot encrypt VM web-1: ..."
	participle string // "encrypted": "web-1 encrypted"
	start      func(ctx context.Context, name string) (*strongroomv1.Task, error)
}

// runTasks starts a task for every name, waits for them unless it should not,
// and prints their results in the order of names. It goes on when one fails.
func (env *Env) runTasks(ctx context.Context, c *client.Client, wait waitFlags, v verb, names []string) error {
	var (
		show  = newProgress(env)
		tasks = make([]*strongroomv1.Task, len(names))
		errs  = make([]error, len(names))
		group errgroup.Group
		print sync.Mutex
	)
	group.SetLimit(atOnce)
	for i, name := range names {
		group.Go(func() error {
			tasks[i], errs[i] = runTask(ctx, c, wait, v, name, show)
			if errs[i] == nil && show.bars == nil {
				print.Lock()
				defer print.Unlock()
				env.taskDone(wait, v, name, tasks[i])
			}
			return nil
		})
	}
	group.Wait() // its functions return no error
	show.close()
	var failed failures
	for i := range names {
		if errs[i] != nil {
			failed = append(failed, cannot(errs[i], "%s %s", v.infinitive, names[i]))
		} else if show.bars != nil { // below the bars, not between them
			env.taskDone(wait, v, names[i], tasks[i])
		}
	}
	if env.flags.output != outputTable {
		all := &strongroomv1.ListTasksResponse{}
		for _, t := range tasks {
			if t != nil {
				all.Tasks = append(all.Tasks, t)
			}
		}
		if err := env.printObject(all); err != nil {
			return err
		}
	}
	switch len(failed) {
	case 0:
		return nil
	case 1:
		return failed[0]
	}
	return failed
}

func runTask(ctx context.Context, c *client.Client, wait waitFlags, v verb, name string, show *progress) (*strongroomv1.Task, error) {
	t, err := v.start(ctx, name)
	if err != nil || wait.noWait {
		return t, err
	}
	if client.TaskEnded(t) { // a host on its local socket has no tasks to watch
		return t, client.TaskError(t)
	}
	t, err = c.WaitTask(ctx, t.GetId(), show.task)
	show.end(t.GetTarget(), err != nil)
	return t, err
}

// taskDone prints the line of a task that was done, or only started.
func (env *Env) taskDone(wait waitFlags, v verb, name string, t *strongroomv1.Task) {
	if wait.noWait && env.flags.output == outputTable {
		env.resultf("%s", t.GetId())
		return
	}
	env.donef("%s %s", name, v.participle)
}

var taskColumns = []column[*strongroomv1.Task]{
	{"ID", (*strongroomv1.Task).GetId},
	{"KIND", (*strongroomv1.Task).GetKind},
	{"TARGET", (*strongroomv1.Task).GetTarget},
	{"STATE", (*strongroomv1.Task).GetState},
	{"PROGRESS", taskProgress},
	{"BY", (*strongroomv1.Task).GetPrincipal},
	{"ERROR", (*strongroomv1.Task).GetError},
}

func newTaskCmd(env *Env) *cobra.Command {
	return newGroup("task", "Follow long operations",
		`Tasks are the long operations: create, encrypt, rekey, and so on. They are kept
by the controller: a task survives a restart of the controller and of this
program.`,
		newTaskLsCmd(env), newTaskShowCmd(env), newTaskWaitCmd(env), newTaskCancelCmd(env))
}

func newTaskLsCmd(env *Env) *cobra.Command {
	req := &strongroomv1.ListTasksRequest{}
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List tasks",
		Long: `List the tasks that the controller remembers, the newest first.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom task ls --active",
		Args:    noArgs,
		RunE: env.withClient("list the tasks", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Task().ListTasks, req)
			if err != nil {
				return err
			}
			return printList(env, res, res.GetTasks(), taskColumns)
		}),
	}
	cmd.Flags().BoolVar(&req.Active, "active", false, "only tasks that have not ended")
	return cmd
}

func newTaskShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show one task",
		Long: `Show what a task does or did, how far it is, and why it failed.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom task show 0197c1de-52f0-7c4d-9bd5-a4f7e9c4a6a5",
		Args:              exactArgs("the task's id"),
		ValidArgsFunction: env.completeTasks,
		RunE: env.withClient("show the task", func(cmd *cobra.Command, c *client.Client, args []string) error {
			t, err := client.Call(cmd.Context(), c.Task().GetTask, &strongroomv1.GetTaskRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return env.printTask(t)
		}),
	}
}

func newTaskWaitCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "wait ID...",
		Short: "Wait until tasks have ended",
		Long: `Wait until every task named has ended. The exit code is that of the first task
that failed. Ending this command ends the wait, not the tasks.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom task wait $(strongroom vm encrypt web-1 --no-wait)",
		Args:              minArgs("a task's id"),
		ValidArgsFunction: env.completeTasks,
		RunE: env.withClient("wait for the tasks", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, waitFlags{}, verb{
				infinitive: "finish task",
				participle: "done",
				start: func(ctx context.Context, id string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.Task().GetTask, &strongroomv1.GetTaskRequest{Id: id})
				},
			}, args)
		}),
	}
}

func newTaskCancelCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Stop a task and undo what it did",
		Long: `Ask a task to stop. It ends its current step, undoes what it did, and is then
"canceled"; a VM that was being encrypted is as it was before. A deep rekey that
has moved data stops where it is; "strongroom vm rekey NAME --deep" goes on.

Needs the privilege Task.Update.`,
		Example:           "  strongroom task cancel 0197c1de-52f0-7c4d-9bd5-a4f7e9c4a6a5",
		Args:              exactArgs("the task's id"),
		ValidArgsFunction: env.completeTasks,
		RunE: env.withClient("cancel the task", func(cmd *cobra.Command, c *client.Client, args []string) error {
			t, err := client.Call(cmd.Context(), c.Task().CancelTask, &strongroomv1.CancelTaskRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(t, "task %s is asked to stop", t.GetId())
		}),
	}
}

func (env *Env) printTask(t *strongroomv1.Task) error {
	return env.printOne(t, []field{
		{"ID", t.GetId()},
		{"Kind", t.GetKind()},
		{"Target", t.GetTarget()},
		{"State", t.GetState()},
		{"Step", t.GetStep()},
		{"Progress", taskProgress(t)},
		{"Remaining", remaining(t)},
		{"Error", t.GetError()},
		{"Hint", t.GetErrorDetail().GetHint()},
		{"Started by", t.GetPrincipal()},
		{"Created", env.when(t.GetCreated())},
		{"Started", env.when(t.GetStarted())},
		{"Ended", env.when(t.GetEnded())},
	})
}

// taskProgress is "40% of 10 GiB", "3 of 40 items" or "".
func taskProgress(t *strongroomv1.Task) string {
	switch {
	case t.GetTotal() <= 0:
		return ""
	case t.GetUnit() == "bytes":
		return fmt.Sprintf("%d%% of %s", int64(float64(t.GetDone())/float64(t.GetTotal())*100), formatSize(t.GetTotal()))
	}
	return fmt.Sprintf("%d of %d %s", t.GetDone(), t.GetTotal(), t.GetUnit())
}

// remaining is how long the step of a task takes yet, or "".
func remaining(t *strongroomv1.Task) string {
	if t.GetRemainingSeconds() <= 0 {
		return ""
	}
	return (time.Duration(t.GetRemainingSeconds()) * time.Second).String()
}
