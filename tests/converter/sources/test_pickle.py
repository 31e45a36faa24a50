"""The pickle reader: reads what honest writers write, executes nothing, and stays small on hostile input."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import os
import pickle
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.converter.sources._pickle import load_pickle
from gkp.converter.sources._records import Global, ObjectArray, Record, Storage
from gkp.errors import FileError, GkpError, UnsafeFileError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SECONDS = 2.0  # generous: a hostile pickle is refused in milliseconds


class Block:
    """A class of this test module, so that its pickles name a module nobody else has."""

    def __init__(self, width: int) -> None:
        self.width = width


class Config(dict[str, int]):
    """A dict subclass, as configuration objects are."""


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def refused_quickly(data: bytes, error: type[GkpError], match: str) -> None:
    start = time.perf_counter()
    with pytest.raises(error, match=match):
        load_pickle(data)
    assert time.perf_counter() - start < SECONDS


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers(-(2**60), 2**60) | st.tuples(st.text(), st.booleans())
plain_data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(keys, inner)
        | st.lists(inner).map(tuple)
        | st.sets(st.integers(0, 99))
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


@given(plain_data, st.sampled_from(PROTOCOLS))
@settings(max_examples=150, deadline=None)
def test_plain_data_survives_every_protocol(value: Any, protocol: int) -> None:
    assert load_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", ">i4", "i8", "u1", "?", "<U5", "S3", "c8"])
def test_numeric_arrays_come_back_native_and_contiguous(protocol: int, dtype: str) -> None:
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))
    loaded = load_pickle(pickle.dumps(array, protocol))
    np.testing.assert_array_equal(loaded, array)
    assert loaded.flags.c_contiguous
    assert loaded.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_object_arrays_and_numpy_scalars_are_read(protocol: int) -> None:
    masks = np.empty(2, object)
    masks[:] = [np.array([True, False]), [np.zeros(3), None]]
    loaded = load_pickle(pickle.dumps({"masks": masks, "accuracy": np.float64(0.5)}, protocol))
    assert isinstance(loaded["masks"], ObjectArray)
    assert loaded["masks"].shape == (2,)
    np.testing.assert_array_equal(loaded["masks"].items[0], [True, False])
    np.testing.assert_array_equal(loaded["masks"].items[1][0], np.zeros(3))
    assert loaded["accuracy"] == 0.5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_array_referred_to_twice_is_one_array(protocol: int) -> None:
    array = np.arange(3.0)
    first, second = load_pickle(pickle.dumps([array, array], protocol))
    assert first is second


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_instances_become_records_and_classes_globals(protocol: int) -> None:
    record, cls, spare = load_pickle(pickle.dumps([Block(7), Block, argparse.Namespace(lr=0.1)], protocol))
    assert isinstance(record, Record)
    assert record.name == f"{__name__}.Block"
    assert record.fields == {"width": 7}
    assert cls == Global(f"{__name__}.Block")
    assert spare.fields == {"lr": 0.1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_subclasses_of_dict_keep_their_items(protocol: int) -> None:
    record = load_pickle(pickle.dumps(Config(lr=3), protocol))
    assert (record.name, record.items) == (f"{__name__}.Config", {"lr": 3})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dicts_of_the_collections_module_become_dicts(protocol: int) -> None:
    state = collections.OrderedDict(b=1, a=2)
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    value = [state, collections.Counter("aab"), collections.defaultdict(list, x=[1])]
    loaded = load_pickle(pickle.dumps(value, protocol))
    assert loaded == [{"b": 1, "a": 2}, {"a": 2, "b": 1}, {"x": [1]}]
    assert list(loaded[0]) == ["b", "a"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "touch should_not_exist"), "(posix|nt).system"),
        (Call(eval, "1"), "(builtins|__builtin__).eval"),
        (Call(getattr, "x", "upper"), "(builtins|__builtin__).getattr"),
        (Call(functools.partial, print), "functools.partial"),
        (Call(pickle.loads, b"N."), "_?pickle.loads"),
        (Call(np.load, "x.npy"), "numpy.load|numpy.lib"),
    ],
)
def test_dangerous_calls_are_refused_by_name(protocol: int, call: Call, name: str) -> None:
    refused_quickly(pickle.dumps({"weights": [call]}, protocol), UnsafeFileError, name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_merely_mentioning_a_dangerous_function_is_refused(protocol: int) -> None:
    refused_quickly(pickle.dumps({"activation": os.system}, protocol), UnsafeFileError, "(posix|nt).system")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_of_an_unknown_function_is_refused_by_name(protocol: int) -> None:
    refused_quickly(pickle.dumps(Call(Block, 3), protocol), UnsafeFileError, "Block")


def test_old_style_instances_are_not_called() -> None:
    assert load_pickle(b"(inet\nBlock\n.").name == "net.Block"
    refused_quickly(b"(I1\ninet\nBlock\n.", UnsafeFileError, "pickle calls net.Block")
    refused_quickly(b"(S'id'\nios\nsystem\n.", UnsafeFileError, "pickle refers to os.system")
    refused_quickly(b"(cos\nsystem\nS'id'\no.", UnsafeFileError, "pickle refers to os.system")


def test_names_in_messages_carry_no_control_characters() -> None:
    with pytest.raises(UnsafeFileError) as caught:
        load_pickle(b"\x80\x04\x8c\x02os\x8c\x09a\x1b[31m\x00\x07z\x93.")
    assert caught.value.message.isprintable()


def test_extension_and_buffer_opcodes_are_refused_by_name() -> None:
    refused_quickly(b"\x80\x02\x82\x01.", UnsafeFileError, "EXT1")
    refused_quickly(b"\x80\x05\x97.", UnsafeFileError, "NEXT_BUFFER")


HUGE = struct.pack("<Q", 2**62)
NESTED_TUPLE = b"N" + b"2\x86" * 60  # of 2^60 leaves, if one hashes it
TEN_THOUSAND_LETTERS = b"X" + struct.pack("<I", 10_000) + b"a" * 10_000
ARRAY = pickle.dumps(np.zeros(1), 2)
BOMBS = {
    "memo index": b"\x80\x02]r\xff\xff\xff\xff0h\x00.",  # only a key; what is missing is entry 0
    "bytes length": b"\x80\x04\x8e" + HUGE + b"x.",
    "text length": b"\x80\x04\x8d" + HUGE + b"x.",
    "bytearray length": b"\x80\x05\x96" + HUGE + b"x.",
    "frame length": b"\x80\x04\x95" + HUGE + b"N",
    "bytearray of a count": b"\x80\x03cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "list of a range": b"\x80\x03cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    "deep list": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuple": b"\x80\x02N" + b"\x85" * 200_000 + b".",
    "deep record": b"\x80\x02" + b"cnet\nB\n)\x81" * 1000 + b"b" * 999 + b".",
    "nested tuple as a key": b"\x80\x02}" + NESTED_TUPLE + b"Ns.",
    "nested tuple in a set": b"\x80\x04\x8f(" + NESTED_TUPLE + b"\x90.",
    "list as a key": b"\x80\x02}]Ns.",
    "many sets of one list": b"\x80\x02cbuiltins\nset\nq\x000]q\x01(" + b"K\x01" * 20_000 + b"e0"
    b"(" + b"h\x00h\x01\x85R" * 20_000 + b"t.",
    "many copies of one text": b"\x80\x02c_codecs\nencode\nq\x000" + TEN_THOUSAND_LETTERS + b"q\x010"
    b"(" + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 40_000 + b"t.",
    "too many operations": b"\x80\x02(" + b"}0" * 2_500_000 + b"t.",
    "colliding integers": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 20_000))
    + b"u.",
    "more tensors than parameters": ARRAY[:-1] + b"q\x0c0}(" + b"h\x0cN" * 5000 + b"u.",
    "more floats than may collide": b"\x80\x02}("
    + b"".join(b"G" + struct.pack(">d", k + 0.5) + b"N" for k in range(5000))
    + b"u.",
}


def test_an_array_as_a_key_is_kept_by_identity() -> None:
    held = ARRAY[:-1] + b"q\x0c0}(h\x0cI1\nh\x0cI2\nuh\x0c\x86."
    found, array = load_pickle(held)
    assert [(key.tensor is array, value) for key, value in found.items()] == [(True, 1), (True, 2)]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(name: str) -> None:
    """In processor time: a busy machine is no bomb."""
    start = time.process_time()
    with pytest.raises((FileError, UnsafeFileError), match=r"corrupt pickle|asks for over"):
        load_pickle(BOMBS[name])
    assert time.process_time() - start < (8 * SECONDS if name == "too many operations" else SECONDS)


def test_cyclic_data_is_read() -> None:
    value: list[Any] = []
    value.append(value)
    loaded = load_pickle(pickle.dumps(value))
    assert loaded[0] is loaded


MALFORMED = (
    *(b"", b".", b"\x80", b"\x80\x02", b"N", b"NN.", b"(N.", b"\xff\xff", b"P1\n.", b"PERSID\n.", b"\x80\x02Q."),
    *(b"\x80\x02a.", b"\x80\x02R.", b"\x80\x02b.", b"\x80\x02t.", b"\x80\x02e.", b"\x80\x02}(Nu.", b"\x80\x02]N\x86R."),
    *(b"\x80\x02Nh\x09.", b"\x80\x02NNb.", b"\x80\x04NN\x93.", b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00V\x85R."),
)


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_streams_are_file_errors(data: bytes) -> None:
    with pytest.raises(FileError, match="corrupt pickle"):
        load_pickle(data)


HONEST = pickle.dumps(
    {"w": np.arange(12.0).reshape(3, 4), "o": np.array([None, [1, 2]], object), "b": Block(3), "s": {1, 2}}, 4
)


def test_every_truncation_is_a_file_error() -> None:
    for end in range(len(HONEST)):
        with pytest.raises(FileError):
            load_pickle(HONEST[:end])


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_give_a_result_or_a_gkp_error(data: st.DataObject) -> None:
    damaged = bytearray(HONEST)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(HONEST) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(GkpError):  # any other exception fails the test
        load_pickle(bytes(damaged))


def array_pickle(shape: tuple[int, ...], dtype: str, payload: Any) -> bytes:
    """A numpy array whose pickle says what it likes."""
    function = np.zeros(1).__reduce__()[0]

    class Lying:
        def __reduce__(self) -> Any:
            return function, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, payload)

    return pickle.dumps(Lying(), 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "payload"),
    [
        ((10**9,), "f4", b"abcd"),
        ((2**62, 4), "f4", b""),
        ((-1,), "f4", b"abcd"),
        ((3,), "O", [1]),
        ((1,), "O", b"12345678"),
        ((2,), "M8[s]", b"0123456789abcdef"),
        ((1,), "S900000000", b"abcd"),
        ((0,), "S900000000", b""),
    ],
)
def test_arrays_whose_size_contradicts_their_data_are_refused(shape: tuple[int, ...], dtype: str, payload: Any) -> None:
    refused_quickly(array_pickle(shape, dtype, payload), FileError, "corrupt pickle")


def tensor_pickle(offset: Any, size: Any, stride: Any, count: int = 1) -> bytes:
    """A list of `count` tensors of one storage, as torch.save writes them."""

    def fragment(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    one = b"ctorch._utils\n_rebuild_tensor_v2\n(NQ" + fragment(offset) + fragment(size) + fragment(stride) + b"\x89NtR"
    return b"\x80\x02(" + one * count + b"l."


def storage(numel: int) -> Storage:
    made = Storage("f4", numel)
    made.provide(np.arange(numel, dtype="<f4").tobytes(), "<")
    return made


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_strided_view_holds_what_its_strides_say(data: st.DataObject) -> None:
    size = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    stride = tuple(data.draw(st.integers(0, 6)) for _ in size)
    offset = data.draw(st.integers(0, 10))
    shared = storage(47)
    (view,) = load_pickle(tensor_pickle(offset, size, stride), lambda _: shared)
    assert view.shape == size
    assert view.flags.c_contiguous
    for index in np.ndindex(*size):
        assert view[index] == offset + sum(i * s for i, s in zip(index, stride, strict=True))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (11,), (1,)),
        (1, (10,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (9, (2,), (-9,)),
        (0, (2, 5), (6, 1)),
        (0, (100,), (0,)),
        (0, (2**40, 2**40), (0, 0)),
        (2**63, (1,), (1,)),
        (0, (2,), ()),
        (0, 2, 1),
        (0, (2.0,), (1,)),
        (0, (1,) * 99, (1,) * 99),
        (0, (0, 2**61, 2**61), (1, 1, 1)),
    ],
)
def test_views_outside_their_storage_are_refused(offset: Any, size: Any, stride: Any) -> None:
    shared = storage(10)
    with pytest.raises(FileError, match="corrupt pickle"):
        load_pickle(tensor_pickle(offset, size, stride), lambda _: shared)


def test_many_views_of_one_storage_do_not_multiply_memory() -> None:
    shared = storage(100_000)
    tied = load_pickle(tensor_pickle(0, (100_000,), (1,), count=1000), lambda _: shared)
    assert all(view is tied[0] for view in tied)
    different = b"\x80\x02(" + b"".join(tensor_pickle(k, (99_000,), (1,))[3:-2] for k in range(1000)) + b"l."
    with pytest.raises(UnsafeFileError, match=r"asks for over .* bytes"):
        load_pickle(different, lambda _: shared)


def test_a_tensor_without_storage_and_a_file_without_one_are_refused() -> None:
    with pytest.raises(FileError, match="no storage"):
        load_pickle(tensor_pickle(0, (1,), (1,)), lambda _: "not a storage")
    with pytest.raises(FileError, match="outside itself"):
        load_pickle(tensor_pickle(0, (1,), (1,)))


def test_bfloat16_and_bool_storages_are_converted() -> None:
    brain = Storage("bfloat16", 3)
    brain.provide(np.array([0x3F80, 0xC020, 0x7F80], ">u2").tobytes(), ">")
    (view,) = load_pickle(tensor_pickle(0, (3,), (1,)), lambda _: brain)
    assert view.dtype == np.float32
    np.testing.assert_array_equal(view, [1.0, -2.5, np.inf])
    flags = Storage("b1", 3)
    flags.provide(b"\x00\x01\x07", "<")
    (view,) = load_pickle(tensor_pickle(0, (3,), (1,)), lambda _: flags)
    assert view.tolist() == [False, True, True]
    assert view.view(np.uint8).tolist() == [0, 1, 1]
