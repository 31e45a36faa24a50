"""Which channels and filters DSP drops, and how the share of energy is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_kit import R8_CONV, random_state

from gkp.errors import UsageError
from gkp.pruning.methods.dsp_channels import (
    Groups,
    channel_mask,
    check_reached,
    layer_mask,
    prune_to_rate,
    reduction_of,
    strongest,
)
from gkp.pruning.methods.dsp_network import chains_of, layers_of
from gkp.pruning.models.architecture import skeleton

SHAPE = (3, 32, 32)


def network(seed: int = 0) -> tuple[nn.Module, Groups]:
    model = skeleton(R8_CONV)
    model.load_state_dict(random_state(R8_CONV))
    rng = np.random.default_rng(seed)
    return model.eval(), {layer.name: rng.integers(0, 4, layer.filters) for layer in layers_of(chains_of(model, SHAPE))}


@pytest.mark.parametrize(
    ("beta", "kept"),
    [(0.05, [1, 1, 1, 1]), (0.15, [1, 0, 1, 1]), (0.35, [0, 0, 1, 1]), (0.65, [0, 0, 0, 1]), (1.0, [0, 0, 0, 1])],
)
def test_weakest_prefix_goes(beta: float, kept: list[int]) -> None:
    """Energies 2, 1, 3, 4 sum up in ascending order to 0.1, 0.3, 0.6, 1; the first case is the empty prefix."""
    assert strongest(np.array([2.0, 1, 3, 4]), beta).tolist() == [bool(k) for k in kept]


def test_equal_energies_do_not_take_each_other_along() -> None:
    assert strongest(np.ones(4), 0.15).all()
    assert strongest(np.ones(4), 0.6).sum() == 2


def test_nothing_is_kept_where_there_is_no_energy() -> None:
    assert not strongest(np.zeros(3), 0.15).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(0, 1))
def test_what_goes_holds_less_than_beta(energies: list[float], beta: float) -> None:
    energy = np.array(energies)
    kept = strongest(energy, beta)
    total = energy.sum()
    assert kept.any() == (total > 0)
    if total > 0:
        assert energy[~kept].sum() <= beta * total * (1 + 1e-9)
        assert not kept.any() or kept.all() or energy[~kept].max() <= energy[kept].min()


def test_each_group_keeps_channels_of_its_own() -> None:
    energy = np.array([[4.0, 0, 1], [5, 1, 0], [0, 9, 1]])
    mask = channel_mask(energy, np.array([0, 0, 1]), 0.2)
    # group 0 has 9, 1, 1 of 11: the middle channel goes (1/11 < 0.2), the last does too (2/11 < 0.2); group 1: 0, 9, 1 of 10
    assert mask.astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_weak_filters_go_by_the_energy_that_their_group_left_them() -> None:
    energy = np.array([[9.0, 0.5], [9, 0.5], [1, 30]])
    groups = np.array([0, 0, 1])
    assert layer_mask(energy, groups, 0.2, False).astype(int).tolist() == [[1, 0], [1, 0], [0, 1]]
    # left: 9, 9, 30 of 48: 9 / 48 < 0.2 goes, 18 / 48 does not
    assert layer_mask(energy, groups, 0.2, True).any(1).sum() == 2


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6, 0.9])
def test_rate_is_met(rate: float) -> None:
    model, groups = network()
    chains = chains_of(model, SHAPE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruning = prune_to_rate(model, chains, groups, rate)
    assert pruning.reduction == pytest.approx(rate, abs=0.02)
    assert pruning.reduction == reduction_of(chains, pruning.masks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for layer in layers_of(chains):
        mask = pruning.masks[layer.name]
        assert mask.shape == (layer.filters, layer.channels)
        for group in range(4):
            rows = mask[groups[layer.name] == group]
            distinct = {row.tobytes() for row in rows if row.any() or not layer.last}
            assert len(distinct) <= 1
    assert any(not row.any() for layer in layers_of(chains) if layer.last for row in pruning.masks[layer.name]) or rate < 0.4


def test_reduction_counts_the_multiplications_of_the_grouped_convs() -> None:
    """A ResNet-8 has, outside stem and shortcuts, 16*16*1024 * 2, (16 + 32)*32*256, (32 + 64)*64*64 (x 9) MACs."""
    model, _ = network()
    chains = chains_of(model, SHAPE)
    masks = {layer.name: np.ones((layer.filters, layer.channels), dtype=bool) for layer in layers_of(chains)}
    assert reduction_of(chains, masks) == 0
    masks["stage_3.0.conv_b"][:16] = False
    total = 2 * 16 * 16 * 1024 + 48 * 32 * 256 + 96 * 64 * 64
    assert reduction_of(chains, masks) == pytest.approx(16 * 64 * 64 / total)


def test_pruning_again_never_brings_a_weight_back() -> None:
    model, groups = network()
    chains = chains_of(model, SHAPE)
    first = prune_to_rate(model, chains, groups, 0.5)
    second = prune_to_rate(model, chains, groups, first.reduction + 0.001, before=first.masks)
    assert first.reduction <= second.reduction <= first.reduction + 0.01
    assert all(not (second.masks[name] & ~mask).any() for name, mask in first.masks.items())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_rate_that_is_no_share_is_refused(rate: float) -> None:
    model, groups = network()
    with pytest.raises(UsageError, match="rate"):
        prune_to_rate(model, chains_of(model, SHAPE), groups, rate)


def test_rate_that_no_beta_reaches_is_refused() -> None:
    """At the largest beta every group still keeps one channel, and every layer one filter's group."""
    model, groups = network()
    best = prune_to_rate(model, chains_of(model, SHAPE), groups, 0.9999)
    assert 0.9 < best.reduction < 0.98
    check_reached(best, best.reduction + 0.01)
    with pytest.raises(UsageError, match="nearest"):
        check_reached(best, 0.9999)
