"""Back to GConv-Prune's public masked form: dense weights with zeros, and `<layer>.mask` [F, C] beside each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.tensor_file import save_tensors

PUBLIC_NAME = "model_best.pth.tar"


def masked_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the network with ordinary convolutions.

    A BranchedConv2d called <layer> becomes <layer>.weight [F, C, kh, kw], zero outside its branches, <layer>.mask
    float32 [F, C], one inside them, and <layer>.bias if it has one. An ordinary conv gets a mask of ones, as upstream
    writes it; a grouped or depthwise one none.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, BranchedConv2d):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            form = module.to_branched()
            mask = np.zeros((form.out_channels, form.in_channels), np.float32)
            for branch in form.branches:
                mask[np.ix_(branch.out_index, branch.in_index)] = 1
            state[f"{name}.weight"] = torch.from_numpy(form.to_dense())
            state[f"{name}.mask"] = torch.from_numpy(mask)
            if module.bias is not None:
                state[f"{name}.bias"] = torch.from_numpy(np.asarray(form.bias))
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            state[f"{name}.mask"] = torch.ones(module.weight.shape[:2])
    return state


def save_masked(path: str | os.PathLike[str], model: nn.Module, accuracy: float | None = None, epoch: int = 0) -> None:
    """Write the public checkpoint {"epoch", "state_dict", "acc", "best_acc"}, atomically; torch.load(weights_only=True)
    reads it. accuracy: 0 to 1 or None, written in percent. UsageError: no layer of the network is in branches.
    FileError: the file cannot be written."""
    if not any(isinstance(module, BranchedConv2d) for module in model.modules()):
        raise UsageError("no convolution of this network is in branches", "save the grouped or finetuned network")
    percent = None if accuracy is None else 100 * accuracy
    payload = {"epoch": epoch, "state_dict": masked_state_dict(model), "acc": percent, "best_acc": percent}
    save_tensors(Path(path), payload)
