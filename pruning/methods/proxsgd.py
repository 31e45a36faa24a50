"""ProxSGD for filters: gradient descent whose proximal step drives whole filters of a convolution to zero.

Y. Yang et al., "ProxSGD: training structured neural networks under regularization and constraints", ICLR 2020, in the
form that GSparsity ("Structured sparsification with ProxSGD", filter pruning) uses: the L2 norms of filters are
penalised, and every filter has one step size, from the mean over its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from gkp.errors import UsageError

Normalization = Literal["none", "mul", "div"]


class ProxSGD(torch.optim.Optimizer):  # type: ignore[misc]
    """One step at iteration t (from 1), for a parameter x with gradient g, lr epsilon; a row is x[f], such as a filter:

        v <- (1 - rho) v + rho g                  rho near 1 weights the new gradient; v is not bias-corrected
        r <- beta r + (1 - beta) g^2
        tau[f] = mean over row f of (sqrt(r / (1 - beta^t)) + delta)
        x~ = x - v / tau
        gain None:   x^ = x~
        gain mu:     x^[f] = max(0, 1 - mu'[f] / |x~[f]|) x~[f], |.| the L2 norm, and, with n weights in a row,
                     mu' = mu / tau ("none"), mu sqrt(n) / tau ("mul"), mu / (sqrt(n) tau) ("div")
        x <- x + epsilon (x^ - x)

    So a row that the penalty wins over shrinks by 1 - epsilon a step: zero is approached, not reached.
    params: parameters, or groups of them in the usual way, each with its own `gain` (mu, from 0 on, or None).
    UsageError: lr, rho or beta outside (0, 1], (0, 1], [0, 1); a negative delta or gain; an unknown normalization.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *, gain: float | None = None, rho: float = 0.9,
                 beta: float = 0.999, delta: float = 1e-8, normalization: Normalization = "div") -> None:
        if not (0 < lr <= 1 and 0 < rho <= 1 and 0 <= beta < 1 and delta >= 0):
            raise UsageError(f"ProxSGD cannot run with lr {lr}, rho {rho}, beta {beta}, delta {delta}",
                             "lr and rho in (0, 1], beta in [0, 1), delta at least 0")
        if normalization not in ("none", "mul", "div"):
            raise UsageError(f"unknown normalization {normalization!r}", "use none, mul or div")
        defaults = {"lr": lr, "gain": gain, "rho": rho, "beta": beta, "delta": delta, "normalization": normalization}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["gain"] is not None and group["gain"] < 0:
                raise UsageError(f"a regularisation gain of {group['gain']} is negative", "use 0 or more, or None")

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step for every parameter that has a gradient. closure: recomputes the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for x in group["params"]:
                    if x.grad is not None:
                        self._update(x, group)
        return loss

    def _update(self, x: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        if not state:
            state.update(step=0, v=torch.zeros_like(x), r=torch.zeros_like(x))
        state["step"] += 1
        state["v"].mul_(1 - group["rho"]).add_(x.grad, alpha=group["rho"])
        state["r"].mul_(group["beta"]).addcmul_(x.grad, x.grad, value=1 - group["beta"])
        tau = step_sizes(state["r"] / (1 - group["beta"] ** state["step"]), group["delta"])
        target = x - state["v"] / tau
        if group["gain"] is not None:
            target = shrunk(target, normalized_gain(group["gain"], tau, x, group["normalization"]))
        x.add_(target - x, alpha=group["lr"])


def step_sizes(r: torch.Tensor, delta: float) -> torch.Tensor:
    """tau: the mean over each row of sqrt(r) + delta. r float [F, ...] -> [F, 1, ...]."""
    return (r.sqrt() + delta).reshape(len(r), -1).mean(1).reshape(-1, *(1,) * (r.ndim - 1))


def normalized_gain(mu: float, tau: torch.Tensor, x: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """mu' for rows of x with n weights each: mu / tau, times sqrt(n) for "mul", over sqrt(n) for "div"."""
    root = (x.numel() / len(x)) ** 0.5
    return mu * {"none": 1.0, "mul": root, "div": 1 / root}[normalization] / tau


def shrunk(x: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """The proximal step of mu[f] times the L2 norm of row f: max(0, 1 - mu[f] / |x[f]|) x[f], and 0 for a zero row.

    x float [F, ...]; mu [F, 1, ...]."""
    norm = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).reshape(mu.shape)
    return torch.where(norm > mu, 1 - mu / norm, 0.0) * x
