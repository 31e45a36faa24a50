"""DSP's fine-tuning: cosine cycles, each of which starts from the best network so far and prunes a little more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from gkp.pruning.masks import apply_masks
from gkp.pruning.methods.dsp_channels import Groups, Mask, Masks, reduction_of
from gkp.pruning.methods.dsp_dead import settle, zero_biases
from gkp.pruning.methods.dsp_group_learning import task_step
from gkp.pruning.methods.dsp_network import Chain
from gkp.pruning.methods.dsp_rate import prune_to_rate
from gkp.pruning.training import StepContext

MORE = 0.001  # of the MACs, pruned by every cycle but the first


class Cycles:
    """Masks and best network of a fine-tuning; its methods are what gkp.pruning.training.Hooks takes.

    masks: conv -> bool [F, C], of the network that training starts with. length: epochs of one cycle.
    """

    def __init__(self, chains: tuple[Chain, ...], groups: Groups, masks: Masks, length: int) -> None:
        self.chains, self.groups, self.length = chains, groups, length
        self._masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
        self._best: dict[str, Any] | None = None
        self._cycle = 0

    @property
    def masks(self) -> dict[str, Mask]:
        """conv -> bool [F, C], of the network as it is."""
        return {name: np.asarray(mask.cpu().numpy()) for name, mask in self._masks.items()}

    def step(self, context: StepContext) -> torch.Tensor:
        """The task's step, and in front of a new cycle the return to the best network and its pruning."""
        if context.epoch // self.length > self._cycle:
            self._cycle = context.epoch // self.length
            self._prune_more(context.model)
            context.optimizer.state.clear()  # momentum of another network
        return task_step(context)

    def after_step(self, model: nn.Module) -> None:
        """What is masked, and the bias of a BatchNorm channel without weight, stays zero."""
        device = next(model.parameters()).device
        self._masks = {name: mask.to(device) for name, mask in self._masks.items()}
        apply_masks(model, self._masks)
        zero_biases(model, self.chains)

    def after_epoch(self, _: int, model: nn.Module, accuracy: float | None) -> None:
        """Remember the best network, the latest without an accuracy."""
        if self._best is None or accuracy is None or accuracy > self._best["accuracy"]:
            state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            self._best = {"accuracy": accuracy or 0.0, "network": state, "masks": self._stored()}

    def state_dict(self) -> dict[str, Any]:
        """The masks, the best network with its masks, and which cycle this is."""
        return {"masks": self._stored(), "best": self._best, "cycle": self._cycle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What state_dict returned."""
        self._masks, self._best, self._cycle = dict(state["masks"]), state["best"], state["cycle"]

    def _prune_more(self, model: nn.Module) -> None:
        if self._best is not None:
            model.load_state_dict(self._best["network"])
            self._masks = dict(self._best["masks"])
        masks = self.masks
        target = reduction_of(self.chains, masks) + MORE
        if target < 1:
            pruned = prune_to_rate(model, self.chains, self.groups, target, before=masks)
            masks = settle(model, self.chains, pruned.masks)
            self._masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}

    def _stored(self) -> dict[str, torch.Tensor]:
        return {name: mask.cpu() for name, mask in self._masks.items()}
