#!/usr/bin/env python3
"""Writes keks.json, backups.json and secrets.json from docs/spec/native-provider.md
and docs/spec/native-backup.md alone (needs python3-cryptography).

Each vector tests one thing; "expect" is "ok" or the failure.
"""
import hashlib
import hmac
import json
import os
import struct
import uuid

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

HERE = os.path.dirname(os.path.abspath(__file__))
KDK = bytes(range(32))
KEY_ID = uuid.UUID("5f0c7c9e-3f5b-4a8e-8a6b-1f1f6a2d9f10")
OBJECT_ID = uuid.UUID("0f9d5f5e-93a8-4d0e-8d63-7c1f1d8f2b11")


def write(name, vectors):
    with open(os.path.join(HERE, name), "w") as out:
        json.dump(vectors, out, indent=1)
        out.write("\n")


# KEKs.

def kek(kdk, key_id, object_id):
    info = b"strongroom/native-kek/v1\0" + key_id.bytes + object_id.bytes
    return HKDF(SHA256(), 32, salt=None, info=info).derive(kdk)


keks = []
for kdk, key_id, object_id in [
    (KDK, KEY_ID, OBJECT_ID),
    (KDK, OBJECT_ID, KEY_ID),
    (KDK, KEY_ID, uuid.UUID(int=1)),
    (bytes(31) + b"\1", KEY_ID, OBJECT_ID),
    (b"\xff" * 32, uuid.UUID(int=2**128 - 1), uuid.UUID(int=2**128 - 1)),
]:
    keks.append({"kdk": kdk.hex(), "key_id": f"{key_id}/{object_id}", "kek": kek(kdk, key_id, object_id).hex()})
write("keks.json", keks)


# Backups.

def tlv(tag, *content):
    body = b"".join(content)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = (len(body).bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + len(body).to_bytes(size, "big") + body


def seq(*content):
    return tlv(0x30, *content)


def integer(n):
    return tlv(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big", signed=True))


def oid(text):
    arcs = [int(a) for a in text.split(".")]
    body = b""
    for arc in [arcs[0] * 40 + arcs[1]] + arcs[2:]:
        part = bytes([arc & 0x7F])
        while arc := arc >> 7:
            part = bytes([0x80 | arc & 0x7F]) + part
        body += part
    return tlv(0x06, body)


def octets(b):
    return tlv(0x04, b)


def data(content):
    return seq(oid("1.2.840.113549.1.7.1"), tlv(0xA0, octets(content)))


NULL = tlv(0x05)
DESCRIPTION = f"strongroom native-backup v1; key-id={KEY_ID}; created=2026-11-23T03:22:28Z; exported=2026-11-24T10:00:00Z; tpm-required=yes"


def mac_key(password, salt, iterations):
    bmp = password.encode("utf-16-be") + b"\0\0"
    bmp = (bmp * 64)[:(len(bmp) + 63) // 64 * 64]
    a = hashlib.sha256(bytes([3]) * 64 + salt * 4 + bmp).digest()
    for _ in range(iterations - 1):
        a = hashlib.sha256(a).digest()
    return a


def backup(password="", name="kp-1", description=DESCRIPTION, kdk=KDK, version=3, header=bytes.fromhex("302e020100300506032b657004220420"),
           padding=b"\x10" * 16, iterations=3, mac_iterations=2, mac_password=None, prf="1.2.840.113549.2.9", cipher="2.16.840.1.101.3.4.1.42",
           extra_bag=b"", swap=False, mac_flip=0, key_length=b""):
    salt, iv, mac_salt = bytes(range(0x10, 0x20)), bytes(range(0x20, 0x30)), bytes(range(0x30, 0x40))
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, max(iterations, 1) % 1000, 32)
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    ciphertext = encryptor.update(header + kdk + padding) + encryptor.finalize()
    kdf = seq(oid("1.2.840.113549.1.5.12"), seq(octets(salt), integer(iterations), key_length, seq(oid(prf), NULL)))
    pbes2 = seq(oid("1.2.840.113549.1.5.13"), seq(kdf, seq(oid(cipher), octets(iv))))
    attributes = sorted([
        seq(oid("1.2.840.113549.1.9.20"), tlv(0x31, tlv(0x1E, name.encode("utf-16-be")))),
        seq(oid("1.2.840.113549.1.9.2"), tlv(0x31, tlv(0x0C, description.encode()))),
    ], reverse=swap)
    bag = seq(oid("1.2.840.113549.1.12.10.1.2"), tlv(0xA0, seq(pbes2, octets(ciphertext))), tlv(0x31, *attributes))
    safe = seq(data(seq(bag, extra_bag)))
    mac = hmac.new(mac_key(password if mac_password is None else mac_password, mac_salt, mac_iterations % 1000), safe, "sha256").digest()
    mac = bytes([mac[0] ^ mac_flip]) + mac[1:]
    digest = seq(seq(oid("2.16.840.1.101.3.4.2.1"), NULL), octets(mac))
    return seq(integer(version), data(safe), seq(digest, octets(mac_salt), integer(mac_iterations)))


backups = []


def add(name, p12, expect="ok", password=""):
    backups.append({"name": name, "p12": p12.hex(), "password": password, "expect": expect})


add("without a password", backup())
add("with a password", backup("secret"), password="secret")
add("password beyond ASCII and the BMP", backup("p\u00e4ss\U0001f510"), password="p\u00e4ss\U0001f510")
add("password longer than a block of UTF-16", backup("0123456789" * 7), password="0123456789" * 7)
add("password that fills a block of UTF-16", backup("0123456789abcdef0123456789abcde"), password="0123456789abcdef0123456789abcde")
add("longest name", backup(name="n" * 63))
add("one iteration", backup(iterations=1, mac_iterations=1))

add("password needed", backup("secret"), "password needed")
add("wrong password", backup("secret"), "wrong password", password="Secret")
add("password where none is", backup(), "wrong password", password="secret")

add("MAC altered", backup(mac_flip=1), "corrupt")
add("MAC under another password", backup("secret", mac_password="x"), "corrupt", password="secret")
add("another key type", backup(header=bytes.fromhex("302e020100300506032b656e04220420")), "corrupt")
add("wrong padding", backup(padding=b"\x0f" * 16), "corrupt")
add("KDK of 16 bytes", backup(kdk=KDK[:16]), "corrupt")
add("KDK of 48 bytes", backup(kdk=KDK + KDK[:16]), "corrupt")
add("PFX version 4", backup(version=4), "corrupt")
add("PRF with SHA-1", backup(prf="1.2.840.113549.2.7"), "corrupt")
add("AES-128", backup(cipher="2.16.840.1.101.3.4.1.2"), "corrupt")
add("PBKDF2 with a key length", backup(key_length=integer(32)), "corrupt")
add("too many iterations", backup(iterations=5_000_001), "corrupt")
add("too many iterations of the MAC", backup(mac_iterations=5_000_001), "corrupt")
add("no iterations", backup(iterations=0), "corrupt")
add("a second bag", backup(extra_bag=seq(oid("1.2.840.113549.1.12.10.1.2"), tlv(0xA0, seq()))), "corrupt")
add("attributes in disorder", backup(swap=True), "corrupt")
add("name that no provider has", backup(name="KP-1"), "corrupt")
add("name beyond ASCII", backup(name="kp-\u00fc"), "corrupt")
add("empty name", backup(name=""), "corrupt")
add("name too long", backup(name="n" * 64), "corrupt")
add("description of version 2", backup(description=DESCRIPTION.replace("v1", "v2")), "corrupt")
add("nil key id", backup(description=DESCRIPTION.replace(str(KEY_ID), str(uuid.UUID(int=0)))), "corrupt")
add("description in another order", backup(description=DESCRIPTION.replace("created", "exporteD")), "corrupt")
add("time with an offset", backup(description=DESCRIPTION.replace("10:00:00Z", "10:00:00+00:00")), "corrupt")
add("time before 1970", backup(description=DESCRIPTION.replace("2026-11-24", "1969-12-31")), "corrupt")
good = backup()
add("a byte more", good + b"\0", "corrupt")
add("a byte less", good[:-1], "corrupt")
add("length in long form", b"\x30\x83\x00" + good[2:], "corrupt")
add("longer than any backup", backup(description="x" * 5000), "corrupt")
add("empty", b"", "corrupt")
write("backups.json", backups)


# Secrets blobs.

def entry(name="kp-1", flags=0, key_id=KEY_ID, created=1795404148, kdk=KDK):
    return bytes([flags]) + key_id.bytes + struct.pack(">Q", created) + bytes([len(name)]) + name.encode() + kdk


def blob(*entries, count=None, magic=b"SRnative", version=1):
    return magic + struct.pack(">II", version, len(entries) if count is None else count) + b"".join(entries)


secrets = []


def add_secrets(name, b, expect="ok", names=()):
    secrets.append({"name": name, "blob": b.hex(), "names": list(names), "expect": expect})


add_secrets("empty set", blob())
add_secrets("one", blob(entry()), names=["kp-1"])
add_secrets("two", blob(entry(), entry("kp-2", flags=1)), names=["kp-1", "kp-2"])
add_secrets("earliest and latest time", blob(entry(created=0), entry("kp-2", created=253402300799)), names=["kp-1", "kp-2"])
add_secrets("longest name", blob(entry("n" * 63)), names=["n" * 63])
add_secrets("another magic", blob(magic=b"SRNATIVE"), "invalid")
add_secrets("version 2", blob(version=2), "version")
add_secrets("header cut", blob()[:-1], "invalid")
add_secrets("a byte more", blob(entry()) + b"\0", "invalid")
add_secrets("a byte less", blob(entry())[:-1], "invalid")
add_secrets("count too small", blob(entry(), count=0), "invalid")
add_secrets("count too large", blob(entry(), count=2), "invalid")
add_secrets("count beyond the limit", blob(count=1025), "invalid")
add_secrets("unknown flag", blob(entry(flags=2)), "invalid")
add_secrets("nil key id", blob(entry(key_id=uuid.UUID(int=0))), "invalid")
add_secrets("time after 9999", blob(entry(created=253402300800)), "invalid")
add_secrets("negative time", blob(entry(created=2**64 - 1)), "invalid")
add_secrets("empty name", blob(entry("")), "invalid")
add_secrets("name too long", blob(entry("n" * 64)), "invalid")
add_secrets("name that no provider has", blob(entry("KP")), "invalid")
add_secrets("name twice", blob(entry(), entry()), "invalid")
add_secrets("names in disorder", blob(entry("kp-2"), entry("kp-1")), "invalid")
write("secrets.json", secrets)
