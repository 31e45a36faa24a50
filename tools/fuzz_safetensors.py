"""safetensors files by structure: a header in which most is right, and the numbers that it promises."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

NAMES = ("conv1.weight", "fc.weight", "model.conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv1.mask", "a.weight_orig",
         "a.weight_mask", "normalize.mean", "new_weight", "", "\x1b[31m", "\ud800", "x" * 300, "__metadata__")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ODD: tuple[Any, ...] = (-1, 2**31, 2**62, 2**64, 10**30, True, None, 1.5, "4", [], [[1]], {}, float("nan"))


def safetensors(rng: Random) -> bytes:
    """A file that the library could have written, were it honest."""
    pairs: list[tuple[str, Any]] = [("__metadata__", {"format": rng.choice(("pt", "np", 3))})] * (rng.random() < 0.5)
    end = 0
    for _ in range(rng.randrange(6)):
        name, dtype = rng.choice(NAMES), rng.choice((*SIZES, "F32", "F32", "F32", *(("C64",) * (rng.random() < 0.1))))
        shape = [rng.randrange(5) for _ in range(rng.randrange(5))]
        begin, end = end, end + math.prod(shape) * SIZES.get(dtype, 8)
        pairs.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
    if rng.random() < 0.6:
        _wrong(rng, pairs)
    rng.shuffle(pairs)
    fields = (f"{json.dumps(name, ensure_ascii=rng.random() < 0.9)}: {json.dumps(value)}" for name, value in pairs)
    header = f"{{{', '.join(fields)}}}".encode("utf-8", "surrogatepass").ljust(rng.choice((0, 8, 640)))
    length = len(header)
    if rng.random() < 0.05:
        length = rng.choice((0, length - 1, length + 1, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + rng.randbytes(max(0, end + (rng.random() < 0.05)))


def _wrong(rng: Random, pairs: list[tuple[str, Any]]) -> None:
    """Something in the header that is not so, or stands there twice."""
    if not pairs:
        return
    name, entry = pairs[rng.randrange(len(pairs))]
    kind = rng.randrange(6)
    if kind == 0:
        pairs.append((name, entry))
    elif kind == 1:
        entry[rng.choice(("dtype", "shape", "data_offsets", "stride"))] = rng.choice(ODD)
    elif kind == 2 and entry.get("shape"):
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(ODD)
    elif kind == 3 and "data_offsets" in entry:
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*ODD, 0, 4, 8))
    elif kind == 4 and "data_offsets" in entry:
        step = rng.choice((-8, -4, 4, 8))
        entry["data_offsets"] = [place + step for place in entry["data_offsets"]]
    elif kind == 5 and entry:
        entry.pop(rng.choice(sorted(entry)))
