"""Damage to JSON, text and safetensors files that keeps most of their structure."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# json.dumps cannot write these; they are put into its text.
_RAW = {
    "@deep@": "[" * 900 + "]" * 900,
    "@deep objects@": '{"a":' * 900 + "1" + "}" * 900,
    "@digits@": "9" * 5000,
    "@surrogate@": '"\\ud800"',
}
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 1.5, -0.0, 1e-40, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**400),
    *("", "4", "true", "yarn", "fp8", "silu", "a\nb\x1b[2Jc", "ü" * 300, "x" * 9000, "\u2028", "../../etc/passwd"),
    *("/etc/passwd", "os.system", "(a+)+$", "a{99999999999}", [], [None], [[]], {}, {"a": 1}, [1, "x"], *_RAW),
]
_TEXTS = [b"", b"5", b"null", b"[]", b'"x"', b"{", b"\xff\xfe{}", b"\x00" * 40, b"[" * 100_000, b'{"a":' * 50_000]


def mutated(value: Any, rng: random.Random, keys: Sequence[str] = (), values: Sequence[Any] = ()) -> Any:
    """A copy of `value` (JSON-like) with a few changes at random places.

    Args:
        keys: Names for members that are added.
        values: What to put in beside `HOSTILE`.
    """
    value = copy.deepcopy(value)  # an input must not change those that come after it
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE)
        parent, key = rng.choice(places)
        value_of = copy.deepcopy(rng.choice([*HOSTILE, *values] if rng.random() < 0.6 or not values else list(values)))
        what = rng.random()
        if what < 0.45:
            parent[key] = value_of
        elif what < 0.6:
            parent[key] = _tweaked(parent[key], rng)
        elif what < 0.7:
            del parent[key]
        elif what < 0.8:
            other, its = rng.choice(places)
            if its in other if isinstance(other, dict) else its < len(other):
                parent[key] = copy.deepcopy(other[its])
        elif isinstance(parent, dict):
            name = (
                rng.choice(list(keys)) if keys and rng.random() < 0.8 else rng.choice(("a\nb", "", "self", "x" * 300))
            )
            parent[name] = value_of
        else:
            parent.insert(key, value_of)
    return value


def _places(value: Any, depth: int = 0) -> Any:
    if depth > 20:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner, depth + 1)


def _tweaked(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        part = value / 2 if abs(value) < 1e300 else value
        return rng.choice((value + 1, value - 1, value * 2, part, -value, str(value), [value]))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), [value], value * 2, f" {value}"))
    return [copy.deepcopy(value)] if rng.random() < 0.5 else {"a": copy.deepcopy(value)}


def text_of(value: Any, rng: random.Random, damage: float = 0.1) -> bytes:
    """`value` as JSON, with the chance `damage` of it being cut off, changed in some bytes, or quite another text."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return damaged(text.encode("utf-8", "surrogatepass"), rng, damage)


def readable(text: bytes) -> bytes:
    """`text`, or an empty object if it is no JSON: for what others have read before it comes to the package."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return b"{}"
    return text


def damaged(text: bytes, rng: random.Random, damage: float = 0.1) -> bytes:
    if rng.random() >= damage:
        return text
    what = rng.random()
    if what < 0.3:
        return rng.choice(_TEXTS)
    if what < 0.5:
        return text[: rng.randrange(len(text) + 1)]
    out = bytearray(text)
    for _ in range(rng.choice((1, 2, 8))):
        if out:
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def hazard(file: Path, rng: random.Random) -> None:
    """Put what is no plain file in its place."""
    file.unlink()
    what = rng.choice(("folder", "pipe", "gone", "loop", "zeros", "empty"))
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "empty":
        file.touch()
    else:
        file.symlink_to({"gone": "blobs/gone", "loop": file.name, "zeros": "/dev/zero"}[what])


_SAME_SIZE = (("F64", "I64"), ("F32", "I32", "U32"), ("F16", "BF16", "I16", "U16"))
_SAME_SIZE += (("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),)
DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL C64 F8_E4M3 F8_E5M2 F8_E8M0 F4 nonsense".split()


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by the definition of the format."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def mutate_tensors(file: Path, rng: random.Random) -> None:
    """Change some tensors of a safetensors file, which stays a whole one: types, shapes, names, rows, or none of it."""
    header, data = header_of(file)
    about = header.pop("__metadata__", None)
    parts = {name: (entry, data[slice(*entry["data_offsets"])]) for name, entry in header.items()}
    for name in rng.sample(sorted(parts), rng.choice((1, 1, 2))):
        entry, raw = parts[name]
        shape, what = list(entry["shape"]), rng.choice(("type", "shape", "rows", "name", "none"))
        if what == "type":
            entry["dtype"] = rng.choice(next(types for types in _SAME_SIZE if entry["dtype"] in types))
        elif what == "shape":
            entry["shape"] = rng.choice((shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1]))
        elif what == "rows" and shape:
            entry["shape"] = [1, *shape[1:]]
            raw = raw[: len(raw) // max(1, shape[0])]
        elif what == "none":
            del parts[name]
            continue
        else:
            other = rng.choice(sorted(parts))
            parts[other], (entry, raw) = (entry, raw), parts[other]
        parts[name] = entry, raw
    header, data = ({} if about is None else {"__metadata__": about}), b""
    for name, (entry, raw) in parts.items():
        header[name] = {**entry, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def mutate_header(file: Path, rng: random.Random) -> None:
    """Change a safetensors file: its tensors, its header, the length of that, or where it ends."""
    if rng.random() < 0.5:
        mutate_tensors(file, rng)
        return
    header, data = header_of(file)
    what = rng.random()
    if what < 0.5:  # a few tensors
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        for entry in rng.sample(entries, min(len(entries), rng.choice((1, 1, 2, 3)))):
            key = rng.choice(("dtype", "shape", "data_offsets"))
            if key == "dtype":
                entry[key] = rng.choice(DTYPES) if rng.random() < 0.9 else rng.choice(HOSTILE)
            elif rng.random() < 0.5:
                other = rng.choice(entries)
                entry[key], other[key] = other[key], entry[key]
            else:
                entry[key] = mutated(list(entry[key]), rng)
    elif what < 0.7:  # names
        names = list(header)
        first, second = rng.choice(names), rng.choice(names)
        new = rng.choice(
            (second, f"model.{first}", first.replace("model.", ""), f"{first}\n\x1b[2J", first[:-1], "x" * 999)
        )
        header[new] = header.pop(first)
    else:
        header = mutated(header, rng, keys=list(header), values=DTYPES)
    text = text_of(header, rng, damage=0.05)
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**31, 2**63, len(text) - 1, len(text) + 9))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.7 else data + b"\0" * 16
    file.write_bytes(struct.pack("<Q", size) + text + data)
