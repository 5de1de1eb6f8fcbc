package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

func newProviderBackupCmd(env *Env) *cobra.Command {
	var (
		out          string
		passwordFile string
		noPassword   bool
	)
	cmd := &cobra.Command{
		Use:   "backup NAME",
		Short: "Write a native provider's backup",
		Long: `Write a native provider's key to a .p12 file, mode 0600, and check that the file
holds it. A provider can be used once it was backed up. An existing file is
never overwritten.

A password protects the file; who has the file and the password has the key. A
file without one (--no-password) is the key itself. Which of the two was chosen
is recorded in the events, the password is not.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider backup kp-1 --out /media/usb/kp-1.p12
  strongroom provider backup kp-1 --out kp-1.p12 --password-file pw`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("back up the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if _, err := os.Lstat(out); !errors.Is(err, fs.ErrNotExist) {
				return errs.New(errs.Exists, "cannot write the backup: %s exists", out).WithHint("choose another --out: an old backup may still be needed")
			}
			var password []byte
			if !noPassword {
				var err error
				if password, err = env.password("New password for "+out, passwordFile, true); err != nil {
					return err
				}
				defer clear(password)
				if len(password) == 0 {
					return errs.New(errs.Invalid, "the password is empty").WithHint("for a backup that anybody can open, use --no-password")
				}
			}
			p, err := env.backup(cmd.Context(), c, args[0], out, password)
			if err != nil {
				return err
			}
			if err := env.printDone(p, "provider %s backed up to %s, %s", p.GetName(), out, p.GetState()); err != nil {
				return err
			}
			env.notef("%s", backupAdvice(p.GetName(), out, noPassword))
			return nil
		}),
	}
	f := cmd.Flags()
	f.StringVar(&out, "out", "", "the `file` to write")
	f.StringVar(&passwordFile, "password-file", "", "`file` with the password; - is standard input")
	f.BoolVar(&noPassword, "no-password", false, "do not protect the file: it is the key itself")
	must(cmd.MarkFlagRequired("out"))
	must(cmd.MarkFlagFilename("out", "p12"))
	cmd.MarkFlagsMutuallyExclusive("password-file", "no-password")
	return cmd
}

// backup gets the backup, stores it, and tells the server so once it was read
// again from the file.
func (env *Env) backup(ctx context.Context, c *client.Client, name, out string, password []byte) (*strongroomv1.Provider, error) {
	export, err := client.Call(ctx, c.Provider().ExportProvider, &strongroomv1.ExportProviderRequest{Name: name, Password: password})
	if err != nil {
		return nil, err
	}
	defer clear(export.GetP12())
	sum, err := storeBackup(out, export.GetP12())
	if err != nil {
		return nil, cannot(err, "write the backup")
	}
	p, err := client.Call(ctx, c.Provider().ConfirmProviderBackup, &strongroomv1.ConfirmProviderBackupRequest{
		Name: name, ExportId: export.GetExportId(), Sha256: sum[:],
	})
	if err != nil {
		return nil, errs.Wrap(err, "%s is written, but cannot be confirmed", out)
	}
	return p, nil
}

// storeBackup writes p12 to a new file, makes it durable, reads it again, and
// returns the SHA-256 of what it read. If it fails there is no file.
func storeBackup(out string, p12 []byte) (sum [sha256.Size]byte, err error) {
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		kind := errs.Invalid
		if errors.Is(err, fs.ErrExist) {
			kind = errs.Exists
		}
		return sum, errs.New(kind, "%w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(out)
		}
	}()
	_, err = f.Write(p12)
	if err = errors.Join(err, f.Sync(), f.Close(), durable.SyncDir(filepath.Dir(out))); err != nil {
		return sum, err
	}
	read, err := os.ReadFile(out)
	if err != nil {
		return sum, err
	}
	defer clear(read)
	if !bytes.Equal(read, p12) {
		return sum, errs.New(errs.Corrupt, "%s does not hold what was written to it", out)
	}
	return sha256.Sum256(read), nil
}

func backupAdvice(name, out string, noPassword bool) string {
	text := fmt.Sprintf(`Keep %s where it is safe but can be reached in an emergency, on reliable media,
with a copy at another site. If it is lost together with the controller and the
hosts, everything encrypted under %s is lost for ever: there is no back door.
Try it from time to time: strongroom provider import %s --dry-run`, out, name, out)
	if noPassword {
		return text + "\nIt has no password: whoever reads the file has the key."
	}
	return text + "\nKeep the password apart from it, known to those who act in an emergency."
}
