"""Refill and refill+: how many filters remain, which ones, and what each criterion scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.methods.refill import activation_scores, filter_count, magnitude, refilled, remaining


def mask_with(counts: list[int], channels: int = 4) -> np.ndarray:
    """[F, channels, 1, 1]; filter f keeps its first counts[f] weights."""
    return (np.arange(channels) < np.array(counts)[:, None])[..., None, None]


@pytest.mark.parametrize(("counts", "rate", "expected"), [
    ([3, 2, 1, 0], 0.0, 2),  # 6 / 4 = 1.5 filters: 1 + 1
    ([3, 2, 1, 0], 0.5, 3),  # 1.5 + 2.5 / 2 = 2.75: 2 + 1
    ([3, 2, 1, 0], 0.99, 4),  # 1.5 + 2.475 = 3.975: 3 + 1
    ([4, 4, 0, 0], 0.0, 3),
    ([4, 4, 4, 4], 0.0, 4),  # there is no fifth
    ([0, 0, 0, 0], 0.0, 1),  # a layer never vanishes
])
def test_number_of_filters_by_hand(counts: list[int], rate: float, expected: int) -> None:
    assert filter_count(mask_with(counts), rate) == expected


@pytest.mark.parametrize("rate", [1, -0.1, 2])
def test_fillback_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="fillback rate"):
        filter_count(mask_with([1, 1]), rate)


def test_best_filters_become_dense_and_the_others_empty() -> None:
    mask = mask_with([3, 2, 1, 0])
    new = refilled(mask, np.array([0.1, 5, 0.2, 3]), 0.0, np.random.default_rng(0))
    assert new.shape == mask.shape
    assert new.reshape(4, -1).all(1).tolist() == [False, True, False, True]
    assert new.reshape(4, -1).any(1).tolist() == [False, True, False, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9))
def test_different_scores_keep_what_the_public_rule_keeps(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    mask, scores = rng.random((8, 3, 3, 3)) < rng.random(), rng.permutation(8).astype(float)
    n = mask.sum() / 27
    n_new = int(n + (8 - n) * rate)
    threshold = np.sort(scores)[max(8 - n_new, 1) - 1]  # the (F - n')-th smallest; above it and itself: n' + 1
    new = refilled(mask, scores, rate, np.random.default_rng(0))
    assert (new.reshape(8, -1).all(1) == (scores >= threshold)).all()


def test_ties_are_drawn_and_the_seed_decides() -> None:
    mask, scores = mask_with([1] * 8), np.ones(8)
    drawn = {tuple(np.flatnonzero(refilled(mask, scores, 0.0, np.random.default_rng(s))[:, 0, 0, 0])) for s in range(20)}
    assert len(drawn) > 5
    assert {len(kept) for kept in drawn} == {3}
    again = [refilled(mask, scores, 0.0, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_mask_and_weight_criteria_by_hand() -> None:
    mask = mask_with([2, 1])
    weight = np.array([[1.0, -2, 50, 50], [-4, 50, 50, 50]])[..., None, None]
    assert remaining(mask).tolist() == [2, 1]
    assert magnitude(weight).tolist() == [103, 154]  # the whole filters, whatever the mask keeps of them


def test_activations_are_summed_per_filter_by_hand() -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False)
    net = nn.Sequential(conv, nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, -1.0]).reshape(2, 1, 1, 1))
        net[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    x = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).reshape(2, 1, 1, 2)  # two images of two pixels
    y = torch.tensor([0, 1])
    # a: image 0 [2, -4], [-1, 2]; image 1 [6, 0], [-3, 0]
    assert activation_scores(net, ["0"], x, y, "l1")["0"].tolist() == [12, 6]
    assert activation_scores(net, ["0"], x, y, "l2")["0"].tolist() == [4 + 16 + 36, 1 + 4 + 9]
    # Logits: image 0 (2, 2), image 1 (6, 0). dL/dlogits = (p - onehot) / 2; only plane 0 pixel 0 and plane 1 pixel 1 count.
    p1 = np.exp(6) / (np.exp(6) + 1)
    plane_0 = abs(2 * (0.5 - 1) / 2) + abs(6 * p1 / 2)
    plane_1 = abs(2 * 0.5 / 2) + 0
    np.testing.assert_allclose(activation_scores(net, ["0"], x, y, "saliency")["0"], [plane_0, plane_1], rtol=1e-6)
    assert not conv._forward_hooks
    assert conv.weight.grad is None


def test_scores_have_one_value_per_filter_whatever_the_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(112, 4)).eval()
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    for criterion in ("l1", "l2", "saliency"):
        scores = activation_scores(net, ["0", "3"], x, y, criterion)
        assert {name: s.shape for name, s in scores.items()} == {"0": (5,), "3": (7,)}
        assert all((s > 0).all() for s in scores.values())
