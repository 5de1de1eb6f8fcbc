#!/usr/bin/env python3
"""Writes vectors.json from docs/spec/key-parcel.md (needs python3-cryptography with HPKE and ML-KEM).

Each vector tests one thing. Fields: name; secret, public, parcel, key (hex);
context (text); expect: "ok", or the failure: "invalid", "version", "does not open".
HPKE encapsulation is random, so each run writes other vectors.
"""
import json
import os
import struct

from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.hashes import SHAKE256, Hash

SECRET = bytes(range(32))
KEY = bytes(range(0x40, 0x60))
CONTEXT = 'sender="controller" recipient="host-1" provider="kp-1" key_id="5f0c7c9e-3f5b-4a8e-8a6b-1f1f6a2d9f10"'
DOMAIN = b"strongroom/key-parcel/v1\0"

shake = Hash(SHAKE256(96))
shake.update(SECRET)
expanded = shake.finalize()
pq = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
classic = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
private = hpke.MLKEM768X25519PrivateKey(pq, classic)
raw = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
PUBLIC = pq.public_key().public_bytes(*raw) + classic.public_key().public_bytes(*raw)


def seal(key=KEY, context=CONTEXT, domain=DOMAIN, version=1, magic=b"SRparcel", aead=hpke.AEAD.AES_256_GCM):
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, aead)
    return magic + struct.pack(">I", version) + suite.encrypt(key, private.public_key(), info=domain + context.encode())


vectors = []


def add(name, parcel, expect="ok", key=b"", context=CONTEXT):
    vectors.append({"name": name, "secret": SECRET.hex(), "public": PUBLIC.hex(), "context": context,
                    "parcel": parcel.hex(), "key": key.hex(), "expect": expect})


def flip(parcel, i):
    return parcel[:i] + bytes([parcel[i] ^ 1]) + parcel[i + 1:]


good = seal()
add("key of 32 bytes", good, key=KEY)
add("key of 1 byte", seal(b"k"), key=b"k")
add("longest context", seal(context="c" * 1024), key=KEY, context="c" * 1024)
add("another context", good, "does not open", context=CONTEXT + " ")
add("another domain", seal(domain=b"strongroom/key-parcel/v2\0"), "does not open")
add("no zero byte after the domain", seal(domain=DOMAIN[:-1]), "does not open")
add("another AEAD", seal(aead=hpke.AEAD.CHACHA20_POLY1305), "does not open")
add("ML-KEM ciphertext altered", flip(good, 12), "does not open")
add("X25519 share altered", flip(good, 12 + 1088), "does not open")
add("X25519 share zero", good[:1100] + bytes(32) + good[1132:], "does not open")
add("ciphertext altered", flip(good, 1132), "does not open")
add("tag altered", flip(good, len(good) - 1), "does not open")
add("a byte less", good[:-1], "does not open")
add("a byte more", good + b"\0", "does not open")
add("another magic", seal(magic=b"SRPARCEL"), "invalid")
add("version 0", seal(version=0), "version")
add("version 2", seal(version=2), "version")
add("header alone", good[:12], "invalid")
add("no key", seal(b""), "invalid")
add("no context", seal(context=""), "invalid", context="")
add("context too long", seal(context="c" * 1025), "invalid", context="c" * 1025)
add("empty", b"", "invalid")

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors.json"), "w") as out:
    json.dump(vectors, out, indent=1)
    out.write("\n")
