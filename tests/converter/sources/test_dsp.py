"""DSP's unpacked checkpoints: [state dict, accuracy] with groups and masks per conv."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_kit import (
    R8_CONV,
    State,
    assert_computes,
    branches,
    forward,
    images,
    layer_names,
    moves,
    random_state,
    recognised,
    save,
)

from gkp.converter.sources import open_model
from gkp.errors import FileError

GROUPS = 3


def checkpoint() -> tuple[State, State]:
    """(the checkpoint's state dict, whose weights are not yet masked; the tensors that the network computes with)."""
    rng = np.random.default_rng(0)
    dense = random_state(R8_CONV)
    held = dict(dense)
    for name in [n for n in dense if n.startswith("stage") and ".conv_" in n]:
        f, c = dense[name].shape[:2]
        group, kept = rng.integers(0, GROUPS, f), rng.random((GROUPS, c)) < 0.5
        kept[:, 0] = True
        mask = torch.from_numpy(kept[group]).float()[:, :, None, None]
        if name.endswith("conv_b.weight"):
            mask[rng.permutation(f)[: f // 4]] = 0  # dropped filters
        base = name.removesuffix(".weight")
        held[f"{base}.group"] = torch.from_numpy(np.eye(GROUPS, dtype=np.float32)[:, group])
        held[f"{base}.mask"] = mask
        dense[name] = dense[name] * mask
        norm = base.replace("conv", "bn")
        dead = torch.from_numpy(rng.random(f) < 0.2)
        held[f"{norm}.weight"] = torch.where(dead, 0.0, held[f"{norm}.weight"])
        dense[f"{norm}.weight"] = held[f"{norm}.weight"]
        dense[f"{norm}.bias"] = torch.where(dead, 0.0, dense[f"{norm}.bias"])  # held keeps its old bias
    return held, dense


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "bare"])
def test_masks_are_applied_and_dropped_channels_are_zero(tmp_path: Path, legacy: bool, pair: bool) -> None:
    held, dense = checkpoint()
    opened = open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22] if pair else held, legacy))
    assert (opened.system, opened.pruned) == ("dsp", True)
    x = images()
    assert_computes(opened, forward(layer_names(dense), x), x)


def test_filters_with_equal_masks_become_branches(tmp_path: Path) -> None:
    held, _ = checkpoint()
    graph = recognised(open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22])))
    assert moves(graph) == []
    found = branches(graph)
    assert found["stage_3.0.conv_b"] == GROUPS
    assert found["conv_1_3x3"] == 1


def test_dense_network_of_a_pair_is_not_pruned(tmp_path: Path) -> None:
    state = random_state(R8_CONV)
    opened = open_model(save(tmp_path / "resnet20.pkl", [state, 91.9]))
    assert (opened.system, opened.pruned) == ("dsp", False)
    x = images()
    assert_computes(opened, forward(layer_names(state), x), x)


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    held, _ = checkpoint()
    held["stage_2.0.conv_b.mask"] = torch.ones(32, 31, 1, 1)
    with pytest.raises(FileError, match="mask"):
        open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22]))
