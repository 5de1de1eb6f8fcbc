#!/usr/bin/env python3
"""Writes vectors.json from docs/spec/sealed-file.md alone (needs python3-cryptography).

"files": how a file must look, byte for byte. The plaintext has `size` bytes, byte i being (i * 7 + i // 251) mod 256; sha256 is that of the file.
"refused": small files that must not open, one reason each; expect is the failure.
"""
import hashlib
import json
import os
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY = bytes(range(32))
SALT = bytes(range(0x80, 0xA0))
SEGMENT = 65536


def seal(plain, key=KEY, context="test", salt=SALT, magic=b"SRsealed", version=1, segment=SEGMENT, domain=b"strongroom/sealed-file/v1\0",
         last=b"\1", empty_last=False):
    begin = magic + struct.pack(">II", version, segment)
    okm = HKDF(SHA256(), 64, salt=salt, info=domain + begin + context.encode()).derive(key)
    out = begin + salt + okm[32:]
    parts = [plain[i:i + SEGMENT] for i in range(0, len(plain), SEGMENT)] or [b""]
    if empty_last:
        parts.append(b"")
    for i, part in enumerate(parts):
        nonce = struct.pack(">3xQ", i) + (last if i == len(parts) - 1 else b"\0")
        out += AESGCM(okm[:32]).encrypt(nonce, part, b"")
    return out


def pattern(size):
    return bytes((i * 7 + i // 251) % 256 for i in range(size))


files = []
for size in [0, 1, 16, 65535, 65536, 65537, 131072, 200000]:
    for context in ["test", "c" * 1024] if size == 1 else ["test"]:
        sealed = seal(pattern(size), context=context)
        files.append({"key": KEY.hex(), "salt": SALT.hex(), "context": context, "size": size, "sha256": hashlib.sha256(sealed).hexdigest()})

refused = []


def add(name, file, expect):
    refused.append({"name": name, "file": file.hex(), "expect": expect})


def flip(b, i):
    return b[:i] + bytes([b[i] ^ 1]) + b[i + 1:]


good = seal(b"secret")
add("another magic", seal(b"secret", magic=b"SRSEALED"), "not sealed")
add("empty file", b"", "not sealed")
add("another short file", b"SRsea", "not sealed")
add("magic alone", good[:8], "damaged")
add("header cut", good[:79], "damaged")
add("version 0", seal(b"secret", version=0), "version")
add("version 2", seal(b"secret", version=2), "version")
add("other segment size", seal(b"secret", segment=32768), "damaged")
add("another key", seal(b"secret", key=bytes(32)), "wrong key")
add("another context", seal(b"secret", context="tesT"), "wrong key")
add("another domain", seal(b"secret", domain=b"strongroom/sealed-file/v2\0"), "wrong key")
add("salt altered", flip(good, 16), "wrong key")
add("verifier altered", flip(good, 48), "wrong key")
add("header alone", good[:80], "damaged")
add("ciphertext altered", flip(good, 80), "damaged")
add("tag altered", flip(good, len(good) - 1), "damaged")
add("a byte less", good[:-1], "damaged")
add("a byte more", good + b"\0", "damaged")
add("tag cut", good[:95], "damaged")
add("not sealed as the last segment", seal(b"secret", last=b"\0"), "damaged")
add("sealed as something else", seal(b"secret", last=b"\2"), "damaged")

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors.json"), "w") as out:
    json.dump({"files": files, "refused": refused}, out, indent=1)
    out.write("\n")
