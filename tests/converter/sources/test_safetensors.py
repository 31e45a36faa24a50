"""safetensors files open as state dicts; what no honest program writes is refused before memory is taken."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_kit import assert_refused, blocked_gkp
from hostile_kit import safetensors as packed
from hostile_kit import safetensors_entry as tensor
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save as save_arrays
from safetensors.torch import save_file
from torch_kit import R8_CONV, R8_PAD, State, assert_computes, forward, images, layer_names, random_state

from gkp.converter.budget import Budget
from gkp.converter.sources import open_model
from gkp.converter.sources._safetensors import read_safetensors
from gkp.converter.sources._torchfile import container_kind
from gkp.converter.sources.dense import open_dense
from gkp.errors import FileError, GkpError, UnsupportedModelError


# ---- networks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.net."])
def test_a_network_opens_as_from_torch(tmp_path: Path, prefix: str) -> None:
    state = layer_names(random_state(R8_CONV))
    save_file({prefix + n: t for n, t in state.items()}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    opened = open_model(tmp_path / "x.safetensors")
    assert (opened.system, opened.assumed[:7]) == ("torch", "resnet8")
    x = images()
    assert_computes(opened, forward(state, x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_single(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in random_state(R8_PAD).items()}
    save_file(state, tmp_path / "x.safetensors")
    x = images()
    expected = forward(layer_names({n: t.float() for n, t in state.items()}), x)
    assert_computes(open_model(tmp_path / "x.safetensors"), expected, x)


def test_masks_of_a_pruning_system_are_multiplied_in(tmp_path: Path) -> None:
    state = layer_names(random_state(R8_CONV))
    mask = (torch.rand(state["layer1.0.conv1.weight"].shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    ticket = {n: t for n, t in state.items() if n != "layer1.0.conv1.weight"}
    ticket |= {"layer1.0.conv1.weight_orig": state["layer1.0.conv1.weight"], "layer1.0.conv1.weight_mask": mask}
    save_file({f"model.{n}": t for n, t in ticket.items()}, tmp_path / "x.safetensors")
    opened = open_model(tmp_path / "x.safetensors")
    assert (opened.system, opened.pruned) == ("structure_lth", True)
    x = images()
    assert_computes(opened, forward({**state, "layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * mask}, x), x)


def test_pruning_can_begin_with_one(tmp_path: Path) -> None:
    state = layer_names(random_state(R8_CONV))
    save_file({f"net.{n}": t for n, t in state.items()}, tmp_path / "x.safetensors")
    found, x = open_dense(tmp_path / "x.safetensors"), images()
    torch.testing.assert_close(found.module(x), forward(state, x))
    assert found.arch.prefix == ""


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    outcome = blocked_gkp(["safetensors"], "inspect", tmp_path / "x.safetensors")
    assert_refused(outcome, 4, "safetensors, which is not installed", 'pip install ".[torch]"')


# ---- arrays ----------------------------------------------------------------------------------------------------------
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
                       st.tuples(st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"]),
                                 st.lists(st.integers(0, 3), max_size=4)), max_size=5))
def test_every_array_and_every_name_comes_back(wanted: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in wanted.items()}
    found = read_safetensors(save_arrays(arrays), Budget(0))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_bfloat16_is_the_upper_half_of_a_single() -> None:
    values = torch.tensor([1.5, -0.0, float("inf"), 3e-39]).bfloat16()
    data = packed('{"a": ' + tensor(0, 8, (4,), "BF16") + "}", values.view(torch.uint8).numpy().tobytes())
    np.testing.assert_array_equal(read_safetensors(data, Budget(0))["a"], values.float().numpy(), strict=True)


@pytest.mark.parametrize("length", [0x4B50, 0x0280, 0x28, 0x08])
def test_a_length_that_looks_like_another_format_is_a_length(tmp_path: Path, length: int) -> None:
    """PK of a zip, protocol 2 of a pickle, MARK of a pickle with a point at the end, the first field of an ONNX file."""
    numbers = b"" if length < 100 else b"...."
    header = "{}" if length < 100 else '{"a": ' + tensor(0, 4) + "}"
    (tmp_path / "x").write_bytes(packed(header.ljust(length), numbers))
    assert container_kind(tmp_path / "x") == "safetensors"
    assert len(read_safetensors((tmp_path / "x").read_bytes(), Budget(0))) == (length > 100)


@pytest.mark.parametrize("text", [b'[1,     {"a": 1}]', b'12345678{"a": 1}', b"\t\n\t\n\t\n\t\n{ }"])
def test_text_with_a_brace_is_no_length(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(text)
    assert container_kind(tmp_path / "x") == "unknown"


# ---- what no honest program writes -----------------------------------------------------------------------------------
A = '"a": ' + tensor(0, 4)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "the same range twice": (packed("{" + A + ', "b": ' + tensor(0, 4) + "}", bytes(4)), "b overlaps another"),
    "ranges that overlap": (packed('{"a": ' + tensor(0, 8, (2,)) + ', "b": ' + tensor(4, 12, (2,)) + "}", bytes(12)), "overlaps"),
    "a gap": (packed("{" + A + ', "b": ' + tensor(8, 12) + "}", bytes(12)), "b lies behind a gap"),
    "a gap in front": (packed('{"a": ' + tensor(4, 8) + "}", bytes(8)), "a lies behind a gap"),
    "more than it promises": (packed("{" + A + "}", bytes(5)), "promises 4 bytes of tensors, and it holds 5"),
    "less than it promises": (packed("{" + A + "}", bytes(3)), "promises 4 bytes of tensors, and it holds 3"),
    "negative offsets": (packed('{"a": ' + tensor(-4, 0) + "}", bytes(4)), "impossible offsets"),
    "offsets the wrong way round": (packed('{"a": ' + tensor(4, 0) + "}", bytes(4)), "contradict"),
    "offsets beyond 64 bits": (packed('{"a": ' + tensor(0, 2**70) + "}", bytes(4)), "22 digits"),
    "offsets at the end of 63 bits": (packed('{"a": ' + tensor(0, 2**62, (2**60,)) + "}", bytes(4)), "impossible shape"),
    "a size that wraps around": (packed('{"a": ' + tensor(0, 0, (2**32, 2**32)) + "}"), "impossible shape"),
    "no elements of a huge shape": (packed('{"a": ' + tensor(0, 0, (0, 2**62)) + "}"), "impossible shape"),
    "a negative side": (packed('{"a": ' + tensor(0, 4, (-1,)) + "}", bytes(4)), "impossible shape"),
    "many sides": (packed('{"a": ' + tensor(0, 4, (1,) * 33) + "}", bytes(4)), "impossible shape"),
    "a side that is true": (packed("{" + A.replace("[1]", "[true]") + "}", bytes(4)), "impossible shape"),
    "a side with a point": (packed("{" + A.replace("[1]", "[1.0]") + "}", bytes(4)), "1.0 is not an integer"),
    "a side that is no number": (packed("{" + A.replace("[1]", "[NaN]") + "}", bytes(4)), "NaN is not an integer"),
    "another size than the shape's": (packed('{"a": ' + tensor(0, 4, (2,)) + "}", bytes(4)), "contradict"),
    "a name twice": (packed("{" + A + ", " + A + "}", bytes(4)), "a stands there twice"),
    "a name twice, once escaped": (packed("{" + A + ", " + A.replace('"a"', '"\\u0061"') + "}", bytes(4)), "twice"),
    "a field twice": (packed("{" + A.replace('"dtype"', '"dtype": "I32", "dtype"') + "}", bytes(4)), "dtype stands"),
    "another field": (packed("{" + A.replace('"dtype"', '"stride": [1], "dtype"') + "}", bytes(4)), "a is not described by"),
    "a missing field": (packed('{"a": {"dtype": "F32", "shape": [1]}}', bytes(4)), "a is not described by"),
    "no dict": (packed('{"a": [1]}', bytes(4)), "a is not described by"),
    "a type that is a number": (packed("{" + A.replace('"F32"', "4") + "}", bytes(4)), "a is not described by"),
    "metadata that are no text": (packed('{"__metadata__": {"a": 1}}'), "metadata"),
    "half a surrogate": (packed("{" + A.replace('"a"', '"\\ud800"') + "}", bytes(4)), "hex escape"),
    "bytes that are no text": (packed(b'{"\xff": 1}'), "its header"),
    "text behind the header": (packed("{} {}"), "its header"),
    "an open header": (packed('{"a": '), "its header"),
    "a header beyond the file": (packed("{}", length=3), "ends before its header"),
    "a header of 62 bits": (packed("{}", length=2**62), "ends before its header"),
    "a header of 64 bits": (packed("{}", length=2**64 - 1), "ends before its header"),
    "nested too deep": (packed('{"a": ' + "[" * 100_000 + "}"), "its header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_honest_program_writes_is_refused(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=words) as caught:
        open_model(tmp_path / "x.safetensors")
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "C64", "U16", "FLOAT", "\x1b[2J", ""])
def test_a_type_without_a_twin_is_named(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(packed('{"a": ' + tensor(0, 4, (1,), dtype) + "}", bytes(4)))
    with pytest.raises(UnsupportedModelError, match="tensors of type") as caught:
        open_model(tmp_path / "x.safetensors")
    assert caught.value.message.isprintable()


def test_a_header_in_another_encoding_is_refused() -> None:
    with pytest.raises(FileError, match="its header"):
        read_safetensors(packed('{"a": 1}'.encode("utf-16-le")), Budget(0))


def test_names_in_errors_are_plain_and_short() -> None:
    name = json.dumps("\x1b[2J\u202e" + "x" * 100_000)
    with pytest.raises(FileError) as caught:
        read_safetensors(packed("{" + name + ": 1}"), Budget(0))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


@given(st.binary(max_size=12), st.integers(0, 130), st.integers(0, 12))
def test_changed_bytes_are_read_or_refused(new: bytes, at: int, gone: int) -> None:
    data = save_arrays({"conv.weight": np.ones((2, 1), np.float32), "conv.bias": np.ones(2, np.float16)})
    with contextlib.suppress(GkpError):
        found = read_safetensors(data[:at] + new + data[at + gone:], Budget(0))
        assert sum(array.nbytes for array in found.values()) <= 2 * len(data)


def test_a_file_without_tensors_is_explained(tmp_path: Path) -> None:
    empty: State = {}
    save_file(empty, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModelError, match="nothing in it"):
        open_model(tmp_path / "x.safetensors")
