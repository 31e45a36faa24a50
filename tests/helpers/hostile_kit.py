"""Files that cost far more than they weigh, and what reading one costs, measured in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_pickles import dict_of, get, name, number, put, record, text, tuple_of, whole

MEBI = 1 << 20

# Imports once, then opens every file in a child: its peak above what it began with, its processor time, how it ended.
_MEASURE = """
import json, os, resource, signal, sys, time
from pathlib import Path
from gkp.errors import GkpError
from gkp.converter.sources import open_model
from gkp.converter.sources._torchfile import read_object_npy

def child(path):
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.alarm(int(sys.argv[1]))
    before, start, code, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0, ""
    try:
        read_object_npy(path) if path.suffix == ".npy" else open_model(path)
    except GkpError as error:
        code, message = error.exit_code, error.message
    except BaseException as error:
        code, message = 70, f"{type(error).__name__}: {error}"[:200]
    error = None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return {"code": code, "message": message[:300], "seconds": time.process_time() - start, "grown": grown}

for name in sys.argv[2:]:
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(sink, json.dumps(child(Path(name))).encode())
        os._exit(0)
    os.close(sink)
    found = os.fdopen(source, "rb").read()
    _, status, usage = os.wait4(pid, 0)
    dead = {"code": -os.WTERMSIG(status), "message": "", "seconds": usage.ru_utime, "grown": usage.ru_maxrss << 10}
    print(json.dumps(json.loads(found) if found else dead), flush=True)
"""


@dataclass(frozen=True)
class Cost:
    """code: what the command would exit with, 70 for an error that is not one of ours, negative for a signal. grown: bytes
    of memory beyond the process after its imports, at its peak. seconds: of processor time."""

    code: int
    message: str
    seconds: float
    grown: int


def measured(paths: Sequence[Path], limit: int = 60) -> list[Cost]:
    """What opening each file costs; a child is ended after `limit` seconds."""
    command = [sys.executable, "-c", _MEASURE, str(limit), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit * len(paths) + 60, check=True)
    return [Cost(**json.loads(line)) for line in done.stdout.splitlines()]


# ---- pickles -------------------------------------------------------------------------------------------------------------
_BLOCK = "torch.nn.modules.container.Sequential"


def nested_object_arrays(count: int = 25_000) -> bytes:
    """An array of one object, which is an array of one object, ..."""
    empty = name("numpy.core.multiarray._reconstruct") + put(0) + b"0" + name("numpy.ndarray") + put(1) + b"0"
    kind = name("numpy.dtype") + text("O8") + b"\x85R" + put(2) + b"0" + tuple_of(b"K\0") + put(3) + b"0"
    shape = tuple_of(b"K\1") + put(4) + b"0U\1b" + put(5) + b"0"
    begin = get(0) + get(1) + get(3) + get(5) + b"\x87R(K\1" + get(4) + get(2) + b"\x89]"
    return whole(empty + kind + shape + begin * count + b"N" + b"atb" * count)


def object_arrays_from_the_inside(count: int = 10_000) -> bytes:
    """A list of arrays of one object, each of which is the array before it: whoever looks from the outside sees no depth."""
    head = name("numpy.core.multiarray._reconstruct") + put(0) + b"0" + name("numpy.ndarray") + put(1) + b"0"
    kind = name("numpy.dtype") + text("O8") + b"\x85R" + put(2) + b"0" + tuple_of(b"K\0") + put(3) + b"0"
    shape = tuple_of(b"K\1") + put(4) + b"0U\1b" + put(5) + b"0"
    make = get(0) + get(1) + get(3) + get(5) + b"\x87R(K\1" + get(4) + get(2) + b"\x89]" + get(6) + b"atb" + put(6)
    return whole(head + kind + shape + b"N" + put(6) + b"0](" + make * count + b"e")


def lists_from_the_inside(count: int = 10_000) -> bytes:
    """The same of lists."""
    return whole(b"N" + put(0) + b"0](" + (b"]" + get(0) + b"a" + put(0)) * count + b"e")


def names_times_children(children: int = 20_000, depth: int = 50, key: int = 1000) -> bytes:
    """Modules within modules under long names, each with the same many children."""
    leaf = record(_BLOCK, dict_of((text("_modules"), b"}")))
    many = dict_of(*((text(f"{n}"), get(0)) for n in range(children)))
    opcodes = leaf + put(0) + b"0" + record(_BLOCK, dict_of((text("_modules"), many)))
    for _ in range(depth):
        opcodes = name(_BLOCK) + b")\x81" + dict_of((text("_modules"), dict_of((text("x" * key), opcodes)))) + b"b"
    return whole(leaf + put(0) + b"0" + opcodes.replace(leaf + put(0) + b"0", b""))


def many_states(records: int = 20_000, entries: int = 30_000) -> bytes:
    """Modules that share one pair of states with many entries."""
    state = dict_of(*((text(f"k{n}"), b"N") for n in range(entries)), (text("_modules"), b"}"))
    pair = tuple_of(b"h\0h\1")
    opcodes = b"}" + put(0) + b"0" + state + put(1) + b"0" + pair + put(2) + b"0"
    children = dict_of(*((text(f"{n}"), name(_BLOCK) + b")\x81" + get(2) + b"b") for n in range(records)))
    return whole(opcodes + record(_BLOCK, dict_of((text("_modules"), children))))


def same_key_again(size: int = 2 * MEBI, count: int = 200_000) -> bytes:
    """A dict whose one key is set again and again through an equal text, which must be compared to its end."""
    key = text("x" * size)
    return whole(key + put(0) + b"0" + key + put(1) + b"0}" + get(0) + b"Ns" + (get(1) + b"Ns") * count)


def big_integer_again(size: int = 2 * MEBI, count: int = 200_000) -> bytes:
    """One enormous integer, taken for a key of a set again and again."""
    big = b"\x8b" + size.to_bytes(4, "little") + b"\1" * size
    return whole(big + put(0) + b"0" + b"\x8f(" + get(0) * count + b"\x90", 4)


def decimal_integer(digits: int = 4_000_000) -> bytes:
    """An integer in decimal text, which takes quadratic time."""
    return b"(I" + b"7" * digits + b"\nl."


def storage_views(count: int = 50_000) -> bytes:
    """For a legacy file: one storage, of which a part is asked for again and again."""
    pid = tuple_of(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), b"K\1", tuple_of(text("v"), b"K\0K\1"))
    return whole(pid + put(0) + b"Q0](" + (get(0) + b"Q") * count + b"e")


def empty_tensors(count: int = 10_000) -> bytes:
    """Tensors without elements, each with a shape of its own."""
    pid = tuple_of(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), b"K\1")
    head = pid + b"Q" + put(0) + b"0" + name("torch._utils._rebuild_tensor_v2") + put(1) + b"0"
    one = (get(1) + tuple_of(get(0), number(n), tuple_of(b"K\0", number(n)), tuple_of(b"K\1", number(n)), b"\x89N") + b"R"
           for n in range(count))
    return whole(head + b"](" + b"".join(one) + b"e")


def legacy(obj: bytes, keys: bytes, numbers: bytes = b"", version: bytes = b"M\xe9\3", little: bytes = b"\x88") -> bytes:
    """A torch file of before 1.6: magic, version, system, object, storage keys; then the storages."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    system = dict_of((text("little_endian"), little))
    return magic + whole(version) + whole(system) + obj + whole(keys) + numbers


ARRAY = (name("numpy.core.multiarray._reconstruct") + name("numpy.ndarray") + tuple_of(b"K\0") + b"U\1b\x87R(K\1"
         + tuple_of(b"K\2") + name("numpy.dtype") + text("i8") + b"\x85R\x89U\x10" + bytes(16) + b"tb")
"""Two numbers."""


def legacy_stride() -> bytes:
    """A tensor of one element whose stride is far beyond what 64 bits of bytes hold."""
    pid = tuple_of(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), b"K\1")
    tensor = name("torch._utils._rebuild_tensor_v2") + tuple_of(pid + b"Q", b"K\0", tuple_of(b"K\1"),
                                                               tuple_of(number(2**62 - 1)), b"\x89N") + b"R"
    return legacy(whole(tensor), b"](" + text("0") + b"e", b"\1" + bytes(7) + bytes(4))


def long_storage_names(size: int = MEBI, count: int = 100_000) -> bytes:
    """Storage keys that differ at their end only, in a list that is sorted."""
    a, b = text("x" * size + "a"), text("x" * size + "b")
    keys = a + put(0) + b"0" + b + put(1) + b"0](" + (get(0) + get(1)) * count + b"e"
    return legacy(whole(b"N"), keys)


def npy(descr: str, shape: str, body: bytes) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + body


# ---- safetensors -----------------------------------------------------------------------------------------------------------
def safetensors(header: str | bytes, numbers: bytes = b"", length: int | None = None) -> bytes:
    """length: what it says of its header instead of the truth."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def safetensors_entry(begin: int, end: int, shape: Sequence[int] = (1,), dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def empty_safetensors(count: int) -> bytes:
    """Many tensors without numbers."""
    entries = (f'"{n}":{safetensors_entry(0, 0, (0,))}' for n in range(count))
    return safetensors(f"{{{','.join(entries)}}}")
