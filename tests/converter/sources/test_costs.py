"""Small files that once took memory or time without end: refused, or read, at a cost in proportion to their size."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import hostile_kit as hostile
import pytest
import torch
from hostile_kit import ARRAY, MEBI, Cost, measured
from torch_pickles import text, whole

KEYS = b"](" + text("0") + b"e"
ONE_NUMBER = b"\1" + bytes(7) + bytes(4)


def one_tensor_masked_often(*pair: str) -> bytes:
    """6000 layers of one weight and one mask, a megabyte each."""
    tensor = torch.ones(512, 512, 1, 1)
    held = io.BytesIO()
    torch.save({f"layer{n}.{name}": tensor for n in range(6000) for name in pair}, held)
    return held.getvalue()


COSTLY: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "nested arrays.pkl": (hostile.nested_object_arrays, 6, "nested more than 200 deep"),
    "arrays from the inside.pkl": (hostile.object_arrays_from_the_inside, 6, "nested more than 200 deep"),
    "lists from the inside.pkl": (hostile.lists_from_the_inside, 6, "nested more than 200 deep"),
    "nested arrays.npy": (lambda: hostile.npy("'O'", "(1,)", hostile.nested_object_arrays()), 6, "nested more than 200 deep"),
    "names times children.pkl": (hostile.names_times_children, 5, "characters"),
    "records with one state.pkl": (hostile.many_states, 3, "pickled module"),
    "a key again.pkl": (hostile.same_key_again, 5, "steps"),
    "a big integer.pkl": (hostile.big_integer_again, 6, "integer in it is too large"),
    "a decimal integer.pkl": (hostile.decimal_integer, 6, "corrupt pickle"),
    "storage names.pt": (hostile.long_storage_names, 6, "not the ones it refers to"),
    "views of a storage.pt": (lambda: hostile.legacy(hostile.storage_views(), KEYS, ONE_NUMBER), 3, "no network"),
    "empty tensors.pt": (lambda: hostile.legacy(hostile.empty_tensors(), KEYS, ONE_NUMBER), 3, "no network"),
    "masks of one tensor.pth.tar": (lambda: one_tensor_masked_often("weight_orig", "weight_mask"), 5, "bytes"),
    "masks of one tensor.pkl": (lambda: one_tensor_masked_often("weight", "mask"), 5, "bytes"),
    "brackets.safetensors": (lambda: hostile.safetensors('{"a": ' + "[" * 10_000_000), 5, "objects"),
    "objects.safetensors": (lambda: hostile.safetensors('{"a": [' + "{}," * 4_000_000 + "{}]}"), 5, "objects"),
    "a big integer.safetensors": (lambda: hostile.safetensors('{"a": ' + "9" * 20_000_000 + "}"), 6, "20000000 digits"),
    "a long name.safetensors": (lambda: hostile.safetensors('{"' + "a" * 20_000_000 + '": 1}'), 6, "is not described by"),
    "spaces.safetensors": (lambda: hostile.safetensors("{" + " " * 30_000_000 + "}"), 3, "nothing in it"),
    "empty tensors.safetensors": (lambda: hostile.empty_safetensors(40_000), 3, "no architecture"),
    "more empty tensors.safetensors": (lambda: hostile.empty_safetensors(120_000), 5, "objects"),
    "dicts.pkl": (lambda: whole(b"(" + b"}" * 2_500_000 + b"t"), 5, "objects"),
}
WRONG: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "a version that is an array.pt": (lambda: hostile.legacy(whole(b"N"), b"]", version=ARRAY), 6, "protocol 1001"),
    "an endianness that is an array.pt": (lambda: hostile.legacy(whole(b"N"), b"]", little=ARRAY), 6, "byte order"),
    "a stride beyond 64 bits.pt": (hostile.legacy_stride, 3, "no network"),
    "an impossible shape.npy": (lambda: hostile.npy("'<f4'", "(0, 4611686018427387903, 8)", b""), 6, "corrupt"),
    "an impossible type.npy": (lambda: hostile.npy("'<U999999999'", "(1,)", b""), 6, "corrupt"),
    "an escape in a header.npy": (lambda: hostile.npy("'\\x1b[2J'", "()", b""), 6, "corrupt"),
    "a format that is an array.pkl": (lambda: whole(b"}" + text("format") + ARRAY + b"s"), 3, "no architecture"),
    "keys that are no text.pkl": (lambda: whole(b"}(" + text("format") + text("gkp.checkpoint") + text("version") + b"K\1"
                                                + text("arch") + b"}" + text("state_dict") + b"}K\1Nsu"), 6, "architecture"),
    "a key of many parts.pkl": (lambda: whole(b"}(" + b"U\3abc" * 20 + b"tNs"), 3, "a dict with a tuple"),
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Cost]]:
    folder = tmp_path_factory.mktemp("costly")
    paths = []
    for name, (make, _, _) in {**COSTLY, **WRONG}.items():
        paths.append(folder / name)
        paths[-1].write_bytes(make())
    return {path.name: (path, cost) for path, cost in zip(paths, measured(paths), strict=True)}


@pytest.mark.parametrize("name", [*COSTLY, *WRONG])
def test_what_a_file_costs_stays_in_proportion_to_its_size(name: str, costs: dict[str, tuple[Path, Cost]]) -> None:
    path, cost = costs[name]
    _, code, words = {**COSTLY, **WRONG}[name]
    assert cost.code == code, cost.message
    assert words in cost.message
    assert cost.message.isprintable()
    size = path.stat().st_size
    assert cost.grown < 512 * MEBI + 8 * size
    assert cost.seconds < 10 + 2e-6 * size
