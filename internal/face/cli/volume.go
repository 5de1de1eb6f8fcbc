package cli

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"

	"strongroom/internal/errs"
)

func newVolumeCmd(env *Env, roles Roles) *cobra.Command {
	return newGroup("volume", "Single encrypted volumes, without a controller",
		`One encrypted volume (a LUKS2 file or block device) and the key that opens it, for
recovery, for measuring, and for someone else's QEMU. No server is needed.

A key file holds the 64 raw bytes of the volume's data encryption key, and must
be readable by its owner only. Keep it on media that is encrypted or in memory.`,
		newVolumeFormatCmd(env, roles), newVolumeInfoCmd(env, roles), newVolumeServeCmd(env, roles),
		newVolumeEncryptCmd(env, roles), newVolumeRekeyCmd(env, roles), newVolumeDecryptCmd(env, roles), newVolumeFillCmd(env, roles),
		newVolumeAdoptCmd(env, roles))
}

func newVolumeFormatCmd(env *Env, roles Roles) *cobra.Command {
	var (
		v    VolumeFormat
		size sizeValue
	)
	cmd := &cobra.Command{
		Use:   "format FILE",
		Short: "Make a new encrypted volume",
		Long: `Make a new volume in a new file. An existing file is never overwritten. To make a
key: (umask 077; head -c 64 /dev/urandom > disk.key)

The file takes the space that is written to it, and 16 MiB for the header.`,
		Example: "  strongroom volume format disk.luks --size 10G --key-file disk.key",
		Args:    exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File, v.Size = args[0], int64(size)
			info, err := roles.FormatVolume(cmd.Context(), v)
			if err != nil {
				return errs.Wrap(err, "cannot format %s", v.File)
			}
			return env.printDone(info, "%s formatted: %s, UUID %s", info.File, formatSize(info.SizeBytes), info.UUID)
		},
	}
	f := cmd.Flags()
	f.Var(&size, "size", "the size of its data, such as 10G")
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	f.IntVar(&v.SectorSize, "sector-size", 512, "the encryption sector in bytes: 512 or 4096")
	must(cmd.MarkFlagRequired("size"))
	return cmd
}

func newVolumeInfoCmd(env *Env, roles Roles) *cobra.Command {
	var v VolumeStorage
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Show what a volume's header tells",
		Long: `Show a volume's format, size and cipher, the state of its two header copies, and
the address of the key that it needs. No key is needed, and nothing is changed.`,
		Example: "  strongroom volume info disk-0.luks -o json",
		Args:    exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File = args[0]
			info, err := roles.InspectVolume(cmd.Context(), v)
			if err != nil {
				return errs.Wrap(err, "cannot read %s", args[0])
			}
			fields := []field{
				{"File", info.File},
				{"Header", cmp.Or(info.Header, "in front of the data")},
				{"Format", info.Format},
				{"UUID", info.UUID},
				{"Label", info.Label},
				{"Cipher", info.Cipher},
				{"Size", fmt.Sprintf("%s (%d bytes)", formatSize(info.SizeBytes), info.SizeBytes)},
				{"Sector size", fmt.Sprint(info.SectorSize)},
				{"Data offset", formatSize(info.DataOffset)},
				{"Discards", allowed(info.AllowDiscards)},
				{"Thin", thinText(info.Thin)},
			}
			for _, k := range info.KeySafes {
				fields = append(fields, field{"Key safe", fmt.Sprintf("generation %d under %s, key id %s", k.Generation, k.Provider, k.KeyID)})
			}
			if r := info.Rekey; r != nil {
				fields = append(fields, field{"Deep rekey", fmt.Sprintf("under way, %s of %s; both keys are needed", formatSize(r.DoneBytes), formatSize(r.TotalBytes))})
			}
			if e := info.Encryption; e != nil {
				fields = append(fields, field{"Encryption", fmt.Sprintf("under way in place, %s of %s", formatSize(e.DoneBytes), formatSize(e.TotalBytes))})
			}
			for _, d := range info.Damage {
				fields = append(fields, field{"Damage", d})
			}
			return env.printOne(info, fields)
		},
	}
	addHeader(cmd, &v)
	return cmd
}

func newVolumeServeCmd(env *Env, roles Roles) *cobra.Command {
	var v VolumeServe
	cmd := &cobra.Command{
		Use:   "serve FILE",
		Short: "Serve a volume's data over NBD, to a virtual machine, or as a file",
		Long: `Serve the plain data of a volume until SIGINT or SIGTERM, and print the address
when it can be used.

--nbd serves on an NBD unix socket, for QEMU, nbdcopy, nbdfuse and others.

--nbd-tcp serves NBD on TCP, with TLS 1.3 only, to clients whose certificate is
signed by the authority in --tls-client-ca. All its certificates open the volume.

--vhost-user serves a virtual disk on a vhost-user socket, for QEMU: faster than
NBD, for one VM at a time, whose memory must be shared. The guest's requests wait
while nobody serves; a server that was killed and started again does what was
left.

--fuse shows the data as one file, for loop devices and for programs that want a
file or a device. At that path must be an empty file or none; the volume takes its
place until the end, or until it is unmounted. What a killed process has left
there is cleared away.

Who can open the socket or the file can read the data; both are made for their
owner only.`,
		Example: `  strongroom volume serve disk.luks --key-file disk.key --nbd /run/user/1000/disk.sock
  qemu-img convert 'nbd+unix:///?socket=/run/user/1000/disk.sock' -O qcow2 copy.qcow2
  strongroom volume serve disk.luks --key-file disk.key --vhost-user /run/user/1000/disk.vhost
  qemu-system-x86_64 -m 2G -machine q35,memory-backend=mem \
    -object memory-backend-memfd,id=mem,size=2G,share=on \
    -chardev socket,id=disk,path=/run/user/1000/disk.vhost,reconnect=1 \
    -device vhost-user-blk-pci,chardev=disk
  strongroom volume serve disk.luks --key-file disk.key --nbd-tcp 127.0.0.1:10809 \
    --tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem
  strongroom volume serve disk.luks --key-file disk.key --fuse /run/disk.raw`,
		Args: exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File = args[0]
			err := roles.ServeVolume(cmd.Context(), v, func(address string) { env.resultf("%s", address) })
			return errs.Wrap(err, "cannot serve %s", v.File)
		},
	}
	f := cmd.Flags()
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	f.StringVar(&v.Socket, "nbd", "", "the unix `socket` to serve on")
	f.StringVar(&v.TCP.Address, "nbd-tcp", "", "the `host:port` to serve on with TLS")
	f.StringVar(&v.TCP.Cert, "tls-cert", "", "`file` with the server's certificate, PEM")
	f.StringVar(&v.TCP.Key, "tls-key", "", "`file` with its private key, PEM")
	f.StringVar(&v.TCP.ClientCAs, "tls-client-ca", "", "`file` with the authorities of clients' certificates, PEM")
	f.StringVar(&v.VhostUser, "vhost-user", "", "the unix `socket` to serve a virtual disk on")
	f.StringVar(&v.Mount, "fuse", "", "the `file` to show the data as")
	f.BoolVar(&v.ReadOnly, "read-only", false, "accept no writes")
	f.BoolVar(&v.Direct, "direct", false, "read and write FILE past the page cache (O_DIRECT)")
	addHeader(cmd, &v.VolumeStorage)
	cmd.MarkFlagsOneRequired("nbd", "nbd-tcp", "vhost-user", "fuse")
	cmd.MarkFlagsRequiredTogether("nbd-tcp", "tls-cert", "tls-key", "tls-client-ca")
	return cmd
}

func newVolumeEncryptCmd(env *Env, roles Roles) *cobra.Command {
	var (
		v    VolumeEncrypt
		rate sizeValue
	)
	cmd := &cobra.Command{
		Use:   "encrypt FILE",
		Short: "Encrypt a plain disk where it is",
		Long: `Make a plain (raw) disk that is not in use an encrypted volume in its own file,
where there is no room for a second copy. The file grows by 32 MiB at first and by
16 MiB in the end, less for disks under 16 MiB.

A block device cannot grow: with --header its header is kept in a file (detached),
and the data stay where they are. Every later command needs that file. Keep a copy
of it when the encryption has ended, and after each rekey.

Interrupted before anything was encrypted, the disk is as it was. Later nothing
opens it until the same command, with the same key, has gone on to the end; it
does so also after a crash or a power loss, and no data are lost.

Holes stay holes: if there are any, "strongroom volume fill" makes the volume safe
for dm-crypt. What was encrypted is not read back and compared: have a backup. The
plain data are overwritten in the file; a file system that writes elsewhere, and
flash, keep them until they reuse the space.

For disks of VMs there is "strongroom vm encrypt".`,
		Example: `  (umask 077; head -c 64 /dev/urandom > disk.key)
  strongroom volume encrypt disk.raw --key-file disk.key --rate 100M
  strongroom volume encrypt /dev/vg0/data --header data.header --key-file disk.key`,
		Args: exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File, v.Rate = args[0], int64(rate)
			show := newProgress(env)
			info, err := roles.EncryptVolume(cmd.Context(), v, func(done, total int64) { show.bytes(v.File, "encrypting", done, total) })
			show.end(v.File, err != nil)
			show.close()
			if err != nil {
				return errs.Wrap(err, "cannot encrypt %s", v.File)
			}
			return env.printDone(info, "%s encrypted: %s, UUID %s", info.File, formatSize(info.SizeBytes), info.UUID)
		},
	}
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	cmd.Flags().StringVar(&v.Header, "header", "", "`file` for its header, which is made if there is none; the disk does not grow")
	cmd.Flags().Var(&rate, "rate", "what may be encrypted in a second, such as 100M (default: no bound)")
	return cmd
}

func newVolumeRekeyCmd(env *Env, roles Roles) *cobra.Command {
	var (
		v    VolumeRekey
		rate sizeValue
	)
	cmd := &cobra.Command{
		Use:   "rekey FILE",
		Short: "Encrypt a volume anew under another key",
		Long: `Write a volume that is not in use anew under another key (deep rekey): beside the
old file, verified, then in its place. There must be room for both. Interrupted at
any point, the file is the old volume or the new one.

With --in-place the volume is rewritten where it is, which needs no such room and
works on block devices too. Interrupted it needs both keys; the same command goes
on. What was rewritten is not read back and compared.

The old key no longer opens the volume, but it opens copies of the old file.
Recovery passphrases are not carried over. Disks of VMs are refused: use
"strongroom vm rekey --deep".`,
		Example: `  strongroom volume rekey disk.luks --key-file old.key --new-key-file new.key
  strongroom volume rekey /dev/sdb1 --key-file old.key --new-key-file new.key --in-place`,
		Args: exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if v.Header != "" && !v.InPlace {
				return usageError(cmd, "a volume with a detached header is rekeyed --in-place only")
			}
			if rate > 0 && !v.InPlace {
				return usageError(cmd, "--rate is for a rekey --in-place")
			}
			v.File, v.Rate = args[0], int64(rate)
			show := newProgress(env)
			err := roles.RekeyVolume(cmd.Context(), v, func(done, total int64) { show.bytes(v.File, "rekeying", done, total) })
			show.end(v.File, err != nil)
			show.close()
			if err != nil {
				return errs.Wrap(err, "cannot rekey %s", v.File)
			}
			env.donef("%s rekeyed", v.File)
			return nil
		},
	}
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	addKeyFile(cmd, &v.NewKeyFile, "new-key-file", "`file` with its new key, 64 raw bytes")
	addHeader(cmd, &v.VolumeStorage)
	cmd.Flags().BoolVar(&v.InPlace, "in-place", false, "rewrite it where it is, without room for a second copy")
	cmd.Flags().Var(&rate, "rate", "what may be rewritten in place in a second, such as 100M (default: no bound)")
	return cmd
}

func newVolumeDecryptCmd(env *Env, roles Roles) *cobra.Command {
	var v VolumeDecrypt
	cmd := &cobra.Command{
		Use:   "decrypt FILE",
		Short: "Write a volume's data to a plain file",
		Long: `Write the plain data of a volume to a new file, mode 0600. Holes stay holes. The
volume is not changed, and an existing file is never overwritten.`,
		Example: "  strongroom volume decrypt disk.luks --key-file disk.key --out disk.raw",
		Args:    exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File = args[0]
			show := newProgress(env)
			err := roles.DecryptVolume(cmd.Context(), v, func(done, total int64) { show.bytes(v.File, "decrypting", done, total) })
			show.end(v.File, err != nil)
			show.close()
			if err != nil {
				return errs.Wrap(err, "cannot decrypt %s", v.File)
			}
			env.donef("%s written", v.Out)
			return nil
		},
	}
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	cmd.Flags().StringVar(&v.Out, "out", "", "the plain `file` to write")
	addHeader(cmd, &v.VolumeStorage)
	must(cmd.MarkFlagRequired("out"))
	return cmd
}

func newVolumeFillCmd(env *Env, roles Roles) *cobra.Command {
	var v VolumeFill
	cmd := &cobra.Command{
		Use:   "fill FILE",
		Short: "Make a thin volume safe for dm-crypt",
		Long: `Write zeros to every sector of a volume that was never written. Strongroom reads
such sectors as zeros, dm-crypt as noise; after a thin import a file system relies
on the zeros. The file then takes the whole size of the disk. What the volume
reads as does not change; interrupted, run it again.`,
		Example: "  strongroom volume fill disk-0.luks --key-file disk.key",
		Args:    exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File = args[0]
			show := newProgress(env)
			err := roles.FillVolume(cmd.Context(), v, func(done, total int64) { show.bytes(v.File, "filling", done, total) })
			show.end(v.File, err != nil)
			show.close()
			if err != nil {
				return errs.Wrap(err, "cannot fill %s", v.File)
			}
			env.donef("%s filled", v.File)
			return nil
		},
	}
	addKeyFile(cmd, &v.KeyFile, "key-file", "`file` with its key, 64 raw bytes")
	addHeader(cmd, &v.VolumeStorage)
	return cmd
}

func newVolumeAdoptCmd(env *Env, roles Roles) *cobra.Command {
	var (
		v    VolumeAdopt
		from passphraseFrom
	)
	cmd := &cobra.Command{
		Use:   "adopt FILE",
		Short: "Make a volume of another program's LUKS volume",
		Long: `Copy a LUKS1 or LUKS2 volume that cryptsetup or QEMU made to a new volume, still
encrypted as it is, and write its key to a new key file. FILE is not changed; it
must be encrypted with aes-xts-plain64 and a key of 512 bits. Without a flag that
says where it is, the passphrase is asked for.

The new volume has none of FILE's passphrases. Who had one could have the key:
afterwards run "strongroom volume rekey". For a disk of a VM there is "strongroom
vm create --disk format=luks,...".`,
		Example: `  strongroom volume adopt old.luks --out disk.luks --key-file disk.key --passphrase-file old.pass`,
		Args:    exactArgs("the file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.File = args[0]
			passphrase, err := env.passphrase("Passphrase of "+v.File, from)
			if err != nil {
				return err
			}
			show := newProgress(env)
			info, err := roles.AdoptVolume(cmd.Context(), v, passphrase, func(done, total int64) { show.bytes(v.File, "copying", done, total) })
			show.end(v.File, err != nil)
			show.close()
			if err != nil {
				return errs.Wrap(err, "cannot adopt %s", v.File)
			}
			return env.printDone(info, "%s made: %s, UUID %s", info.File, formatSize(info.SizeBytes), info.UUID)
		},
	}
	f := cmd.Flags()
	f.StringVar(&v.Out, "out", "", "the `file` of the new volume")
	addHeader(cmd, &v.VolumeStorage)
	addKeyFile(cmd, &v.KeyFile, "key-file", "the `file` to write its key to, 64 raw bytes")
	f.StringVar(&from.file, "passphrase-file", "", "`file` whose first line is FILE's passphrase; - is standard input")
	f.StringVar(&from.keyFile, "passphrase-key-file", "", "FILE's key `file`, all of it, as cryptsetup --key-file")
	cmd.MarkFlagsMutuallyExclusive("passphrase-file", "passphrase-key-file")
	must(cmd.MarkFlagRequired("out"))
	return cmd
}

// addHeader adds the flag that names the file of a detached header.
func addHeader(cmd *cobra.Command, v *VolumeStorage) {
	cmd.Flags().StringVar(&v.Header, "header", "", "`file` with its header, if that is detached")
}

// addKeyFile adds a required flag that names a key file.
func addKeyFile(cmd *cobra.Command, file *string, flag, usage string) {
	cmd.Flags().StringVar(file, flag, "", usage)
	must(cmd.MarkFlagRequired(flag))
}

func thinText(thin bool) string {
	if thin {
		return "yes: fill it before dm-crypt opens it"
	}
	return "no"
}

func allowed(b bool) string {
	if b {
		return "give storage back"
	}
	return "ignored"
}
