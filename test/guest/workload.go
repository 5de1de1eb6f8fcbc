package guest

// Workload returns a guest that behaves like a server with a database, boot
// after boot: it makes an ext4 file system on a blank /dev/vda, checks the
// checksums of all that earlier boots wrote ("verified N files, B bytes"), writes
// 20 more files, and then rewrites blocks of one file without end ("churned N
// writes", twice a second). When the power button is pressed it checks that each
// block reads as it was written last, unmounts and powers off.
//
// Every file begins with marker, in plain text, one word.
func Workload(marker string) Options {
	return Options{
		Programs: []string{"mke2fs"},
		Steps: []Step{
			{Name: "format", Command: "agent await /dev/vda && if agent blank /dev/vda; then mke2fs -q -t ext4 /dev/vda; fi"},
			{Name: "mount", Command: "mount -t ext4 /dev/vda /mnt"},
			{Name: "verify", Command: "agent verify-files /mnt"},
			{Name: "write", Command: "agent write-files /mnt/$(cat /proc/sys/kernel/random/uuid) 20 200000 " + marker},
			{Name: "churn", Command: "agent churn /mnt/churn 4000000 0"},
			{Name: "unmount", Command: "umount /mnt"},
		},
	}
}
