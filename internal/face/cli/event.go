package cli

import (
	"bytes"
	"encoding/json"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newEventCmd(env *Env) *cobra.Command {
	return newGroup("event", "Events: what happened", "Events tell what happened, when, to what, and who did it.",
		newEventLsCmd(env))
}

func newEventLsCmd(env *Env) *cobra.Command {
	req := &strongroomv1.ListEventsRequest{}
	var follow bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List events",
		Long: `List the newest events, the oldest of them first. With --follow go on with those
that happen, until interrupted; then -o json prints one event a line, and -o yaml
one document for each.

It changes nothing. Needs the privilege System.Read.`,
		Example: `  strongroom event ls --limit 20
  strongroom event ls --follow -o json`,
		Args: noArgs,
		RunE: env.withClient("list the events", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			if follow {
				return env.followEvents(cmd, c)
			}
			res, err := client.Call(cmd.Context(), c.Event().ListEvents, req)
			if err != nil {
				return err
			}
			return printList(env, res, res.GetEvents(), []column[*strongroomv1.Event]{
				{"TIME", func(v *strongroomv1.Event) string { return env.when(v.GetTime()) }},
				{"SEVERITY", (*strongroomv1.Event).GetSeverity},
				{"TYPE", (*strongroomv1.Event).GetType},
				{"TARGET", (*strongroomv1.Event).GetTarget},
				{"BY", (*strongroomv1.Event).GetPrincipal},
				{"MESSAGE", (*strongroomv1.Event).GetMessage},
			})
		}),
	}
	cmd.Flags().Uint32Var(&req.Limit, "limit", 100, "at most so many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "print events as they happen")
	cmd.MarkFlagsMutuallyExclusive("limit", "follow")
	return cmd
}

func (env *Env) followEvents(cmd *cobra.Command, c *client.Client) error {
	stream, err := c.Event().WatchEvents(cmd.Context(), connect.NewRequest(&strongroomv1.WatchEventsRequest{}))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if err := env.printEvent(stream.Msg()); err != nil {
			return err
		}
	}
	if cmd.Context().Err() != nil { // interrupting is how one leaves
		return nil
	}
	return stream.Err()
}

// printEvent prints one event of a stream.
func (env *Env) printEvent(e *strongroomv1.Event) error {
	if env.flags.output == outputTable {
		_, err := fmt.Fprintf(env.Stdout, "%s  %-7s  %s  %s  %s\n", env.when(e.GetTime()), cell(e.GetSeverity()), cell(e.GetType()), cell(e.GetTarget()), cell(e.GetMessage()))
		return err
	}
	text, err := encodeJSON(e)
	if err != nil {
		return err
	}
	if env.flags.output == outputYAML {
		text, err = yaml.JSONToYAML(text)
		text = append([]byte("---\n"), text...)
	} else {
		var line bytes.Buffer
		err = json.Compact(&line, text)
		line.WriteByte('\n')
		text = line.Bytes()
	}
	if err != nil {
		return err
	}
	_, err = env.Stdout.Write(text)
	return err
}

func newAlarmCmd(env *Env) *cobra.Command {
	return newGroup("alarm", "Alarms: what is wrong now", "An alarm is there as long as what it tells of is.",
		newAlarmLsCmd(env))
}

func newAlarmLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List alarms",
		Long: `List what is wrong now, and where the runbook for it is.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom alarm ls",
		Args:    noArgs,
		RunE: env.withClient("list the alarms", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Event().ListAlarms, &strongroomv1.ListAlarmsRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetAlarms(), []column[*strongroomv1.Alarm]{
				{"SEVERITY", (*strongroomv1.Alarm).GetSeverity},
				{"NAME", (*strongroomv1.Alarm).GetName},
				{"TARGET", (*strongroomv1.Alarm).GetTarget},
				{"SINCE", func(v *strongroomv1.Alarm) string { return env.when(v.GetSince()) }},
				{"RUNBOOK", (*strongroomv1.Alarm).GetRunbook},
				{"MESSAGE", (*strongroomv1.Alarm).GetMessage},
			})
		}),
	}
}

func newHealthCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "health",
		Short: "Show how well things are",
		Long: `Show every health check: green, yellow, red, or gray if it was not checked. The
exit code is 0 whatever the checks say.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom health",
		Args:    noArgs,
		RunE: env.withClient("show the health", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Event().GetHealth, &strongroomv1.GetHealthRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetChecks(), []column[*strongroomv1.HealthCheck]{
				{"STATUS", (*strongroomv1.HealthCheck).GetStatus},
				{"CHECK", (*strongroomv1.HealthCheck).GetName},
				{"CHECKED", func(v *strongroomv1.HealthCheck) string { return env.when(v.GetChecked()) }},
				{"MESSAGE", (*strongroomv1.HealthCheck).GetMessage},
			})
		}),
	}
}
