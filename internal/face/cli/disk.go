package cli

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

func newDiskCmd(env *Env) *cobra.Command {
	return newGroup("disk", "Disks of virtual machines",
		`One disk of a VM: its size, and the way to its data without Strongroom, by its key.

While the controller is away, export-key works with a host's local socket:
--server unix:/PATH.`,
		newDiskResizeCmd(env), newDiskExportKeyCmd(env), newDiskFillCmd(env))
}

func newDiskResizeCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		size sizeValue
	)
	cmd := &cobra.Command{
		Use:   "resize VM DISK",
		Short: "Make a disk larger",
		Long: `Make a disk larger, in any power state. A guest that runs sees it at once if it
reaches the disk over vhost-user ("strongroom vm show"); one on NBD must be powered
off. What is new reads as zeros and takes no space until it is written. Then grow
the partition and the file system in the guest.

It cannot be undone: a disk does not shrink. Needs the privilege
VirtualMachine.Config.DiskExtend.`,
		Example: "  strongroom disk resize web-1 disk-0 --size 20G",
		Args:    exactArgs("the VM's name", "the disk's"),
		RunE: env.withClient("resize the disk", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "resize " + args[1] + " of", participle: "resized",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().ResizeDisk, &strongroomv1.ResizeDiskRequest{Name: name, Disk: args[1], SizeBytes: int64(size)})
				},
			}, args[:1])
		}),
	}
	wait.add(cmd)
	cmd.ValidArgsFunction = env.completeFirst(vmNames)
	cmd.Flags().Var(&size, "size", "its new size, such as 20G")
	must(cmd.MarkFlagRequired("size"))
	return cmd
}

func newDiskExportKeyCmd(env *Env) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "export-key VM DISK",
		Short: "Write a disk's key to a file, with the commands that open the disk by it",
		Long: `Write the data encryption key of a disk to a new file, mode 0600, and print the
recovery sheet: the exact commands by which cryptsetup, dm-crypt or "strongroom
volume" open the disk with that file, and whether it must be filled first. Use it
for recovery, and to take a disk to a machine without Strongroom.

Who has the file reads the disk and every copy of it, older ones too, until the
disk gets another key: "strongroom vm rekey VM --disk DISK --deep". Write it to
memory (/dev/shm) or to an encrypted file system. The key is never printed, and
the export is in the audit log and the events. The sheet holds no key.

Needs the privilege Cryptographer.Access.`,
		Example: `  strongroom disk export-key web-1 disk-0 --out /dev/shm/disk-0.key
  strongroom disk export-key web-1 disk-0 --out /dev/shm/disk-0.key -o json`,
		Args: exactArgs("the VM's name", "the disk's"),
		RunE: env.withClient("export the disk's key", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if _, err := os.Lstat(out); !errors.Is(err, fs.ErrNotExist) {
				return errs.New(errs.Exists, "cannot write the key: %s exists", out).WithHint("choose another --out")
			}
			layout, err := exportDiskKey(cmd.Context(), c, args[0], args[1], out)
			if err != nil {
				return err
			}
			sheet := newRecoverySheet(layout, out)
			if env.flags.output != outputTable {
				return env.printObject(sheet)
			}
			return sheet.write(env.Stdout)
		}),
	}
	cmd.ValidArgsFunction = env.completeFirst(vmNames)
	cmd.Flags().StringVar(&out, "out", "", "the `file` to write the key to, 64 raw bytes")
	must(cmd.MarkFlagRequired("out"))
	return cmd
}

// exportDiskKey has the key sealed to this process alone, on its whole way
// through the server, and writes it to file out.
func exportDiskKey(ctx context.Context, c *client.Client, vm, disk, out string) (*strongroomv1.VolumeLayout, error) {
	recipient, err := parcel.NewRecipient()
	if err != nil {
		return nil, err
	}
	defer recipient.Close()
	res, err := client.Call(ctx, c.VM().ExportDiskKey, &strongroomv1.ExportDiskKeyRequest{Name: vm, Disk: disk, RecipientPublicKey: recipient.PublicKey()})
	if err != nil {
		return nil, err
	}
	layout := res.GetLayout()
	dek, err := recipient.Open(res.GetParcel(), parcel.DiskContext{VM: layout.GetVmId(), UUID: layout.GetUuid()}.String())
	if err != nil {
		return nil, errs.New(errs.Corrupt, "the server's answer: %w", err)
	}
	defer dek.Close()
	if err := keyfile.Write(out, dek); err != nil {
		return nil, cannot(err, "write the key")
	}
	return layout, nil
}

func newDiskFillCmd(env *Env) *cobra.Command {
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "fill VM [DISK...]",
		Short: "Make thin disks safe for dm-crypt",
		Long: `Write zeros to every sector of encrypted disks that was never written: of the
disks named, or of all that are thin (imported with "thin"). Strongroom reads such
sectors as zeros, dm-crypt as noise, and file systems of a thin disk rely on the
zeros. The VM must be powered off; each disk then takes its whole size on the
datastore. The guest's data do not change. Interrupted, it can be run again.

It cannot be undone. Needs the privilege Datastore.FileManagement.`,
		Example: `  strongroom disk fill web-1
  strongroom disk fill web-1 disk-0`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, "%s needs a VM's name", cmd.CommandPath())
			}
			return nil
		},
		RunE: env.withClient("fill the disks", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "fill disks of", participle: "filled",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().FillDisks, &strongroomv1.FillDisksRequest{Name: name, Disks: args[1:]})
				},
			}, args[:1])
		}),
	}
	wait.add(cmd)
	cmd.ValidArgsFunction = env.completeFirst(vmNames)
	return cmd
}
