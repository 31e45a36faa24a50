"""Iterative magnitude pruning with rewinding (Frankle et al., "Linear mode connectivity and the lottery ticket
hypothesis", ICML 2020): train, prune the smallest weights of the whole network, rewind the rest to an early epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.tensor_file import load_tensors

Masks = dict[str, torch.Tensor]


def prune_smallest(weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], rate: float) -> Masks:
    """The masks without the smallest weights: of all weights that the masks still keep, in all layers together, the share
    `rate` with the smallest |w| goes (rounded to a whole number; of equal ones the earlier).

    weights: name -> float [F, C, kh, kw]; masks: name -> bool of the same shape.
    UsageError: rate is not between 0 and 1, or nothing is left to prune.
    """
    if not 0 < rate < 1:
        raise UsageError(f"the pruning rate must lie between 0 and 1, not {rate}", "the published one is 0.2")
    kept = torch.cat([masks[name].flatten() for name in masks]) if masks else torch.zeros(0, dtype=torch.bool)
    count = int(kept.sum())
    if count == 0:
        raise UsageError("there is no weight left to prune", "prune fewer rounds, or at a lower rate")
    size = torch.cat([weights[name].detach().cpu().flatten() for name in masks]).abs()
    places = torch.nonzero(kept).flatten()
    order = torch.sort(size[places], stable=True).indices
    kept[places[order[: round(rate * count)]]] = False
    parts = torch.split(kept, [mask.numel() for mask in masks.values()])
    return {name: part.reshape(mask.shape).clone() for (name, mask), part in zip(masks.items(), parts, strict=True)}


def density(masks: Mapping[str, torch.Tensor]) -> float:
    """Share of ones in the masks (at least one), 0 to 1."""
    return float(torch.cat([mask.flatten() for mask in masks.values()]).double().mean())


@dataclass
class RewindPoint:
    """Keeps a copy of the network after `epoch` epochs of training (0: call `note` before). Saved with every epoch of
    the training (Hooks.extra), so a resumed run has it too."""

    epoch: int
    weights: dict[str, torch.Tensor] | None = None

    def note(self, model: nn.Module) -> None:
        self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def after_epoch(self, epoch: int, model: nn.Module, _accuracy: float | None) -> None:
        if epoch + 1 == self.epoch:
            self.note(model)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


def read_snapshot(folder: Path, epoch: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of epoch_<epoch>.pt, which must fit the model: {"model_state_dict": ...} or the dict itself.

    UsageError: no such snapshot, or one of another network. FileError, UnsafeFileError: see load_tensors.
    """
    path = folder / f"epoch_{epoch}.pt"
    if not path.is_file():
        raise UsageError(f"{folder} has no {path.name}, whose weights shall be rewound to",
                         "set rewind_epoch to an epoch that is there, or leave --snapshots out")
    payload = load_tensors(path)
    state = payload.get("model_state_dict", payload.get("state_dict", payload)) if isinstance(payload, dict) else None
    own = model.state_dict()
    if not isinstance(state, dict) or {n: getattr(t, "shape", None) for n, t in state.items()} != {
            n: t.shape for n, t in own.items()}:
        raise UsageError(f"{path} is not a snapshot of this network", "give the snapshots of the baseline's training")
    return {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
