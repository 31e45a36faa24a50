"""Refilling: an unstructured mask becomes one of whole filters (T. Chen et al., "Coarsening the granularity: towards
structurally sparse lottery tickets", ICML 2022). As many filters as the mask's weights would fill remain, those that
score highest; with a fillback rate above zero (refill+) some more.

The mask decides how many filters remain; which ones it decides only by the criterion "remain". The others look at the
trained network whole, without the mask: the public program scores the checkpoint of its --pretrained as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UsageError
from gkp.pruning.masks import conv_named
from gkp.types import Array

Mask = npt.NDArray[np.bool_]
Criterion = Literal["remain", "magnitude", "l1", "l2", "saliency"]
Activation = Literal["l1", "l2", "saliency"]


def filter_count(mask: Mask, fillback_rate: float = 0.0) -> int:
    """How many of the F filters remain: int(n + (F - n) fillback_rate) + 1, at most F, where n = ones / (C kh kw) is how
    many filters the ones would fill. mask bool [F, C, kh, kw].

    The one more is the public program's: it keeps what lies above the (F - n')-th smallest score, and that one too.
    UsageError: the rate is not from 0 up to (not including) 1.
    """
    if not 0 <= fillback_rate < 1:
        raise UsageError(f"the fillback rate must be from 0 to below 1, not {fillback_rate}", "0 is refill, more refill+")
    filters = len(mask)
    equivalent = int(mask.sum()) / (mask.size / filters)
    return min(filters, int(equivalent + (filters - equivalent) * fillback_rate) + 1)


def refilled(mask: Mask, scores: Array, fillback_rate: float, rng: np.random.Generator) -> Mask:
    """bool [F, C, kh, kw]: all ones for the filters that remain, zeros for the others.

    scores float [F]: the highest remain; equal scores are decided at random. (Upstream leaves filters that tie with the
    threshold, but are not drawn, as they were: unstructured.)
    """
    order = rng.permutation(len(mask))
    ranked = order[np.argsort(-np.asarray(scores, np.float64)[order], kind="stable")]
    kept = np.zeros(len(mask), dtype=bool)
    kept[ranked[: filter_count(mask, fillback_rate)]] = True
    return np.array(np.broadcast_to(kept[:, None, None, None], mask.shape))


def remaining(mask: Mask) -> Array:
    """Criterion "remain": how many weights of each filter the mask keeps. [F, C, kh, kw] -> int64 [F]."""
    return np.asarray(mask.reshape(len(mask), -1).sum(1))


def magnitude(weight: Array) -> Array:
    """Criterion "magnitude": L1 norm of each trained filter. [F, C, kh, kw] -> float64 [F]."""
    return np.asarray(np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(1))


def activation_scores(model: nn.Module, names: Iterable[str], x: torch.Tensor, y: torch.Tensor,
                      criterion: Activation) -> dict[str, Array]:
    """What each filter of the named convs puts out for a batch, summed over images and pixels: |a| ("l1"), a^2 ("l2"),
    or |a dL/da| with the mean cross entropy L ("saliency"). name -> float64 [F].

    (Upstream takes the images of the batch for the filters, and runs the network in training mode.) model in eval mode;
    x [N, C, H, W], y int64 [N].
    """
    planes: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def keep(_module: nn.Module, _inputs: object, output: torch.Tensor, name: str = name) -> None:
            planes[name] = output

        handles.append(conv_named(model, name).register_forward_hook(keep))
    try:
        loss = F.cross_entropy(model(x.detach().requires_grad_()), y)
    finally:
        for handle in handles:
            handle.remove()
    if criterion == "saliency":
        gradients = torch.autograd.grad(loss, list(planes.values()))
        worth = {n: (a * g).abs() for (n, a), g in zip(planes.items(), gradients, strict=True)}
    else:
        worth = {n: a.abs() if criterion == "l1" else a**2 for n, a in planes.items()}
    return {name: plane.detach().double().sum((0, 2, 3)).numpy() for name, plane in worth.items()}
