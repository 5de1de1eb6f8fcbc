#!/usr/bin/env python3
"""Makes credentials.json from docs/spec/standard-provider.md, apart from the Go code."""
import json, struct

def blob(providers, version=1, magic=b"SRkmscrd"):
    out = magic + struct.pack(">IB", version, len(providers))
    for name, *secrets in providers:
        out += struct.pack("B", len(name)) + name.encode()
        for s in secrets:
            out += struct.pack(">H", len(s)) + s
    return out

def entry(p):
    return {"Name": p[0], "Password": p[1].hex(), "ClientKey": p[2].hex(), "Requested": p[3].hex()}

one = ("kms-1", b"pass\xc3\xa9", bytes(range(64)), b"")
two = ("kms-2", b"", b"\x30\x81", b"\x30\x82\x00")
ok = [("none", []), ("one", [one]), ("two", [one, two]), ("no secrets", [("a", b"", b"", b"")])]
bad = [
    ("other magic", blob([one], magic=b"SRkmscre")), ("version 2", blob([one], version=2)), ("out of order", blob([two, one])),
    ("twice", blob([one, one])), ("cut", blob([one])[:-1]), ("too long", blob([one]) + b"\0"), ("a name with a slash", blob([("a/b", b"", b"", b"")])),
    ("an empty name", blob([("", b"", b"", b"")])),
]
vectors = [{"Name": n, "Blob": blob(p).hex(), "Providers": [entry(e) for e in p]} for n, p in ok]
vectors += [{"Name": n, "Blob": b.hex(), "Invalid": True} for n, b in bad]
with open("credentials.json", "w") as f:
    json.dump(vectors, f, indent=1)
    f.write("\n")
