"""Inputs are checked against the manifest before the runtime sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_kit import save, small_net

import gkp
from gkp.errors import UsageError
from gkp.manifest import Tensor
from gkp.runtime.load import LoadedModel, check_input

SPEC = Tensor(name="x", shape=["batch", 3, 8, 8], dtype="float32")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    gkp.convert(save(small_net(batch="n"), tmp_path / "m.onnx"), output=tmp_path / "out", benchmark=False, threads=1)
    return tmp_path / "out"


def test_floats_are_converted_and_made_contiguous() -> None:
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).transpose(0, 3, 1, 2)
    checked = check_input(x, SPEC)
    assert checked.dtype == np.float32
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, x.astype(np.float32))


def test_an_array_that_fits_is_not_copied() -> None:
    x = np.zeros((2, 3, 8, 8), np.float32)
    assert check_input(x, SPEC) is x or np.shares_memory(check_input(x, SPEC), x)


@pytest.mark.parametrize(("x", "words"), [
    (np.zeros((2, 3, 8, 8), np.uint8), "uint8"), (np.zeros((2, 3, 8, 8), bool), "bool"),
    (np.zeros((2, 3, 8, 8), complex), "complex"), (np.zeros((3, 8, 8), np.float32), "shape"),
    (np.zeros((2, 3, 8, 9), np.float32), "shape"), (np.zeros((0, 3, 8, 8), np.float32), "batch 0"),
    (np.full((2, 3, 8, 8), "a"), "dtype"), (np.empty((2, 3, 8, 8), object), "dtype"), (None, ""), ("text", ""),
    ([[1, 2], [3]], ""),
])
def test_what_does_not_fit_is_a_usage_error_with_a_hint(x: object, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_input(x, SPEC)
    assert caught.value.hint
    assert "'x'" in caught.value.message


def test_the_hint_of_a_wrong_batch_names_the_option() -> None:
    static = Tensor(name="x", shape=[1, 3, 8, 8], dtype="float32")
    with pytest.raises(UsageError) as caught:
        check_input(np.zeros((2, 3, 8, 8), np.float32), static)
    assert "--dynamic-batch" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        check_input(np.zeros((1, 8, 8, 3), np.float32), static)
    assert "[batch, channels, height, width]" in caught.value.hint


def test_names_are_checked(directory: Path) -> None:
    x = np.zeros((1, 3, 8, 8), np.float32)
    with gkp.load(directory) as model:
        with pytest.raises(UsageError, match="'x' is missing"):
            model.run({"y": x})
        with pytest.raises(UsageError, match="no input 'y'"):
            model.run({"x": x, "y": x})


def test_a_model_can_be_opened_twice_and_closed(directory: Path) -> None:
    x = np.ones((2, 3, 8, 8), np.float32)
    with gkp.load(directory) as one, gkp.load(directory) as two:
        assert isinstance(one, LoadedModel)
        np.testing.assert_array_equal(one.run(x), two.run(x))
    model = gkp.load(str(directory))
    model.close()


def test_the_callers_array_is_left_as_it_was(directory: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    before = x.copy()
    with gkp.load(directory) as model:
        model.run(x)
    np.testing.assert_array_equal(x, before)


def test_nan_in_gives_nan_out_and_no_crash(directory: Path) -> None:
    with gkp.load(directory) as model:
        assert np.isnan(model.run(np.full((1, 3, 8, 8), np.nan, np.float32))).any()
