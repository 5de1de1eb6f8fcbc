#!/usr/bin/env python3
"""Makes vectors.json: an implementation of docs/spec/luks2-header.md that shares
nothing with the one in Go. Run it in this directory; the output never changes.
"""

import base64
import hashlib
import json
import struct

UUID = "7f3c1d52-0a77-4a7e-9c1e-2f5d3c9b8a10"
DEK = bytes(range(0x40, 0x80))
SAFE = {  # the vector "disk" of the key safe
    "version": 1, "provider": "kp-1", "key_id": "key-1", "owner": "disk:" + UUID, "generation": 1, "nonce": "oKGio6Slpqeoqaqr",
    "wrapped": "plk+bgGORPgqLM2YSzeOkSD9C0PG4hQ7xFd83SP2K16yFyWcy0c1Wjf1bqNlF+2WN2o0OxalbAk5J3El2A37z8ZZ8HCxyrujK6YWMsXW3Bg=",
}


def b64(b):
    return base64.b64encode(b).decode()


def header_copy(copy, seqid, label, salt, doc, size=16384):
    text = json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) < size - 4096
    def binary(csum):
        b = struct.pack(">6sHQQ48s32s64s40s48sQ184s64s",
                        [b"LUKS\xba\xbe", b"SKUL\xba\xbe"][copy], 2, size, seqid, label.encode(), b"sha256", salt,
                        UUID.encode(), b"", copy * size, b"", csum)
        assert len(b) == 512
        return b + bytes(4096 - 512)
    area = text + bytes(size - 4096 - len(text))
    return binary(hashlib.sha256(binary(b"") + area).digest()) + area


def metadata(sector_size, offset, safe, flags=()):
    salt = bytes(range(32))
    config = {"json_size": "12288", "keyslots_size": str(offset - 32768)}
    if flags:
        config["flags"] = list(flags)
    return {
        "config": config,
        "keyslots": {},
        "tokens": {"0": dict(safe, type="strongroom", keyslots=[])} if safe else {},
        "segments": {"0": {"type": "crypt", "offset": str(offset), "size": "dynamic", "iv_tweak": "0",
                           "encryption": "aes-xts-plain64", "sector_size": sector_size}},
        "digests": {"0": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "keyslots": [], "segments": ["0"],
                          "salt": b64(salt), "digest": b64(hashlib.pbkdf2_hmac("sha256", DEK, salt, 1000, 32))}},
    }


def header(name, label="", **options):
    doc = metadata(**options)
    copies = [header_copy(c, 7, label, bytes([0xa0 + c]) * 64, doc) for c in (0, 1)]
    return {
        "name": name, "uuid": UUID, "label": label, "seqid": 7, "offset": options["offset"], "sector_size": options["sector_size"],
        "dek": DEK.hex(), "safe": json.dumps(options["safe"], separators=(",", ":")) if options["safe"] else "",
        # Zeros at the ends of the binary header and of the JSON area are left out.
        "binary": [c[:512].hex() for c in copies],
        "metadata": copies[0][4096:].rstrip(b"\0").decode(),
        "sha256": [hashlib.sha256(c).hexdigest() for c in copies],
    }


def af_merge(stripes, key_size, name):
    def diffuse(d):
        n = hashlib.new(name).digest_size
        return b"".join(hashlib.new(name, struct.pack(">I", i) + d[i * n:(i + 1) * n]).digest()[:len(d[i * n:(i + 1) * n])]
                        for i in range((len(d) + n - 1) // n))
    d = bytes(key_size)
    parts = [stripes[i:i + key_size] for i in range(0, len(stripes), key_size)]
    for part in parts[:-1]:
        d = diffuse(bytes(a ^ b for a, b in zip(d, part)))
    return bytes(a ^ b for a, b in zip(d, parts[-1]))


def splitter(name, key_size):
    """Byte i of the stripes is i*i*7 + i mod 251."""
    stripes = bytes((i * i * 7 + i) % 251 for i in range(4000 * key_size))
    return {"hash": name, "key": af_merge(stripes, key_size, name).hex()}


vectors = {
    "headers": [
        header("defaults", sector_size=512, offset=16 << 20, safe=SAFE),
        header("smallest, no safe, label", label="Büro", sector_size=512, offset=32768, safe=None),
        header("4096, discards", sector_size=4096, offset=1 << 20, safe=SAFE, flags=["allow-discards"]),
    ],
    "splitters": [splitter("sha256", 64), splitter("sha256", 32), splitter("sha1", 64), splitter("sha512", 48)],
}
with open("vectors.json", "w", encoding="utf-8") as f:
    json.dump(vectors, f, indent=1, ensure_ascii=False)
    f.write("\n")
