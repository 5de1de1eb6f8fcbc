#!/bin/sh
# Installs the programs that Strongroom's tests and demo run beside it, and
# fetches the kernel of their test guests. `make demo` and `make test` call it;
# when nothing is missing it changes nothing and takes a moment.
#
#   scripts/setup.sh            install what is missing
#   scripts/setup.sh --check    only tell what is missing; fails if anything is
#
# Debian and Ubuntu: apt-get, through sudo when not root. Elsewhere it prints
# what to install and fails.
#
# The kernel is never installed: it is unpacked into guest-kernel in
# $STRONGROOM_CACHE (default: .cache of the checkout), so that no boot loader,
# initramfs or /boot of this machine is touched:
#
#   guest-kernel/vmlinuz    the kernel
#   guest-kernel/modules    its /lib/modules/VERSION
set -eu

cd "$(dirname "$0")/.."
cache=${STRONGROOM_CACHE:-.cache}
guest_kernel=$cache/guest-kernel
check_only=
[ "${1:-}" = --check ] && check_only=1

# What we need, one a line: a program (or a path), the package that has it, why.
needs='
qemu-system-x86_64   qemu-system-x86     the virtual machines
qemu-storage-daemon  qemu-system-common  peer in benchmarks
qemu-img             qemu-utils          qcow2 import, images for tests
qemu-io              qemu-utils          block peer in tests
qemu-nbd             qemu-utils          block peer in tests
qemu-aarch64         qemu-user           arm64 code, in tests
swtpm                swtpm               TPM of hosts and guests
swtpm_setup          swtpm-tools         TPM with an EK certificate, in tests
softhsm2-util        softhsm2            HSM of a KMS, in tests
nbdkit               nbdkit              NBD peer in tests and benchmarks
nbdinfo              libnbd-bin          NBD peer in tests
nbdcopy              libnbd-bin          NBD peer in tests
nbdfuse              libnbd-bin          NBD peer in tests
nbdsh                python3-libnbd      NBD peer in tests
cryptsetup           cryptsetup-bin      LUKS2 peer in tests
dmsetup              dmsetup             dm-crypt inside test guests
mke2fs               e2fsprogs           file systems inside test guests
mkfs.xfs             xfsprogs            file systems of disk groups
losetup              mount               block devices in tests
fusermount3          fuse3               mounts by users other than root
fio                  fio                 benchmarks, load in tests
/usr/bin/pykmip-server python3-pykmip    KMIP peer in tests
openssl              openssl             peer for PKCS#12 and AES in tests
ps                   procps              tests look for leftover processes
gcc                  gcc                 go test -race; strongroom-pkcs11
/usr/include/stdlib.h libc6-dev          go test -race
/etc/ssl/certs/ca-certificates.crt ca-certificates  fetching Go modules
/bin/busybox         busybox-static      user land of test guests
'

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# present PROGRAM PACKAGE: mke2fs and friends live in sbin, which is not in
# everybody's PATH. A busybox that is not static cannot run in a guest. Debian
# puts libc's headers where gcc finds them, so the path is only a fall-back.
present() {
	case $1 in
	/bin/busybox)
		command -v busybox >/dev/null 2>&1 || return 1
		dpkg_installed busybox-static || ! have_dpkg
		;;
	/usr/include/*) [ -e "$1" ] ;;
	/*) [ -e "$1" ] ;;
	*)
		command -v "$1" >/dev/null 2>&1 ||
			[ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]
		;;
	esac
}

have_dpkg() { command -v dpkg-query >/dev/null 2>&1; }

dpkg_installed() {
	have_dpkg && [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

have_kernel() {
	[ -s "$guest_kernel/vmlinuz" ] && [ -d "$guest_kernel/modules/kernel" ]
}

missing=$(printf '%s\n' "$needs" | while read -r program package why; do
	[ -n "$program" ] || continue
	present "$program" || printf '%-22s %-20s %s\n' "$program" "$package" "$why"
done)

if [ -z "$missing" ] && have_kernel; then
	exit 0
fi

if [ -n "$check_only" ] || ! command -v apt-get >/dev/null 2>&1 || ! have_dpkg; then
	if [ -n "$missing" ]; then
		say 'missing (program, its package on Debian, why):'
		printf '%s\n' "$missing" | sed 's/^/  /' >&2
	fi
	have_kernel || say "missing: a kernel for test guests: put its image at $guest_kernel/vmlinuz and its /lib/modules/VERSION at $guest_kernel/modules"
	[ -n "$check_only" ] && exit 1
	die 'this is not Debian or Ubuntu: install the above, then run this again'
fi

[ "$(dpkg --print-architecture)" = amd64 ] || die 'test guests are x86-64: run this on amd64'

as_root=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null 2>&1 || die 'need root to install packages: run as root or install sudo'
	as_root=sudo
fi

# apt waits for a dpkg lock that someone else holds instead of failing.
apt() {
	$as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l \
		apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@"
}

updated=
update() {
	[ -z "$updated" ] || return 1
	updated=1
	say 'reading package lists'
	apt update >&2
}

if [ -n "$missing" ]; then
	packages=$(printf '%s\n' "$missing" | awk '{ print $2 }' | sort -u | tr '\n' ' ')
	say "installing $packages"
	log=$(mktemp)
	# Package lists may be absent or old: then read them once and try again.
	# shellcheck disable=SC2086
	if ! apt install -y --no-install-recommends $packages >"$log" 2>&1; then
		update
		if ! apt install -y --no-install-recommends $packages >"$log" 2>&1; then
			tail -n 20 "$log" >&2
			rm -f "$log"
			die "cannot install $packages"
		fi
	fi
	rm -f "$log"
	printf '%s\n' "$packages" | tr ' ' '\n' | while read -r package; do
		[ -n "$package" ] || continue
		dpkg_installed "$package" || die "$package is not installed, although apt-get reported success"
	done
fi

# kernel_packages prints the packages that hold the newest small kernel and its
# modules: Debian's cloud kernel is one package; Ubuntu has the modules apart.
kernel_packages() {
	for meta in linux-image-cloud-amd64 linux-image-virtual; do
		image=$(apt-cache depends --important "$meta" 2>/dev/null |
			awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }')
		[ -n "$image" ] || continue
		printf '%s\n' "$image"
		modules="linux-modules-${image#linux-image-}"
		if apt-cache show "$modules" >/dev/null 2>&1; then printf '%s\n' "$modules"; fi
		return 0
	done
	return 1
}

if ! have_kernel; then
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/guest-kernel.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	fetch() {
		packages=$(kernel_packages) || return 1
		# shellcheck disable=SC2086
		(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download $packages)
	}
	say 'fetching a kernel for test guests'
	fetch 2>/dev/null || { update && fetch; } || die 'cannot download a kernel package (linux-image-cloud-amd64 or linux-image-virtual)'
	mkdir "$work/tree"
	for deb in "$work"/*.deb; do dpkg -x "$deb" "$work/tree"; done
	rm -f "$work"/*.deb
	# Newer distributions have /usr/lib/modules only.
	image=$(find "$work/tree/boot" "$work/tree/usr/lib/modules" -name 'vmlinuz*' -type f 2>/dev/null | head -n 1)
	modules=$(find "$work/tree" -path '*/lib/modules/*' -maxdepth 5 -name kernel -type d | head -n 1)
	[ -n "$image" ] && [ -n "$modules" ] || die 'the kernel package holds no kernel or no modules'
	mkdir "$work/new"
	mv "$image" "$work/new/vmlinuz"
	mv "$(dirname "$modules")" "$work/new/modules"
	chmod -R u+rwX,go+rX "$work/new"
	rm -rf "$guest_kernel"
	mv "$work/new" "$guest_kernel"
fi

say 'everything that tests and demo need is here'
