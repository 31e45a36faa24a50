"""DSP's group regulariser and its derivatives, for one convolution.

R(W, a) = sum_g s(a_g) sum_c l_gc,   l_gc = || a_g * W[:, c] ||_2,   s(a) = (sum_f sqrt(a_f))^2

W float [F, C, kh, kw]; a float [G, F], column f says how far filter f belongs to each group (soft, or one-hot: then
s = (filters of the group)^2). The norm runs over the filters and taps of one input channel, so R asks every group to do
without whole input channels. Everything needs only the sums over taps of W^2 and W*Delta, so it is matrix products of
[G, F] with [F, C].
"""

from __future__ import annotations

import math

import torch

EPSILON = 1e-8  # added to a norm that divides
SMALLEST = 1e-12  # of an assignment under a^(-1/2): a soft assignment may underflow to zero


def regulariser(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """R, a scalar. weight [F, C, kh, kw], a [G, F]."""
    return (_size(a) * _norms(weight, a).sum(1)).sum()


def weight_gradient(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """dR/dW [F, C, kh, kw] = sum_g s a_g^2 W / (l + 1e-8)."""
    share = (a.square() * _size(a)[:, None]).T @ (1 / (_norms(weight, a) + EPSILON))
    return weight * share[:, :, None, None]


def assignment_gradient(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """dR/da [G, F] = ds/da sum_c l + s sum W * What, with What = a_g W / (l + 1e-8)."""
    norms = _norms(weight, a)
    inner = a * ((1 / (norms + EPSILON)) @ _taps(weight, weight).T)
    return _size_gradient(a) * norms.sum(1)[:, None] + _size(a)[:, None] * inner


def second_order(weight: torch.Tensor, a: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """d/da <dR/dW (W, a), delta> [G, F]: how the assignment moves the weights along `delta` [F, C, kh, kw].

    (ds/da) sum_c <dl/dW, delta> + s sum_c [2 What delta - (dl/da) <dl/dW, delta> / l].
    """
    scaled = 1 / (_norms(weight, a) + EPSILON)
    energy, product = _taps(weight, weight), _taps(weight, delta)
    along = (a.square() @ product) * scaled  # <dl/dW, delta> [G, C]
    inner = 2 * a * (scaled @ product.T) - a * ((along * scaled.square()) @ energy.T)
    return _size_gradient(a) * along.sum(1)[:, None] + _size(a)[:, None] * inner


def lookahead_gradient(
    a: torch.Tensor, start: torch.Tensor, penalised: torch.Tensor, trained: torch.Tensor, again: torch.Tensor
) -> torch.Tensor:
    """The assignment's gradient [G, F] through one unrolled training step.

    start: W. penalised: W1 = W - p dR/dW(W). trained: W2, after a task step from W1. again: W3 = W2 - p dR/dW(W2).
    With Delta = W3 - W1 this is dR/da at W2 + d/da <dR/dW(W), Delta>: the gradient of (lr / p) loss(W1) + R(W2) by a,
    where W2 is taken to follow W1 one to one (exact for plain SGD and a loss that is linear in W)."""
    return assignment_gradient(trained, a) + second_order(start, a, again - penalised)


def penalty_scale(in_channels: int, height: int, width: int, kernel: int, groups: int, filters: int) -> float:
    """What the weight penalty of a layer is multiplied by: sqrt(C H W / 16384) k (G / F)^1.5, H x W of its input.

    The gradient of the assignment is not scaled."""
    return math.sqrt(in_channels * height * width / 16384) * kernel * math.pow(groups / filters, 1.5)


def gumbel_softmax(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A soft sample of the assignment [G, F]: softmax over the groups of logits / temperature + Gumbel noise.

    So the temperature sharpens what is learned and leaves the noise as it is. The noise is drawn on the CPU, so that a
    seed gives one sequence on every device."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_(1e-20, 1 - 1e-16)
    noise = -torch.log(-torch.log(uniform))
    return torch.softmax(logits / temperature + noise.to(logits), 0)


def one_hot(groups: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """The hard assignment [count, F] of groups int64 [F], in the dtype and on the device of `like`."""
    return torch.nn.functional.one_hot(groups, count).T.to(like)


def _size(a: torch.Tensor) -> torch.Tensor:
    """s [G]: the square of the number of filters, for a hard assignment."""
    return a.sqrt().sum(1).square()


def _size_gradient(a: torch.Tensor) -> torch.Tensor:
    """ds/da [G, F] = (sum sqrt a) / sqrt a."""
    return a.sqrt().sum(1)[:, None] * a.clamp_min(SMALLEST).rsqrt()


def _norms(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """l [G, C]."""
    return (a.square() @ _taps(weight, weight)).sqrt()


def _taps(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum of x * y over the taps: [F, C]."""
    return (x * y).sum((2, 3))
