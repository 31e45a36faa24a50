"""Back to GSparsity's public form of a compressed network: {"small_model": state dict in torchvision's names}."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from gkp.errors import UsageError
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.residual import ResidualBlock
from gkp.pruning.tensor_file import save_tensors


def save_small_model(path: str | os.PathLike[str], model: nn.Module, arch: Architecture) -> None:
    """Write a network of conv12 compression, such as small_model_conv12_1e-06.pth.tar, atomically; reading it needs
    torch.load(weights_only=True) only.

    UsageError: the public form cannot hold this network: another family than ImageNet ResNets, a conv in branches (of
    all-conv), a block that is relu(shortcut + constant), a normalisation in front. FileError: it cannot be written."""
    _refuse(_misfit(model, arch))
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    save_tensors(Path(path), {"small_model": state})


def check_small_model(baseline: nn.Module, arch: Architecture, scope: str) -> None:
    """UsageError: whatever is removed from this dense network, the public form cannot hold it. scope: see the settings."""
    _refuse(_misfit(baseline, arch) or ("" if scope == "conv12" else f"it is for conv12, not {scope}"))


def _refuse(reason: str) -> None:
    if reason:
        raise UsageError(f"GSparsity's public form cannot hold this network: {reason}",
                         "leave out --public: gkp's own checkpoints hold every network")


def _misfit(model: nn.Module, arch: Architecture) -> str:
    """Why not, "" if it can."""
    if arch.family != "imagenet_resnet":
        return f"it knows ImageNet ResNets, not {arch.family}"
    if any(name.startswith("normalize.") for name in model.state_dict()):
        return "it has no normalisation in front"
    for name, module in model.named_modules():
        if isinstance(module, BranchedConv2d):
            return f"{name} is in branches"
        if isinstance(module, ResidualBlock) and module.constant is not None:
            return f"it drops the constant of {name}, whose residual branch is gone"
    return ""
