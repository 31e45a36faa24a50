"""Networks whose channels are pruned away for good: fewer filters, and narrower readers, as structured pruning leaves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

Index = np.ndarray

IMAGE = "the image"


@dataclass(frozen=True)
class Wire:
    """A layer reads these groups of channels, one behind the other; a convolution writes one, which others may write too."""

    reads: tuple[str, ...]
    writes: str = ""


Wires = Mapping[str, Wire]


def narrow(model: nn.Module, keep: Callable[[str, int], Index], wires: Wires | None = None) -> nn.Module:
    """A copy with these channels only. keep: of a group, and its size. The attributes follow, as in a network made so."""
    wires = wires or wires_of(model)
    sizes = {wire.writes: model.get_submodule(name).out_channels for name, wire in wires.items() if wire.writes}
    kept = {group: np.asarray(keep(group, size)) for group, size in sorted(sizes.items())}
    sizes[IMAGE], kept[IMAGE] = 3, np.arange(3)
    model = copy.deepcopy(model)
    for name, wire in wires.items():
        starts = np.cumsum([0, *(sizes[group] for group in wire.reads)])
        read = np.concatenate([kept[group] + start for group, start in zip(wire.reads, starts[:-1], strict=True)])
        _cut(model.get_submodule(name), torch.as_tensor(read), torch.as_tensor(kept.get(wire.writes, ())))
    return model


def at_random(rng: np.random.Generator) -> Callable[[str, int], Index]:
    """Any number of channels of every group, one at least."""
    return lambda group, size: np.sort(rng.permutation(size)[: rng.integers(1, size, endpoint=True)])


def _cut(part: nn.Module, read: torch.Tensor, written: torch.Tensor) -> None:
    if isinstance(part, nn.BatchNorm2d):
        for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
            tensor.data = tensor.data[read]
        part.num_features = len(read)
    elif isinstance(part, nn.Linear):
        part.weight.data, part.in_features = part.weight.data[:, read], len(read)
    else:
        depthwise = part.groups > 1
        part.weight.data = part.weight.data[written] if depthwise else part.weight.data[written][:, read]
        part.groups, part.in_channels, part.out_channels = len(read) if depthwise else 1, len(read), len(written)
        if part.bias is not None:
            part.bias.data = part.bias.data[written]


# ---- who reads and writes what -----------------------------------------------------------------------------------------
def wires_of(model: nn.Module) -> Wires:
    """Of the networks that state dicts are recognised as, and of torchvision's ResNets."""
    names = [name for name, _ in model.named_children()]
    if "features" in names:
        return _densenet86(model) if hasattr(model.features, "init_conv") else _vgg(model)
    if "layers" in names:
        return _mobilenet(model)
    if "dense1" in names:
        return _densenet40(model)
    return _resnet(model)


def _resnet(model: nn.Module) -> Wires:
    """Blocks that add to their shortcut, in sequences or alone, with norms behind or (a `bn` at the end) in front."""
    stem = "conv_1_3x3" if hasattr(model, "conv_1_3x3") else "conv1"
    before = hasattr(model, "bn")
    wires, stream = {}, IMAGE
    if hasattr(model, stem):
        wires[stem] = Wire((IMAGE,), stream := "stem")
        wires |= {} if before else {stem.replace("conv", "bn").removesuffix("_3x3"): Wire((stream,))}
    for name, block in model.named_modules():
        convs = [key for key, part in block.named_children() if isinstance(part, nn.Conv2d)] if name else []
        if len(convs) < 2:
            continue
        out, read = stream if block.downsample is None else name, stream
        if isinstance(block.downsample, nn.Sequential):
            wires[f"{name}.downsample.0"] = Wire((stream,), out)
            wires |= {f"{name}.downsample.1": Wire((out,))} if len(block.downsample) > 1 else {}
        for conv in convs:
            write = out if conv == convs[-1] else f"{name}.{conv}"
            wires[f"{name}.{conv}"] = Wire((read,), write)
            wires[f"{name}.{conv.replace('conv', 'bn')}"] = Wire((read if before else write,))
            read = write
        stream = out
    wires |= {"bn": Wire((stream,))} if before else {}
    return wires | {_classifier(model): Wire((stream,))}


def _vgg(model: nn.Module) -> Wires:
    wires, stream = {}, IMAGE
    for key, part in model.features.named_children():
        if isinstance(part, nn.Conv2d):
            wires[f"features.{key}"] = Wire((stream,), stream := key)
        elif isinstance(part, nn.BatchNorm2d):
            wires[f"features.{key}"] = Wire((stream,))
    return wires | {"classifier": Wire((stream,))}


def _mobilenet(model: nn.Module) -> Wires:
    wires, stream = {"conv1": Wire((IMAGE,), "stem"), "bn1": Wire(("stem",))}, "stem"
    for key, _ in model.layers.named_children():
        wires[f"layers.{key}.conv1"] = Wire((stream,), stream)
        wires[f"layers.{key}.bn1"] = Wire((stream,))
        wires[f"layers.{key}.conv2"] = Wire((stream,), stream := key)
        wires[f"layers.{key}.bn2"] = Wire((stream,))
    return wires | {"linear": Wire((stream,))}


def _densenet40(model: nn.Module) -> Wires:
    wires: dict[str, Wire] = {"conv1": Wire((IMAGE,), "stem")}
    stream: tuple[str, ...] = ("stem",)
    for number in (1, 2, 3):
        for key in _keys(model.get_submodule(f"dense{number}")):
            name = f"dense{number}.{key}"
            wires |= {f"{name}.bn": Wire(stream), f"{name}.conv": Wire(stream, name)}
            stream = (*stream, name)
        if number < 3:
            name = f"trans{number}"
            wires |= {f"{name}.bn1": Wire(stream), f"{name}.conv1": Wire(stream, name)}
            stream = (name,)
    return wires | {"bn": Wire(stream), "fc": Wire(stream)}


def _densenet86(model: nn.Module) -> Wires:
    wires: dict[str, Wire] = {"features.init_conv": Wire((IMAGE,), "stem")}
    stream: tuple[str, ...] = ("stem",)
    for number in (1, 2, 3):
        for key in _keys(model.get_submodule(f"features.denseblock_{number}")):
            name = f"features.denseblock_{number}.{key}"
            wires |= {f"{name}.bn1": Wire(stream), f"{name}.conv1": Wire(stream, f"{name} inside"),
                      f"{name}.bn2": Wire((f"{name} inside",)), f"{name}.conv2": Wire((f"{name} inside",), name)}
            stream = (*stream, name)
    return wires | {"features.norm_last": Wire(stream), "classifier": Wire(stream)}


def _keys(part: nn.Module) -> Iterable[str]:
    return [key for key, _ in part.named_children()]


def _classifier(model: nn.Module) -> str:
    return next(name for name in ("classifier", "fc", "linear") if hasattr(model, name))
