#!/bin/sh
# Makes the golden headers in this directory with cryptsetup (2.6.1, Debian 12).
# UUIDs, salts and keys are new in every run, and the tests depend on none of
# them; the files are committed so that the tests also hold for a cryptsetup
# that is not installed. Each holds the first bytes of an image, gzip -9.
# The passphrase is "correct horse battery staple"; the volume key of NAME is
# NAME.key where there is one. They protect nothing.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf 'correct horse battery staple' >"$work/passphrase"
fast='--pbkdf-memory 64 --pbkdf-parallel 1 --pbkdf-force-iterations 4'

format() { # IMAGE [OPTION...]: luksFormat a new image of 8 MiB
	image=$1
	shift
	truncate -s 8M "$image"
	cryptsetup luksFormat --batch-mode --key-file "$work/passphrase" "$@" "$image"
}
keep() { # NAME BYTES: store the start of the image
	head -c "$2" "$work/$1" | gzip -9n >"$1.gz"
}

# One argon2id keyslot; the keyslot area is kept too.
head -c 64 /dev/urandom >argon2id.key
format "$work/argon2id" --type luks2 --pbkdf argon2id $fast --key-size 512 --sector-size 512 --offset 568 \
	--label "golden" --subsystem "test" --volume-key-file argon2id.key
keep argon2id 290816

# Header only, data at 16 MiB as by default, sectors of 4096, a foreign token.
head -c 64 /dev/urandom >token.key
truncate -s 20M "$work/token"
cryptsetup luksFormat --batch-mode --key-file "$work/passphrase" --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
	--key-size 512 --sector-size 4096 --volume-key-file token.key "$work/token"
echo '{"type":"other/vendor","keyslots":["0"],"note":"kept as it is: é \u2028 \/","n":1.50e3,"deep":[{"a":null,"b":[true,false]}]}' |
	cryptsetup token import "$work/token"
keep token 32768

# A re-encryption that was begun.
format "$work/reencrypt" --type luks2 --pbkdf argon2id $fast --offset 8192
cryptsetup reencrypt --batch-mode --init-only --key-file "$work/passphrase" --pbkdf argon2id $fast "$work/reencrypt"
keep reencrypt 32768

# Encryptions in place that were begun: with the data moved up, and with them where they are, under a detached header.
encrypt() { # NAME [OPTION...]
	name=$1
	shift
	truncate -s 8M "$work/$name"
	cryptsetup reencrypt --batch-mode --encrypt --init-only --type luks2 --key-size 512 --sector-size 512 --key-file "$work/passphrase" --pbkdf argon2id $fast "$@"
	[ -e "$work/$name.header" ] || ln "$work/$name" "$work/$name.header"
	rm -f "$name.key"
	cryptsetup luksDump --batch-mode --dump-volume-key --volume-key-file "$name.key" --key-file "$work/passphrase" "$work/$name.header" >/dev/null
	chmod 644 "$name.key"
	ln -f "$work/$name.header" "$work/$name"
	keep "$name" 32768
}
encrypt encrypting --reduce-device-size 2M "$work/encrypting"
truncate -s 16M "$work/detached.header"
encrypt detached --resilience journal --header "$work/detached.header" "$work/detached"

# LUKS1 with one keyslot, whose area is kept too.
head -c 64 /dev/urandom >luks1.key
format "$work/luks1" --type luks1 --key-size 512 --hash sha256 --pbkdf-force-iterations 1000 --volume-key-file luks1.key
keep luks1 262144

# Another cipher.
format "$work/cbc" --type luks2 --pbkdf argon2id $fast --cipher aes-cbc-essiv:sha256 --key-size 256 --offset 568
keep cbc 32768
