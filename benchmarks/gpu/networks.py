"""The networks of the GPU suite, each dense, as published, and rewritten: batch norms and channel orders folded into
weights, every grouped layer one convolution. float32, eval, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gkp.benchmarks.gpu.results import DENSE, PUBLISHED, REWRITTEN
from gkp.benchmarks.networks import Form, block_diagonal, resnet20, resnet50, tmi_style
from gkp.branched import BranchedConv
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.resnet_imagenet import Bottleneck

Planes = Mapping[str, int]
Choose = Callable[["Layer"], int]


@dataclass(frozen=True)
class Layer:
    """A grouped layer to be rewritten. groups: how many there are that share no channel, 1 where any overlap; plane: side of
    its output."""

    channels: int
    groups: int
    kernel: int
    stride: int
    plane: int


@dataclass(frozen=True)
class Case:
    """make(form): the network with its layers in a pruning system's form, or dense. shape: of one image."""

    name: str
    make: Callable[[Form | None], Any]
    form: Form
    shape: tuple[int, int, int]


CASES = (Case("ResNet-50 block-diagonal 3x3, 8 groups", resnet50, block_diagonal, (3, 224, 224)),
         Case("ResNet-20 TMI-GKP style, 8 groups", resnet20, tmi_style, (3, 32, 32)))


@dataclass(frozen=True)
class Forms:
    """The networks of a case by form, and the groups that the rewriting gave to each layer."""

    networks: dict[str, Any]
    groups: dict[str, int]


def make_forms(case: Case, choose: Choose) -> Forms:
    """dense: random weights everywhere, batch norms folded; as published: Gather, grouped convolution, Gather, batch norm
    behind it; rewritten: what `rewritten` makes of that."""
    published = case.make(case.form)
    new, groups = rewritten(published, case.shape, choose)
    return Forms({DENSE: folded(case.make(None)), PUBLISHED: published, REWRITTEN: new}, groups)


def rewritten(published: Any, shape: tuple[int, int, int], choose: Choose) -> tuple[Any, dict[str, int]]:
    """(the same function, groups per layer). `choose` says in how many groups a layer is to run. The 3x3 convolution of a
    bottleneck whose branches share no channel becomes one grouped convolution, its channel orders folded into the 1x1
    convolutions around it; every other branched layer becomes dense with zeros, as no Gather may be left."""
    model = copy.deepcopy(published)
    planes = output_planes(model, shape)
    groups = {}
    for name, parent, own in list(_branched(model)):
        conv = getattr(parent, own)
        form = conv.to_branched()
        count = choose(_layer(form, planes[name])) if isinstance(parent, Bottleneck) and own == "conv2" else 1
        if count > 1:
            _regroup(parent, form, count)
        else:
            setattr(parent, own, _convolution(form, form.to_dense(), form.bias, 1))
        groups[name] = count
    return folded(model), groups


def _layer(form: BranchedConv, plane: int) -> Layer:
    read = sum(b.in_index.size for b in form.branches)
    sizes = {b.weight.shape for b in form.branches}
    disjoint = form.overlap == 1 and read == form.in_channels == form.out_channels and len(sizes) == 1
    return Layer(form.out_channels, len(form.branches) if disjoint else 1, form.kernel_shape[0], form.strides[0], plane)


def _regroup(block: Bottleneck, form: BranchedConv, count: int) -> None:
    """conv2 as one convolution of `count` groups; conv1 makes its channels in that order, conv3 reads them so."""
    each = len(form.branches) // count
    merged = form.merge([list(range(k * each, (k + 1) * each)) for k in range(count)])
    ins = np.concatenate([b.in_index for b in merged.branches])
    outs = np.concatenate([b.out_index for b in merged.branches])
    block.conv2 = _convolution(form, np.concatenate([b.weight for b in merged.branches]), form.bias[outs], count)
    with torch.no_grad():
        block.conv1.weight.copy_(block.conv1.weight[ins])
        block.conv3.weight.copy_(block.conv3.weight[:, outs])
        for norm, order in ((block.bn1, ins), (block.bn2, outs)):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                values.copy_(values[order])


def _convolution(form: BranchedConv, weight: Any, bias: Any, groups: int) -> Any:
    top, left = form.pads[:2]
    made = nn.Conv2d(form.in_channels, form.out_channels, form.kernel_shape, form.strides, (top, left), form.dilations,
                     groups)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        made.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
    return made.eval()


def folded(model: Any) -> Any:
    """The model with every batch norm folded into the convolution in front of it (in place)."""
    for module in model.modules():
        children = dict(module.named_children())
        for name, conv in children.items():
            behind = {"conv_1_3x3": "bn_1", "0": "1"}.get(name, name.replace("conv", "bn"))
            if isinstance(conv, nn.Conv2d) and isinstance(children.get(behind), nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, children[behind]))
                setattr(module, behind, nn.Identity())
    return model


def output_planes(model: Any, shape: tuple[int, int, int]) -> Planes:
    """Side of each branched layer's output, from a run on one image."""
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = int(output.shape[-1])
        return hook

    hooks = [getattr(parent, own).register_forward_hook(note(name)) for name, parent, own in _branched(model)]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return seen


def _branched(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, parent, name in the parent) of every branched layer."""
    for name, module in model.named_modules():
        if isinstance(module, BranchedConv2d):
            parent, _, own = name.rpartition(".")
            yield name, model.get_submodule(parent), own
