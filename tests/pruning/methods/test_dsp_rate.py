"""How DSP finds the share of energy that may go, so that the rate is met."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch_kit import R8_CONV, random_state

from gkp.errors import UsageError
from gkp.pruning.methods.dsp_channels import Groups, reduction_of
from gkp.pruning.methods.dsp_dead import settle
from gkp.pruning.methods.dsp_network import chains_of, layers_of
from gkp.pruning.methods.dsp_rate import check_reached, prune_to_rate
from gkp.pruning.models.architecture import skeleton

SHAPE = (3, 32, 32)


def network(seed: int = 0) -> tuple[nn.Module, Groups]:
    model = skeleton(R8_CONV)
    model.load_state_dict(random_state(R8_CONV))
    rng = np.random.default_rng(seed)
    return model.eval(), {layer.name: rng.integers(0, 4, layer.filters) for layer in layers_of(chains_of(model, SHAPE))}


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6, 0.9])
def test_rate_is_met(rate: float) -> None:
    model, groups = network()
    chains = chains_of(model, SHAPE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruning = prune_to_rate(model, chains, groups, rate)
    assert pruning.reduction == pytest.approx(rate, abs=0.02)
    assert pruning.reduction == reduction_of(chains, settle(copy.deepcopy(model), chains, pruning.masks))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for layer in layers_of(chains):
        mask = pruning.masks[layer.name]
        assert mask.shape == (layer.filters, layer.channels)
        for group in range(4):
            rows = mask[groups[layer.name] == group]
            distinct = {row.tobytes() for row in rows if row.any() or not layer.last}
            assert len(distinct) <= 1
    assert any(not row.any() for layer in layers_of(chains) if layer.last for row in pruning.masks[layer.name]) or rate < 0.4


def test_what_is_dead_under_the_masks_counts_as_saved() -> None:
    """With one group all filters of a block's second conv read the same channels; filters of the first conv that write the
    others are dead, and without them the masks alone would save less than was asked for."""
    model, groups = network()
    chains = chains_of(model, SHAPE)
    pruning = prune_to_rate(model, chains, {name: np.zeros_like(found) for name, found in groups.items()}, 0.6)
    assert pruning.reduction == pytest.approx(0.6, abs=0.02)
    assert reduction_of(chains, pruning.masks) < 0.55


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
    """Half of the channels between the convs are read by none, so they and their filters go whatever beta is."""
    model, groups = network()
    chains = chains_of(model, SHAPE)
    with torch.no_grad():
        for _, last in chains:
            model.get_submodule(last.name).weight[:, ::2] = 0
    best = prune_to_rate(model, chains, groups, 0.05)
    assert 0.45 < best.reduction < 0.55
    check_reached(best, best.reduction + 0.01)
    with pytest.raises(UsageError, match="nearest"):
        check_reached(best, 0.05)
