#!/usr/bin/env python3
"""Makes vectors.json: the data areas of docs/spec/volume.md, "Test vectors".

Independent of the Go code: AES-XTS comes from python3-cryptography (OpenSSL).
Run it in this directory: ./gen.py > vectors.json
"""
import hashlib
import json

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

DEK = bytes((i * 7 + 1) & 0xFF for i in range(64))
SIZE = 64 << 10
EMPTY = range(3 * 4096, 5 * 4096)  # never written: the ciphertext is zeros


def plain(o):
    return (o * 131 + (o >> 9) * 17) & 0xFF


def data(sector):
    out = bytearray()
    for off in range(0, SIZE, sector):
        if off in EMPTY:
            out += bytes(sector)
            continue
        tweak = (off // 512).to_bytes(8, "little") + bytes(8)
        e = Cipher(algorithms.AES(DEK), modes.XTS(tweak)).encryptor()
        out += e.update(bytes(plain(o) for o in range(off, off + sector))) + e.finalize()
    return bytes(out)


vectors = []
for sector in (512, 4096):
    d = data(sector)
    vectors.append({
        "dek": DEK.hex(),
        "sector_size": sector,
        "first_16": d[:16].hex(),
        "last_16": d[-16:].hex(),
        "sha256": hashlib.sha256(d).hexdigest(),
    })
print(json.dumps(vectors, indent=2))
