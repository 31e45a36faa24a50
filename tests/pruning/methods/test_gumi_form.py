"""The public masked form: what is written, and that the converter opens it as the same network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_kit import R8_PAD, assert_computes, branches, images, liven, moves, recognised

import gkp
from gkp.converter.sources import open_model
from gkp.errors import FileError, UsageError
from gkp.pruning.masks import form_of_mask, grouped, plain_convs
from gkp.pruning.methods.grps import find_groups, norm_criterion
from gkp.pruning.methods.gumi_form import masked_state_dict, save_masked
from gkp.pruning.models.architecture import skeleton
from gkp.pruning.models.branched import BranchedConv2d

FOUR = ("stage_1.0.conv_a", "stage_2.0.conv_b", "stage_3.0.conv_a")


@pytest.fixture
def network() -> nn.Module:
    """ResNet-8 with three convs in four groups."""
    torch.manual_seed(3)
    dense = liven(skeleton(R8_PAD))
    convs = plain_convs(dense)
    found = {name: find_groups(norm_criterion(convs[name].weight.detach().numpy()), 4) for name in FOUR}
    return grouped(dense, {name: form_of_mask(convs[name], grouping.mask()) for name, grouping in found.items()})


def test_masks_are_ones_inside_the_branches_and_weights_zero_outside(network: nn.Module) -> None:
    state = masked_state_dict(network)
    for name in FOUR:
        weight, mask = state[f"{name}.weight"], state[f"{name}.mask"]
        assert weight.shape[:2] == mask.shape
        assert (mask.sum(1) == mask.shape[1] / 4).all()  # G = C / row sum
        assert ((weight != 0).any(3).any(2) == mask.bool()).all()
        assert not any(key.startswith(f"{name}.") for key in state if key not in (f"{name}.weight", f"{name}.mask"))
    assert state["stage_1.0.conv_b.mask"].all()
    assert state["conv_1_3x3.mask"].shape == (16, 3)


def test_the_converter_opens_it_as_the_same_network(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth.tar"
    save_masked(path, network, accuracy=0.9235, epoch=7)
    held = torch.load(path, weights_only=True)
    assert (held["epoch"], held["acc"], held["best_acc"]) == (7, 92.35, 92.35)
    opened = open_model(path)
    assert (opened.system, opened.pruned) == ("gconv_prune", True)
    x = images()
    with torch.inference_mode():
        assert_computes(opened, network(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert {name for name, count in branches(graph).items() if count == 4} == set(FOUR)
    own = network.get_submodule(FOUR[0])
    assert isinstance(own, BranchedConv2d)
    np.testing.assert_array_equal(gkp.open(path).layers[FOUR[0]].to_dense() != 0, own.to_branched().to_dense() != 0)


def test_bias_is_kept_and_a_depthwise_conv_has_no_mask() -> None:
    conv = nn.Conv2d(4, 4, 1)
    net = grouped(nn.Sequential(conv, nn.Conv2d(4, 4, 3, groups=4)), {"0": form_of_mask(conv, np.eye(4, dtype=bool))})
    state = masked_state_dict(net)
    assert set(state) == {"0.weight", "0.mask", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(state["0.bias"], conv.bias.detach())


def test_a_dense_network_and_an_unwritable_path_are_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in branches"):
        save_masked(tmp_path / "a.pth.tar", skeleton(R8_PAD))
    with pytest.raises(FileError, match="cannot write"):
        save_masked(tmp_path / "none" / "a.pth.tar", network)
    assert list(tmp_path.iterdir()) == []
