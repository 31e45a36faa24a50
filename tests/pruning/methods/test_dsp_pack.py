"""Dead filters go, and the packed network computes what the masked one does, whatever the masks look like."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_kit import R8_CONV, R18, assert_computes, forward, images, layer_names, random_state

from gkp.converter.sources import open_model
from gkp.errors import FileError, UnsupportedModelError, UsageError
from gkp.pruning.masks import apply_masks
from gkp.pruning.methods.dsp_channels import Mask
from gkp.pruning.methods.dsp_dead import remove_dead, settle, without_silent, zero_biases
from gkp.pruning.methods.dsp_network import Chain, chains_of, check_finite, check_groups, layers_of
from gkp.pruning.methods.dsp_pack import pack, public_state, write_public
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d

SHAPE = (3, 16, 16)
R50 = Architecture("imagenet_resnet_3x3_stem", 50, "conv", 10, (3, 32, 32))


def network(arch: Architecture = R8_CONV) -> tuple[nn.Module, tuple[Chain, ...]]:
    model = skeleton(arch)
    model.load_state_dict(random_state(arch))
    return model.eval(), chains_of(model, SHAPE)


def full_masks(chains: tuple[Chain, ...]) -> dict[str, Mask]:
    return {layer.name: np.ones((layer.filters, layer.channels), dtype=bool) for layer in layers_of(chains)}


def random_mask(kind: str, filters: int, channels: int, rng: np.random.Generator) -> Mask:
    rows = rng.random((5, channels)) < rng.random()
    if kind == "irregular":
        return rng.random((filters, channels)) < rng.random()
    if kind == "equal rows":
        return np.repeat(rows[:1], filters, 0)
    if kind == "empty":
        return np.zeros((filters, channels), dtype=bool)
    mask: npt.NDArray[np.bool_] = rows[rng.integers(0, 5, filters)]
    if kind == "groups and empty rows":
        mask[rng.random(filters) < 0.5] = False
    return mask


KINDS = st.sampled_from(["groups", "groups and empty rows", "equal rows", "irregular", "empty", "full"])


@settings(max_examples=60, deadline=None)
@given(st.lists(KINDS, min_size=6, max_size=6), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_packed_network_computes_what_the_masked_one_does(kinds: list[str], seed: int, dead: float) -> None:
    model, chains = network()
    rng, masks = np.random.default_rng(seed), full_masks(chains)
    for layer, kind in zip(layers_of(chains), kinds, strict=True):
        if kind != "full":
            masks[layer.name] = random_mask(kind, layer.filters, layer.channels, rng)
        silent = torch.from_numpy(rng.random(layer.filters) < dead)
        norm = model.get_submodule(layer.norm)
        norm.weight.data[silent] = 0
        norm.bias.data[silent & torch.from_numpy(rng.random(layer.filters) < 0.7)] = 0  # the others: a constant
    packed = pack(model, chains, masks)
    apply_masks(model, {name: torch.from_numpy(mask) for name, mask in masks.items()})
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for x in (torch.randn(2, *SHAPE, generator=generator), torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 50.0)):
            expected = model(x)
            tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
            np.testing.assert_allclose(packed(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("arch", [R18, R50], ids=lambda arch: arch.name)
def test_other_residual_networks_are_packed_too(arch: Architecture) -> None:
    model, chains = network(arch)
    rng = np.random.default_rng(0)
    masks = {la.name: random_mask("groups and empty rows", la.filters, la.channels, rng) for la in layers_of(chains)}
    packed = pack(model, chains, masks)
    apply_masks(model, {name: torch.from_numpy(mask) for name, mask in masks.items()})
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x)
        np.testing.assert_allclose(packed(x), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_filters_with_equal_rows_form_a_branch_in_first_seen_order() -> None:
    model, chains = network()
    masks = full_masks(chains)
    mask = np.zeros((64, 64), dtype=bool)
    mask[1::3, :40], mask[2::3, 30:] = True, True
    masks["stage_3.0.conv_b"] = mask
    conv = pack(model, chains, masks).stage_3[0].conv_b
    assert isinstance(conv, BranchedConv2d)
    form = conv.to_branched()
    assert [b.out_index.tolist() for b in form.branches] == [list(range(1, 64, 3)), list(range(2, 64, 3))]
    assert [b.in_index.tolist() for b in form.branches] == [list(range(40)), list(range(30, 64))]
    assert not form.written[::3].any()


def test_dead_inputs_and_unread_filters_are_in_no_branch() -> None:
    model, chains = network()
    masks = full_masks(chains)
    model.stage_2[0].bn_a.weight.data[4] = model.stage_2[0].bn_a.bias.data[4] = 0
    masks["stage_2.0.conv_b"][:, 9] = False
    exact = without_silent(model, chains, masks)
    assert not exact["stage_2.0.conv_b"][:, [4, 9]].any()
    assert not exact["stage_2.0.conv_a"][[4, 9]].any()
    assert exact["stage_2.0.conv_a"].sum() == 30 * 16
    assert masks["stage_2.0.conv_a"].all()


# ---- dead filters ----------------------------------------------------------------------------------------------------
def dying() -> tuple[nn.Module, tuple[Chain, ...], dict[str, Mask]]:
    """Filter 3 of conv_a reads nothing, column 5 of conv_b is masked, ReLU never lets channel 7 through, filter 2 of conv_b
    reads nothing."""
    model, chains = network()
    masks = full_masks(chains)
    masks["stage_2.0.conv_a"][3] = False
    masks["stage_2.0.conv_b"][:, 5] = False
    masks["stage_2.0.conv_b"][2] = False
    model.stage_2[0].bn_a.bias.data[7] = -1e4
    return model, chains, masks


def test_what_gets_no_gradient_is_dead() -> None:
    model, chains, masks = dying()
    statistics = {n: t.clone() for n, t in model.state_dict().items() if "running" in n}
    after = remove_dead(model, chains, masks, SHAPE, 3, torch.Generator().manual_seed(0))
    alive = np.setdiff1d(np.arange(32), [3, 5, 7])
    assert np.flatnonzero(after["stage_2.0.conv_a"].any(1)).tolist() == alive.tolist()
    assert np.flatnonzero(after["stage_2.0.conv_b"].any(0)).tolist() == alive.tolist()
    assert np.flatnonzero(~after["stage_2.0.conv_b"].any(1)).tolist() == [2]
    block = model.stage_2[0]
    assert not block.bn_a.weight[[3, 5, 7]].any()
    assert not block.bn_a.bias[[3, 5, 7]].any()
    assert block.bn_b.weight[2] == block.bn_b.bias[2] == 0
    assert not block.conv_a.weight[[3, 5, 7]].any()
    untouched = [name for name in masks if not name.startswith("stage_2")]
    assert all(after[name].all() for name in untouched)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in statistics.items())


def test_settling_needs_no_data_and_loses_only_the_constants_of_dropped_filters() -> None:
    model, chains, masks = dying()
    before = copy.deepcopy(model)
    for block, channel in ((before.stage_2[0].bn_a, 3), (before.stage_2[0].bn_b, 2)):
        block.weight.data[channel] = block.bias.data[channel] = 0
    apply_masks(before, {name: torch.from_numpy(mask) for name, mask in masks.items()})
    after = settle(model, chains, masks)
    assert np.flatnonzero(~after["stage_2.0.conv_a"].any(1)).tolist() == [3, 5]
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        np.testing.assert_allclose(model(x), before(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", [R8_CONV, R50], ids=lambda arch: arch.name)
def test_settled_masks_agree_along_a_block_and_keep_the_function(arch: Architecture) -> None:
    """What a conv writes, its BatchNorm scales and the next conv reads is the same set of channels."""
    model, chains = network(arch)
    rng = np.random.default_rng(1)
    masks = {la.name: random_mask("groups and empty rows", la.filters, la.channels, rng) for la in layers_of(chains)}
    expected = copy.deepcopy(model)
    after = settle(model, chains, masks)
    apply_masks(expected, {name: torch.from_numpy(mask) for name, mask in masks.items()})
    for layer in layers_of(chains):
        written = after[layer.name].any(1)
        norm, own = model.get_submodule(layer.norm), expected.get_submodule(layer.norm)
        assert ((norm.weight != 0).numpy() == written).all()
        dropped = torch.from_numpy(~written)
        own.weight.data[dropped] = own.bias.data[dropped] = 0
        assert not (after[layer.name] & ~masks[layer.name]).any()
    for chain in chains:
        for writes, reads in pairwise(chain):
            assert (after[writes.name].any(1) == after[reads.name].any(0)).all()
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = expected(x)
        np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-5 * max(1.0, float(y.abs().max())))


def test_dropped_filters_stay_exactly_zero_once_biases_are_zeroed() -> None:
    model, chains = network()
    norm = model.stage_1[0].bn_b
    norm.weight.data[3] = 0
    kept = norm.bias.detach().clone()
    zero_biases(model, chains)
    assert norm.bias[3] == 0
    assert torch.equal(norm.bias[4:], kept[4:])


# ---- files -----------------------------------------------------------------------------------------------------------
def grouped_network() -> tuple[nn.Module, tuple[Chain, ...]]:
    model, chains = network()
    rng, masks = np.random.default_rng(0), full_masks(chains)
    for layer in list(layers_of(chains))[1:]:
        masks[layer.name] = random_mask("groups and empty rows", layer.filters, layer.channels, rng)
    return pack(model, chains, settle(model, chains, masks)), chains


def test_public_form_is_what_the_dsp_source_opens(tmp_path: Path) -> None:
    packed, chains = grouped_network()
    write_public(tmp_path / "resnet8.pkl", packed, chains, 5, 0.9222)
    state, accuracy = torch.load(tmp_path / "resnet8.pkl", weights_only=True)
    assert accuracy == pytest.approx(92.22)
    group, mask = state["stage_3.0.conv_b.group"], state["stage_3.0.conv_b.mask"]
    assert (group.shape, mask.shape) == ((5, 64), (64, 64, 1, 1))
    assert (group.sum(0) == 1).all()
    assert state["stage_1.0.conv_a.mask"].all()
    opened = open_model(tmp_path / "resnet8.pkl")
    assert (opened.system, opened.pruned) == ("dsp", True)
    x = images()
    with torch.inference_mode():
        assert_computes(opened, packed(x), x)


def test_public_form_holds_the_masked_network() -> None:
    packed, chains = grouped_network()
    state = public_state(packed, chains, 5)
    for layer in layers_of(chains):
        weight, mask = state[f"{layer.name}.weight"], state[f"{layer.name}.mask"]
        assert torch.equal(weight, weight * mask)
    x = images()
    with torch.inference_mode():
        np.testing.assert_allclose(forward(layer_names(state), x), packed(x), rtol=0, atol=1e-5)


def test_more_branches_than_groups_are_refused() -> None:
    packed, chains = grouped_network()
    with pytest.raises(UsageError, match="branches"):
        public_state(packed, chains, 2)


def test_public_form_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    packed, chains = grouped_network()
    with pytest.raises(FileError, match="cannot write"):
        write_public(tmp_path / "nowhere" / "resnet8.pkl", packed, chains, 5, None)


def test_packed_checkpoint_is_opened_by_the_converter(tmp_path: Path) -> None:
    packed, _ = grouped_network()
    checkpoint.save(tmp_path / "grouped", packed, R8_CONV, {"stage": "grouped"})
    opened = open_model(tmp_path / "grouped")
    assert (opened.system, opened.pruned) == ("gkp", True)
    x = images()
    with torch.inference_mode():
        assert_computes(opened, packed(x), x)


# ---- what does not fit -----------------------------------------------------------------------------------------------
def test_groups_that_do_not_fit_are_refused() -> None:
    _, chains = network()
    check_groups(chains, 16)
    with pytest.raises(UsageError, match="17 groups"):
        check_groups(chains, 17)


def test_nan_in_the_baseline_is_refused() -> None:
    model, _ = network()
    model.stage_1[0].conv_a.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"stage_1\.0\.conv_a\.weight"):
        check_finite(model)


def test_network_without_residual_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ResNet"):
        chains_of(nn.Sequential(nn.Conv2d(3, 4, 3)), SHAPE)


def test_planes_are_those_of_each_conv() -> None:
    _, chains = network()
    found = {layer.name: (layer.plane, layer.positions, layer.last) for layer in layers_of(chains)}
    assert found["stage_2.0.conv_a"] == ((16, 16), 64, False)
    assert found["stage_2.0.conv_b"] == ((8, 8), 64, True)
    assert len(found) == 6
