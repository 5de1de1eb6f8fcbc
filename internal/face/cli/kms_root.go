package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

const (
	// unsealWait bounds how long a KMS that was unsealed takes to serve.
	unsealWait = 2 * time.Minute
	unsealPoll = 100 * time.Millisecond
)

func newKMSUnsealCmd(env *Env) *cobra.Command {
	var passphraseFile string
	var shareFiles []string
	cmd := &cobra.Command{
		Use:   "unseal",
		Short: "Give a sealed key management server its root key",
		Long: `Give a key management server that was started its root key: its passphrase, or one
share after another until there are enough. Each holder of a share can run this
command for himself: the server keeps shares until there are enough of them.
Whose root key comes from a TPM or an HSM opens by itself; after what kept it from
that was put right the command has it try at once.

The command waits until the server serves.`,
		Example: `  strongroom kms unseal --server unix:/var/lib/strongroom/kms/kms.sock
  strongroom kms unseal --share-file share-1 --share-file share-3`,
		Args: noArgs,
		RunE: env.withClient("unseal the KMS", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			seal, err := client.Call(cmd.Context(), c.KMSRoot().GetKMSSeal, &strongroomv1.GetKMSSealRequest{})
			if err != nil {
				return err
			}
			files := shareFiles
			if passphraseFile != "" {
				files = []string{passphraseFile}
			}
			for seal.GetSealed() {
				file := ""
				if len(files) > 0 {
					file, files = files[0], files[1:]
				} else if len(shareFiles) > 0 {
					break
				}
				if seal, err = env.giveSecret(cmd.Context(), c, seal, file); err != nil {
					return err
				}
			}
			if seal.GetSealed() {
				return env.printDone(seal, "share taken: %d of %d are there", seal.GetGiven(), seal.GetSources()[0].GetPeople())
			}
			if err := waitServing(cmd.Context(), c); err != nil {
				return err
			}
			return env.printDone(seal, "the KMS is unsealed and serves")
		}),
	}
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "`file` whose first line is the passphrase (- is standard input)")
	cmd.Flags().StringArrayVar(&shareFiles, "share-file", nil, "`file` whose first line is a share; may be repeated")
	cmd.MarkFlagsMutuallyExclusive("passphrase-file", "share-file")
	return cmd
}

// giveSecret gives one passphrase or share, from file or the terminal.
func (env *Env) giveSecret(ctx context.Context, c *client.Client, seal *strongroomv1.KMSSeal, file string) (*strongroomv1.KMSSeal, error) {
	if file == "" && seal.GetSources()[0].GetPeople() == 0 { // a TPM or an HSM: it is asked again
		return client.Call(ctx, c.KMSRoot().UnsealKMS, &strongroomv1.UnsealKMSRequest{})
	}
	prompt := "Passphrase of the KMS"
	if people := seal.GetSources()[0].GetPeople(); people > 1 {
		prompt = fmt.Sprintf("Share %d of %d", seal.GetGiven()+1, people)
	}
	if file == "" && !env.Interactive {
		return nil, errs.New(errs.Invalid, "a passphrase or share is needed, and there is no terminal to ask").
			WithHint("use --passphrase-file FILE or --share-file FILE")
	}
	secret, err := env.password(prompt, file, false)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	return client.Call(ctx, c.KMSRoot().UnsealKMS, &strongroomv1.UnsealKMSRequest{Secret: secret})
}

// waitServing waits until a KMS that was unsealed serves: in between its socket
// is gone for a moment.
func waitServing(ctx context.Context, c *client.Client) error {
	ctx, cancel := context.WithTimeout(ctx, unsealWait)
	defer cancel()
	tick := time.NewTicker(unsealPoll)
	defer tick.Stop()
	for {
		_, err := client.Call(ctx, c.KMS().GetKMS, &strongroomv1.GetKMSRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errs.Wrap(err, "it took the root key and does not serve")
		case <-tick.C:
		}
	}
}

func newKMSRootCmd(env *Env) *cobra.Command {
	return newGroup("root", "Where the root key of a key management server comes from",
		`The root key opens the server's vault, and with it every key. It comes from a key
file (at first), a passphrase, shares that several people hold, a TPM, or an
HSM.

A change makes a new root key: the old key file, passphrase or shares do not open
the vault any more. Copies of the vault from before they open as they did.`,
		newKMSRootShowCmd(env), newKMSRootSetCmd(env))
}

func newKMSRootShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Show where the root key comes from",
		Long: `Show where the root key comes from, and whether the server is sealed: waits for
people to give it. It changes nothing.`,
		Example: "  strongroom kms root show",
		Args:    noArgs,
		RunE: env.withClient("show the root key's source", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			seal, err := client.Call(cmd.Context(), c.KMSRoot().GetKMSSeal, &strongroomv1.GetKMSSealRequest{})
			if err != nil {
				return err
			}
			fields := []field{{"Sealed", yesNo(seal.GetSealed())}, {"Source", seal.GetSources()[0].GetDescription()}}
			if len(seal.GetSources()) > 1 {
				fields = append(fields, field{"Not confirmed", seal.GetSources()[1].GetDescription()})
			}
			if seal.GetProblem() != "" {
				fields = append(fields, field{"Problem", seal.GetProblem()})
			}
			if seal.GetGiven() > 0 {
				fields = append(fields, field{"Shares given", fmt.Sprint(seal.GetGiven())})
			}
			return env.printOne(seal, fields)
		}),
	}
}

func newKMSRootSetCmd(env *Env) *cobra.Command {
	return newGroup("set", "Have the root key come from elsewhere",
		`Have the root key come from elsewhere, while the server runs. The vault is sealed
under a new root key after the new source has proved that it opens; then the old
source is retired. Interrupted at any point, the server opens by the old source or
by the new one: it tells which.`,
		newKMSRootSetKeyFileCmd(env), newKMSRootSetPassphraseCmd(env), newKMSRootSetSharesCmd(env), newKMSRootSetTPMCmd(env), newKMSRootSetHSMCmd(env))
}

// setRoot makes both steps of a change; secrets makes the second's of the
// answer to the first.
func (env *Env) setRoot(ctx context.Context, c *client.Client, req *strongroomv1.SetKMSRootRequest, secrets func(*strongroomv1.SetKMSRootResponse) ([][]byte, error)) error {
	begun, err := client.Call(ctx, c.KMSRoot().SetKMSRoot, req)
	if err != nil {
		return err
	}
	given, err := secrets(begun)
	if err != nil {
		return errs.Wrap(err, "the old source stays in force")
	}
	seal, err := client.Call(ctx, c.KMSRoot().ConfirmKMSRoot, &strongroomv1.ConfirmKMSRootRequest{Secrets: given})
	if err != nil {
		return err
	}
	return env.printDone(seal, "the root key comes from: %s", seal.GetSources()[0].GetDescription())
}

func newKMSRootSetKeyFileCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "key-file PATH",
		Short: "Keep the root key in a file",
		Long: `Keep a new root key in a file on the server, which must not exist yet. Whoever can
read it and the vault has all keys: it may lie on another medium.`,
		Example: "  strongroom kms root set key-file /media/keys/kms.key",
		Args:    exactArgs("the file on the server"),
		RunE: env.withClient("change the root key's source", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req := &strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_KeyFile{KeyFile: &strongroomv1.KMSRootKeyFile{Path: args[0]}}}
			return env.setRoot(cmd.Context(), c, req, func(*strongroomv1.SetKMSRootResponse) ([][]byte, error) { return nil, nil })
		}),
	}
}

func newKMSRootSetPassphraseCmd(env *Env) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "passphrase",
		Short: "Protect the root key by a passphrase",
		Long: `Protect a new root key by a passphrase of 12 to 1024 bytes (Argon2id), asked for
at the terminal. From then on the server is sealed after every start, until
"strongroom kms unseal". Without the passphrase all keys are lost.`,
		Example: "  strongroom kms root set passphrase",
		Args:    noArgs,
		RunE: env.withClient("change the root key's source", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			passphrase, err := env.password("New passphrase of the KMS", file, true)
			if err != nil {
				return err
			}
			defer clear(passphrase)
			req := &strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Passphrase{Passphrase: &strongroomv1.KMSRootPassphrase{Passphrase: passphrase}}}
			return env.setRoot(cmd.Context(), c, req, func(*strongroomv1.SetKMSRootResponse) ([][]byte, error) {
				return [][]byte{passphrase}, nil
			})
		}),
	}
	cmd.Flags().StringVar(&file, "passphrase-file", "", "`file` whose first line is the passphrase (- is standard input)")
	return cmd
}

func newKMSRootSetSharesCmd(env *Env) *cobra.Command {
	req := &strongroomv1.KMSRootShares{}
	var out string
	cmd := &cobra.Command{
		Use:   "shares",
		Short: "Split the root key into shares that several people hold",
		Long: `Split a new root key into shares, of which a number, the threshold, opens the vault
and fewer tell nothing (Shamir). Each share is written to a file of its own, here,
of mode 0600: give each to its holder and delete it. From then on the server is
sealed after every start, until enough holders ran "strongroom kms unseal".

The files are read again and tried before the old source is retired.`,
		Example: "  strongroom kms root set shares --threshold 3 --shares 5 --out /media/ceremony",
		Args:    noArgs,
		RunE: env.withClient("change the root key's source", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			var written [][]byte
			defer func() {
				for _, b := range written {
					clear(b)
				}
			}()
			err := env.setRoot(cmd.Context(), c, &strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Shares{Shares: req}},
				func(begun *strongroomv1.SetKMSRootResponse) ([][]byte, error) {
					var err error
					written, err = env.writeShares(out, begun.GetShares())
					return written, err
				})
			if err != nil {
				return err
			}
			env.notef("The shares are in %s: give each to its holder, and delete the files.", out)
			return nil
		}),
	}
	cmd.Flags().Uint32Var(&req.Threshold, "threshold", 2, "how many shares open the vault, at least 2")
	cmd.Flags().Uint32Var(&req.Count, "shares", 3, "how many shares there are, at most 32")
	cmd.Flags().StringVar(&out, "out", ".", "the `folder` for the files share-1, share-2, ...")
	must(cmd.MarkFlagDirname("out"))
	return cmd
}

func newKMSRootSetTPMCmd(env *Env) *cobra.Command {
	var device string
	var pcrs []uint
	cmd := &cobra.Command{
		Use:   "tpm",
		Short: "Seal the root key to the server's TPM",
		Long: `Seal a new root key to a TPM 2.0 of the server. It opens by itself, on this machine
only, and only while the chosen PCRs have the values that they have now: PCR 7, the
default, changes with the state and keys of Secure Boot, 0 and 2 with the firmware,
4 and 11 with what is booted.

Before such a change take another source for a while. When the TPM or the machine
is lost, so are all keys: keep a backup.`,
		Example: `  strongroom kms root set tpm
  strongroom kms root set tpm --device /dev/tpmrm0 --pcrs 0,2,7`,
		Args: noArgs,
		RunE: env.withClient("change the root key's source", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			t := &strongroomv1.KMSRootTPM{Device: device}
			for _, n := range pcrs {
				t.Pcrs = append(t.Pcrs, uint32(min(n, math.MaxUint32)))
			}
			req := &strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Tpm{Tpm: t}}
			return env.setRoot(cmd.Context(), c, req, func(*strongroomv1.SetKMSRootResponse) ([][]byte, error) { return nil, nil })
		}),
	}
	cmd.Flags().StringVar(&device, "device", "/dev/tpmrm0", "the TPM's `device` on the server, or unix:/PATH of an emulator")
	cmd.Flags().UintSliceVar(&pcrs, "pcrs", []uint{7}, "the PCRs that must not change, 0 to 23")
	return cmd
}

func newKMSRootSetHSMCmd(env *Env) *cobra.Command {
	h := &strongroomv1.KMSRootHSM{}
	cmd := &cobra.Command{
		Use:   "hsm",
		Short: "Wrap the root key in a hardware security module",
		Long: `Wrap a new root key under an AES-256 key in a hardware security module, by PKCS #11
(AES-GCM). The key is made in the token if it has none of that label, and never
leaves it. The module is asked once, when the server starts; its vendor's library
is loaded into a process of its own, strongroom-pkcs11.

When the key in the module is lost, so are all keys: keep a backup of the token.`,
		Example: "  strongroom kms root set hsm --module /usr/lib/softhsm/libsofthsm2.so --token kms --pin-file /etc/strongroom/hsm.pin",
		Args:    noArgs,
		RunE: env.withClient("change the root key's source", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			req := &strongroomv1.SetKMSRootRequest{Source: &strongroomv1.SetKMSRootRequest_Hsm{Hsm: h}}
			return env.setRoot(cmd.Context(), c, req, func(*strongroomv1.SetKMSRootResponse) ([][]byte, error) { return nil, nil })
		}),
	}
	cmd.Flags().StringVar(&h.Module, "module", "", "the vendor's PKCS #11 library, a `file` on the server")
	cmd.Flags().StringVar(&h.Token, "token", "", "the token's label")
	cmd.Flags().StringVar(&h.Key, "key", "strongroom-kms", "the label of the AES key in it")
	cmd.Flags().StringVar(&h.PinFile, "pin-file", "", "`file` on the server whose first line is the user's PIN, mode 0600")
	for _, needed := range []string{"module", "token", "pin-file"} {
		must(cmd.MarkFlagRequired(needed))
	}
	return cmd
}

// writeShares writes each share to a file of its own in dir, durably, and
// returns what the files hold. On an error it leaves none.
func (env *Env) writeShares(dir string, shares [][]byte) (read [][]byte, err error) {
	var made []string
	defer func() {
		if err != nil {
			for _, path := range made {
				err = errors.Join(err, os.Remove(path))
			}
		}
	}()
	for i, share := range shares {
		path := filepath.Join(dir, fmt.Sprintf("share-%d", i+1))
		line := append(share, '\n')
		err := writeNew(path, line)
		clear(share)
		clear(line)
		if err != nil {
			return read, err
		}
		made = append(made, path)
		again, err := env.passwordFile(path)
		if err != nil {
			return read, err
		}
		read = append(read, again)
	}
	return read, durable.SyncDir(dir)
}
