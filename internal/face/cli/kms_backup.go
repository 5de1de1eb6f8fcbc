package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

func newKMSBackupCmd(env *Env, roles Roles) *cobra.Command {
	return newGroup("backup", "Backups of a key management server",
		`A backup holds everything that a key management server keeps, of one point in time,
encrypted: who can open it has all keys that there were. It is made while the
server serves, and needs nothing of the server to be opened: a passphrase, or the
private key of a recipient, whose public key alone need be on the server.

A key that is destroyed later is still in the backup. Destroy old backups as you
destroy keys.`,
		newKMSBackupCreateCmd(env, roles), newKMSBackupStatusCmd(env), newKMSBackupVerifyCmd(env, roles), newKMSBackupDrillCmd(env, roles), newKMSBackupKeygenCmd(env, roles))
}

func newKMSBackupCreateCmd(env *Env, roles Roles) *cobra.Command {
	var recipient, passphraseFile string
	cmd := &cobra.Command{
		Use:   "create FILE|FOLDER",
		Short: "Back a key management server up, while it serves",
		Long: `Write a backup of the whole key management server, whichever of its nodes is asked,
as it is at one point in time. It goes to a new file of mode 0600; in a folder it
gets a name with the server's id and the time. The file gets its name when it is
complete, flushed and read back, and only then counts as a backup
("strongroom kms backup status").

It opens with a passphrase of 12 to 1024 bytes, asked for at the terminal, or with
the private key that belongs to --recipient: then nothing secret is needed here,
as for a backup that a timer makes.`,
		Example: `  strongroom kms backup create /media/usb/kms.backup
  strongroom kms backup create /srv/backups --recipient /etc/strongroom/backup.key.pub`,
		Args: exactArgs("the file or folder to write to"),
		RunE: env.withClient("back the KMS up", func(cmd *cobra.Command, c *client.Client, args []string) error {
			b := &kmsBackup{env: env, roles: roles, c: c, out: args[0]}
			defer b.close()
			if err := b.protect(recipient, passphraseFile); err != nil {
				return err
			}
			made, err := b.make(cmd.Context())
			if err != nil {
				return err
			}
			return env.printDone(made, "%d keys backed up to %s (%s)", made.GetKeys(), b.out, formatSize(made.GetBytes()))
		}),
	}
	cmd.Flags().StringVar(&recipient, "recipient", "", "`file` with the public key of who alone opens it: strongroom kms backup keygen")
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "`file` whose first line is the passphrase (- is standard input)")
	cmd.MarkFlagsMutuallyExclusive("recipient", "passphrase-file")
	return cmd
}

// kmsBackup is a backup that is being made.
type kmsBackup struct {
	env        *Env
	roles      Roles
	c          *client.Client
	out        string // the file, once it is known
	req        strongroomv1.BackupKMSRequest
	passphrase []byte // to open it again; nil for a recipient's
}

func (b *kmsBackup) close() { clear(b.passphrase) }

func (b *kmsBackup) protect(recipient, passphraseFile string) error {
	if recipient != "" {
		public, err := readRecipient(recipient)
		b.req.Protection = &strongroomv1.BackupKMSRequest_Recipient{Recipient: public}
		return err
	}
	if passphraseFile == "" && !b.env.Interactive {
		return errs.New(errs.Invalid, "nothing says what opens the backup, and there is no terminal to ask for a passphrase").
			WithHint("use --recipient FILE or --passphrase-file FILE")
	}
	passphrase, err := b.env.password("New passphrase of the backup", passphraseFile, true)
	b.passphrase = passphrase
	b.req.Protection = &strongroomv1.BackupKMSRequest_Passphrase{Passphrase: passphrase}
	return err
}

// recipientMax bounds a file with a public key, in bytes.
const recipientMax = 16 << 10

// readRecipient reads the public key that "kms backup keygen" has written: its
// bytes in hexadecimal, on one line.
func readRecipient(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot read the recipient: %w", err).WithHint("strongroom kms backup keygen")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, recipientMax))
	if err != nil {
		return nil, err
	}
	public, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(public) == 0 {
		return nil, errs.New(errs.Invalid, "%s holds no public key of a recipient", file).WithHint("strongroom kms backup keygen writes one")
	}
	return public, nil
}

// make writes the backup and has it count.
func (b *kmsBackup) make(ctx context.Context) (_ *strongroomv1.KMSBackup, err error) {
	folder := false
	if info, err := os.Stat(b.out); err == nil {
		if !info.IsDir() {
			return nil, errs.New(errs.Exists, "%s exists", b.out).WithHint("choose another file: an old backup may still be needed")
		}
		folder = true
	}
	stream, err := b.c.KMSBackup().BackupKMS(ctx, connect.NewRequest(&b.req))
	if err != nil {
		return nil, apierr.From(err)
	}
	defer stream.Close()
	if !stream.Receive() || stream.Msg().GetBegun() == nil {
		return nil, orEnded(stream.Err())
	}
	if begun := stream.Msg().GetBegun(); folder {
		b.out = filepath.Join(b.out, fmt.Sprintf("kms-%.16s-%s.backup", begun.GetCluster(), begun.GetCreated().AsTime().Format("20060102T150405Z")))
	}
	partial := b.out + ".new"
	defer func() {
		if err != nil {
			os.Remove(partial)
		}
	}()
	made, err := b.receive(stream, partial)
	if err != nil {
		return nil, err
	}
	if b.passphrase != nil {
		if _, err := b.roles.VerifyKMSBackup(ctx, KMSBackupFile{File: partial, Passphrase: append([]byte(nil), b.passphrase...)}); err != nil {
			return nil, errs.Wrap(err, "what was written does not open")
		}
	}
	if _, err := os.Lstat(b.out); !errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.Exists, "%s exists", b.out)
	}
	if err := os.Rename(partial, b.out); err != nil {
		return nil, err
	}
	if err := durable.SyncDir(filepath.Dir(b.out)); err != nil {
		return nil, err
	}
	_, err = client.Call(ctx, b.c.KMSBackup().ConfirmKMSBackup, &strongroomv1.ConfirmKMSBackupRequest{Id: made.GetId(), Sha256: made.GetSha256()})
	return made, errs.Wrap(err, "%s is complete, but cannot be confirmed", b.out)
}

func orEnded(err error) error {
	if err != nil {
		return apierr.From(err)
	}
	return errs.New(errs.Unavailable, "the server ended the backup before its end")
}

// receive writes what the server sends to a new file, flushes it, and compares what
// it then holds with what the server says it has sent.
func (b *kmsBackup) receive(stream *connect.ServerStreamForClient[strongroomv1.BackupKMSResponse], path string) (_ *strongroomv1.KMSBackup, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var made *strongroomv1.KMSBackup
	for made == nil && stream.Receive() {
		if _, err := f.Write(stream.Msg().GetData()); err != nil {
			return nil, err
		}
		made = stream.Msg().GetDone()
	}
	if made == nil {
		return nil, orEnded(stream.Err())
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, made.GetBytes()+1)); err != nil {
		return nil, err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != made.GetSha256() {
		return nil, errs.New(errs.Corrupt, "%s does not hold what the server sent", path)
	}
	return made, nil
}

func newKMSBackupStatusCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the last backup, and whether another one is due",
		Long: `Show the last backup of this key management server that was stored and read back,
whichever node made it, and whether it is older than the configuration allows
(backup_max_age_hours). The metrics say so too: strongroom_kms_backup_overdue.

It changes nothing.`,
		Example: "  strongroom kms backup status",
		Args:    noArgs,
		RunE: env.withClient("show the last backup", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			s, err := client.Call(cmd.Context(), c.KMSBackup().GetKMSBackupStatus, &strongroomv1.GetKMSBackupStatusRequest{})
			if err != nil {
				return err
			}
			allowed := "any age"
			if s.GetMaxAgeSeconds() > 0 {
				allowed = formatDuration(time.Duration(s.GetMaxAgeSeconds()) * time.Second)
			}
			fields := []field{{"Last backup", "never"}, {"Overdue", yesNo(s.GetOverdue())}, {"Allowed age", allowed}}
			if last := s.GetLast(); last != nil {
				fields[0].text = env.when(last.GetCreated())
				fields = append(fields, field{"Id", last.GetId()}, field{"Opens with", last.GetOpensWith()}, field{"Keys", strconv.FormatInt(last.GetKeys(), 10)},
					field{"Size", formatSize(last.GetBytes())}, field{"SHA-256", last.GetSha256()})
			}
			return env.printOne(s, fields)
		}),
	}
}

func newKMSBackupKeygenCmd(env *Env, roles Roles) *cobra.Command {
	return &cobra.Command{
		Use:   "keygen FILE",
		Short: "Make the key pair of a recipient of backups",
		Long: `Make the key pair of who is to open backups: the private key in FILE, 32 bytes of
mode 0600, the public key in FILE.pub. Keep the private key away from the server,
with a copy: without it the backups are worth nothing. The public key is no
secret; it is what "strongroom kms backup create --recipient" needs.

The key encapsulation is MLKEM768-X25519 (HPKE): backups that are copied today stay
closed to a quantum computer too.`,
		Example: "  strongroom kms backup keygen /media/usb/backup.key",
		Args:    exactArgs("the file of the private key"),
		RunE: func(cmd *cobra.Command, args []string) error {
			file := args[0]
			for _, f := range []string{file, file + ".pub"} {
				if _, err := os.Lstat(f); !errors.Is(err, fs.ErrNotExist) {
					return cannot(errs.New(errs.Exists, "%s exists", f).WithHint("choose another file: backups may still need that key"), "make the key pair")
				}
			}
			public, id, err := roles.MakeKMSBackupKey(file)
			if err != nil {
				return cannot(err, "make the key pair")
			}
			if err := writeNew(file+".pub", []byte(hex.EncodeToString(public)+"\n")); err != nil {
				return cannot(errors.Join(err, os.Remove(file)), "make the key pair")
			}
			return env.printDone(map[string]string{"id": id, "privateKey": file, "publicKey": file + ".pub"}, "recipient %s: private key in %s, public key in %s.pub", id, file, file)
		},
	}
}
