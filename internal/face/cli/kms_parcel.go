package cli

import (
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

func newKMSParcelCmd(env *Env) *cobra.Command {
	return newGroup("parcel", "Keys that go out of and into a key management server over HTTP",
		`A key that an application with REST exports comes in a parcel, sealed to the
application's public key (HPKE), and one that it imports goes in a parcel, sealed
to the server's: it is in no message, log or proxy on the way. See "ExportKMSKey"
and "ImportKMSKey" of the API.`,
		newKMSParcelKeygenCmd(env), newKMSParcelOpenCmd(env), newKMSParcelSealCmd(env))
}

func newKMSParcelKeygenCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "keygen FILE",
		Short: "Make the key pair that opens parcels",
		Long: `Make a key pair: the private key in FILE, 32 bytes of mode 0600, the public key in
FILE.pub, in base64: the field recipientPublicKey of ExportKMSKey. Whoever has
the private key can open all parcels that were sealed to it: make one for each
export, and delete it then.

The key encapsulation is MLKEM768-X25519.`,
		Example: "  strongroom kms parcel keygen parcel.key",
		Args:    exactArgs("the file of the private key"),
		RunE: func(_ *cobra.Command, args []string) error {
			return cannot(makeParcelKey(env, args[0]), "make the key pair")
		},
	}
}

func makeParcelKey(env *Env, file string) error {
	for _, f := range []string{file, file + ".pub"} {
		if _, err := os.Lstat(f); !errors.Is(err, fs.ErrNotExist) {
			return errs.New(errs.Exists, "%s exists", f).WithHint("choose another file: a parcel may still need that key")
		}
	}
	recipient, err := parcel.NewRecipient()
	if err != nil {
		return err
	}
	defer recipient.Close()
	secret, err := recipient.Secret()
	if err != nil {
		return err
	}
	defer secret.Close()
	if err := keyfile.Write(file, secret); err != nil {
		return err
	}
	if err := writeNew(file+".pub", []byte(base64.StdEncoding.EncodeToString(recipient.PublicKey())+"\n")); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	return env.printDone(map[string]string{"privateKey": file, "publicKey": file + ".pub"}, "private key in %s, public key in %s.pub", file, file)
}

func newKMSParcelOpenCmd(env *Env) *cobra.Command {
	var in, out string
	var context parcel.ApplicationContext
	cmd := &cobra.Command{
		Use:   "open FILE",
		Short: "Open a parcel",
		Long: `Open a parcel with the private key in FILE and write the key that is in it, raw
bytes, to a new file of mode 0600. A parcel is bound to the application that asked
for it, by its full name, and to the key's id: with others it does not open.`,
		Example: "  strongroom kms parcel open parcel.key --application billing --id 01a21abd-5b98-7f16-87b5-10b6ce5c8aeb --in parcel --out orders.key",
		Args:    exactArgs("the file of the private key"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := openParcel(env.Stdin, args[0], in, out, context.String()); err != nil {
				return cannot(err, "open the parcel")
			}
			return env.printDone(map[string]string{"key": out}, "the key is in %s", out)
		},
	}
	cmd.Flags().StringVar(&context.Application, "application", "", "the application's full name")
	cmd.Flags().StringVar(&context.KeyID, "id", "", "the key's id, as ExportKMSKey has answered")
	cmd.Flags().StringVar(&in, "in", "-", "`file` with the parcel, in base64 (- is standard input)")
	cmd.Flags().StringVar(&out, "out", "", "`file` for the key")
	must(cmd.MarkFlagRequired("application"))
	must(cmd.MarkFlagRequired("id"))
	must(cmd.MarkFlagRequired("out"))
	return cmd
}

func newKMSParcelSealCmd(env *Env) *cobra.Command {
	var in, out string
	var context parcel.ImportContext
	cmd := &cobra.Command{
		Use:   "seal FILE",
		Short: "Make a parcel",
		Long: `Seal a key, the raw bytes of a file, to the public key in FILE (- is standard
input), in base64: the field publicKey of the answer to GetKMSImportKey. The
parcel is bound to the application that imports it, by its full name, and to the
name and type that the key is to have: ImportKMSKey takes it for no others.`,
		Example: "  strongroom kms parcel seal import.pub --application billing --name orders --type AES-256 --in orders.key --out parcel",
		Args:    exactArgs("the file of the public key"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := sealParcel(env.Stdin, args[0], in, out, context.String()); err != nil {
				return cannot(err, "make the parcel")
			}
			return env.printDone(map[string]string{"parcel": out}, "the parcel is in %s", out)
		},
	}
	cmd.Flags().StringVar(&context.Application, "application", "", "the application's full name")
	cmd.Flags().StringVar(&context.Name, "name", "", "the name that the key is to have")
	cmd.Flags().StringVar(&context.Type, "type", "", "the `type` of the key, as ImportKMSKey will name it, such as AES-256")
	cmd.Flags().StringVar(&in, "in", "", "`file` with the key, raw bytes")
	cmd.Flags().StringVar(&out, "out", "", "new `file` for the parcel, in base64")
	for _, name := range []string{"application", "name", "type", "in", "out"} {
		must(cmd.MarkFlagRequired(name))
	}
	return cmd
}

func sealParcel(stdin io.Reader, publicFile, in, out, context string) error {
	public, err := readBase64(stdin, publicFile, parcel.PublicKeySize, "publicKey of the answer to GetKMSImportKey")
	if err != nil {
		return err
	}
	f, err := os.Open(in)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < 1 || info.Size() > parcel.KeyMax {
		return errs.New(errs.Invalid, "%s has %d bytes: a parcel carries 1 to %d", in, info.Size(), parcel.KeyMax)
	}
	key, err := keymem.Read(f, int(info.Size()))
	if err != nil {
		return err
	}
	defer key.Close()
	sealed, err := parcel.Seal(public, context, key)
	if err != nil {
		return err
	}
	return writeNew(out, []byte(base64.StdEncoding.EncodeToString(sealed)+"\n"))
}

// readBase64 reads what a field of the API has from a file (- is standard input), at
// most max bytes.
func readBase64(stdin io.Reader, file string, max int, field string) ([]byte, error) {
	source := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		source = f
	}
	const lineEnds = 1024
	text, err := io.ReadAll(io.LimitReader(source, int64(base64.StdEncoding.EncodedLen(max)+lineEnds)))
	if err != nil {
		return nil, err
	}
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, errs.New(errs.Invalid, "it is no base64: %w", err).WithHint("the field %s, without quotes", field)
	}
	return b, nil
}

func openParcel(stdin io.Reader, keyFile, in, out, context string) error {
	secret, err := keyfile.Read(keyFile, parcel.SecretSize)
	if err != nil {
		return err
	}
	defer secret.Close()
	recipient, err := parcel.RestoreRecipient(secret)
	if err != nil {
		return err
	}
	defer recipient.Close()
	sealed, err := readBase64(stdin, in, parcel.KeyMax+parcel.Overhead, "parcel of the answer to ExportKMSKey")
	if err != nil {
		return err
	}
	key, err := recipient.Open(sealed, context)
	if err != nil {
		return errs.New(errs.Invalid, "%w", err).WithHint("--application and --id must be those that are in the answer's context: %s", context)
	}
	defer key.Close()
	return keyfile.Write(out, key)
}
