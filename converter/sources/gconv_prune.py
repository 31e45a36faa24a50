"""GConv-Prune (gumi): masked checkpoints, and exports whose convolutions are GroupConv2d.

Masked: `<layer>.weight` [F, C, k, k] times `<layer>.mask` [F, C], with an infix `.conv2d` in old files. Exported, as a
pickled module or its state dict: y = conv2d(x[:, ind_in])[:, ind_out] + bias. Its networks open as pickled modules without
GroupConv2d, too, dense or narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.budget import Budget
from gkp.converter.sources import _prune_masks
from gkp.converter.sources._checkpoints import (
    Tensors,
    masked,
    network_in,
    open_network,
    payload_of,
    state_dict_in,
    without_prefix,
)
from gkp.converter.sources._modules import RELU, Known, average, class_name
from gkp.converter.sources._torchfile import state_dict_of, submodules
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.converter.sources.state_dict import TORCHVISION
from gkp.errors import FileError, GkpError, UnsupportedModelError, UsageError
from gkp.text import clean
from gkp.types import Array

_INFIX, _IN, _OUT, _MASK = ".conv2d", ".ind_in", ".ind_out", ".mask"
_DAMAGED = "the file is damaged: get it again, or export it again"
_MODELS = "gumi.models"
_RELU = {"relu": RELU}
_CLASSES = TORCHVISION | {
    "GroupConv2d": Known(("BranchedConv2d",)),
    f"{_MODELS}.resnet.ResNet": Known(("CifarResNet",), _RELU, pool="avgpool"),
    f"{_MODELS}.resnet.BasicBlock": Known(("CifarBlock",), _RELU),
    f"{_MODELS}.preresnet.PreResNet": Known(("CifarPreResNet",), _RELU, pool="avgpool"),
    f"{_MODELS}.preresnet.BottleneckBlock": Known(("PreActBottleneck",), _RELU),
    f"{_MODELS}.densenet.DenseNet": Known(("CifarDenseNet40",), _RELU, pool="avgpool"),
    f"{_MODELS}.densenet.BasicBlock": Known(("DenseLayer",), _RELU),
    f"{_MODELS}.densenet.Transition": Known(("Transition",), _RELU),
    f"{_MODELS}.condensenet.CondenseNet": Known(
        ("CifarDenseNet86",), {"features.relu_last": RELU}, pool="features.pool_last"),
    f"{_MODELS}.condensenet.DenseBlock": Known(("Sequential",)),
    f"{_MODELS}.condensenet.Bottleneck": Known(("BottleneckLayer",), _RELU),
    f"{_MODELS}.condensenet.Transition": Known(("AvgPool2d",), {"pool": average(2, 2)}),
    f"{_MODELS}.vgg.VGG": Known(("CifarVgg",), windows=(1,), stacks=("classifier",)),
    f"{_MODELS}.imagenet.mobilenet.MobileNet": Known(
        ("MobileNet",), _RELU, pool="pool", stacks=("layer1", "layer2", "layer3", "layer4", "layer5")),
    f"{_MODELS}.imagenet.mobilenet.DepthwiseSeparableConv2d": Known(
        ("SeparableBlock",), {"relu1": RELU, "relu2": RELU}, order=("d_conv", "bn1", "relu1", "p_conv", "bn2", "relu2")),
}
_NETWORKS = tuple(f"{_MODELS}.{name}" for name in (
    "resnet.ResNet", "preresnet.PreResNet", "densenet.DenseNet", "condensenet.CondenseNet", "vgg.VGG",
    "imagenet.mobilenet.MobileNet"))


def matches(file: SourceFile) -> bool:
    """One of its networks, any module with GroupConv2d in it, a state dict of one, a state dict with 2-D masks, or a group
    configuration."""
    if file.path.suffix == ".json" and file.kind == "unknown":
        return _is_group_config(file)
    payload = payload_of(file)
    record = network_in(payload)
    if record is not None and record.name in _NETWORKS:
        return True
    if record is not None:
        parts = (part for _, part in submodules(record, file.budget) if class_name(part) == "GroupConv2d")
        return any("ind_in" in state_dict_of(part, file.budget) for part in parts)
    tensors = state_dict_in(payload)
    return tensors is not None and (bool(_exported(tensors)) or bool(_masks(tensors)))


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Rebuild the network. UnsupportedModelError: a group configuration, which has no weights."""
    if file.path.suffix == ".json":
        raise UnsupportedModelError(
            f"{file.path} is a group configuration of GConv-Prune: the number of groups of each layer, without weights",
            "convert checkpoint.pth.tar, model_best.pth.tar or gconv.pth.tar of the pruned network",
        )
    record = network_in(file.payload)
    found = state_dict_of(record, file.budget) if record is not None else state_dict_in(file.payload)
    tensors = without_prefix(found or {})
    if _exported(tensors):
        forms = dict(_forms(tensors))
        file.budget.steps(len(tensors) * len(forms))
        dense = {n: a for n, a in tensors.items() if not n.startswith(tuple(f"{layer}." for layer in forms))}
        return open_network(file, dense, forms, system="gconv_prune", options=options, pruned=True, record=record,
                            classes=_CLASSES, description=f"GConv-Prune export ({len(forms)} GroupConv2d)")
    if record is not None:
        dense, kept = _prune_masks.apply_masks(tensors, file.budget)
        note = f" ({kept:.1%} of the masked weights kept)" if kept < 1 else ""
        return open_network(file, dense, system="gconv_prune", options=options, pruned=kept < 1, record=record,
                            classes=_CLASSES, description=f"GConv-Prune network{note}")
    dense, kept = apply_masks(tensors, file.budget)
    return open_network(file, dense, system="gconv_prune", options=options, pruned=kept < 1,
                        description=f"GConv-Prune masked network ({kept:.1%} of the masked kernels kept)")


def _is_group_config(file: SourceFile) -> bool:
    from gkp.pruning.models.group_config import read_group_config

    try:
        return bool(read_group_config(file.path))
    except UsageError:  # one with placeholders
        return True
    except GkpError:
        return False


# ---- exports ---------------------------------------------------------------------------------------------------------
def _exported(tensors: Tensors) -> list[str]:
    """Names of the GroupConv2d."""
    names = (name.removesuffix(_IN) for name in tensors if name.endswith(_IN))
    return [n for n in names if f"{n}{_OUT}" in tensors and f"{n}{_INFIX}.weight" in tensors]


def _forms(tensors: Tensors) -> Iterator[tuple[str, BranchedConv]]:
    for name in _exported(tensors):
        weight, ind_in = tensors[f"{name}{_INFIX}.weight"], tensors[f"{name}{_IN}"]
        try:
            form = BranchedConv.from_grouped(weight, _groups(weight, ind_in), tensors.get(f"{name}{_INFIX}.bias"))
            form = form.gather_inputs(ind_in, ind_in.size)
            form = form.take_outputs(tensors[f"{name}{_OUT}"])
            bias = tensors.get(f"{name}.bias")
            if bias is not None and bias.shape != np.shape(form.bias):
                raise ValueError(f"a bias of shape {list(bias.shape)}")
            yield name, form if bias is None else replace(form, bias=form.bias + bias)
        except (GkpError, ValueError, IndexError) as e:
            raise FileError(f"{clean(name)} is damaged: {clean(e, 150)}", _DAMAGED) from e


def _groups(weight: Array, ind_in: Array) -> int:
    if weight.ndim != 4 or ind_in.ndim != 1 or weight.shape[1] == 0 or ind_in.size % weight.shape[1]:
        raise ValueError(f"weight {list(weight.shape)} and {ind_in.size} input channels do not make groups")
    return int(ind_in.size // weight.shape[1])


# ---- masks -----------------------------------------------------------------------------------------------------------
def _masks(tensors: Tensors) -> dict[str, Array]:
    """Layer -> mask [F, C]."""
    found = {}
    for name, array in tensors.items():
        layer = name.removesuffix(_MASK)
        weights = (tensors.get(f"{layer}{infix}.weight") for infix in ("", _INFIX))
        if layer != name and array.ndim == 2 and any(w is not None and w.ndim == 4 for w in weights):
            found[layer] = array
    return found


def apply_masks(tensors: Tensors, budget: Budget) -> tuple[Tensors, float]:
    """(the tensors under their plain names, weights times masks, without masks; share of kernels that is kept).

    FileError: a mask of another shape than its weight."""
    masks = _masks(tensors)
    dense = {}
    for name, array in tensors.items():
        layer, _, kind = name.rpartition(".")
        layer = layer.removesuffix(_INFIX)
        if layer in masks and kind == "mask":
            continue
        if layer in masks and kind == "weight":
            array = masked(tensors, name, masks[layer], budget)
        dense[f"{layer}.{kind}" if layer in masks else name] = array
    total = sum(mask.size for mask in masks.values())
    return dense, sum(int(np.count_nonzero(mask)) for mask in masks.values()) / max(1, total)
