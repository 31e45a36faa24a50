"""Mutations of checkpoints: bytes, zip members, pickle opcodes, ONNX fields; and new files, written by structure. Each is
decided by the generator alone."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import fuzz_dialect
import fuzz_networks
import fuzz_proto
import fuzz_safetensors
import fuzz_script
import fuzz_torch
import fuzz_zip
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

Corpus = dict[str, bytes]
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1)
DANGEROUS = ("os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "builtins getattr",
             "builtins __import__", "nt system", "runpy run_path", "torch load", "torch.hub load", "numpy load",
             "operator attrgetter", "functools partial", "shutil rmtree", "socket create_connection", "pickle loads",
             "importlib import_module", "torch.storage _load_from_bytes", "torch._utils _rebuild_tensor_v2",
             "collections OrderedDict", "torch FloatStorage", "numpy.core.multiarray _reconstruct", "numpy dtype",
             "copyreg _reconstructor", "torch.nn.modules.conv Conv2d", "__main__ Shell", "a.b.c d")
NAMES = ("../escape", "/etc/passwd", "", ".", "x" * 300, "\x1b[31m", "*/", "<script>", "a\\b", "CON", "\U0001f600")
OPERATORS = ("Conv", "If", "Loop", "Scan", "Gather", "ScatterND", "ScatterElements", "Split", "Slice", "Concat", "Reshape",
             "Transpose", "BatchNormalization", "Relu", "Add", "Mul", "Pad", "Resize", "ConstantOfShape", "Expand", "Tile",
             "Constant", "ConvTranspose", "MaxPool", "AveragePool", "QuantizeLinear", "DequantizeLinear", "Einsum",
             "Identity", "Range", "Shape", "GatherND", "Cast", "Unsqueeze", "Squeeze", "Flatten", "Gemm", "MatMul", "Frob")


def mutate(rng: Random, name: str, corpus: Corpus) -> bytes:
    """The file `name` with one to four mutations of the kinds that fit its format; half of the time another file instead, of
    a kind that may have this name."""
    if rng.random() < 0.5 and not name.endswith(".json"):
        return generate(rng, name, corpus)
    data = corpus[name]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if rng.random() < 0.25:
            data = mutate_bytes(rng, data, corpus)
        elif name.endswith(".onnx"):
            data = mutate_onnx(rng, data, corpus)
        elif data.startswith(b"PK"):
            data = mutate_zip(rng, data, corpus)
        elif name.endswith(".npy"):
            data = data[:128] + mutate_pickle(rng, data[128:], corpus) if rng.random() < 0.7 else _header(rng, data)
        elif name.endswith((".json", ".safetensors")):
            data = _json(rng, data)
        else:
            data = mutate_pickle(rng, data, corpus)
    return data


def generate(rng: Random, name: str, corpus: Corpus) -> bytes:
    """A file written by structure, for a name that says what it is or leaves it open."""
    if name.endswith(".onnx"):
        return fuzz_proto.model(rng, name)
    if name.endswith(".npy"):
        return fuzz_torch.object_array(rng)
    return rng.choice(GENERATORS)(rng, name, corpus)


def _surgery(rng: Random, name: str, corpus: Corpus) -> bytes:
    """An archive of the corpus that is not large, or a generated one, with contradictions."""
    archives = [data for key, data in sorted(corpus.items()) if data.startswith(b"PK") and len(data) < 100_000]
    given = rng.choice(archives) if archives and rng.random() < 0.7 else fuzz_dialect.script(rng)
    return fuzz_zip.surgery(rng, given) or given


GENERATORS: tuple[Callable[[Random, str, Corpus], bytes], ...] = (
    lambda rng, name, corpus: fuzz_torch.checkpoint(rng),
    lambda rng, name, corpus: fuzz_networks.network(rng),
    lambda rng, name, corpus: fuzz_dialect.script(rng),
    lambda rng, name, corpus: fuzz_script.script(rng),
    lambda rng, name, corpus: fuzz_proto.model(rng, name),
    lambda rng, name, corpus: fuzz_safetensors.safetensors(rng),
    _surgery,
)


# ---- bytes -----------------------------------------------------------------------------------------------------------
def mutate_bytes(rng: Random, data: bytes, corpus: Corpus) -> bytes:
    """Flip, overwrite, insert, delete, repeat, cut, or splice with another file."""
    if not data:
        return rng.randbytes(8)
    at, to = sorted((rng.randrange(len(data) + 1), min(len(data), rng.randrange(len(data) + 1))))
    to = min(to, at + rng.choice((1, 4, 64, 4096)))
    kind = rng.randrange(8)
    if kind == 0:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:]
    if kind == 1:
        number = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS) % 2**64)[: rng.choice((1, 2, 4, 8))]
        return data[:at] + number + data[at + len(number):]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 3, 16))) + data[at:]
    if kind == 3:
        return data[:at] + data[to:]
    if kind == 4:
        return data[:at] + data[at:to] * rng.choice((2, 3, 50)) + data[to:]
    if kind == 5:
        return data[:at]
    if kind == 6:
        return data[:at] + bytes(to - at) + data[to:]
    other = corpus[rng.choice(sorted(corpus))]
    return data[:at] + other[rng.randrange(len(other)):]


def _header(rng: Random, data: bytes) -> bytes:
    """Another dtype or shape in the header of a .npy file."""
    header = data[10:128].decode("latin-1")
    old = rng.choice(("'<f4'", "'|O'", "(2,", "(2, 3, 4)", "False", "shape", "4"))
    new = rng.choice(("'|O'", "'<f8'", "'<M8[ns]'", "'|V0'", "(-1,", "(9999999999, 9999999999)", "()", "True", "1e999",
                      "__import__('os').system('x')", "'" * 3, "[" * 60))
    return data[:10] + header.replace(old, new, 1)[:117].ljust(117).encode("latin-1", "replace") + b"\n" + data[128:]


def _json(rng: Random, data: bytes) -> bytes:
    """Another value somewhere."""
    at = rng.randrange(len(data) + 1)  # a mutation before this one may have left nothing
    new = rng.choice((b"null", b"-1", b"1e999", b'"../x"', b"[", b"{}", b"99999999999999999999", b'"\\ud800"', b"\xff",
                      b","))
    return data[:at] + new + data[at + rng.choice((0, 1, 5)):]


# ---- zip -------------------------------------------------------------------------------------------------------------
def mutate_zip(rng: Random, data: bytes, corpus: Corpus) -> bytes:
    """The archive again with members changed, renamed, dropped, doubled, added; or with false sizes in its records."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, struct.error, MemoryError):
        return mutate_bytes(rng, data, corpus)
    if not members or rng.random() < 0.15:
        return _records(rng, data)
    pickles = [k for k, (name, _) in enumerate(members) if name.endswith(".pkl")]
    k = rng.choice(pickles) if pickles and rng.random() < 0.6 else rng.randrange(len(members))
    name, content = members[k]
    kind = rng.randrange(10)
    if kind < 5:
        change = mutate_pickle if name.endswith(".pkl") else _code if ".py" in name else mutate_bytes
        members[k] = (name, change(rng, content, corpus))
    elif kind == 5:
        folder = name.rpartition("/")[0]
        members[k] = (rng.choice((f"{folder}/{rng.choice(NAMES)}", rng.choice(NAMES), name.upper(), name + "x")), content)
    elif kind == 6:
        del members[k]
    elif kind == 7:
        members.insert(rng.randrange(len(members) + 1), (rng.choice((name, name.upper(), rng.choice(NAMES))), content))
    elif kind == 8:
        other = rng.randrange(len(members))
        members[k], members[other] = (name, members[other][1]), (members[other][0], content)
    else:
        members[k] = (name, bytes(rng.choice((0, 1, 1 << 16, 1 << 24))))
    return _zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _zipped(members: list[tuple[str, bytes]], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name or "empty")  # a fixed date: the same run gives the same file
            info.compress_type = compression
            info.filename = name
            archive.writestr(info, content)
    return buffer.getvalue()


def _records(rng: Random, data: bytes) -> bytes:
    """A false number in a local header, the directory or its end record."""
    signature = rng.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06"))
    places = [k for k in range(len(data) - 60) if data.startswith(signature, k)] if len(data) < 2**21 else []
    places = places or [max(0, data.rfind(b"PK\x05\x06"))]
    at = rng.choice(places) + rng.randrange(4, 44)
    number = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice((2, 4))]
    return data[:at] + number + data[at + len(number):]


def _code(rng: Random, data: bytes, corpus: Corpus) -> bytes:
    """TorchScript source with another call, name or structure in it."""
    evil = (b"torch.save(x, 'f')", b"ops.aten.save(x)", b"__import__('os').system('x')", b"exec('1')", b"open('f', 'w')",
            b"ops.prim.PythonOp(x)", b"  def __setstate__(self, x):\n    torch.save(x, 'f')\n", b"(" * 300, b"lambda: 0",
            b"import os\n", b"@", b"\x00", b"while True:\n    pass\n", b"9" * 5000, b"torch.from_file('f')")
    lines = data.split(b"\n")
    k = rng.randrange(len(lines))
    if rng.random() < 0.5:
        words = lines[k].split(b" ")
        words[rng.randrange(len(words))] = rng.choice(evil)
        lines[k] = b" ".join(words)
    else:
        indent = lines[k][: len(lines[k]) - len(lines[k].lstrip())]
        lines.insert(k, indent + rng.choice(evil))
    return b"\n".join(lines)


# ---- pickle ----------------------------------------------------------------------------------------------------------
def mutate_pickle(rng: Random, data: bytes, corpus: Corpus) -> bytes:
    """Opcodes deleted, doubled, swapped, inserted, or with other arguments; names replaced by dangerous ones."""
    ops, tail = opcodes(data)
    if len(ops) < 2:
        return mutate_bytes(rng, data, corpus)
    k, other = rng.randrange(len(ops)), rng.randrange(len(ops))
    kind = rng.randrange(7)
    if kind == 0:
        del ops[k]
    elif kind == 1:
        ops.insert(k, ops[other])
    elif kind == 2:
        ops[k], ops[other] = ops[other], ops[k]
    elif kind == 3:
        ops[k:k] = _inserted(rng)
    elif kind == 4:
        places = [i for i, op in enumerate(ops) if op[:1] in (b"c", b"i")] or [k]
        module, name = rng.choice(DANGEROUS).split(" ")
        ops[rng.choice(places)] = f"c{module}\n{name}\n".encode()
    elif kind == 5:
        ops[k] = mutate_bytes(rng, ops[k], corpus)
    else:
        texts = [i for i, op in enumerate(ops) if op[:1] in (b"X", b"\x8c", b"U", b"V")] or [k]
        module, name = rng.choice(DANGEROUS).split(" ")
        text = rng.choice((module, name, rng.choice(NAMES))).encode()
        ops[rng.choice(texts)] = b"X" + struct.pack("<I", len(text)) + text
    return b"".join(ops) + tail


def opcodes(data: bytes) -> tuple[list[bytes], bytes]:
    """The pickles at the beginning of `data` cut into opcodes, and what follows them."""
    ops: list[bytes] = []
    stream, start = io.BytesIO(data), 0
    while start < len(data) and len(ops) < 100_000:
        try:
            places = [position for _, _, position in pickletools.genops(stream) if position is not None]
        except Exception:  # not a pickle from here on; genops raises what it likes
            break
        ends = [*places[1:], stream.tell()]
        ops += [data[a:b] for a, b in zip(places, ends, strict=True)]
        start = stream.tell()
    return ops, data[start:]


def _inserted(rng: Random) -> list[bytes]:
    module, name = rng.choice(DANGEROUS).split(" ")
    call = f"c{module}\n{name}\n".encode()
    number = rng.choice(NUMBERS)
    short, long = struct.pack("<I", number % 2**32), struct.pack("<Q", number)
    return rng.choice((
        [call, b"X\x04\x00\x00\x00true", b"\x85", b"R"], [call, b")", b"R"], [call, b")", b"\x81"], [call, b"}", b"b"],
        [b"(", f"i{module}\n{name}\n".encode()], [b"(", call, b"o"], [b"(" * 3000], [b"2" * 50], [b"0"], [b"1"],
        [b"}", b"b"], [b"\x8a\xff" + b"\x7f" * 255], [b"I" + b"9" * 4000 + b"\n"], [b"r" + short], [b"j" + short],
        [b"B" + short], [b"\x8d" + long], [b"\x8e" + long], [b"\x95" + long], [b"\x82\x01"], [b"\x97"], [b"\x98"], [b"Q"],
        [b"Pabc\n"], [b")", *[b"2\x86"] * 60], [b"]", *[b"2a"] * 9], [b"\x93"], [b"\x92"], [b"\x8f"], [b"\x91"], [b"."]))


# ---- ONNX ------------------------------------------------------------------------------------------------------------
def mutate_onnx(rng: Random, data: bytes, corpus: Corpus) -> bytes:
    """One field of the protobuf changed: any number, text, bytes or list in it, or an idiom of sabotage."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return mutate_bytes(rng, data, corpus)
    if rng.random() < 0.25 and model.graph.node and model.graph.initializer:
        _sabotage(rng, model)
    else:
        _any_field(rng, model)
    try:
        return bytes(model.SerializeToString())
    except (ValueError, UnicodeError):
        return mutate_bytes(rng, data, corpus)


def _sabotage(rng: Random, model: onnx.ModelProto) -> None:
    node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
    actions: tuple[Callable[[], Any], ...] = (
        lambda: setattr(node, "op_type", rng.choice(OPERATORS)),
        lambda: setattr(node, "domain", rng.choice(("gkp", "com.microsoft", "ai.onnx.ml", "x", "ai.onnx"))),
        lambda: node.input.append(rng.choice(model.graph.node).output[0] if rng.choice(model.graph.node).output else ""),
        lambda: tensor.dims.append(rng.choice(NUMBERS) % 2**63),
        lambda: _outside(tensor, rng.choice(NAMES)),
        lambda: setattr(tensor, "data_type", rng.randrange(30)),
        lambda: setattr(tensor, "raw_data", b"\xff\xff\xff\x7f" * (len(tensor.raw_data) // 4)),
        lambda: tensor.CopyFrom(rng.choice(model.graph.initializer)),
        lambda: node.attribute.append(onnx.helper.make_attribute(rng.choice(("group", "axis", "transB", "epsilon", "to")),
                                                                 rng.choice(NUMBERS) - rng.choice((0, 2**62)))),
        lambda: node.attribute.append(onnx.helper.make_attribute(rng.choice(("pads", "strides", "dilations", "perm",
                                                                             "kernel_shape", "in_index", "axes")),
                                                                 [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 6))])),
        lambda: model.graph.node.append(onnx.helper.make_node(rng.choice(OPERATORS), [node.output[0] if node.output else ""],
                                                              ["y" if rng.random() < 0.5 else "z"])),
        lambda: setattr(model.opset_import[0], "version", rng.choice((1, 5, 9, 11, 13, 18, 25, 1000))),
    )
    rng.choice(actions)()


def _outside(tensor: onnx.TensorProto, location: str) -> None:
    tensor.external_data.add(key="location", value=location)
    tensor.data_location = onnx.TensorProto.EXTERNAL


def _any_field(rng: Random, model: onnx.ModelProto) -> None:
    """Walk down from the root at random, and change what is there."""
    message: Message = model
    while True:
        fields = message.ListFields()
        if not fields:
            return
        field, value = rng.choice(fields)
        if not isinstance(value, (Message, int, float, str, bytes)):  # a list
            if rng.random() < 0.15 or field.type != FieldDescriptor.TYPE_MESSAGE:
                _list(rng, field, value)
                return
            message = rng.choice(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            message = value
        else:
            new = _value(rng, field, value)
            try:
                setattr(message, field.name, new)
            except (ValueError, TypeError):  # an enum that has no such number
                message.ClearField(field.name)
            return


def _list(rng: Random, field: Any, values: Any) -> None:
    k = rng.randrange(len(values))
    kind = rng.randrange(4)
    if kind == 0:
        del values[k]
    elif kind == 1:
        values.append(values[k])
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        values[k].CopyFrom(rng.choice(values))
    else:
        values[k] = _value(rng, field, values[k])


def _value(rng: Random, field: Any, old: Any) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        limit = 2**31 if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM) else 2**63
        return rng.choice((old + 1, old - 1, -old, rng.choice(NUMBERS), -rng.choice(NUMBERS))) % limit
    if isinstance(old, float):
        return rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    if isinstance(old, bytes):
        return rng.choice((old[:-1], b"", old * 2, rng.randbytes(len(old)) if len(old) < 10_000 else old[1:]))
    return rng.choice((*NAMES, *OPERATORS, "x", "a", "c", "c0", "y", old + "x"))
