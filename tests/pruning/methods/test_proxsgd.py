"""ProxSGD's steps are those of its formulas, written out once more here in float64 numpy, one weight at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.errors import UsageError
from gkp.pruning.methods.proxsgd import ProxSGD, shrunk


class Reference:
    """One parameter with rows, by loops."""

    def __init__(self, x: np.ndarray, lr: float, mu: float | None, rho: float, beta: float, delta: float, norm: str) -> None:
        self.rows = [[float(value) for value in row.ravel()] for row in x]
        self.lr, self.mu, self.rho, self.beta, self.delta, self.norm = lr, mu, rho, beta, delta, norm
        self.v = [[0.0] * len(row) for row in self.rows]
        self.r = [[0.0] * len(row) for row in self.rows]
        self.t = 0

    def step(self, g: np.ndarray) -> None:
        self.t += 1
        for f, row in enumerate(self.rows):
            n, gradient = len(row), g[f].ravel()
            for i in range(n):
                self.v[f][i] = (1 - self.rho) * self.v[f][i] + self.rho * float(gradient[i])
                self.r[f][i] = self.beta * self.r[f][i] + (1 - self.beta) * float(gradient[i]) ** 2
            corrected = [r / (1 - self.beta**self.t) for r in self.r[f]]
            tau = sum(math.sqrt(r) + self.delta for r in corrected) / n
            target = [x - v / tau for x, v in zip(row, self.v[f], strict=True)]
            if self.mu is not None:
                gain = {"none": 1.0, "mul": math.sqrt(n), "div": 1 / math.sqrt(n)}[self.norm] * self.mu / tau
                length = math.sqrt(sum(t * t for t in target))
                scale = 0.0 if length == 0 else max(0.0, 1 - gain / length)
                target = [scale * t for t in target]
            self.rows[f] = [x + self.lr * (t - x) for x, t in zip(row, target, strict=True)]


def run_both(shape: tuple[int, ...], steps: int, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> float:
    """Largest difference after some steps, over the largest weight."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(shape)
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    values = {"lr": 0.1, "gain": 0.05, "rho": 0.9, "beta": 0.999, "delta": 1e-8, "normalization": "div"} | options
    optimizer = ProxSGD([parameter], **values)
    reference = Reference(start, *(values[k] for k in ("lr", "gain", "rho", "beta", "delta", "normalization")))
    for _ in range(steps):
        gradient = rng.standard_normal(shape)
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        reference.step(gradient)
        optimizer.step()
    expected = np.array(reference.rows).reshape(shape)
    return float(np.abs(parameter.detach().double().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("normalization", ["none", "mul", "div"])
@pytest.mark.parametrize("gain", [None, 0.0, 0.3, 100.0])
def test_steps_are_those_of_the_formulas(normalization: str, gain: float | None) -> None:
    assert run_both((4, 3, 3, 3), 5, 0, normalization=normalization, gain=gain) < 1e-12


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1e-4, 1), st.floats(0.05, 1), st.floats(0, 0.999), st.sampled_from([(3,), (2, 5), (3, 2, 1, 1)]))
def test_all_settings_follow_the_formulas(seed: int, lr: float, rho: float, beta: float, shape: tuple[int, ...]) -> None:
    assert run_both(shape, 3, seed, lr=lr, rho=rho, beta=beta, delta=1e-3) < 1e-10


def test_float32_stays_close_to_float64() -> None:
    assert run_both((8, 4, 3, 3), 20, 1, torch.float32, lr=1e-2) < 1e-5


def test_first_step_by_hand() -> None:
    """g = (3, 4), beta = 0: r = g^2, tau = (3 + 4) / 2 = 3.5; v = 0.9 g; x~ = x - v / 3.5."""
    x = torch.nn.Parameter(torch.tensor([[2.7 / 3.5 + 3, 3.6 / 3.5 + 4]], dtype=torch.float64))
    x.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    # |x~| = |(3, 4)| = 5 and mu' = 7 sqrt(2) / (sqrt(2) 3.5) = 2: x^ = 0.6 x~
    ProxSGD([x], 1.0, gain=7 * math.sqrt(2), beta=0.0, delta=0.0).step()
    torch.testing.assert_close(x.detach(), torch.tensor([[1.8, 2.4]], dtype=torch.float64))


def test_losing_filters_shrink_by_one_minus_lr_and_others_keep_going() -> None:
    x = torch.nn.Parameter(torch.tensor([[0.01, 0.02], [3.0, 4.0]]))
    optimizer = ProxSGD([x], 0.5, gain=1.0, delta=0.25, normalization="none")
    for _ in range(3):
        x.grad = torch.zeros_like(x)
        optimizer.step()
    torch.testing.assert_close(x.detach()[0], torch.tensor([0.01, 0.02]) / 8)
    assert 0 < float(x.detach()[1].norm()) < 5  # tau = 0.25: the length 5 loses 4 of itself, half of it a step


def test_zero_row_stays_zero_without_a_nan() -> None:
    for gain in (None, 0.0, 1.0):
        x = torch.nn.Parameter(torch.zeros(2, 3))
        x.grad = torch.zeros_like(x)
        ProxSGD([x], gain=gain).step()
        assert not x.detach().any()


def test_shrinking_is_the_proximal_step() -> None:
    """The minimiser of |y - x|^2 / 2 + mu |y|: no nearby point is better."""
    rng = torch.Generator().manual_seed(0)
    x, mu = torch.randn(3, 4, generator=rng, dtype=torch.float64), torch.tensor([[0.3], [1.0], [9.0]], dtype=torch.float64)

    def cost(y: torch.Tensor) -> torch.Tensor:
        return ((y - x) ** 2).sum(1) / 2 + mu[:, 0] * y.norm(dim=1)

    best = shrunk(x, mu)
    assert not best[2].any()
    for _ in range(100):
        near = best + 1e-3 * torch.randn(3, 4, generator=rng, dtype=torch.float64)
        assert bool((cost(near) >= cost(best)).all())


def test_state_survives_saving_and_loading() -> None:
    def grown(reload: bool) -> torch.Tensor:
        torch.manual_seed(0)
        x = torch.nn.Parameter(torch.randn(3, 4))
        optimizer = ProxSGD([{"params": [x], "gain": 0.1}])
        for step in range(4):
            if reload and step == 2:
                state = optimizer.state_dict()
                optimizer = ProxSGD([{"params": [x], "gain": 0.1}])
                optimizer.load_state_dict(state)
            x.grad = torch.full_like(x, 0.1 + step)
            optimizer.step()
        return x.detach()

    assert torch.equal(grown(True), grown(False))


def test_learning_rate_schedules_reach_it_and_parameters_without_gradient_stay() -> None:
    x, still = torch.nn.Parameter(torch.ones(1, 1)), torch.nn.Parameter(torch.ones(1, 1))
    optimizer = ProxSGD([x, still], 1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    x.grad = torch.ones_like(x)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    torch.testing.assert_close(1 - x.detach(), torch.full((1, 1), 0.9e-3), rtol=1e-3, atol=0)
    assert torch.equal(still.detach(), torch.ones(1, 1))


def test_closure_gives_the_loss() -> None:
    x = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = ProxSGD([x])

    def closure() -> torch.Tensor:
        loss = (x**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    assert float(loss) == 1.0
    assert float(x.detach()) < 1


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"rho": 0.0}, {"beta": 1.0}, {"delta": -1.0}, {"gain": -0.1}, {"normalization": "log"}]
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ProxSGD([torch.nn.Parameter(torch.ones(1))], **options)
