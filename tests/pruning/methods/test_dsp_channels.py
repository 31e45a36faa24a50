"""Which channels and filters DSP drops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_kit import R8_CONV

from gkp.pruning.methods.dsp_channels import channel_mask, layer_mask, reduction_of, strongest
from gkp.pruning.methods.dsp_network import chains_of, layers_of
from gkp.pruning.models.architecture import skeleton


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


def test_weak_filters_go_by_all_their_energy_not_by_what_their_group_left_them() -> None:
    energy = np.array([[6.0, 0], [6, 0], [4, 3]])
    groups = np.array([0, 0, 1])
    assert layer_mask(energy, groups, 0.45, False).astype(int).tolist() == [[1, 0], [1, 0], [1, 0]]  # 3 / 7 < 0.45
    # whole: 6, 6, 7 of 19: 6 / 19 goes, 12 / 19 does not; of what is left, 6, 6, 4, the last would go
    assert layer_mask(energy, groups, 0.45, True).any(1).tolist() == [False, True, True]


def public_rule(weight: torch.Tensor, group: torch.Tensor, beta: float) -> torch.Tensor:
    """Masks [F, C] as published: energy shares, ascending; what is above the largest of the prefix that sums to less than
    beta stays. group: one-hot [G, F]."""

    def above(energy: torch.Tensor) -> torch.Tensor:
        share = energy / energy.sum()
        ascending = share.sort().values
        return share > ascending[int((ascending.cumsum(0) < beta).sum()) - 1]

    energy = weight.square().sum((2, 3))
    kept = torch.stack([above(rows[:, None].mul(energy).sum(0)) for rows in group])
    return kept[group.argmax(0)] & above(energy.sum(1))[:, None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.09, 0.7))
def test_masks_of_a_last_conv_are_those_of_the_public_rule(seed: int, beta: float) -> None:
    """From a beta above 1 / 12 on, as an empty prefix prunes everything there."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((24, 12, 3, 3)))
    groups = rng.permutation(np.arange(24) % 3)
    mask = layer_mask(weight.square().sum((2, 3)).numpy(), groups, beta, True)
    expected = public_rule(weight, torch.nn.functional.one_hot(torch.from_numpy(groups)).T.double(), beta)
    assert np.array_equal(mask, expected.numpy())


def test_reduction_counts_the_multiplications_of_the_grouped_convs() -> None:
    """A ResNet-8 has, outside stem and shortcuts, 16*16*1024 * 2, (16 + 32)*32*256, (32 + 64)*64*64 (x 9) MACs."""
    chains = chains_of(skeleton(R8_CONV), (3, 32, 32))
    masks = {layer.name: np.ones((layer.filters, layer.channels), dtype=bool) for layer in layers_of(chains)}
    assert reduction_of(chains, masks) == 0
    masks["stage_3.0.conv_b"][:16] = False
    total = 2 * 16 * 16 * 1024 + 48 * 32 * 256 + 96 * 64 * 64
    assert reduction_of(chains, masks) == pytest.approx(16 * 64 * 64 / total)
