package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func newBenchmarkCmd(env *Env, roles Roles) *cobra.Command {
	var (
		each   time.Duration
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "benchmark",
		Short: "Measure the speed of the cipher on this machine",
		Long: `Measure XTS-AES-256 on one core, in memory, with every implementation that this
machine can run, beside copying memory and OpenSSL, if it is installed. The last
column is the speed as a multiple of OpenSSL's at the same size. It changes nothing
and needs no server.`,
		Example: "  strongroom benchmark --json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				env.flags.output = outputJSON
			}
			all, err := roles.Benchmark(cmd.Context(), each)
			if err != nil {
				return cannot(err, "measure the cipher")
			}
			return printList(env, map[string]any{"results": all}, all, []column[Measurement]{
				{"IMPLEMENTATION", func(m Measurement) string { return m.Implementation }},
				{"BYTES", func(m Measurement) string { return formatSize(int64(m.Bytes)) }},
				{"OPERATION", func(m Measurement) string { return m.Op }},
				{"SPEED", func(m Measurement) string { return fmt.Sprintf("%.2f GB/s", m.GBPerS) }},
				{"OPENSSL", func(m Measurement) string { return againstOpenSSL(all, m) }},
			})
		},
	}
	addDuration(cmd, &each, "each", 200*time.Millisecond, "how long to measure each")
	cmd.Flags().BoolVar(&asJSON, "json", false, "the same as -o json")
	return cmd
}

// againstOpenSSL is the speed of m as a multiple of OpenSSL's, if that was measured.
func againstOpenSSL(all []Measurement, m Measurement) string {
	for _, o := range all {
		if o.Implementation == "openssl" && o.Bytes == m.Bytes && o.Op == m.Op {
			return fmt.Sprintf("%.2f x", m.GBPerS/o.GBPerS)
		}
	}
	return ""
}
