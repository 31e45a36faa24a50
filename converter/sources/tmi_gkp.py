"""TMI-GKP: whole-module pickles (baseline, pruned, grouped, finetuned), its checkpoints and training snapshots.

A grouped convolution is published as conv(x[:, in_list])[:, out_list], with both lists as plain attributes of its
block: they are in the pickled module and not in its state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.budget import Budget
from gkp.converter.sources._checkpoints import (
    Tensors,
    network_in,
    open_network,
    payload_of,
    state_dict_in,
    without_prefix,
)
from gkp.converter.sources._modules import RELU, Known, average, class_name, setting
from gkp.converter.sources._prune_masks import apply_masks
from gkp.converter.sources._records import Record
from gkp.converter.sources._torchfile import state_dict_of, submodules
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError, UsageError
from gkp.text import clean
from gkp.types import Array

_GROUPED, _PRUNED = "GroupResNet", "ModifiedResNet"
BASELINES = ("models.resnet.CifarResNet", "models.resnet_bottleneck.ResNet")
_SIDES = (4, 8)  # of the last maps that its forward pools where there is no avgpool
_BLOCKS = ("CifarBlock", "BasicBlock", "Bottleneck")
_SHORTCUT = {"DownsampleA": Known(("PadShortcut",), {"avg": average(1, 2)})}
BASELINE_CLASSES = _SHORTCUT | {
    "models.resnet.CifarResNet": Known(("CifarResNet",), pool="avgpool"),
    "models.resnet.ResNetBasicblock": Known(("CifarBlock",)),
    "models.resnet_bottleneck.ResNet": Known(("ImageNetResNet",), windows=_SIDES),
    "models.resnet_bottleneck.BasicBlock": Known(("BasicBlock",)),
    "models.resnet_bottleneck.Bottleneck": Known(("Bottleneck",)),
}
_CLASSES = _SHORTCUT | {
    _GROUPED: Known(("CifarResNet", "ImageNetResNet"), pool="avgpool", optional=("avgpool",), windows=_SIDES),
    _PRUNED: Known(("CifarResNet", "ImageNetResNet"), {"relu": RELU}, pool="avgpool", optional=("avgpool", "relu"),
                   windows=_SIDES, ignored=("original_model",)),
    "GroupBasicblock": Known(_BLOCKS),
    "GroupBottleneck": Known(("Bottleneck",)),
    "NewBasicblock": Known(_BLOCKS, {"relu": RELU}, optional=("relu",)),
}
_ALIAS = "new_weight"  # a root parameter of grouped networks: the last conv's weight again
_ORIGINAL = "original_model"  # pruned networks carry the dense one along
_TINY_IMAGE = (3, 64, 64)  # networks without an avgpool module pool 8x8 at the end of a stride-8 body
_DAMAGED = "the file is damaged: get it again, or group the pruned network again"


def matches(file: SourceFile) -> bool:
    """A module of TMI-GKP's classes, a training snapshot, or a state dict of a grouped network."""
    payload = payload_of(file)
    record = network_in(payload)
    if record is not None:
        return class_name(record) in (_GROUPED, _PRUNED) or record.name in BASELINES
    tensors = state_dict_in(payload)
    if tensors is None:
        return False
    snapshot = {"model_state_dict", "epoch"} <= set(payload) and "conv_1_3x3.weight" in without_prefix(tensors)
    return snapshot or _is_grouped(tensors)


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Open a module, or a snapshot (dense). UnsupportedModelError: a grouped network without its index lists."""
    record = network_in(file.payload)
    if record is None:
        tensors = state_dict_in(file.payload) or {}
        if _is_grouped(tensors):
            raise UnsupportedModelError(
                "this is only the state dict of a grouped TMI-GKP network: in_list and out_list, which say how the "
                "groups are wired, are not in it",
                "convert the file `grouped` or `finetuned` of the same run, or export the network to ONNX and convert that",
            )
        return open_network(file, tensors, system="tmi_gkp", options=options, shortcut="pad",
                            description="TMI-GKP training snapshot (dense)")
    kind = class_name(record)
    pruned = kind in (_GROUPED, _PRUNED)
    forms = dict(_forms(record, file.budget)) if pruned else {}
    skip = (f"{_ORIGINAL}.", *(f"{name}." for name in forms))
    tensors = state_dict_of(record, file.budget)
    file.budget.steps(len(tensors) * len(skip))
    tensors = {n: a for n, a in tensors.items() if n != _ALIAS and not n.startswith(skip)}
    tensors, kept = apply_masks(tensors, file.budget)
    small = record.name.startswith(("group_imagenet.", "models.resnet_bottleneck.")) and _child(record, "avgpool") is None
    return open_network(
        file, tensors, forms, system="tmi_gkp", options=options, pruned=pruned or kept < 1, record=record,
        classes=_CLASSES if pruned else BASELINE_CLASSES,
        shortcut=shortcut_of(record, file.budget), image=_TINY_IMAGE if small else None,
        reference_name="the pickled network, rebuilt in PyTorch",
        description={_GROUPED: "TMI-GKP grouped network", _PRUNED: "TMI-GKP pruned network"}.get(
            kind, "TMI-GKP baseline (dense)" if kept == 1 else f"TMI-GKP baseline ({kept:.1%} of the masked weights kept)"),
    )


def _is_grouped(tensors: Tensors) -> bool:
    return _ALIAS in without_prefix(tensors)


def _child(record: Record, name: str) -> Record | None:
    modules = record.fields.get("_modules")
    found = modules.get(name) if isinstance(modules, dict) else None
    return found if isinstance(found, Record) else None


def shortcut_of(record: Record, budget: Budget) -> str | None:
    """"pad" for DownsampleA (every second pixel, zeros behind the channels); else what the tensors say."""
    for name, part in submodules(record, budget):
        if class_name(part) == "DownsampleA":
            pool = _child(part, "avg")
            settings = () if pool is None else tuple(setting(pool.fields.get(key)) for key in ("kernel_size", "stride"))
            if settings not in ((1, 2), ((1, 1), (2, 2))):
                raise UnsupportedModelError(f"{clean(name)} pools with [kernel, stride] {clean(list(settings), 40)}",
                                            "gkp knows the stride-2 subsampling of DownsampleA only")
            return "pad"
    return None


Make = Callable[[Record, int, Array | None, Array], BranchedConv]


def _forms(record: Record, budget: Budget) -> Iterator[tuple[str, BranchedConv]]:
    """(name, form) of every grouped or pruned conv. The channels that a conv reads are those that the one before
    writes: in_list names only some of them."""
    width = 0
    lists: tuple[list[Any], list[Any]] = ([], [])
    block, number = "", 0
    make: Make = _grouped_conv
    for name, part in submodules(record, budget):
        if name == _ORIGINAL or name.startswith(f"{_ORIGINAL}.") or ".shortcut" in name or ".downsample" in name:
            continue
        if class_name(part) in _MAKE and "out_list" in part.fields:
            lists, block, number, make = _lists(name, part, budget), name, 0, _MAKE[class_name(part)]
        if class_name(part) != "Conv2d":
            continue
        if block and name.startswith(f"{block}."):
            if number == len(lists[0]):
                raise FileError(f"{clean(block)} has more convolutions than index lists", _DAMAGED)
            ins, outs = lists[0][number], lists[1][number]
            if outs is not None:
                try:
                    yield name, make(part, width, ins, outs)
                except (UsageError, KeyError, ValueError, IndexError, TypeError) as e:
                    raise FileError(f"{clean(name)} is damaged: {clean(e, 150)}", _DAMAGED) from e
            number += 1
        weight = state_dict_of(part, budget).get("weight")
        width = 0 if weight is None or not weight.ndim else len(weight)


def _lists(name: str, block: Record, budget: Budget) -> tuple[list[Any], list[Any]]:
    """in_list and out_list per conv of the block; None for a conv that was left dense.

    Blocks with all convs grouped hold lists of tensors; where only the 3x3 conv of a bottleneck is, a list of one or
    the tensor itself."""
    convs = [n for n, part in submodules(block, budget) if class_name(part) == "Conv2d" and "." not in n]
    found = []
    for key in ("in_list", "out_list"):
        value = block.fields.get(key)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if block.name == _FIRST_ONLY:
            values = values[:1]
        if len(values) == 1 and len(convs) == 3:
            values = [None, values[0], None]
        if value is None:
            values = [None] * len(convs)
        if len(values) != len(convs) or not all(v is None or isinstance(v, np.ndarray) for v in values):
            raise FileError(f"{clean(name)} has {len(convs)} convolutions and {len(values)} index lists", _DAMAGED)
        found.append(values)
    return found[0], found[1]


def _grouped_conv(conv: Record, in_channels: int, in_list: Array | None, out_list: Array) -> BranchedConv:
    """conv(x[:, in_list])[:, out_list]."""
    tensors = state_dict_of(conv)
    form = BranchedConv.from_grouped(tensors["weight"], int(conv.fields["groups"]), tensors.get("bias"))
    if in_list is None:
        raise ValueError("it has an out_list and no in_list")
    return form.gather_inputs(in_list, in_channels).take_outputs(_complete(out_list, form))


def _masked_conv(conv: Record, in_channels: int, in_list: Array | None, out_list: Array) -> BranchedConv:
    """conv(x)[:, out_list], with the weights of pruned kernels zero."""
    tensors = state_dict_of(conv)
    form = BranchedConv.from_grouped(tensors["weight"], int(conv.fields["groups"]), tensors.get("bias"))
    return form.take_outputs(_complete(out_list, form))


def _complete(out_list: Array, form: BranchedConv) -> Array:
    if not np.array_equal(np.sort(out_list), np.arange(form.out_channels)):
        raise ValueError("out_list is not a permutation of its outputs")
    return out_list


_MAKE: Mapping[str, Make] = {
    "GroupBasicblock": _grouped_conv, "GroupBottleneck": _grouped_conv, "NewBasicblock": _masked_conv}
_FIRST_ONLY = "prune_imagenet.NewBasicblock"  # it uses out_list[0] alone, for its 3x3 conv
