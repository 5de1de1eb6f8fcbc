package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newVMCmd(env *Env) *cobra.Command {
	return newGroup("vm", "Virtual machines",
		`A VM is a folder on a datastore: vm.json and its disks. An encrypted disk is a
LUKS2 volume whose key is wrapped under a key of a key provider, so the folder
can be copied, replicated and registered elsewhere as it is.

While the controller is away, ls, show, power-on and power-off work with a
host's local socket: --server unix:/PATH.`,
		newVMCreateCmd(env), newVMCloneCmd(env), newVMLsCmd(env), newVMShowCmd(env),
		newVMPowerOnCmd(env), newVMPowerOffCmd(env), newVMSnapshotCmd(env),
		newVMSetCmd(env), newVMEncryptCmd(env), newVMDecryptCmd(env), newVMRekeyCmd(env),
		newVMRegisterCmd(env), newVMUnregisterCmd(env), newVMForgetCmd(env), newVMDeleteCmd(env), newVMUnlockCmd(env))
}

func newVMCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateVMRequest{Settings: &strongroomv1.VMSettings{}}
	var (
		wait   waitFlags
		disks  []string
		memory = sizeValue(1 << 30)
	)
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a virtual machine",
		Long: `Create a VM with empty disks, or with disks copied from images on the datastore.
With --encrypt its disks are encrypted from the first byte, under a new key of
the provider named, or of the default one.

A disk is SIZE, or a list of KEY=VALUE: size, image (a path on the datastore),
format (of the image: raw, qcow2 or luks), plain (leave this disk unencrypted),
thin (an encrypted disk leaves out the zeros of its image: smaller, but it needs
"strongroom disk fill" before anything but Strongroom may open it).

A LUKS1 or LUKS2 image is taken over as it is encrypted: the disk has the image's
volume key, wrapped under the VM's key, and none of its passphrases. The image is
opened with passphrase-file (the first line; - is standard input) or key-file (all
bytes), both files of this machine; without them the passphrase is asked for.
Who had the passphrase had the volume key: run "strongroom vm rekey --deep" after.

The guest reaches its disks over vhost-user, which is fast because the volume
process works on the guest's memory, or over NBD, where QEMU passes the data on.
By default it is vhost-user on hosts where that works. "vm show" tells which a
running VM has.

It can be undone with "strongroom vm delete". Needs the privilege
VirtualMachine.Inventory.Create; for an image or boot file in the folder of another
VM also VirtualMachine.Provisioning.Clone on that.`,
		Example: `  strongroom vm create web-1 --datastore ds-1 --disk 10G --encrypt
  strongroom vm create db-1 --datastore ds-1 --encrypt --provider kp-2 \
    --disk image=images/debian.qcow2,format=qcow2,size=20G --disk 100G
  strongroom vm create mail-1 --datastore ds-1 --encrypt \
    --disk image=images/mail.luks,format=luks,passphrase-file=mail.pass`,
		Args: exactArgs("the VM's name"),
		RunE: env.withClient("create the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			adopted := false
			for _, text := range disks {
				d, from, err := parseDisk(text)
				if err != nil {
					return err
				}
				req.Disks = append(req.Disks, d)
				if d.GetImageFormat() != formatLUKS {
					continue
				}
				if d.Passphrase, err = env.passphrase("Passphrase of "+d.GetImage(), from); err != nil {
					return err
				}
				defer clear(d.Passphrase)
				adopted = true
			}
			if adopted && !req.GetEncrypt() {
				return usageError(cmd, "a LUKS image needs --encrypt")
			}
			mib, rest := int64(memory)>>20, int64(memory)&(1<<20-1)
			if rest != 0 || mib > 1<<22 {
				return usageError(cmd, "--memory %s: want whole MiB, at most 4T", formatSize(int64(memory)))
			}
			req.Settings.MemoryMib = uint32(mib)
			if req.GetProvider() != "" && !req.GetEncrypt() {
				return usageError(cmd, "--provider needs --encrypt")
			}
			err := env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "create VM", participle: "created",
				start: func(ctx context.Context, _ string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().CreateVM, req)
				},
			}, args)
			if err == nil && adopted {
				env.notef("whoever had a passphrase of the LUKS image can still read the disk; to end that: strongroom vm rekey %s --deep", args[0])
			}
			return err
		}),
	}
	wait.add(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Datastore, "datastore", "", "the datastore for its folder")
	f.StringVar(&req.Host, "host", "", "the host to run on (default: any of the datastore's cluster)")
	f.StringArrayVar(&disks, "disk", nil, "a disk: SIZE or KEY=VALUE,...; may be repeated")
	f.BoolVar(&req.Encrypt, "encrypt", false, "encrypt the disks")
	f.StringArrayVar(&req.Runs, "runs", nil, "it will run this part of the site: controller or provider:NAME; may be repeated")
	addAllowCircular(cmd, &req.AllowCircular)
	f.StringVar(&req.Provider, "provider", "", "the key provider (default: the default provider)")
	f.Uint32Var(&req.Settings.Cpus, "cpus", 1, "virtual CPUs")
	f.Var(&memory, "memory", "memory")
	f.StringVar(&req.Settings.Machine, "machine", "", "QEMU machine: q35 or pc (default: q35)")
	f.StringVar(&req.Settings.Kernel, "kernel", "", "boot this Linux kernel, a path on the datastore")
	f.StringVar(&req.Settings.Initrd, "initrd", "", "with this initial RAM disk, a path on the datastore")
	f.StringVar(&req.Settings.Append, "append", "", "and this kernel command line")
	f.StringVar(&req.Settings.Network, "network", "none", "network: none, or user (outgoing connections only)")
	f.StringVar(&req.Settings.DiskInterface, "disk-interface", "auto", "disk interface: vhost-user, nbd, or auto (vhost-user where it works)")
	must(cmd.MarkFlagRequired("datastore"))
	env.completeFlag(cmd, "datastore", datastoreNames)
	env.completeFlag(cmd, "provider", providerNames)
	env.completeFlag(cmd, "host", hostNames)
	return cmd
}

// formatLUKS is the format of an image that is opened by a passphrase.
const formatLUKS = "luks"

// parseDisk parses the value of --disk. The second result says where the
// passphrase of a LUKS image is.
func parseDisk(text string) (*strongroomv1.NewDisk, passphraseFrom, error) {
	d := &strongroomv1.NewDisk{}
	var from passphraseFrom
	fail := func(format string, args ...any) (*strongroomv1.NewDisk, passphraseFrom, error) {
		return nil, passphraseFrom{}, errs.New(errs.Invalid, "disk %q: "+format, append([]any{text}, args...)...)
	}
	if !strings.Contains(text, "=") && text != "plain" {
		size, err := parseSize(text)
		d.SizeBytes = size
		return d, from, errs.Wrap(err, "disk %q", text)
	}
	for part := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(part, "=")
		var err error
		switch key {
		case "size":
			d.SizeBytes, err = parseSize(value)
		case "image":
			d.Image = value
		case "format":
			d.ImageFormat = value
		case "passphrase-file":
			from.file = value
		case "key-file":
			from.keyFile = value
		case "plain":
			if value != "" {
				err = errs.New(errs.Invalid, "plain takes no value")
			}
			d.Plain = true
		case "thin":
			if value != "" {
				err = errs.New(errs.Invalid, "thin takes no value")
			}
			d.Thin = true
		default:
			err = errs.New(errs.Invalid, "it has no %q; want size, image, format, plain, thin, passphrase-file, key-file", key)
		}
		if err != nil {
			return nil, passphraseFrom{}, errs.Wrap(err, "disk %q", text)
		}
	}
	isLUKS := d.GetImageFormat() == formatLUKS
	switch {
	case d.GetImage() == "" && d.GetSizeBytes() == 0:
		return fail("it needs a size or an image")
	case d.GetThin() && (d.GetImage() == "" || d.GetPlain()):
		return fail("thin is for an image that becomes an encrypted disk")
	case (d.GetImage() == "") != (d.GetImageFormat() == ""):
		return fail("image and format go together")
	case !isLUKS && from != passphraseFrom{}:
		return fail("passphrase-file and key-file are for format=luks")
	case isLUKS && (d.GetPlain() || d.GetThin()):
		return fail("a LUKS image becomes an encrypted disk as it is: neither plain nor thin")
	case from.file != "" && from.keyFile != "":
		return fail("passphrase-file or key-file, not both")
	}
	return d, from, nil
}

func newVMLsCmd(env *Env) *cobra.Command {
	var unregistered bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List virtual machines",
		Long: `List the VMs with their power state and their encryption. With --unregistered,
list instead the VMs that were unregistered and had keys of a key server: their
folders can be registered again.

It changes nothing. Needs the privilege System.Read.`,
		Example: `  strongroom vm ls
  strongroom vm ls -o json | jq -r '.vms[] | select(.cryptoState == "locked") | .name'`,
		Args: noArgs,
		RunE: env.withClient("list the VMs", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			if unregistered {
				return env.printUnregistered(cmd.Context(), c)
			}
			res, err := client.Call(cmd.Context(), c.VM().ListVMs, &strongroomv1.ListVMsRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetVms(), []column[*strongroomv1.VM]{
				{"NAME", (*strongroomv1.VM).GetName},
				{"POWER", (*strongroomv1.VM).GetPowerState},
				{"ENCRYPTION", vmEncryption},
				{"PROVIDER", func(v *strongroomv1.VM) string { return v.GetKey().GetProvider() }},
				{"DISKS", func(v *strongroomv1.VM) string { return fmt.Sprint(len(v.GetDisks())) }},
				{"SIZE", func(v *strongroomv1.VM) string { return formatSize(vmSize(v)) }},
				{"HOST", (*strongroomv1.VM).GetHost},
				{"DATASTORE", (*strongroomv1.VM).GetDatastore},
			})
		}),
	}
	cmd.Flags().BoolVar(&unregistered, "unregistered", false, "list VMs that were unregistered and whose keys are kept")
	return cmd
}

func newVMShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one virtual machine",
		Long: `Show a VM, its disks and the keys that they need; if it is locked, why.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom vm show web-1",
		Args:              exactArgs("the VM's name"),
		ValidArgsFunction: env.completeFirst(vmNames),
		RunE: env.withClient("show the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.VM().GetVM, &strongroomv1.GetVMRequest{Name: args[0]})
			if err != nil {
				return err
			}
			fields := []field{
				{"Name", v.GetName()},
				{"ID", v.GetId()},
				{"Power", v.GetPowerState()},
				{"Encryption", vmEncryption(v)},
				{"Key", keyText(v.GetKey())},
				{"Host", v.GetHost()},
				{"Cluster", v.GetCluster()},
				{"Folder", "[" + v.GetDatastore() + "] " + v.GetFolder()},
				{"CPUs", fmt.Sprint(v.GetSettings().GetCpus())},
				{"Memory", formatSize(int64(v.GetSettings().GetMemoryMib()) << 20)},
				{"Network", v.GetSettings().GetNetwork()},
				{"Disk interface", v.GetSettings().GetDiskInterface()},
				{"Created", env.when(v.GetCreated())},
			}
			if len(v.GetRuns()) > 0 {
				fields = append(fields, field{"Runs", strings.Join(v.GetRuns(), ", ")})
			}
			if v.GetLockReason() != "" {
				fields = append(fields, field{"Locked because", v.GetLockReason()})
			}
			for _, d := range v.GetDisks() {
				fields = append(fields, field{d.GetName(), diskText(d)})
			}
			fields = append(fields, snapshotFields(v)...)
			return env.printOne(v, fields)
		}),
	}
}

// vmEncryption is "none", "partial", "encrypted" or "locked"; "partial" also of a disk
// that is being encrypted in place.
func vmEncryption(v *strongroomv1.VM) string {
	return disksEncryption(v.GetDisks(), v.GetCryptoState() == "locked")
}

func disksEncryption(disks []*strongroomv1.Disk, locked bool) string {
	encrypted, begun := 0, 0
	for _, d := range disks {
		switch {
		case d.GetEncryption() != nil:
			begun++
		case d.GetEncrypted():
			encrypted++
		}
	}
	switch {
	case locked:
		return "locked"
	case encrypted+begun == 0:
		return "none"
	case encrypted < len(disks):
		return "partial"
	}
	return "encrypted"
}

func vmSize(v *strongroomv1.VM) int64 {
	var n int64
	for _, d := range v.GetDisks() {
		n += d.GetSizeBytes()
	}
	return n
}

func keyText(k *strongroomv1.KeyRef) string {
	if k == nil {
		return ""
	}
	return k.GetProvider() + ", key id " + k.GetKeyId()
}

func diskText(d *strongroomv1.Disk) string {
	text := fmt.Sprintf("%s, %s (%s used)", d.GetFile(), formatSize(d.GetSizeBytes()), formatSize(d.GetAllocatedBytes()))
	if d.GetInterface() != "" {
		text += ", over " + d.GetInterface()
	}
	if !d.GetEncrypted() {
		return text + ", not encrypted"
	}
	if e := d.GetEncryption(); e != nil {
		return fmt.Sprintf("%s; encryption in place not finished, %d%% under %s", text, percent(e.GetDoneBytes(), e.GetTotalBytes()), keyText(d.GetKey()))
	}
	if d.GetThin() {
		text += ", thin"
	}
	text = fmt.Sprintf("%s, %s, key safe generation %d under %s", text, d.GetCipher(), d.GetGeneration(), keyText(d.GetKey()))
	if r := d.GetRekey(); r != nil {
		text += fmt.Sprintf("; deep rekey under way, %d%% under %s", percent(r.GetDoneBytes(), r.GetTotalBytes()), keyText(r.GetKey()))
	}
	return text
}

func percent(done, total int64) int64 { return int64(float64(done) / float64(max(1, total)) * 100) }
