"""Whole files with pickles in them: plain, torch's zip and legacy files, arrays of objects, archives of TorchScript."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from functools import partial
from random import Random

from fuzz_checkpoint import STORAGE_BYTES, Checkpoint
from fuzz_pickle import Thing
from fuzz_zip import archive

ROOTS = ("state_dict", "model", "net", "model_state_dict", "small_model", "epoch", "format", "args", "arch", "optimizer")
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def checkpoint(rng: Random) -> bytes:
    """A file that PyTorch or pickle could have written, were it honest."""
    kind = rng.choice(("plain", "zip", "zip", "legacy"))
    if kind == "plain":
        return pickled(rng, Checkpoint(rng))
    writer = Checkpoint(rng, outside=True)
    data = pickled(rng, writer)
    if kind == "zip":
        members = [("data.pkl", data), ("byteorder", b"little"), *((f"data/{k}", x) for k, x in contents(writer).items()),
                   ("version", b"3\n")]
        return archive([(f"archive/{name}", content) for name, content in members])
    keys = list(writer.storages)
    system = {"protocol_version": 1001, "little_endian": rng.random() < 0.98, "type_sizes": {"int": 4}}
    heads = [MAGIC if rng.random() < 0.99 else pickled(rng, Checkpoint(rng)),
             *(pickle.dumps(x, 2) if rng.random() < 0.98 else pickled(rng, Checkpoint(rng)) for x in (1001, system))]
    tail = b"".join(struct.pack("<q", writer.storages[key][1]) + x for key, x in contents(writer).items())
    return b"".join(heads) + data + pickle.dumps(keys, 2) + tail


def object_array(rng: Random) -> bytes:
    """An .npy file whose body is a pickle."""
    writer = Checkpoint(rng)
    count = rng.randrange(1, 4)

    def content() -> None:
        writer.mark()
        for _ in range(count):
            writer.value(rng.choice(("objects", "array", "any")), 3)
        writer.collect(b"l", "list")

    writer.filled((count,), "O8", content)
    if rng.random() < 0.3:
        bomb(rng, writer)
        writer.op(b"0", 1)
    header = f"{{'descr': '|O', 'fortran_order': {rng.choice((True, False))}, 'shape': ({count},), }}"
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\x80\x03" + b"".join(writer.out) + b"."


def contents(writer: Checkpoint) -> dict[str, bytes]:
    """The bytes of the storages that a pickle refers to; a few have another length."""
    rng = writer.rng
    sizes = {key: STORAGE_BYTES[cls] * numel for key, (cls, numel) in writer.storages.items()}
    return {key: rng.randbytes(max(0, size + (rng.choice((-1, 1)) if rng.random() < 0.005 else 0)))
            for key, size in sizes.items()}


def pickled(rng: Random, writer: Checkpoint) -> bytes:
    """A pickle: a dict or module like a checkpoint's, a walk through the opcodes, or a bomb within one of these."""
    kind = rng.randrange(4)
    if kind == 0:
        roots = [(f"={key}", rng.choice(("dict", "module", "any", "int"))) for key in rng.sample(ROOTS, 3)]
        writer.mapping([*roots, ("str", "array"), ("str", "any")], 4)
    elif kind == 1:
        writer.value("module", 5)
    elif kind == 2:
        walk(rng, writer)
    else:
        bomb(rng, writer)
        if rng.random() < 0.5:
            walk(rng, writer)
            writer.op(b"\x86", 2, "tuple")
    head = b"\x80" + bytes([rng.choice((2, 2, 3, 4, 5))]) if rng.random() < 0.95 else b""
    if rng.random() < 0.1:
        head += b"\x95" + struct.pack("<Q", sum(map(len, writer.out)))
    return head + b"".join(writer.out) + b"."


# ---- any opcode that fits ----------------------------------------------------------------------------------------------
def walk(rng: Random, writer: Checkpoint) -> None:
    """Opcodes that the state of the machine allows, in any order; one value is left."""
    start = len(writer.stack)
    for _ in range(rng.choice((5, 20, 60))):
        if len(writer.stack) < start:
            break
        step(rng, writer, start)
    while len(writer.stack) > start and any(thing.kind == "mark" for thing in writer.stack[start:]):
        writer.collect(b"t", "tuple")
    while len(writer.stack) > start + 1:
        writer.op(b"\x86", 2, "tuple")
    if len(writer.stack) == start:
        writer.value("any", 1)


def step(rng: Random, writer: Checkpoint, start: int) -> None:
    """One opcode, or a value."""
    above, marks = writer.above(), [k for k, thing in enumerate(writer.stack) if thing.kind == "mark" and k >= start]
    if not marks:
        above = writer.stack[start:]
    top = above[-1].kind if above else ""
    under = writer.stack[marks[-1] - 1].kind if marks and marks[-1] > start else ""
    second, third = (above[-k].kind if len(above) >= k else "" for k in (2, 3))
    lists, dicts = ("list", "record"), ("dict", "record")
    keys = len(above) % 2 == 0 and all(thing.hashable for thing in above[::2])
    can: list[Callable[[], object]] = [partial(writer.value, "any", 2)] * 2
    can += [partial(writer.value, "key"), writer.mark]
    if above:
        can += [lambda: writer.op(b"2", 0, writer.stack[-1]), writer.put]
        can += [lambda: writer.op(b"0", 1)] * (len(above) > 1)
        can += [partial(writer.op, bytes([0x84 + count]), count, "tuple")
                for count in (1, 2, 3) if len(above) >= count]
    can += [lambda: writer.get(rng.randrange(len(writer.memo)))] * bool(writer.memo)
    can += [lambda: writer.op(b"a", 1)] * 3 * (second in lists) + [lambda: writer.op(b"b", 1)] * 2 * (second == "record")
    can += [lambda: writer.op(b"b", 1)] * 2 * (second == "dict" and top == "dict")
    can += [lambda: writer.op(b"s", 2)] * 3 * (third in dicts and len(above) > 2 and above[-2].hashable)
    if top in lists:  # into itself
        can.append(lambda: (writer.op(b"2", 0, writer.stack[-1]), writer.op(b"a", 1)))
    if marks:
        can += [lambda: writer.collect(b"t", "tuple"), lambda: writer.collect(b"l", "list"),
                lambda: writer.collect(b"1", None)]
        can += [lambda: writer.collect(b"e", None)] * 3 * (under in lists)
        can += [lambda: writer.collect(b"u", None)] * 3 * (under in dicts and keys)
        can += [lambda: writer.collect(b"d", "dict")] * keys
        if all(thing.hashable for thing in above):
            can += [lambda: writer.collect(b"\x91", "frozenset")]
            can += [lambda: writer.collect(b"\x90", None)] * 3 * (under == "set")
    rng.choice(can)()


# ---- sabotage ------------------------------------------------------------------------------------------------------------
NESTED = ((b"]", b"a"), (b"", b"\x85"), (b"}N", b"s"), (b"(", b"l"), (b"(", b"t"), (b"ca\nb\n)\x81", b"b"),
          (b"ca\nb\n)\x81(", b"e"), (b"ca\nb\n", b"\x85\x81"), (b"ccollections\nOrderedDict\n]]N", b"aa\x85R"),
          (b"cbuiltins\nlist\n]", b"a\x85R"), (b"ctorch.jit._pickle\nrestore_type_tag\n", b"X\1\0\0\0a\x86R"),
          (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1K\1\x85cnumpy\ndtype\n"
           b"X\2\0\0\0O8\x85R\x89]", b"atb"), (b"ctorch._tensor\n_rebuild_from_type_v2\nca\nb\nca\nb\n", b"\x85NtR"))
"""What begins and ends a level: an object array in an object array, a state in a state, ..."""
SHARED = (b"(%bt", b"(%bl", b"(%b\x91", b"}N(%bts", b"ca\nb\n)\x81(%btb", b"ca\nb\n(%bt\x81",
          b"ccollections\nOrderedDict\n](K\1%bteK\1N\x86a\x85R")
"""What refers twice to the value before it, on every level."""


def bomb(rng: Random, writer: Checkpoint) -> None:
    """One value that costs more than it weighs: nested, shared, cyclic, or with keys that collide."""
    count, before = rng.choice((3, 30, 190, 210, 1000, 3000)), len(writer.stack)
    kind = rng.randrange(9)
    if kind < 3:
        begin, end = rng.choice(NESTED)
        count *= rng.choice((1, 1, 1, 8))
        writer.out.append(begin * count + b"N" + end * count)
    elif kind == 3:
        _shared(writer, rng.choice(SHARED), min(count, 210))
    else:
        make = (_shared_modules, _keys, _copies, _states, _views)[kind - 4]
        make(writer, count)
    if rng.random() < 0.05:
        writer.out.append(b"r" + struct.pack("<I", rng.choice((2**16, 2**28, 2**32 - 1))))
    del writer.stack[before:]
    writer.stack.append(Thing("bomb"))


def _reserved(writer: Checkpoint, count: int = 1) -> list[bytes]:
    """The next places of the memo, as arguments of LONG_BINPUT."""
    writer.memo += [Thing("reserved")] * count
    return [struct.pack("<I", len(writer.memo) - count + k) for k in range(count)]


def _shared(writer: Checkpoint, level: bytes, count: int) -> None:
    writer.out.append(b")" + b"".join(b"r" + place + b"0" + level.replace(b"%b", b"j" + place + b"j" + place)
                                                   for place in _reserved(writer, count)))


def _shared_modules(writer: Checkpoint, count: int) -> None:
    """Two children that are one, on every level, with long names."""
    name = b"X" + struct.pack("<I", 60) + b"n" * 59
    module = b"r%s0ctorch.nn.modules.container\nSequential\n)\x81}X\x08\0\0\0_modules}(" + name + b"aj%s" + name + b"bj%susb"
    writer.out.append(b"N" + b"".join(module % (place, place, place) for place in _reserved(writer, min(count, 60))))


def _keys(writer: Checkpoint, count: int) -> None:
    """Numbers whose hashes are equal."""
    numbers = (k * (2**61 - 1) for k in range(count))
    writer.out.append(b"}(" + b"".join(b"\x8a\x0a" + n.to_bytes(10, "little", signed=True) + b"N" for n in numbers) + b"u")


def _copies(writer: Checkpoint, count: int) -> None:
    """One text, encoded again and again."""
    (place,) = _reserved(writer)
    call = b"c_codecs\nencode\nj" + place + b"X\6\0\0\0latin1\x86R"
    writer.out.append(b"X" + struct.pack("<I", 1000) + b"x" * 1000 + b"r" + place + b"0(" + call * count + b"t")


def _states(writer: Checkpoint, count: int) -> None:
    """Many instances that share a large state."""
    (place,) = _reserved(writer)
    state = b"}(" + b"".join(b"X\4\0\0\0%04dN" % k for k in range(min(count, 1000))) + b"ur" + place + b"0"
    writer.out.append(state + b"(" + (b"ca\nb\n)\x81j" + place + b"b") * count + b"t")


def _views(writer: Checkpoint, count: int) -> None:
    """Many tensors of one storage."""
    if not writer.outside:
        writer.value("any", 2)
        return
    writer.storages["v"] = ("FloatStorage", 100)
    pid = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0vX\3\0\0\0cpuKdtQ"
    views = (b"ctorch._utils\n_rebuild_tensor\n(" + pid + b"K%cK%c\x85K\1\x85tR" % (k % 100, 100 - k % 100)
             for k in range(count))
    writer.out.append(b"(" + b"".join(views) + b"t")
