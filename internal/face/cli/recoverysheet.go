package cli

import (
	"fmt"
	"io"
	"regexp"
	"strings"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// recoverySheet tells how to open an encrypted disk with its key and without
// Strongroom. It names the key's file and holds no key.
type recoverySheet struct {
	VM         string            `json:"vm"`
	Disk       string            `json:"disk"`
	UUID       string            `json:"uuid"`
	Host       string            `json:"host"`
	File       string            `json:"file"` // the volume, on the host
	KeyFile    string            `json:"keyFile"`
	Provider   string            `json:"provider"` // of the KEK that wraps the key in the header
	KeyID      string            `json:"keyId"`
	Cipher     string            `json:"cipher"`
	SizeBytes  int64             `json:"sizeBytes"`  // of the data
	DataOffset int64             `json:"dataOffset"` // bytes
	SectorSize uint32            `json:"sectorSize"` // bytes
	PoweredOn  bool              `json:"poweredOn"`
	FillNeeded bool              `json:"fillNeeded"` // before dm-crypt opens it
	Commands   map[string]string `json:"commands"`   // by what they do, see the constants
}

// The commands of a sheet.
const (
	sheetVerify = "verify"      // the key file, without opening anything
	sheetOpen   = "open"        // with cryptsetup, by the header
	sheetPlain  = "openPlain"   // with cryptsetup, without the header
	sheetTable  = "openDmsetup" // with dmsetup alone
	sheetRaw    = "decrypt"     // into a plain file, with this program and without root
	sheetFill   = "fill"        // with this program
)

// dmSector is dm-crypt's unit of offsets and lengths, in bytes.
const dmSector = 512

func newRecoverySheet(l *strongroomv1.VolumeLayout, keyFile string) recoverySheet {
	s := recoverySheet{
		VM: l.GetVm(), Disk: l.GetDisk(), UUID: l.GetUuid(), Host: l.GetHost(), File: l.GetPath(), KeyFile: keyFile,
		Provider: l.GetKey().GetProvider(), KeyID: l.GetKey().GetKeyId(), Cipher: "aes-xts-plain64",
		SizeBytes: l.GetSizeBytes(), DataOffset: l.GetDataOffset(), SectorSize: l.GetSectorSize(),
		PoweredOn: l.GetPowerState() == "poweredOn", FillNeeded: l.GetThin(),
	}
	file, key, name := shellQuote(s.File), shellQuote(s.KeyFile), s.mapping()
	var option string // of dm-crypt's table
	if s.SectorSize != dmSector {
		option = fmt.Sprintf(" 1 sector_size:%d", s.SectorSize)
	}
	s.Commands = map[string]string{
		sheetVerify: fmt.Sprintf("cryptsetup open --test-passphrase --type luks2 --key-size 512 --volume-key-file %s %s", key, file),
		sheetOpen:   fmt.Sprintf("cryptsetup open --type luks2 --key-size 512 --volume-key-file %s %s %s", key, file, name),
		sheetPlain: fmt.Sprintf("cryptsetup open --type plain --cipher %s --key-size 512 --key-file %s --offset %d --sector-size %d %s %s",
			s.Cipher, key, s.DataOffset/dmSector, s.SectorSize, file, name),
		// The key goes through a pipe: an argument could be seen by all users.
		sheetTable: fmt.Sprintf("LOOP=$(losetup --find --show %s); echo \"0 %d crypt %s $(od -An -v -tx1 %s | tr -d ' \\n') 0 $LOOP %d%s\" | dmsetup create %s",
			file, s.SizeBytes/dmSector, s.Cipher, key, s.DataOffset/dmSector, option, name),
		sheetRaw: fmt.Sprintf("strongroom volume decrypt %s --key-file %s --out %s", file, key, name+".raw"),
	}
	if s.FillNeeded {
		s.Commands[sheetFill] = fmt.Sprintf("strongroom volume fill %s --key-file %s", file, key)
	}
	return s
}

// mapping is the name under which the sheet has the disk opened.
func (s recoverySheet) mapping() string { return s.VM + "-" + s.Disk }

// fillByHand writes zeros through dm-crypt to what was never written. Its
// arguments are the volume, the name of the mapping, offset, size and sector size.
// A shell wants the last line at the start of a line.
const fillByHand = `python3 - %s /dev/mapper/%s %d %d %d <<'END'
import sys
volume, mapped = open(sys.argv[1], "rb"), open(sys.argv[2], "r+b")
offset, size, sector = map(int, sys.argv[3:])
volume.seek(offset)
for at in range(0, size, sector):
    if volume.read(sector) == bytes(sector):
        mapped.seek(at)
        mapped.write(bytes(sector))
END`

func (s recoverySheet) write(w io.Writer) error {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("RECOVERY SHEET")
	p("")
	p("  Disk          %s of VM %s", s.Disk, s.VM)
	p("  Volume        %s on host %s, LUKS2, UUID %s", s.File, s.Host, s.UUID)
	p("  Data          %d bytes from byte %d on, %s, sectors of %d bytes", s.SizeBytes, s.DataOffset, s.Cipher, s.SectorSize)
	p("  Key           %s, 64 bytes, mode 0600", s.KeyFile)
	p("  Wrapped under key id %s of key provider %s", s.KeyID, s.Provider)
	p("")
	p("Who has the key file reads every copy of the disk. Erase it after use: shred -u %s", shellQuote(s.KeyFile))
	p("")
	if s.PoweredOn {
		p("The VM IS RUNNING. Power it off before anything else opens the disk: strongroom vm power-off %s", s.VM)
	} else {
		p("Nothing else may use the disk meanwhile: dm-crypt does not heed Strongroom's locks.")
	}
	p("")
	if s.FillNeeded {
		p("FILL IT FIRST. The disk is thin: sectors that were never written are zeros to the")
		p("guest and noise to dm-crypt. With Strongroom:")
		p("")
		p("  strongroom disk fill %s %s", s.VM, s.Disk)
		p("  %s", s.Commands[sheetFill])
		p("")
		p("Without it, once it is opened as below, and before it is mounted:")
		p("")
		p(fillByHand, shellQuote(s.File), s.mapping(), s.DataOffset, s.SizeBytes, s.SectorSize)
	} else {
		p("It need not be filled: the disk was never thin, or is filled.")
	}
	section := func(title string, commands ...string) {
		p("")
		p("%s", title)
		p("")
		for _, c := range commands {
			p("  %s", c)
		}
	}
	section("Check the key, without root:", s.Commands[sheetVerify])
	section("Open it as /dev/mapper/"+s.mapping()+", as root (to read only, add --readonly):", s.Commands[sheetOpen], "cryptsetup close "+s.mapping())
	section("If its header is damaged:", s.Commands[sheetPlain])
	section("With dmsetup alone:", strings.Split(s.Commands[sheetTable], "; ")...)
	p("  dmsetup remove %s; losetup --detach \"$LOOP\"", s.mapping())
	section("Into a plain file, without root, with this program:", s.Commands[sheetRaw])
	_, err := io.WriteString(w, b.String())
	return err
}

var shellSafe = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellQuote returns s as a word of a POSIX shell.
func shellQuote(s string) string {
	if shellSafe.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
