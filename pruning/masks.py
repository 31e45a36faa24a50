"""From masks to branches: what every method that zeroes weights hands over in the end.

A mask is bool [F, C] (whole kernels) or [F, C, kh, kw] (taps). Filters whose mask rows are equal read the same inputs, so
they form a branch; filters without a one are in no branch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import UsageError
from gkp.pruning.models.branched import BranchedConv2d
from gkp.types import Array

Mask = npt.NDArray[np.bool_]
Triple = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Array]


def branches_of_mask(weight: Array, mask: Mask) -> list[Triple]:
    """Branches (in_index [I], out_index [O], weight [O, I, kh, kw]) of a masked weight, in order of their first filter.

    weight float [F, C, kh, kw]; mask bool [F, C] or [F, C, kh, kw]. Filters with identical non-zero rows form a branch,
    whose inputs are the channels with any one in the row; taps that the mask clears are zeros in its weight.
    A weight that is zero by chance where the mask is one stays in. UsageError: the shapes do not fit.
    """
    weight, mask = np.asarray(weight), np.asarray(mask, dtype=bool)
    if weight.ndim != 4 or mask.shape not in (weight.shape[:2], weight.shape):
        raise UsageError(f"a mask of shape {list(mask.shape)} does not fit a weight of shape {list(weight.shape)}")
    taps = mask.reshape(*mask.shape, *(1,) * (4 - mask.ndim))
    rows: dict[bytes, list[int]] = {}
    for f, row in enumerate(mask.reshape(len(mask), -1)):
        if row.any():
            rows.setdefault(np.packbits(row).tobytes(), []).append(f)
    triples = []
    for filters in rows.values():
        outs = np.asarray(filters, dtype=np.int64)
        ins = np.flatnonzero(taps[outs[0]].any((1, 2)))
        block = np.ix_(outs, ins)
        triples.append((ins, outs, np.where(taps[block], weight[block], 0).astype(weight.dtype)))
    return triples


def form_of_mask(conv: nn.Conv2d, mask: Mask) -> BranchedConv:
    """The masked convolution in the one form: weights, bias, stride, padding and dilation are the conv's.

    mask: see branches_of_mask. UsageError: the conv is itself grouped, or does not pad with zeros."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise UsageError("only an ordinary convolution with zero padding can be cut into branches",
                         "leave grouped and depthwise convolutions out of the pruning")
    weight = _array(conv.weight)
    bias = None if conv.bias is None else _array(conv.bias)
    geometry = {"strides": conv.stride, "pads": conv.padding * 2, "dilations": conv.dilation}
    triples = branches_of_mask(weight, mask)
    return BranchedConv.build(weight.shape[1], weight.shape[0], triples, bias=bias, kernel_shape=weight.shape[2:],
                              **geometry)


def grouped(model: nn.Module, forms: Mapping[str, BranchedConv]) -> nn.Module:
    """A copy of the network in which the named convs are BranchedConv2d; the model itself stays as it is.

    Stride, padding and dilation are those of the conv that is replaced, whatever the form says. A form that is dense
    (one branch that reads and writes everything) stays an ordinary conv with the form's weights.
    UsageError: no such conv, or one with other channels.
    """
    result = copy.deepcopy(model)
    for name, form in forms.items():
        conv = conv_named(result, name)
        if conv.weight.shape != (form.out_channels, form.in_channels, *form.kernel_shape):
            raise UsageError(f"the branches of {name} have other channels than the convolution")
        if form.is_dense and (conv.bias is not None or not np.any(form.bias)):
            with torch.no_grad():
                conv.weight.copy_(torch.from_numpy(form.to_dense()))
                if conv.bias is not None:
                    conv.bias.copy_(torch.from_numpy(np.asarray(form.bias)))
            continue
        form = replace(form, strides=conv.stride, pads=conv.padding * 2, dilations=conv.dilation)
        parent = result.get_submodule(name.rpartition(".")[0])
        new = BranchedConv2d(form).to(device=conv.weight.device, dtype=conv.weight.dtype)
        setattr(parent, name.rpartition(".")[2], new.train(conv.training))
    return result


def in_groups(model: nn.Module, kept: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the network in which the masked convs are BranchedConv2d. kept: conv name -> bool mask, on any device."""
    return grouped(model, {n: form_of_mask(conv_named(model, n), mask.cpu().numpy()) for n, mask in kept.items()})


def apply_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Zero the weights that are masked out, in place. masks: conv name -> bool [F, C] or [F, C, kh, kw]."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = conv_named(model, name).weight
            weight.mul_(mask.reshape(*mask.shape, *(1,) * (weight.ndim - mask.ndim)).to(weight))


def mask_keeper(masks: Mapping[str, torch.Tensor]) -> Callable[[nn.Module], None]:
    """apply_masks as a function of the network alone, to run after every training step (Hooks.after_step). The masks
    are copied to the network's device once."""
    near: dict[str, torch.Tensor] = {}

    def keep(model: nn.Module) -> None:
        for name, mask in masks.items():
            weight = conv_named(model, name).weight
            if name not in near or near[name].device != weight.device:
                near[name] = mask.to(weight.device)
        apply_masks(model, near)

    return keep


def conv_named(model: nn.Module, name: str) -> nn.Conv2d:
    """The convolution of that name. UsageError: there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Conv2d):
        raise UsageError(f"the network has no convolution named {name}", "check the layer names")
    return module


def plain_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Name -> convolution for every Conv2d without groups, in the network's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}


def _array(tensor: torch.Tensor) -> Array:
    return np.array(tensor.detach().cpu().float().numpy())
