"""DSP's packing: filters with equal mask rows become a branch; and the public form of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.masks import conv_named, form_of_mask, grouped
from gkp.pruning.methods.dsp_channels import Masks
from gkp.pruning.methods.dsp_dead import without_silent
from gkp.pruning.methods.dsp_network import Chain, layers_of
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.tensor_file import save_tensors


def pack(model: nn.Module, chains: tuple[Chain, ...], masks: Masks) -> nn.Module:
    """A copy of the network whose grouped convs are BranchedConv2d, in eval mode: it computes what the masked one does.

    masks: conv -> bool [F, C]. Filters with equal rows form a branch, in order of their first filter; empty ones are in no
    branch, and neither are inputs that are always zero nor filters that nothing reads."""
    exact = without_silent(model, chains, masks)
    return grouped(model, {name: form_of_mask(conv_named(model, name), mask) for name, mask in exact.items()}).eval()


def public_name(arch: Architecture, groups: int, rate: float) -> str:
    """The file name that DSP gives a pruned network, such as resnet20_P0g4c0.60.pkl; 0 is the device."""
    return f"{arch.name}_P0g{groups}c{rate:.2f}.pkl"


def public_state(packed: nn.Module, chains: tuple[Chain, ...], groups: int) -> dict[str, torch.Tensor]:
    """The state dict as DSP publishes it: dense weights, and per grouped conv what makes its branches.

    <conv>.weight float [F, C, k, k]; <conv>.group float [groups, F], one-hot: a filter's branch (0 if it is in none);
    <conv>.mask float [F, C, 1, 1]. All other names are those of the network: conv_1_3x3, bn_1, stage_s.i.bn_a, ...
    UsageError: a conv has more branches than there are groups.
    """
    names = [layer.name for layer in layers_of(chains)]
    inside = tuple(f"{name}." for name in names)
    others = {n: t.detach().cpu().clone() for n, t in packed.state_dict().items() if not n.startswith(inside)}
    arrays = {key: array for name in names for key, array in _conv_arrays(name, packed.get_submodule(name), groups).items()}
    return others | {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}


def write_public(
    path: str | os.PathLike[str], packed: nn.Module, chains: tuple[Chain, ...], groups: int, accuracy: float | None
) -> None:
    """Write DSP's checkpoint [state dict, accuracy in per cent], which `torch.load(path, weights_only=True)` reads.

    accuracy: 0 to 1; None becomes 0. FileError: the file cannot be written. UsageError: see public_state."""
    save_tensors(Path(path), [public_state(packed, chains, groups), 100 * (accuracy or 0.0)])


def _conv_arrays(name: str, conv: nn.Module, groups: int) -> dict[str, npt.NDArray[np.float32]]:
    if isinstance(conv, BranchedConv2d):
        form = conv.to_branched()
    else:
        form = form_of_mask(conv, np.ones(conv.weight.shape[:2], dtype=bool))
    if len(form.branches) > groups:
        raise UsageError(f"{name} has {len(form.branches)} branches, more than {groups} groups",
                         "give at least as many groups as the layers have branches")
    group = np.zeros((groups, form.out_channels), np.float32)
    mask = np.zeros((form.out_channels, form.in_channels, 1, 1), np.float32)
    for number, branch in enumerate(form.branches):
        group[number, branch.out_index] = 1
        mask[np.ix_(branch.out_index, branch.in_index)] = 1
    group[0, ~form.written] = 1
    return {f"{name}.weight": form.to_dense(), f"{name}.group": group, f"{name}.mask": mask}
