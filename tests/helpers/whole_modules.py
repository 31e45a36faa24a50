"""torchvision's ResNet as it is pickled (its submodules, attributes and forward), and changes of whole modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_kit import assert_computes, classes_as, save

from gkp.converter.sources import open_model
from gkp.converter.sources.base import OpenOptions
from gkp.errors import GkpError


class _Block(nn.Module):
    def __init__(self, convs: tuple[tuple[int, int, int, int], ...], downsample: nn.Module | None, stride: int) -> None:
        super().__init__()
        for n, (i, o, kernel, step) in enumerate(convs, 1):
            setattr(self, f"conv{n}", nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(o))
            if n == 1 and len(convs) == 2:
                self.relu = nn.ReLU(inplace=True)
        if len(convs) == 3:
            self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        last = 3 if hasattr(self, "conv3") else 2
        for n in range(1, last + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            y = self.relu(y) if n < last else y
        y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


class _ResNet(nn.Module):
    def __init__(self, block: type, blocks: tuple[int, ...], deep: bool, small_stem: bool, classes: int = 10) -> None:
        super().__init__()
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 64, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small_stem else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        for n, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
            setattr(self, f"layer{n}", nn.Sequential(*(self._block(block, width, deep, 2 if n > 1 and k == 0 else 1)
                                                       for k in range(count))))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(self.inplanes, classes)

    def _block(self, block: type, width: int, deep: bool, stride: int) -> nn.Module:
        c, f = self.inplanes, width * (4 if deep else 1)
        down = None
        if stride != 1 or c != f:
            down = nn.Sequential(nn.Conv2d(c, f, 1, stride, bias=False), nn.BatchNorm2d(f))
        self.inplanes = f
        convs = ((c, width, 1, 1), (width, width, 3, stride), (width, f, 1, 1)) if deep else (
            (c, width, 3, stride), (width, width, 3, 1))
        made: nn.Module = block(convs, down, stride)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


def torchvision_resnet(monkeypatch: pytest.MonkeyPatch, depth: int = 18, small_stem: bool = True,
                       blocks: tuple[int, ...] = (2, 2, 2, 2)) -> Any:
    """ResNet-18 or 50 with random weights, of classes that pickle under torchvision's names. Blocks that are missing at the
    end of a layer are taken for such as lost their residual branch."""
    net, basic, bottleneck = classes_as(
        monkeypatch, torchvision_DOT_models_DOT_resnet__ResNet=_ResNet,
        torchvision_DOT_models_DOT_resnet__BasicBlock=_Block, torchvision_DOT_models_DOT_resnet__Bottleneck=_Block)
    torch.manual_seed(0)
    return net(bottleneck if depth == 50 else basic, blocks, depth == 50, small_stem)


# ---- one change at a time ------------------------------------------------------------------------------------------------
Change = Callable[[nn.Module], None]


def changes(module: nn.Module) -> Iterator[tuple[str, Change]]:
    """(what, how) of every change of one attribute of one submodule, of its class, its place, its hooks."""
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_"):
                yield f"{name}.{key}", partial(_set, name, key, _other(value))
        for key in ("forward", "_conv_forward", "__call__", "weight", "relu", "maxpool", "in_list"):
            yield f"{name}.{key} hidden", partial(_hide, name, key)
        for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
            yield f"{name} {hook}", partial(_hook, name, hook)
        yield f"{name} more", partial(_more, name)
        yield f"{name} reversed", partial(_reversed, name)
        for child in dict(part.named_children()):
            yield f"{name}.{child} gone", partial(_gone, name, child)
        if name:
            for layer in (nn.LeakyReLU(0.1), nn.ReLU6(), nn.Identity(), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1),
                          nn.Dropout(), nn.Upsample(scale_factor=2), nn.Sequential(part, nn.ReLU()), nn.Sequential()):
                yield f"{name} is {type(layer).__name__}", partial(_replace, name, layer)
            yield f"{name} subclassed", partial(_subclass, name)
        if isinstance(part, nn.Conv2d):
            yield f"{name}.bias", partial(_bias, name, part.out_channels, "parameter")
            yield f"{name}.bias transient", partial(_bias, name, part.out_channels, "buffer")


def outcome(path: Path, module: nn.Module, change: Change, x: torch.Tensor) -> str:
    """Change the module, save and open it: "refused", "exact", or "broken" when it does not run itself any more.

    AssertionError: it opens, and computes something else."""
    change(module)
    save(path, module)
    try:
        with torch.no_grad():
            expected = module.eval()(x)
    except Exception:  # whatever a broken module raises
        expected = None
    try:
        opened = open_model(path, OpenOptions({"": tuple(x.shape)}))
    except GkpError:
        return "refused"
    if expected is None:
        return "broken"
    assert_computes(opened, expected, x)
    return "exact"


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    if isinstance(value, str):
        return "reflect"
    if isinstance(value, tuple):
        return tuple(map(_other, value))
    if isinstance(value, list):
        return value[::-1]
    return value.flip(0) if isinstance(value, torch.Tensor) else 1


def _set(name: str, key: str, value: Any, module: nn.Module) -> None:
    vars(module.get_submodule(name))[key] = value


def _hide(name: str, key: str, module: nn.Module) -> None:
    vars(module.get_submodule(name))[key] = nn.functional.leaky_relu


def _hook(name: str, kind: str, module: nn.Module) -> None:
    getattr(module.get_submodule(name), f"register_{kind}")(nn.functional.dropout)


def _more(name: str, module: nn.Module) -> None:
    module.get_submodule(name).add_module("more", nn.Tanh())


def _reversed(name: str, module: nn.Module) -> None:
    part = module.get_submodule(name)
    part._modules = dict(reversed(part._modules.items()))


def _gone(name: str, child: str, module: nn.Module) -> None:
    del module.get_submodule(name)._modules[child]


def _replace(name: str, layer: nn.Module, module: nn.Module) -> None:
    module.set_submodule(name, layer.eval())


def _subclass(name: str, module: nn.Module) -> None:
    part = module.get_submodule(name)
    own = part.__class__ = type("Own", (type(part),), {"__module__": __name__, "__qualname__": "Own"})
    globals()["Own"] = own  # where pickle looks for it


def _bias(name: str, count: int, kind: str, module: nn.Module) -> None:
    conv: Any = module.get_submodule(name)
    if kind == "parameter":
        conv.bias = nn.Parameter(torch.linspace(-1, 1, count))
    else:
        del conv._parameters["bias"]
        conv.register_buffer("bias", torch.linspace(-1, 1, count), persistent=False)
