"""Checkpoints of a network that is known, in the forms that pruning systems give them, with a few entries that do not fit.

A small CIFAR ResNet: its tensors by name, as a state dict under one of the usual keys or as a module with modules; masks,
groups, index lists beside the weights; then shapes, types, names and numbers change in a few places.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from random import Random

from fuzz_checkpoint import DTYPES, Checkpoint
from fuzz_pickle import NUMBERS, TEXTS

NORM = ("weight", "bias", "running_mean", "running_var")
SCHEMES = {"layer": ("conv1", "bn1", "layer{}", "linear"), "stage": ("conv_1_3x3", "bn_1", "stage_{}", "classifier")}
KEYS = ("state_dict", "model_state_dict", "net", "model", "small_model")


@dataclass
class Tensor:
    """values: whole numbers to fill it with, again and again; None: 0.5."""

    shape: tuple[int, ...]
    code: str = "f4"
    values: list[int] | None = None


Tensors = dict[str, Tensor]


def network(rng: Random) -> bytes:
    """A plain pickle of some form of the network."""
    writer = Checkpoint(rng, wrong=0.0002, tidy=True)
    form = rng.choice((_module, _module, _own, *[_dict] * 4))
    tensors = _layers(rng, "stage" if form is _own else rng.choice(("layer", "stage")))
    if rng.random() < 0.3:
        _spoil(rng, tensors)
    if form is not _own:
        rng.choice((_plain, _masks, _pairs, _exported, _groups))(rng, tensors)
    if rng.random() < 0.6:
        _spoil(rng, tensors)
    form(rng, writer, tensors)
    return b"\x80\x02" + b"".join(writer.out) + b"."


def _layers(rng: Random, scheme: str) -> Tensors:
    first, norm, stage, last = SCHEMES[scheme]
    convs = ("conv1", "bn1", "conv2", "bn2") if scheme == "layer" else ("conv_a", "bn_a", "conv_b", "bn_b")
    tensors = {f"{first}.weight": Tensor((16, 3, 3, 3))} | _norm(norm, 16)
    width, blocks = 16, rng.choice((1, 1, 1, 1, 3))
    for number, channels in enumerate((16, 32, 64), 1):
        for block in range(blocks):
            name = f"{stage.format(number)}.{block}"
            tensors |= {f"{name}.{convs[0]}.weight": Tensor((channels, width, 3, 3))} | _norm(f"{name}.{convs[1]}", channels)
            tensors[f"{name}.{convs[2]}.weight"] = Tensor((channels, channels, 3, 3))
            tensors |= _norm(f"{name}.{convs[3]}", channels)
            width = channels
    return tensors | {f"{last}.weight": Tensor((10, 64)), f"{last}.bias": Tensor((10,))}


def _norm(name: str, width: int) -> Tensors:
    return {f"{name}.{part}": Tensor((width,)) for part in NORM} | {f"{name}.num_batches_tracked": Tensor((), "i8", [3])}


# ---- what stands beside the weights ----------------------------------------------------------------------------------
def _convs(rng: Random, tensors: Tensors) -> list[str]:
    """Names of some of the convolutions."""
    names = [name.removesuffix(".weight") for name, tensor in tensors.items()
             if len(tensor.shape) == 4 and name.endswith(".weight")]
    return rng.sample(names, rng.choice((1, len(names) // 2, len(names)))) if names else []


def _plain(rng: Random, tensors: Tensors) -> None:
    """No pruning."""


def _masks(rng: Random, tensors: Tensors) -> None:
    """GConv-Prune's, of two axes, or DSP's, of four."""
    infix = rng.choice(("", "", ".conv2d"))
    axes = rng.choice((2, 4))
    for name in _convs(rng, tensors):
        weight = tensors.pop(f"{name}.weight")
        tensors[f"{name}{infix}.weight"] = weight
        tensors[f"{name}.mask"] = Tensor((*weight.shape[:2], 1, 1)[:axes], rng.choice(("f4", "f4", "b1", "i8")),
                                         rng.choice(([1], [0, 1], [1, 0, 0], [0])))


def _groups(rng: Random, tensors: Tensors) -> None:
    """DSP's: a row for each group, or for none."""
    for name in _convs(rng, tensors):
        filters = tensors[f"{name}.weight"].shape[0]
        tensors[f"{name}.group"] = Tensor((rng.choice((0, 1, 4)), filters), "f4", [1, 0])


def _pairs(rng: Random, tensors: Tensors) -> None:
    """torch.nn.utils.prune's: a weight and its mask; regrouped filters have equal masks."""
    for name in _convs(rng, tensors):
        weight = tensors.pop(f"{name}.weight")
        row = prod(weight.shape[1:])
        half = [1] * (row // 2) + [0] * (row - row // 2)
        values = rng.choice(([1], [0, 1], half + half[::-1]))
        tensors |= {f"{name}.weight_orig": weight, f"{name}.weight_mask": Tensor(weight.shape, "f4", values)}
    if rng.random() < 0.3:
        tensors |= {"normalize.mean": Tensor((3,)), "normalize.std": Tensor((3,))}


def _exported(rng: Random, tensors: Tensors) -> None:
    """GConv-Prune's GroupConv2d: the input's channels in an order, a grouped convolution, its outputs in an order."""
    for name in _convs(rng, tensors):
        filters, channels, *kernel = tensors.pop(f"{name}.weight").shape
        groups = rng.choice((1, 2, 4)) if channels % 4 == 0 else 1
        tensors |= {f"{name}.conv2d.weight": Tensor((filters, channels // groups, *kernel)),
                    f"{name}.ind_in": _order(rng, channels), f"{name}.ind_out": _order(rng, filters)}


def _order(rng: Random, count: int) -> Tensor:
    """A permutation, or one with a number too many, too few, twice, out of range."""
    values = rng.sample(range(count), count)
    if rng.random() < 0.1 and values:
        values[rng.randrange(len(values))] = rng.choice((-1, 0, count, *NUMBERS))
    if rng.random() < 0.03:
        values = values[: rng.randrange(count)] * rng.randrange(3)
    return Tensor((len(values),), "i8", values)


# ---- what does not fit -------------------------------------------------------------------------------------------------
def _spoil(rng: Random, tensors: Tensors) -> None:
    """One to three entries with another shape, type, name or content; or without."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(tensors))
        tensor, kind = tensors[name], rng.randrange(7)
        if kind == 0:
            other: tuple[int, ...] = rng.choice((tensor.shape[::-1], tensor.shape[1:], (*tensor.shape, 1), (), (0,)))
            tensors[name] = Tensor(other, tensor.code)
        elif kind == 1 and tensor.shape:
            shape = list(tensor.shape)
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 5, 8, 48, 4096))
            if prod(shape) < 2**18:
                tensors[name] = Tensor(tuple(shape), tensor.code)
        elif kind == 2:
            tensors[name] = Tensor(tensor.shape, rng.choice(tuple(DTYPES)))
        elif kind == 3:
            del tensors[name]
        elif kind == 4:
            tensors[rng.choice((*TEXTS, f"module.{name}", name.upper(), name + ".weight", name.replace("1", "9")))] = tensor
        elif kind == 5:
            tensors[name] = Tensor(tensor.shape, tensor.code, [rng.choice((0, -1, 2**31 - 1))])
        else:
            tensors[name.replace(rng.choice("123ab"), rng.choice("0245cz"))] = tensors.pop(name)


# ---- how it is written -------------------------------------------------------------------------------------------------
def _write(writer: Checkpoint, tensor: Tensor) -> None:
    code = {"f4": "f", "f8": "d", "i8": "q", "i4": "i", "b1": "?", "u1": "B", "f2": "e"}.get(tensor.code)
    count = prod(tensor.shape)
    values: list[float] = list(tensor.values or ())
    values = values or [0.5 if tensor.code[0] == "f" else 1]
    if code is None:
        data = bytes(count * DTYPES[tensor.code])
    elif code in "fde":
        data = struct.pack(f"<{len(values)}{code}", *values)
    elif code == "q":
        data = struct.pack(f"<{len(values)}q", *map(int, values))
    else:
        data = struct.pack(f"<{len(values)}{code}", *(int(v) % 128 for v in values))
    size = count * DTYPES[tensor.code]
    writer.filled(tensor.shape, tensor.code, lambda: writer.blob((data * (size // max(1, len(data)) + 1))[:size]))


def _state(writer: Checkpoint, tensors: Tensors) -> None:
    writer.op(b"}", 0, "dict")
    prefix = "module." * (writer.rng.random() < 0.1)
    for name, tensor in tensors.items():
        writer.text(prefix + name)
        if writer.rng.random() < 0.002:
            writer.value("any", 2)
        else:
            _write(writer, tensor)
        writer.op(b"s", 2)


def _dict(rng: Random, writer: Checkpoint, tensors: Tensors) -> None:
    """A state dict: alone, with an accuracy, or under a key among others."""
    way = rng.randrange(4)
    if way == 0:
        _state(writer, tensors)
    elif way == 1:
        _state(writer, tensors)
        writer.value(rng.choice(("float", "float", "any")), 1)
        writer.op(b"\x86", 2, "tuple")
    else:
        writer.op(b"}", 0, "dict")
        for key, kind in (("epoch", "int"), ("arch", "str"), ("", "")):
            writer.text(key or rng.choice(KEYS))
            writer.value(kind, 1) if kind else _state(writer, tensors)
            writer.op(b"s", 2)


def _own(rng: Random, writer: Checkpoint, tensors: Tensors) -> None:
    """gkp's own: an architecture that is named, branched convolutions as index lists."""
    for name in _convs(rng, tensors):
        filters, channels, *kernel = tensors.pop(f"{name}.weight").shape
        branches = rng.choice((1, 2, 4)) if channels % 4 == 0 else 1
        tensors |= {f"{name}.weight": Tensor((filters, channels // branches, *kernel)),
                    f"{name}.channels": Tensor((2,), "i8", [filters, channels]),
                    f"{name}.in_index": _order(rng, channels), f"{name}.out_index": _order(rng, filters),
                    f"{name}.in_sizes": Tensor((branches,), "i8", [channels // branches]),
                    f"{name}.out_sizes": Tensor((branches,), "i8", [filters // branches])}
    blocks = sum(name.endswith(("conv_b.weight", "conv2.weight")) for name in tensors)
    writer.op(b"}", 0, "dict")
    odd = rng.random() < 0.1
    arch = {"family": rng.choice(("cifar_resnet", "vgg", "x")) if odd else "cifar_resnet",
            "shortcut": rng.choice(("pad", "pad", "conv", "")),
            "depth": rng.choice(NUMBERS) if odd else 2 + 2 * blocks, "num_classes": rng.choice(NUMBERS) if odd else 10}
    for key in ("format", "version", "arch", "state_dict"):
        writer.text(key)
        if key == "format":
            writer.text("gkp.checkpoint")
        elif key == "version":
            writer.number(1)
        elif key == "state_dict":
            _state(writer, tensors)
        else:
            writer.op(b"}", 0, "dict")
            for name, value in arch.items():
                writer.text(name)
                writer.text(value) if isinstance(value, str) else writer.number(value)
                writer.op(b"s", 2)
            writer.text("input_shape")
            writer.numbers(3, *(rng.choice(NUMBERS) if odd else 32 for _ in range(2)))
            writer.op(b"s", 2)
        writer.op(b"s", 2)


def _module(rng: Random, writer: Checkpoint, tensors: Tensors) -> None:
    """A module with modules in it: TMI-GKP's, or torchvision's."""
    root = rng.choice(("group_cifar.GroupResNet", "x.ModifiedResNet", "models.resnet.CifarResNet",
                       "torchvision.models.resnet.ResNet", "models.resnet_bottleneck.ResNet"))
    if rng.random() < 0.1:
        writer.op(b"}", 0, "dict")
        writer.text("net")
    _part(rng, writer, root, tensors)
    if writer.stack[-2:-1] and writer.stack[-2].kind == "str":
        writer.op(b"s", 2)


def _part(rng: Random, writer: Checkpoint, cls: str, tensors: Tensors) -> None:
    children: dict[str, Tensors] = {}
    own: Tensors = {}
    for name, tensor in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, {})[rest] = tensor
        else:
            own[name] = tensor
    weight = own.get("weight")
    if weight is not None:
        kind = {4: "conv.Conv2d", 2: "linear.Linear"}.get(len(weight.shape), "batchnorm.BatchNorm2d")
        cls = f"torch.nn.modules.{kind}"
    writer.name(cls)
    writer.op(b")", 0, "tuple")
    writer.op(b"\x81", 2, "record")
    writer.op(b"}", 0, "dict")
    for key, entries in (("_parameters", own), ("_buffers", {})):
        writer.text(key)
        _state(writer, entries)
        writer.op(b"s", 2)
    writer.text("_modules")
    writer.op(b"}", 0, "dict")
    for name, inner in children.items():
        writer.text(name)
        block = {"conv1", "conv_a"} & {key.split(".")[0] for key in inner}
        _part(rng, writer, "group_cifar.GroupBasicblock" if block else "torch.nn.modules.container.Sequential", inner)
        writer.op(b"s", 2)
    writer.op(b"s", 2)
    lists = [inner["weight"].shape for inner in children.values() if len(inner.get("weight", Tensor(())).shape) == 4]
    if lists and rng.random() < 0.9:
        for key, axis in (("in_list", 1), ("out_list", 0)):
            writer.text(key)
            writer.mark()
            for shape in lists:
                writer._none(0) if rng.random() < 0.03 else _write(writer, _order(rng, shape[axis]))
            writer.collect(b"l", "list")
            writer.op(b"s", 2)
    for key, values in (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("kernel_size", (3, 3))):
        writer.text(key)
        writer.numbers(*(values if rng.random() < 0.97 else [rng.choice(NUMBERS)] * 2))
        writer.op(b"s", 2)
    writer.text("groups")
    writer.number(1 if rng.random() < 0.95 else rng.choice(NUMBERS))
    writer.op(b"s", 2)
    writer.op(b"b", 1)
