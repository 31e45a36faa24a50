"""Opening a file: whatever a stranger's values make Python or numpy say, it is one of gkp's errors; the budget goes along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_kit import R8_PAD, random_state, save

from gkp.converter.budget import RATES
from gkp.converter.sources import open_model
from gkp.converter.sources.base import reading
from gkp.converter.sources.dense import open_dense
from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError


@pytest.mark.parametrize("error", [ValueError("\x1b[2J"), TypeError(), IndexError(), KeyError("x"), AttributeError("x"),
                                   OverflowError("x"), ZeroDivisionError("x"), MemoryError(), RecursionError("x")])
def test_what_python_says_to_damaged_values_is_a_file_error(error: Exception) -> None:
    with pytest.raises(FileError, match=type(error).__name__) as caught, reading(Path("m.pt")):
        raise error
    assert caught.value.message.isprintable()
    assert caught.value.__cause__ is error


def test_errors_of_gkp_stay_what_they_are() -> None:
    with pytest.raises(UsageError, match="as it was"), reading(Path("m.pt")):
        raise UsageError("as it was")


@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 3, 3), (2, 0, 3, 3), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["conv_1_3x3.weight", "layer1.0.conv3.weight", "layer1.0.conv1.weight", "a.mask", "a.weight_mask"])
def test_tensors_of_odd_shapes_are_refused_by_both_ways_of_opening(shape: tuple[int, ...], name: str, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape), "layer1.0.conv2.weight": torch.zeros(shape), "a.weight": torch.zeros(1, 1, 1, 1),
               "a.weight_orig": torch.zeros(shape)}
    path = save(tmp_path / "m.pt", {"state_dict": tensors, "arch": "resnet50", "epoch": 1, "model_state_dict": tensors})
    for way in (open_model, open_dense):
        with pytest.raises(GkpError):
            way(path)


def test_the_opened_model_carries_what_is_left_of_its_budget(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"state_dict": random_state(R8_PAD)})
    budget = open_model(path).budget
    assert budget is not None
    left = RATES["bytes"].of(path.stat().st_size)
    with pytest.raises(UnsafeFileError):
        budget.bytes(left - 1000)  # its tensors were charged


