"""Mutations of valid files and texts: what a broken disk, a careless writer or an attacker makes of them."""

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

DEEP, DIGITS, LONG = "@deep@", "@digits@", "@long@"  # written out last: json.dumps would refuse the first two
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 1000, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.5, 1e-300, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "-1", "NaN", "\x00", "\ud800", "\u202e\u200b", "../../../etc/passwd", "/dev/zero", "/", ".", ".."),
    *("True", "qwen3", "qwen2", "yarn", "float32", "<|im_end|>", "{{ 1 / 0 }}", DEEP, DIGITS, LONG),
    *([], {}, [[]], [None] * 3, [0, -1], {"": None}, {"a": [{}]}),
)
INTEGERS = (0, 1, 2, 7, 8, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63, 2**64 - 1)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats, drops and overwrites parts of a file, one to four times."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at:end]
        elif kind == 3:
            changed[at:at] = changed[at:end] * rng.choice((1, 2, 100))
        elif kind == 4:
            changed[at:end] = rng.randbytes(end - at)
        elif kind == 5:
            changed[at : at + 8] = struct.pack("<Q", rng.choice(INTEGERS))
        else:
            changed[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) & 0xFFFFFFFF)
    return bytes(changed)


def changed_json(rng: random.Random, data: bytes) -> bytes:
    """Replaces, drops, renames and adds values of a JSON document, one to four times."""
    document = [json.loads(data)]
    for _ in range(rng.randint(1, 4)):
        container, key = rng.choice(list(_places(document)))
        kind = rng.randrange(6)
        if kind == 0 and container is not document:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("", "\ud800", "id", "type", key + "x"))] = copy.deepcopy(container[key])
        elif kind == 2 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 1000))
        elif kind == 3 and isinstance(container[key], int):
            container[key] = container[key] + rng.choice((-1, 1)) * rng.choice((1, 2, 10**6))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return written_out(rng, json.dumps(document[0]))


def written_out(rng: random.Random, text: str) -> bytes:
    """Puts what json.dumps refuses in the place of its name."""
    n = rng.choice((10, 500, 990, 3000, 100_000))
    text = text.replace(json.dumps(DEEP), "[" * n + "]" * n).replace(json.dumps(DIGITS), "9" * n)
    return text.replace(LONG, "a" * n).encode("utf-8", "surrogatepass")


def changed_line(rng: random.Random, data: bytes) -> bytes:
    """Mutates one line of a JSONL file as JSON."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = changed_json(rng, lines[at])
    return b"\n".join(lines)


def changed_header(rng: random.Random, data: bytes) -> bytes:
    """Mutates a safetensors header as JSON, with its length right (mostly)."""
    size = struct.unpack("<Q", data[:8])[0]
    header = changed_json(rng, data[8 : 8 + size])
    claimed = len(header) if rng.random() < 0.9 else rng.choice(INTEGERS)
    return struct.pack("<Q", claimed) + header + data[8 + size :]


def composed(parts: Sequence[str], longest: int = 12) -> Callable[[random.Random], str]:
    """Makes a generator of texts: parts after each other, some of them nested or repeated many times."""

    def compose(rng: random.Random) -> str:
        text = ""
        for _ in range(rng.randint(1, longest)):
            part = rng.choice(parts)
            if rng.random() < 0.05:
                part = part * rng.choice((2, 50, 3000))
            if rng.random() < 0.15:
                text = part.replace("@", text) if "@" in part else text + part
            else:
                text += part.replace("@", rng.choice(parts).replace("@", "1"))
            text = text[:200_000]
        return text

    return compose


def _places(container: Any):
    """Yields every (container, key) of a document."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        yield container, key
        if isinstance(value, dict | list):
            yield from _places(value)
