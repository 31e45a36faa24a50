"""The protocol's messages are the specification's, and no tensor gets in that is not what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from oip_kit import Call, read_reply, write_call

from gkp.edge.wire import oip
from gkp.edge.wire.oip import DATATYPES, MESSAGES, Refusal, Spec

EDGE = Path(oip.__file__).parent
PLAN = "a" * 64


def asked(call: Call) -> oip.Asked:
    return oip.read_call(write_call(call).SerializeToString())


def call(**values: Any) -> Call:
    return Call(PLAN, "request-1", values=values)


def spec(name: str, array: Any) -> Spec:
    return Spec(name, array.dtype.name, array.shape)


def refused(status: str, error: str, work: Any) -> str:
    with pytest.raises(Refusal) as caught:
        work()
    assert (caught.value.status, caught.value.error) == (status, error), caught.value.message
    return caught.value.message


# ---- the messages ---------------------------------------------------------------------------------------------------
@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_the_compiled_file_is_the_proto(tmp_path: Path) -> None:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    out = tmp_path / "oip.binpb"
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", str(EDGE), f"--descriptor_set_out={out}", "oip.proto"], check=True)
    assert FileDescriptorSet.FromString(out.read_bytes()) == FileDescriptorSet.FromString((EDGE / "oip.binpb").read_bytes())


def _fields(message: Any) -> dict[str, tuple[int, int, bool]]:
    return {f.name: (f.number, f.type, getattr(f, "is_repeated", False)) for f in message.fields}


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_fields_and_numbers_are_those_of_another_implementation(name: str) -> None:
    """In the same process, too: both bring the package `inference`."""
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR.message_types_by_name[name]
    ours = MESSAGES[name].DESCRIPTOR
    assert _fields(ours).items() <= _fields(theirs).items()
    for nested in ours.nested_types:
        assert _fields(nested).items() <= _fields(theirs.nested_types_by_name[nested.name]).items()


# ---- tensors --------------------------------------------------------------------------------------------------------
ARRAYS = st.sampled_from(sorted(DATATYPES)).flatmap(lambda d: npst.arrays(
    d, npst.array_shapes(min_dims=0, max_dims=oip.MAX_AXES, max_side=4),
    elements=st.floats(-100, 100, width=16) if d.startswith("float") else st.integers(0, 255)))


@settings(deadline=None)
@given(x=ARRAYS, y=ARRAYS)
def test_tensors_arrive_as_they_were_sent(x: Any, y: Any) -> None:
    found = oip.read_tensors(asked(call(v0=x, v1=y)), [spec("v1", y), spec("v0", x)])
    for sent, name in ((x, "v0"), (y, "v1")):
        assert found[name].dtype == sent.dtype
        np.testing.assert_array_equal(found[name], sent)


@settings(deadline=None)
@given(x=ARRAYS.filter(lambda a: a.size > 0), at=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(x: Any, at: int, bit: int) -> None:
    message = write_call(call(v0=x))
    raw = bytearray(message.raw_input_contents[0])
    raw[at % len(raw)] ^= 1 << bit
    message.raw_input_contents[0] = bytes(raw)
    refused("DATA_LOSS", "checksum", lambda: oip.read_tensors(oip.read_call(message.SerializeToString()), [spec("v0", x)]))


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "model_version", "b" * 64), lambda m: setattr(m, "id", "request-2"),
    lambda m: setattr(m.parameters["attempt"], "int64_param", 2), lambda m: setattr(m.inputs[0].parameters["crc32"], "int64_param", 1)])
def test_a_tensor_of_another_request_does_not_pass(change: Any) -> None:
    x = np.ones((2, 3), np.float32)
    message = write_call(call(v0=x))
    change(message)
    refused("DATA_LOSS", "checksum", lambda: oip.read_tensors(oip.read_call(message.SerializeToString()), [spec("v0", x)]))


@settings(deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 400))
def test_no_bytes_do_anything_but_refuse(data: bytes, cut: int) -> None:
    x = np.ones((2, 3), np.float32)
    good = write_call(call(v0=x)).SerializeToString()
    for broken in (data, good[:cut], good[:cut] + data, data + good):
        with contextlib.suppress(Refusal):  # anything else fails the test
            found = oip.read_tensors(oip.read_call(broken), [spec("v0", x)])
            np.testing.assert_array_equal(found["v0"], x)


@pytest.mark.parametrize("shape", [(2**40, 2**23), (2**62,), (-1, -6), (6,), (3, 2), ()])
def test_shapes_that_are_not_the_plans_cost_nothing(shape: tuple[int, ...]) -> None:
    x = np.ones((2, 3), np.float32)
    message = write_call(call(v0=x))
    message.inputs[0].shape[:] = shape
    refused("INVALID_ARGUMENT", "tensor", lambda: oip.read_tensors(oip.read_call(message.SerializeToString()), [spec("v0", x)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_and_infinity_are_refused(bad: float, dtype: str) -> None:
    x = np.ones((2, 3), dtype)
    x[1, 2] = bad
    refused("INVALID_ARGUMENT", "not-finite", lambda: oip.read_tensors(asked(call(v0=x)), [spec("v0", x)]))


@pytest.mark.parametrize("parameter", ["attempt", "profile"])
def test_parameters_of_another_type_are_refused(parameter: str) -> None:
    message = write_call(call())
    message.parameters[parameter].double_param = 1.0
    refused("INVALID_ARGUMENT", "tensor", lambda: oip.read_call(message.SerializeToString()))


def test_names_of_strangers_do_not_reach_a_terminal() -> None:
    message = write_call(call(v0=np.ones(1, np.float32)))
    message.inputs[0].name = "\x1b[31m" + "x" * 500
    said = refused("INVALID_ARGUMENT", "tensor", lambda: oip.read_tensors(oip.read_call(message.SerializeToString()), [Spec("v0", "float32", (1,))]))
    assert said.isprintable()
    assert len(said) < 200


# ---- replies --------------------------------------------------------------------------------------------------------
def test_a_reply_brings_values_with_their_checksums_and_parameters() -> None:
    made = oip.write_reply(asked(call()), {"v2": np.arange(6, dtype=np.float32)}, {"compute_ms": 1.5, "sent_bytes": 3, "accepted": "new"})
    found = read_reply(call(), MESSAGES["ModelInferResponse"].FromString(made.SerializeToString()))
    np.testing.assert_array_equal(found.values["v2"], np.arange(6))
    assert found.parameters == {"attempt": 1, "compute_ms": 1.5, "sent_bytes": 3, "accepted": "new"}
