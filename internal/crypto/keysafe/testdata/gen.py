#!/usr/bin/env python3
"""Writes vectors.json from docs/spec/key-safe.md alone (needs python3-cryptography).

Each vector tests one thing. Fields: name; safe (text); kek, dek (hex); owner;
expect: "ok", or the failure: "invalid", "version", "wrong owner", "does not open".
"""
import base64
import json
import os
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEK = bytes(range(32))
NONCE = bytes(range(0xA0, 0xAC))
OWNER = "disk:7f3c1d52-0a77-4a7e-9c1e-2f5d3c9b8a10"
DEK64 = bytes(range(0x40, 0x80))
DEK32 = bytes(range(0x40, 0x60))


def lp(text):
    return struct.pack(">I", len(text)) + text.encode()


def safe(dek=DEK64, version=1, provider="kp-1", key_id="key-1", owner=OWNER, generation=1, nonce=NONCE, kek=KEK):
    aad = lp("strongroom/key-safe/v1") + lp(provider) + lp(key_id) + lp(owner) + struct.pack(">Q", generation & (2**64 - 1))
    return {
        "version": version,
        "provider": provider,
        "key_id": key_id,
        "owner": owner,
        "generation": generation,
        "nonce": base64.b64encode(nonce).decode(),
        "wrapped": base64.b64encode(AESGCM(kek).encrypt(nonce[:12].ljust(12, b"\0"), dek, aad)).decode(),
    }


def text(members):
    return json.dumps(members, separators=(",", ":"), ensure_ascii=False)


def flip(encoded, byte):
    raw = bytearray(base64.b64decode(encoded))
    raw[byte] ^= 1
    return base64.b64encode(raw).decode()


vectors = []


def add(name, body, expect="ok", dek=b"", kek=KEK, owner=OWNER):
    body = body if isinstance(body, str) else text(body)
    vectors.append({"name": name, "safe": body, "kek": kek.hex(), "owner": owner, "dek": dek.hex(), "expect": expect})


good = safe()
add("disk", good, dek=DEK64)
add("file", safe(DEK32), dek=DEK32)
add("largest generation", safe(generation=2**53 - 1), dek=DEK64)
add("quotes and backslashes", safe(key_id='a"b\\c/d<e>&f'), dek=DEK64)
add("longest names", safe(provider="p" * 63, key_id="k" * 256, owner="o" * 128), dek=DEK64, owner="o" * 128)

add("another KEK", good, "does not open", kek=bytes(32))
add("owner of another disk", good, "wrong owner", owner="disk:00000000-0000-0000-0000-000000000000")
for field, value in [("provider", "kp-2"), ("key_id", "key-2"), ("generation", 2)]:
    add(f"{field} altered", {**good, field: value}, "does not open")
add("owner altered", {**good, "owner": "disk:other"}, "does not open", owner="disk:other")
add("border between provider and key id moved", {**good, "provider": "kp-1k", "key_id": "ey-1"}, "does not open")
add("nonce altered", {**good, "nonce": flip(good["nonce"], 0)}, "does not open")
add("ciphertext altered", {**good, "wrapped": flip(good["wrapped"], 0)}, "does not open")
add("tag altered", {**good, "wrapped": flip(good["wrapped"], 79)}, "does not open")
add("wrapped without AAD", {**good, "wrapped": base64.b64encode(AESGCM(KEK).encrypt(NONCE, DEK64, b"")).decode()}, "does not open")

add("version 0", safe(version=0), "version")
add("version 2", safe(version=2), "version")
add("version as a string", {**good, "version": "1"}, "invalid")
add("version 1.0", text(good).replace('"version":1', '"version":1.0'), "invalid")
add("version 1e0", text(good).replace('"version":1', '"version":1e0'), "invalid")
add("generation 0", safe(generation=0), "invalid")
add("generation negative", safe(generation=-1), "invalid")
add("generation over the limit", safe(generation=2**53), "invalid")
add("generation over 64 bits", {**good, "generation": 2**64}, "invalid")
add("generation with a fraction", text(good).replace('"generation":1', '"generation":1.5'), "invalid")
add("empty provider", safe(provider=""), "invalid")
add("provider too long", safe(provider="p" * 64), "invalid")
add("provider in upper case", safe(provider="KP-1"), "invalid")
add("provider with a slash", safe(provider="kp/1"), "invalid")
add("empty key id", safe(key_id=""), "invalid")
add("key id too long", safe(key_id="k" * 257), "invalid")
add("control character in key id", safe(key_id="k\n"), "invalid")
add("key id not ASCII", safe(key_id="schluessel-\u00fc"), "invalid")
add("empty owner", safe(owner=""), "invalid", owner="")
add("owner too long", safe(owner="o" * 129), "invalid", owner="o" * 129)
add("nonce of 11 bytes", safe(nonce=NONCE[:11]), "invalid")
add("nonce of 13 bytes", safe(nonce=NONCE + b"\0"), "invalid")
add("DEK of 0 bytes", safe(b""), "invalid")
add("DEK of 31 bytes", safe(DEK32[:31]), "invalid")
add("DEK of 48 bytes", safe(DEK64[:48]), "invalid")
add("DEK of 65 bytes", safe(DEK64 + b"\0"), "invalid")
add("wrapped shorter than a tag", {**good, "wrapped": base64.b64encode(bytes(15)).decode()}, "invalid")
add("wrapped without base64 padding", {**good, "wrapped": good["wrapped"].rstrip("=")}, "invalid")
alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
padded = good["wrapped"][:-2] + alphabet[alphabet.index(good["wrapped"][-2]) | 1] + "="
add("wrapped with base64 padding bits", {**good, "wrapped": padded}, "invalid")
add("wrapped in URL base64", {**good, "wrapped": "-_" + good["wrapped"][2:]}, "invalid")
add("newline in base64", {**good, "wrapped": good["wrapped"][:4] + "\n" + good["wrapped"][4:]}, "invalid")
for field in good:
    add(f"{field} missing", {k: v for k, v in good.items() if k != field}, "invalid")
    add(f"{field} null", {**good, field: None}, "invalid")
    add(f"{field} twice", text(good)[:-1] + "," + text({field: good[field]})[1:], "invalid")
    add(f"{field} in upper case", text(good).replace(f'"{field}":', f'"{field.upper()}":'), "invalid")
add("unknown member", {**good, "extra": 1}, "invalid")
add("nested value", {**good, "extra": {"a": 1}}, "invalid")
add("members in another order", dict(sorted(good.items())), "invalid")
add("space", text(good).replace(",", ", ", 1), "invalid")
add("escape that is not needed", text(good).replace("kp-1", "k\\u0070-1"), "invalid")
add("trailing newline", text(good) + "\n", "invalid")
add("trailing object", text(good) + "{}", "invalid")
add("leading byte order mark", "\ufeff" + text(good), "invalid")
add("array", "[" + text(good) + "]", "invalid")
add("truncated", text(good)[:-1], "invalid")
add("empty", "", "invalid")
add("null", "null", "invalid")
add("longer than any safe", {**good, "extra": "x" * 20000}, "invalid")

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors.json"), "w") as out:
    json.dump(vectors, out, indent=1)
    out.write("\n")
