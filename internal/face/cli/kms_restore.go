package cli

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"strongroom/internal/errs"
)

// KMSBackupFile names a backup of a key management server and what opens it.
type KMSBackupFile struct {
	File       string
	KeyFile    string // private key of a recipient; "": the passphrase
	Passphrase []byte // whoever is given it wipes it
}

// KMSBackupReport is what a backup holds.
type KMSBackupReport struct {
	ID        string    `json:"id"`
	Cluster   string    `json:"cluster"`
	Created   time.Time `json:"created"`
	OpensWith string    `json:"opensWith"`
	Program   string    `json:"program"`
	Address   string    `json:"address"`
	Revision  int64     `json:"revision"`
	Records   int64     `json:"records"`
	Objects   int64     `json:"objects"`
	Keys      int64     `json:"keys"`
}

// KMSDrillReport is what a restore drill has found.
type KMSDrillReport struct {
	Backup       KMSBackupReport `json:"backup"`
	Groups       int             `json:"groups"`
	Applications int             `json:"applications"`
	ObjectsRead  int64           `json:"objectsRead"`
	KeysRead     int64           `json:"keysRead"`
	RestoreMs    int64           `json:"restoreMs"`
	OpenMs       int64           `json:"openMs"`
	ReadMs       int64           `json:"readMs"`
}

// KMSRestore says how to restore a key management server.
type KMSRestore struct {
	Backup     KMSBackupFile
	ConfigFile string // of the new server; "": Dir
	Dir        string // its data folder
	// What tells which keys were destroyed after the backup was made.
	AuditLogs          []string
	Lists              []string
	BringBackDestroyed bool
}

// KMSRestoreReport is what was restored.
type KMSRestoreReport struct {
	Backup    KMSBackupReport `json:"backup"`
	Dir       string          `json:"dir"`
	KeyFile   string          `json:"keyFile"`
	Destroyed []string        `json:"destroyed"` // keys that were destroyed since the backup, and are again
	Revoked   []string        `json:"revoked"`   // applications and credentials that were deleted or revoked since, and are again
}

// addBackupKey adds the flags that say what opens a backup.
func addBackupKey(cmd *cobra.Command, keyFile, passphraseFile *string) {
	cmd.Flags().StringVar(keyFile, "key-file", "", "`file` with the private key of the recipient")
	cmd.Flags().StringVar(passphraseFile, "passphrase-file", "", "`file` whose first line is the passphrase (- is standard input)")
	cmd.MarkFlagsMutuallyExclusive("key-file", "passphrase-file")
}

// backupFile completes f with what opens it.
func (env *Env) backupFile(ctx context.Context, roles Roles, f *KMSBackupFile, passphraseFile string) error {
	recipient, err := roles.KMSBackupRecipient(ctx, f.File)
	switch {
	case err != nil:
		return err
	case recipient != "" && f.KeyFile == "":
		return errs.New(errs.Invalid, "it opens with the private key of recipient %s", recipient).WithHint("use --key-file FILE")
	case recipient == "" && f.KeyFile != "":
		return errs.New(errs.Invalid, "it opens with a passphrase, not with a private key").WithHint("use --passphrase-file FILE")
	case f.KeyFile != "":
		return nil
	case passphraseFile == "" && !env.Interactive:
		return errs.New(errs.Invalid, "its passphrase is needed, and there is no terminal to ask").WithHint("use --passphrase-file FILE")
	}
	f.Passphrase, err = env.password("Passphrase of the backup", passphraseFile, false)
	return err
}

func (env *Env) backupFields(r KMSBackupReport) []field {
	return []field{
		{"Backup", r.ID},
		{"KMS", r.Cluster + ", " + r.Address},
		{"Made", r.Created.In(env.Now().Location()).Format(time.DateTime)},
		{"Opens with", r.OpensWith},
		{"Revision", strconv.FormatInt(r.Revision, 10)},
		{"Records", strconv.FormatInt(r.Records, 10)},
		{"Objects", strconv.FormatInt(r.Objects, 10)},
		{"Keys", strconv.FormatInt(r.Keys, 10)},
	}
}

func newKMSBackupVerifyCmd(env *Env, roles Roles) *cobra.Command {
	var f KMSBackupFile
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Check that a backup is whole and opens",
		Long: `Read a backup to its end, open every record and every key in it, and compare what
there is with what the server had when it was made. Altered, cut or reordered
anywhere, it is refused.

It needs no server, writes nothing and changes nothing.`,
		Example: `  strongroom kms backup verify kms.backup
  strongroom kms backup verify kms.backup --key-file /media/usb/backup.key`,
		Args: exactArgs("the backup"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.File = args[0]
			if err := env.backupFile(cmd.Context(), roles, &f, passphraseFile); err != nil {
				return cannot(err, "verify the backup")
			}
			r, err := roles.VerifyKMSBackup(cmd.Context(), f)
			if err != nil {
				return cannot(err, "verify the backup")
			}
			return env.printOne(r, append(env.backupFields(r), field{"Whole", "yes"}))
		},
	}
	addBackupKey(cmd, &f.KeyFile, &passphraseFile)
	return cmd
}

func newKMSBackupDrillCmd(env *Env, roles Roles) *cobra.Command {
	var f KMSBackupFile
	var passphraseFile, dir string
	cmd := &cobra.Command{
		Use:   "drill FILE",
		Short: "Practise a restore, and read every key of it",
		Long: `Restore a backup into a new temporary folder, open the server that it makes as
after a start, read every key, compare all with what the server had when the backup
was made, and remove the folder. It tells how long each step took: so long would a
restore take.

It goes near no running server and listens nowhere. The temporary server's root key
is in memory only: what a crash leaves in the folder opens to nobody.`,
		Example: `  strongroom kms backup drill kms.backup --key-file /media/usb/backup.key
  strongroom kms backup drill kms.backup --dir /srv/scratch -o json`,
		Args: exactArgs("the backup"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.File = args[0]
			if err := env.backupFile(cmd.Context(), roles, &f, passphraseFile); err != nil {
				return cannot(err, "practise the restore")
			}
			r, err := roles.DrillKMSBackup(cmd.Context(), f, dir)
			if err != nil {
				return cannot(err, "practise the restore")
			}
			seconds := func(ms int64) string { return strconv.FormatFloat(float64(ms)/1000, 'f', 1, 64) + " s" }
			return env.printOne(r, append(env.backupFields(r.Backup),
				field{"Groups", strconv.Itoa(r.Groups)}, field{"Applications", strconv.Itoa(r.Applications)},
				field{"Restored in", seconds(r.RestoreMs)}, field{"Opened in", seconds(r.OpenMs)},
				field{"Keys read", strconv.FormatInt(r.KeysRead, 10) + " in " + seconds(r.ReadMs) + ", all as they were backed up"}))
		},
	}
	addBackupKey(cmd, &f.KeyFile, &passphraseFile)
	cmd.Flags().StringVar(&dir, "dir", "", "the `folder` below which the temporary one is made (default: that of the system)")
	must(cmd.MarkFlagDirname("dir"))
	return cmd
}

func newKMSRestoreCmd(env *Env, roles Roles) *cobra.Command {
	var r KMSRestore
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make a new key management server from a backup",
		Long: `Make the data folder of a new key management server, of one node, from a backup. It
has the keys, groups, applications, credentials and certificates of the one that
was backed up, so that its clients go on as they are. Its root key is a new one, in
a key file (change that with "strongroom kms root set"); its audit log begins with
where it comes from. Other nodes join it anew.

A key that was destroyed after the backup was made is in the backup. So that it
does not come back, the command needs to know what was destroyed: from the audit
logs of the old nodes (--audit-log, each with audit-key.pem beside it), or from a
list (--destroyed). Keys that were made after the backup are lost. Requests for
approval are not in a backup: whoever waits for one asks again.

The old server must be gone for good: two servers of the same keys drift apart.

The folder must be empty. The backup is verified before anything is written. A
restore that breaks off leaves nothing that runs; repeat it.`,
		Example: `  strongroom kms restore kms.backup --config /etc/strongroom/kms.toml --audit-log /mnt/old/kms/audit
  strongroom kms restore kms.backup --dir /var/lib/strongroom/kms --key-file /media/usb/backup.key --destroyed destroyed.txt`,
		Args: exactArgs("the backup"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Backup.File = args[0]
			if err := env.backupFile(cmd.Context(), roles, &r.Backup, passphraseFile); err != nil {
				return cannot(err, "restore the KMS")
			}
			done, err := roles.RestoreKMS(cmd.Context(), r)
			if err != nil {
				return cannot(err, "restore the KMS")
			}
			next := "strongroom kms run --config " + r.ConfigFile
			if r.Dir != "" {
				next = `strongroom kms run, with data_dir = "` + done.Dir + `"`
			}
			if err := env.printDone(done, "%d keys, as of %s, restored into %s; next: %s", done.Backup.Keys-int64(len(done.Destroyed)), done.Backup.Created.Format(time.RFC3339), done.Dir, next); err != nil {
				return err
			}
			if n := len(done.Destroyed); n > 0 {
				env.notef("%d keys of the backup were destroyed since, and are destroyed again:\n%s", n, strings.Join(done.Destroyed, "\n"))
			}
			if n := len(done.Revoked); n > 0 {
				env.notef("%d applications or credentials were deleted or revoked since, and are again:\n%s", n, strings.Join(done.Revoked, "\n"))
			}
			if r.BringBackDestroyed {
				env.notef("Keys that were destroyed after %s and that nothing given here names are back.", done.Backup.Created.Format(time.RFC3339))
			}
			env.notef("The root key lies in %s: whoever has it and the folder has all keys. Change that with: strongroom kms root set", done.KeyFile)
			return nil
		},
	}
	addBackupKey(cmd, &r.Backup.KeyFile, &passphraseFile)
	f := cmd.Flags()
	f.StringVar(&r.ConfigFile, "config", "/etc/strongroom/kms.toml", "the configuration `file` of the new server, TOML")
	must(cmd.MarkFlagFilename("config", "toml"))
	f.StringVar(&r.Dir, "dir", "", "the data `folder` to make, instead of a configuration's")
	must(cmd.MarkFlagDirname("dir"))
	cmd.MarkFlagsMutuallyExclusive("config", "dir")
	f.StringArrayVar(&r.AuditLogs, "audit-log", nil, "`folder` with the audit log of an old node; may be repeated")
	f.StringArrayVar(&r.Lists, "destroyed", nil, "`file` with one identifier of a destroyed key in each line; may be repeated")
	f.BoolVar(&r.BringBackDestroyed, "bring-back-destroyed", false, "let keys come back that were destroyed since, as far as nothing given here names them")
	return cmd
}
