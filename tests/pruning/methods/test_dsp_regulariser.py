"""DSP's regulariser and its derivatives: worked out by hand, by autograd in float64, and by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.pruning.methods.dsp_regulariser import (
    assignment_gradient,
    gumbel_softmax,
    lookahead_gradient,
    one_hot,
    penalty_scale,
    regulariser,
    second_order,
    weight_gradient,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 3]))  # G, F, C, k
SEEDS = st.integers(0, 2**32 - 1)


def draw(shape: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, soft assignment, direction), in float64."""
    groups, filters, channels, kernel = shape
    generator = torch.Generator().manual_seed(seed)
    weight, delta = torch.randn(2, filters, channels, kernel, kernel, generator=generator, dtype=torch.float64)
    logits = torch.randn(groups, filters, generator=generator, dtype=torch.float64)
    return weight, torch.softmax(logits, 0), delta


def written_out(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """R with the sums of the definition."""
    total = weight.new_zeros(())
    for group in a:
        for channel in weight.unbind(1):
            total = total + group.sqrt().sum() ** 2 * (group[:, None, None] * channel).norm()
    return total


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().max())))


def test_two_filters_by_hand() -> None:
    weight = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)
    together, apart = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.eye(2)
    assert regulariser(weight, together).item() == pytest.approx(4 * 5)  # two filters in a group: 2^2, ||(3, 4)|| = 5
    assert regulariser(weight, apart).item() == pytest.approx(3 + 4)
    assert_near(weight_gradient(weight, together).flatten(), torch.tensor([4 * 3 / 5, 4 * 4 / 5]))
    assert_near(weight_gradient(weight, apart).flatten(), torch.ones(2))


def test_assignment_gradient_by_hand() -> None:
    """One group, a = (1, 1): s = 4, ds/da = 2; l = 5, dl/da = (9, 16) / 5. So dR/da = 2 * 5 + 4 * (9, 16) / 5."""
    weight = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)
    assert_near(assignment_gradient(weight, torch.ones(1, 2)), torch.tensor([[17.2, 22.8]]))


def test_second_order_by_hand() -> None:
    """One filter: R = a (sqrt a)^2 |w| = a^2 |w|, so d/da <dR/dw, delta> = 2 a delta for w > 0."""
    weight, a, delta = torch.tensor(3.0).reshape(1, 1, 1, 1), torch.tensor([[0.7]]), torch.full((1, 1, 1, 1), 5.0)
    assert_near(second_order(weight, a, delta), torch.tensor([[2 * 0.7 * 5]]))


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS)
def test_first_derivatives_are_those_of_autograd(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, a, _ = draw(shape, seed)
    by_weight, by_a = torch.autograd.grad(written_out(weight.requires_grad_(), a.requires_grad_()), (weight, a))
    with torch.no_grad():
        assert_near(regulariser(weight, a), written_out(weight, a))
        assert_near(weight_gradient(weight, a), by_weight)
        assert_near(assignment_gradient(weight, a), by_a)


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS)
def test_second_order_is_that_of_autograd(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, a, delta = draw(shape, seed)
    (slope,) = torch.autograd.grad(written_out(weight.requires_grad_(), a.requires_grad_()), weight, create_graph=True)
    (expected,) = torch.autograd.grad((slope * delta).sum(), a)
    with torch.no_grad():
        assert_near(second_order(weight, a, delta), expected)


def test_second_order_is_a_finite_difference() -> None:
    weight, a, delta = draw((3, 5, 4, 3), 0)
    step, expected = 1e-6, torch.zeros_like(a)
    for place in np.ndindex(*a.shape):
        up, down = a.clone(), a.clone()
        up[place] += step
        down[place] -= step
        expected[place] = ((weight_gradient(weight, up) - weight_gradient(weight, down)) * delta).sum() / (2 * step)
    assert_near(second_order(weight, a, delta), expected)


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(1e-3, 0.1), st.floats(1e-4, 1e-2))
def test_lookahead_is_the_gradient_through_the_unrolled_step(
    shape: tuple[int, int, int, int], seed: int, lr: float, penalty: float
) -> None:
    """Loss <slope, W>: W2 = W1 - lr slope, and the objective (lr / penalty) loss(W1) + R(W2) is differentiated as a whole."""
    weight, a, slope = draw(shape, seed)

    def penalised(w: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(written_out(w, a), w, create_graph=True)
        return w - penalty * gradient

    a.requires_grad_()
    first = penalised(weight.clone().requires_grad_())
    second = first - lr * slope
    (expected,) = torch.autograd.grad((lr / penalty) * (slope * first).sum() + written_out(second, a), a, retain_graph=True)
    third = penalised(second)
    tensors = (t.detach() for t in (a, weight, first, second, third))
    assert_near(lookahead_gradient(*tensors), expected, 1e-5)


def test_an_assignment_that_underflowed_has_finite_gradients() -> None:
    weight, a, delta = (t.float() for t in draw((2, 3, 4, 3), 0))
    a[0], a[1] = 0, 1
    for gradient in (assignment_gradient(weight, a), second_order(weight, a, delta)):
        assert torch.isfinite(gradient).all()


def test_zero_weights_have_finite_gradients() -> None:
    _, a, delta = draw((2, 3, 4, 3), 0)
    weight = torch.zeros_like(delta)
    assert not weight_gradient(weight, a).any()
    assert not assignment_gradient(weight, a).any()
    assert torch.isfinite(second_order(weight, a, delta)).all()


def test_penalty_scale_by_hand() -> None:
    assert penalty_scale(16, 32, 32, 3, 4, 16) == pytest.approx(3 / 8)  # sqrt(16384 / 16384) * 3 * (1 / 4)^1.5
    assert penalty_scale(64, 8, 8, 3, 4, 64) == pytest.approx(0.5 * 3 / 64)
    assert penalty_scale(16, 32, 32, 1, 16, 16) == pytest.approx(1)


def test_soft_samples_are_distributions_whose_largest_entry_follows_the_logits() -> None:
    """At temperature 1/2 the logits count twice: shares of 0.6, 0.3 and 0.1 become their squares."""
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))[:, None].repeat(1, 20_000)
    sample = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(sample.sum(0), 1, atol=1e-5)
    expected = np.array([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(torch.bincount(sample.argmax(0)) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 3.0])
def test_soft_samples_are_distributed_as_the_public_program_draws_them(temperature: float) -> None:
    """Which divides the logits and leaves the noise: torch's own sampler, at its own temperature 1, of the quotient."""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.0, -0.2, 0.1])[:, None].repeat(1, 40_000)
    ours = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(1))
    theirs = torch.nn.functional.gumbel_softmax(logits / temperature, dim=0)
    for of in (lambda t: t.mean(1), lambda t: t.sort(0).values.mean(1), lambda t: t.square().mean(1)):
        np.testing.assert_allclose(of(ours), of(theirs), atol=0.01)


def test_at_logits_of_zero_the_temperature_does_not_matter() -> None:
    one, other = (gumbel_softmax(torch.zeros(4, 20_000), t, torch.Generator().manual_seed(0)) for t in (0.1, 5))
    assert torch.equal(one, other)
    assert float(one.max(0).values.mean()) == pytest.approx(0.60, abs=0.01)


def test_one_hot_has_a_row_per_group() -> None:
    like = torch.zeros((), dtype=torch.float64)
    hard = one_hot(torch.tensor([2, 0, 2]), 4, like)
    assert hard.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert hard.dtype == torch.float64
