"""The Open Inference Protocol's messages (oip.proto), and tensors in them with checksums.

The messages live in a descriptor pool of their own: another client library in the same process may bring the same package
name. They are built from oip.binpb, which any version of protobuf reads.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from math import prod
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from gkp.edge.wire.frames import Parameter
from gkp.errors import GkpError
from gkp.types import Array

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
MODEL = "gkp"
"""Name of the model that stands for a plan; "segment_<k>" is one segment by itself."""
DATATYPES: Mapping[str, str] = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "uint8": "UINT8"}
"""numpy's names -> the protocol's."""
MAX_AXES = 8
MAX_ATTEMPT = 2**31 - 1
_NUMPY = {theirs: np.dtype(ours).newbyteorder("<") for ours, theirs in DATATYPES.items()}
_TYPED = {"FP32": "fp32_contents", "INT64": "int64_contents", "UINT8": "uint_contents"}
_REQUEST = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_CRC = "crc32"
ERROR_KEY, DEVICE_KEY = "gkp-error", "gkp-device"
"""Trailing metadata of an error: what it is in the protocol, and the index of the device at fault."""


def _messages() -> dict[str, Any]:
    files = descriptor_pb2.FileDescriptorSet.FromString(resources.files("gkp.edge.wire").joinpath("oip.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    names = [f"{m}{kind}" for m in METHODS for kind in ("Request", "Response")]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in names}


MESSAGES: Mapping[str, Any] = _messages()
"""Message classes by name: "ModelInferRequest", ..."""


class Refusal(GkpError):
    """A call that is answered with an error. status: gRPC's name of the code; error: what it is in the protocol
    (docs/tasks/serve.md); device: the one at fault, by index."""

    def __init__(self, status: str, error: str, message: str, device: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status, self.error, self.device = status, error, device


@dataclass(frozen=True)
class Spec:
    """What a tensor must be. dtype: numpy's name, on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Asked:
    """A request as it arrived: its tensors are not looked at yet. request: "" when the client gave none."""

    model: str
    plan: str
    request: str
    attempt: int
    profile: bool
    wanted: tuple[str, ...]
    message: Any


# ---- tensors --------------------------------------------------------------------------------------------------------
def checksum(raw: Any, plan: str, request: str, attempt: int, name: str, datatype: str, shape: Iterable[int]) -> int:
    """CRC-32 of a tensor's bytes and of what they are said to be: bytes of another value, attempt or shape do not pass."""
    said = f"{plan}|{request}|{attempt}|{name}|{datatype}|{','.join(map(str, shape))}"
    return zlib.crc32(raw, zlib.crc32(said.encode()))


def _put(tensors: Any, raws: Any, values: Mapping[str, Array], plan: str, request: str, attempt: int) -> None:
    for name, value in values.items():
        datatype = DATATYPES[value.dtype.name]
        raw = np.ascontiguousarray(value, _NUMPY[datatype]).tobytes()
        tensor = tensors.add(name=name, datatype=datatype, shape=value.shape)
        tensor.parameters[_CRC].int64_param = checksum(raw, plan, request, attempt, name, datatype, value.shape)
        raws.append(raw)


def _array(tensor: Any, raw: bytes | None, key: tuple[str, str, int]) -> Array:
    """One tensor as a read-only array. Refusal when its length is not what dtype and shape say, or its checksum differs."""
    datatype, shape = tensor.datatype, tuple(tensor.shape)
    if datatype not in _NUMPY:
        raise bad_tensor(f"tensor {shown(tensor.name)} has datatype {shown(datatype)}")
    if len(shape) > MAX_AXES or any(d < 0 for d in shape):
        raise bad_tensor(f"tensor {shown(tensor.name)} has a shape that makes no sense")
    if raw is None:
        contents = getattr(tensor.contents, _TYPED[datatype]) if datatype in _TYPED else ()
        if len(contents) != prod(shape):
            raise bad_tensor(f"tensor {shown(tensor.name)} has no contents, or not as many as its shape says")
        if datatype == "UINT8" and any(v > 255 for v in contents):
            raise bad_tensor(f"tensor {shown(tensor.name)} holds a number that is no UINT8")
        raw = np.array(contents, _NUMPY[datatype]).tobytes()
    if len(raw) != prod(shape) * _NUMPY[datatype].itemsize:
        raise bad_tensor(f"tensor {shown(tensor.name)} has {len(raw)} bytes, its shape says "
                         f"{prod(shape) * _NUMPY[datatype].itemsize}")
    crc = tensor.parameters[_CRC].int64_param if _CRC in tensor.parameters else None
    if crc not in (None, checksum(raw, *key, tensor.name, datatype, shape)):
        raise Refusal("DATA_LOSS", "checksum", f"the bytes of tensor {shown(tensor.name)} changed on their way")
    return np.frombuffer(raw, _NUMPY[datatype]).reshape(shape)


def read_tensors(asked: Asked, specs: Sequence[Spec]) -> dict[str, Array]:
    """The request's tensors: exactly those of the specs, in any order. Refusal (DATA_LOSS for a wrong checksum, else
    INVALID_ARGUMENT) otherwise, or when a number in them is NaN or infinite."""
    tensors, raws = asked.message.inputs, asked.message.raw_input_contents
    wanted = {spec.name: spec for spec in specs}
    if len(tensors) != len(wanted) or {t.name for t in tensors} != set(wanted):
        raise bad_tensor(f"{len(tensors)} tensors came; the plan wants {', '.join(wanted) or 'none'}")
    if raws and len(raws) != len(tensors):
        raise bad_tensor(f"{len(raws)} raw contents came with {len(tensors)} tensors")
    for tensor in tensors:  # all, before a byte of one is looked at
        spec = wanted[tensor.name]
        if tensor.datatype != DATATYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
            raise bad_tensor(f"tensor {spec.name} must be {DATATYPES[spec.dtype]} {list(spec.shape)}")
    key = (asked.plan, asked.request, asked.attempt)
    arrays = {t.name: _array(t, raws[k] if raws else None, key) for k, t in enumerate(tensors)}
    for name, array in arrays.items():
        check_finite(name, array)
    return arrays


def check_finite(name: str, array: Array) -> None:
    """Refusal when a number is NaN or infinite: such an answer would be wrong without anybody seeing it."""
    if array.dtype.kind == "f" and 0 in np.isfinite(array).tobytes():  # the shortest way, for small ones
        raise Refusal("INVALID_ARGUMENT", "not-finite", f"value {name} holds NaN or infinity")


# ---- requests and responses -----------------------------------------------------------------------------------------
def parse(name: str, data: bytes) -> Any:
    """A message from its bytes. Refusal when they are none."""
    try:
        return MESSAGES[name].FromString(data)
    except message.DecodeError:
        raise bad_tensor(f"this is no {name}") from None


def read_call(data: bytes) -> Asked:
    """Refusal when the bytes are no ModelInferRequest, or its id or parameters make no sense."""
    asked = parse("ModelInferRequest", data)
    if asked.id and not _REQUEST.fullmatch(asked.id):
        raise bad_tensor("a request id has 1 to 64 letters, digits, dots, dashes and underscores")
    attempt = _parameter(asked, "attempt", "int64_param", 1)
    if not 1 <= attempt <= MAX_ATTEMPT:
        raise bad_tensor(f"attempt {attempt} is not between 1 and {MAX_ATTEMPT}")
    return Asked(asked.model_name, asked.model_version, asked.id, attempt,
                 _parameter(asked, "profile", "bool_param", False), tuple(o.name for o in asked.outputs), asked)


def _parameter(asked: Any, name: str, kind: str, default: Any) -> Any:
    if name not in asked.parameters:
        return default
    if asked.parameters[name].WhichOneof("parameter_choice") != kind:
        raise bad_tensor(f"parameter {name} has another type")
    return getattr(asked.parameters[name], kind)


def write_reply(asked: Asked, values: Mapping[str, Array], parameters: Mapping[str, Parameter]) -> Any:
    """The ModelInferResponse."""
    made = MESSAGES["ModelInferResponse"](model_name=asked.model, model_version=asked.plan, id=asked.request)
    for name, value in {"attempt": asked.attempt, **parameters}.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(made.parameters[name], kind, value)
    _put(made.outputs, made.raw_output_contents, values, asked.plan, asked.request, asked.attempt)
    return made


def bad_tensor(text: str) -> Refusal:
    """INVALID_ARGUMENT: the request is not what the plan says."""
    return Refusal("INVALID_ARGUMENT", "tensor", text)


def shown(name: str) -> str:
    """A stranger's name, fit for a message."""
    return repr("".join(c if c.isprintable() and c.isascii() else "?" for c in name[:40]))
