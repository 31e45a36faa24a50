"""Is the network that was rebuilt from the tensors the one that a whole-module pickle holds?

The pickle says the class and the attributes of every submodule, but not their code. So each class must be one whose code is
known, torch's own or the pruning system's, and each submodule the one that the rebuilt network computes with at its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gkp.converter.budget import Budget
from gkp.converter.sources._records import Global, Record
from gkp.converter.sources._torchfile import submodules
from gkp.errors import UnsupportedModelError
from gkp.text import clean

if TYPE_CHECKING:
    import torch

    from gkp.pruning.models.architecture import Architecture

HINT = "export the model to ONNX, or save its state dict and pass --arch pkg:callable, and convert that"
CONV = "torch.nn.modules.conv.Conv2d"
_NORM, _SYNC_NORM = "torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm"
_MAX, _AVERAGE = "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.pooling.AvgPool2d"
_ADAPTIVE = "torch.nn.modules.pooling.AdaptiveAvgPool2d"
_IDENTITY, _SEQUENTIAL = "torch.nn.modules.linear.Identity", "torch.nn.modules.container.Sequential"

_REQUIRED = object()
_READ: Mapping[str, Mapping[str, Any]] = {
    CONV: {"stride": _REQUIRED, "padding": _REQUIRED, "dilation": _REQUIRED, "groups": _REQUIRED, "padding_mode": "zeros"},
    _NORM: {"track_running_stats": True},
    _MAX: {"kernel_size": _REQUIRED, "stride": _REQUIRED, "padding": _REQUIRED, "dilation": _REQUIRED,
           "return_indices": False, "ceil_mode": False},
    _AVERAGE: {"kernel_size": _REQUIRED, "stride": _REQUIRED, "padding": 0, "ceil_mode": False, "count_include_pad": True,
               "divisor_override": None},
    _ADAPTIVE: {"output_size": _REQUIRED},
    "torch.nn.modules.linear.Linear": {},
    "torch.nn.modules.activation.ReLU": {},
    _IDENTITY: {},
}
"""What the forward of each of torch's layers reads in eval mode, and what counts where an older PyTorch did not write it."""

_PAIRS = ("kernel_size", "stride", "padding", "dilation", "output_size")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PRUNE = "torch.nn.utils.prune."  # its hooks compute weight_orig times weight_mask, both of which are in the state dict
_NOT_CALLED = ("_norm_layer", "_backend")  # classes that the constructors used, and PyTorch's before 1.3
_SHORTCUTS = ("downsample", "shortcut")  # plain attributes where they are None
_MAX_WINDOW = 1 << 10


@dataclass(frozen=True)
class Layer:
    """A layer of torch's own: its class, and those of its settings that its forward reads."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name.rpartition('.')[2]}({settings})"


RELU = Layer("torch.nn.modules.activation.ReLU")


def average(kernel: int, stride: int) -> Layer:
    """AvgPool2d(kernel, stride)."""
    defaults = {key: value for key, value in _READ[_AVERAGE].items() if value is not _REQUIRED}
    return Layer(_AVERAGE, {"kernel_size": (kernel, kernel), "stride": (stride, stride), **defaults, "padding": (0, 0)})


@dataclass(frozen=True)
class Known:
    """A class whose code is known.

    ours: the classes of ours of which one computes the same. layers: submodules that are functions in ours, by name
    (relative, with dots). pool: the submodule that averages the last maps to one pixel; windows: where there is none, the
    sides of the maps for which that is what its forward does (none: of all). optional: submodules that may be absent.
    free: poolings of ours that are built as the pickle has them. stacks: sequences that ours does not have. order: of the
    submodules of a subclass of Sequential. ignored: submodules that its forward does not use.
    """

    ours: tuple[str, ...]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    pool: str | None = None
    windows: tuple[int, ...] = ()
    optional: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


Classes = Mapping[str, Known]  # by full name, or by bare name where the system's programs run as scripts


def class_name(record: Record) -> str:
    """The class without its module: one run as a script is saved as __main__.Name."""
    return str(record.name).rpartition(".")[2]


def setting(value: Any) -> Any:
    """A module's setting as pickled: a number, a word, or a few of them. Of anything else the name of its type, which may be
    compared and shown: it can be far larger than the file."""
    if isinstance(value, tuple) and len(value) <= 8:
        return tuple(part if isinstance(part, int) else f"a {type(part).__name__}" for part in value)
    plain = value is None or isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 80)
    return value if plain else f"a {type(value).__name__}"


def compare(record: Record, arch: Architecture, module: torch.nn.Module, classes: Classes, budget: Budget) -> None:
    """Make the rebuilt module the pickled one: take over the epsilon of every norm and what `free` allows.

    A network that pools windows of a fixed size refuses maps of another size from then on, as the pickled one does.
    UnsupportedModelError, with the name of the submodule: it is something else than the architecture has there.
    """
    comparison = _Comparison(arch, module, classes, budget)
    comparison.run(record)
    if comparison.windows:
        list(module.children())[-2].register_forward_hook(_Window(comparison.windows))  # the last one is the classifier


def layer_of(module: torch.nn.Module) -> Layer | None:
    """The layer of torch's own that computes what this module of ours does."""
    from gkp.pruning.models.branched import BranchedConv2d

    if isinstance(module, BranchedConv2d):  # its groups are in its form
        return Layer(CONV, {"stride": module.strides, "padding": module.pads[:2], "dilation": module.dilations,
                            "padding_mode": "zeros"})
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name not in _READ:
        return None
    return Layer(name, {key: _normal(key, getattr(module, key)) for key in _READ[name]})


@dataclass(frozen=True)
class _Window:
    """A hook behind the last maps. sides: those whose maps the network pools as a whole."""

    sides: tuple[int, ...]

    def __call__(self, module: object, inputs: object, maps: torch.Tensor) -> None:
        size = [int(n) for n in maps.shape[-2:]]
        if size not in [[side, side] for side in self.sides]:
            sides = " or ".join(f"{side}x{side}" for side in self.sides)
            raise ValueError(f"it pools last maps of {sides} pixels, and these are {size[0]}x{size[1]}")


class _Empty:
    """Stands for a shortcut without layers: an empty sequence."""


class _Stack:
    """Stands for a sequence that ours does not have: its blocks lie elsewhere."""


class _Pool:
    """Stands for the pooling of the last maps."""


@dataclass(frozen=True)
class _Free:
    """Stands for a pooling that is built as the pickle has it. name: of ours."""

    name: str


class _Comparison:
    """wanted: what must be at each pickled name, put there when its parent was met. met: names of ours that were."""

    def __init__(self, arch: Architecture, module: torch.nn.Module, classes: Classes, budget: Budget) -> None:
        self.arch, self.module, self.classes, self.budget = arch, module, classes, budget
        self.ours = dict(module.named_modules())
        self.wanted: dict[str, Any] = {"": module}
        self.met: set[str] = set()
        self.optional: set[str] = set()
        self.windows: tuple[int, ...] = ()

    def run(self, record: Record) -> None:
        ignored: tuple[str, ...] = ()
        for name, part in submodules(record, self.budget):
            if name.partition(".")[0] in ignored:
                continue
            if name == "" and (kind := self._known(part)) is not None:
                ignored = kind.ignored
            if name not in self.wanted:
                self._differs(name, clean(part.name, 100), "nothing")
            _check_attributes(name or "the module itself", part, self.budget)
            self._visit(name, part, self.wanted.pop(name))
        for name in self.wanted.keys() - self.optional:
            self._differs(name, "missing", "there")
        for name, module in self.ours.items():
            layer = layer_of(module) or (type(module).__name__ if type(module).__name__ == "PadShortcut" else None)
            if layer is not None and layer != Layer(_IDENTITY) and name not in self.met:
                self._differs(name, "missing", str(layer))

    def _visit(self, name: str, part: Record, place: Any) -> None:
        kind = self._known(part)
        if isinstance(place, Layer):
            self._layer(name, part, place)
        elif isinstance(place, _Pool):
            self._pool(name, part)
        elif isinstance(place, _Free):
            self._build(name, part, place)
        elif isinstance(place, (_Empty, _Stack)):
            keys = _children(part)
            if part.name != _SEQUENTIAL or keys != ([] if isinstance(place, _Empty) else [str(n) for n in range(len(keys))]):
                self._differs(name, clean(part.name, 100), "a sequence" if isinstance(place, _Stack) else "nothing")
            self._want(name, keys, Known(()))
        elif kind is not None:
            self._inner(name, part, place, kind)
        elif part.name == _SEQUENTIAL and type(place).__name__ == "Sequential":
            self._inner(name, part, place, Known(("Sequential",)))
        else:
            layer = layer_of(place)
            if layer is None:
                self._differs(name, clean(part.name, 100), f"a block of {self.arch.name}")
            self._layer(name, part, layer)
            if part.name in (_NORM, _SYNC_NORM):
                place.eps = self._epsilon(name, part)

    # ---- modules with submodules -------------------------------------------------------------------------------------
    def _inner(self, name: str, part: Record, own: torch.nn.Module, kind: Known) -> None:
        keys = _children(part)
        if any(part.fields.get(key) is not None for key in _SHORTCUTS):
            self._differs(name, "with a shortcut that is no module", "without")
        if type(own).__name__ not in kind.ours:
            self._differs(name, clean(part.name, 100), f"a block of {self.arch.name}")
        for path, layer in kind.layers.items():
            self.wanted[_join(name, path)] = layer
        if kind.pool:
            self.wanted[_join(name, kind.pool)] = _Pool()
        self.optional |= {_join(name, path) for path in kind.optional}
        if kind.pool is None or kind.pool in kind.optional:
            self.windows = self.windows or kind.windows
        if type(own).__name__ == "BranchedConv2d":
            self.wanted[_join(name, "conv2d")] = layer_of(own)
        mine = self._want(name, keys, kind)
        convs = [key for key, child in own.named_children() if getattr(layer_of(child), "name", "") == CONV]
        met = [key for key in mine if key in convs]
        if met != [key for key in convs if key in met]:  # index lists belong to convolutions in their order
            self._differs(name, f"made of {clean(', '.join(met), 200)}", f"of {clean(', '.join(convs), 200)}")
        order = list(kind.order)
        if type(own).__name__ == "Sequential":
            # A block that lost its residual branch is not in the file.
            order = [key for key, child in own.named_children() if layer_of(child) or list(child.children())]
            order += [path for path in map(_last(name), self.wanted) if path and path not in order]
        if order and keys != order:
            self._differs(name, f"made of {clean(', '.join(keys), 200)}", f"of {clean(', '.join(order), 200)}")

    def _want(self, name: str, keys: Iterable[str], kind: Known) -> list[str]:
        """Say what must be at these submodules; their names in ours, where it has them."""
        mine = []
        for key in keys:
            full = _join(name, key)
            ours = self.arch.canonical(full)
            if full in self.wanted:
                continue
            if key in kind.stacks:
                self.wanted[full] = _Stack()
            elif key in kind.free:
                self.wanted[full] = _Free(ours)
                self.met.add(ours)
            elif ours in self.ours and ours not in self.met:
                self.wanted[full] = self.ours[ours]
                self.met.add(ours)
                mine.append(ours.rpartition(".")[2])
            elif key in _SHORTCUTS and ours not in self.ours:
                self.wanted[full] = _Empty()
        return mine

    # ---- layers ------------------------------------------------------------------------------------------------------
    def _layer(self, name: str, part: Record, expected: Layer) -> None:
        same = part.name == expected.name or (part.name, expected.name) == (_SYNC_NORM, _NORM)
        if not same or _children(part):
            self._differs(name, clean(part.name, 100), str(expected))
        found = Layer(expected.name, {key: _read(part, expected.name, key) for key in expected.settings})
        if repr(found) != repr(expected):
            other = [key for key in expected.settings if repr(found.settings[key]) != repr(expected.settings[key])]
            self._differs(name, str(Layer(found.name, {key: found.settings[key] for key in other})),
                          str(Layer(expected.name, {key: expected.settings[key] for key in other})))

    def _epsilon(self, name: str, part: Record) -> float:
        eps = part.fields.get("eps")
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
            self._differs(name, f"BatchNorm2d(eps={clean(setting(eps), 80)})", "a number")
        return float(eps)

    def _pool(self, name: str, part: Record) -> None:
        """AdaptiveAvgPool2d(1), or AvgPool2d of windows that the last maps must then fill."""
        self.windows = ()
        expected = Layer(_ADAPTIVE, {"output_size": (1, 1)})
        if part.name == _AVERAGE:
            side = _read(part, _AVERAGE, "kernel_size")
            if not _sides(side, 1) or side[0] != side[1]:
                self._differs(name, f"AvgPool2d(kernel_size={side})", str(expected))
            self.windows = (side[0],)
            expected = Layer(_AVERAGE, {"kernel_size": side, "padding": (0, 0), "divisor_override": None})
        self._layer(name, part, expected)

    def _build(self, name: str, part: Record, place: _Free) -> None:
        """Put the pickled pooling in the place of ours."""
        from torch import nn

        settings = {key: _read(part, part.name, key) for key in _READ.get(part.name, {})}
        made: nn.Module | None = nn.Identity() if part.name == _IDENTITY else None
        if part.name in (_MAX, _AVERAGE):
            flags = [settings.get(key, False) for key in ("return_indices", "ceil_mode", "count_include_pad")]
            usual = all(_sides(settings[key], 0 if key == "padding" else 1) for key in _PAIRS if key in settings)
            usual = usual and not flags[0] and settings.get("divisor_override") is None
            if usual and all(isinstance(flag, bool) for flag in flags):
                made = (nn.MaxPool2d if part.name == _MAX else nn.AvgPool2d)(**settings)
        if made is None or _children(part):
            self._differs(name, str(Layer(part.name, settings)), str(layer_of(self.ours[place.name])))
        self.module.set_submodule(place.name, made)

    def _known(self, part: Record) -> Known | None:
        return self.classes.get(part.name) or self.classes.get(class_name(part))

    def _differs(self, name: str, found: str, expected: str) -> NoReturn:
        place = clean(name, 200) or "the module itself"
        raise UnsupportedModelError(f"{place} is {found}, in {self.arch.name} it is {expected}", HINT)


# ---- what a pickled module says ----------------------------------------------------------------------------------------
def _check_attributes(name: str, part: Record, budget: Budget) -> None:
    """No hooks, nothing that is called in the place of a method, nothing that hides a tensor or a submodule."""
    fields = part.fields
    tables = [fields.get(key) for key in ("_parameters", "_buffers", "_modules")]
    entries = [table if isinstance(table, dict) else {} for table in tables]
    budget.steps(len(fields) + sum(map(len, entries)))
    if not _prunes(fields.get(_HOOKS[0])):
        _refuse_calls(name, part, _HOOKS[:1])
    _refuse_calls(name, part, _HOOKS[1:])
    pruned = _prunes(fields.get(_HOOKS[0]))
    for key, value in fields.items():
        hidden = any(key in table for table in entries) or (key in _TENSORS and value is not None and not pruned)
        if hidden or (isinstance(value, (Global, Record)) and key not in _NOT_CALLED):
            _refuse(name, f"has an attribute {clean(key, 80)} of its own, in the place of its class's")
    transient = fields.get("_non_persistent_buffers_set")
    lost = transient & entries[1].keys() & set(_TENSORS) if isinstance(transient, (set, frozenset)) else set()
    if lost or sum(map(len, entries)) != len(set().union(*entries)):
        _refuse(name, "has two tensors or submodules of the same name, or one that is not in its state dict")
    for table in entries[:2]:
        if not all(value is None or isinstance(value, np.ndarray) for value in table.values()):
            _refuse(name, "has a parameter or buffer that is no tensor")


def check_wrapper(part: Record) -> None:
    """DataParallel and the like call the network and do nothing else. UnsupportedModelError: this one does more."""
    _refuse_calls(class_name(part), part, (*_HOOKS, "forward"))


def _refuse_calls(name: str, part: Record, keys: Iterable[str]) -> None:
    for key in keys:
        if part.fields.get(key):
            _refuse(name, f"has {key.strip('_').replace('_', ' ')}, which gkp cannot run")


def _refuse(name: str, what: str) -> NoReturn:
    raise UnsupportedModelError(f"{clean(name, 200)} {what}", HINT)


def _prunes(hooks: Any) -> bool:
    """Are these torch.nn.utils.prune's?"""
    return isinstance(hooks, dict) and bool(hooks) and all(
        isinstance(hook, Record) and hook.name.startswith(_PRUNE) for hook in hooks.values())


def _children(part: Record) -> list[str]:
    modules = part.fields.get("_modules")
    return [key for key, child in modules.items() if isinstance(child, Record)] if isinstance(modules, dict) else []


def _read(part: Record, name: str, key: str) -> Any:
    default = _READ[name][key]
    return _normal(key, setting(part.fields.get(key, "missing" if default is _REQUIRED else default)))


def _normal(key: str, value: Any) -> Any:
    return (value, value) if key in _PAIRS and isinstance(value, int) and not isinstance(value, bool) else value


def _sides(value: Any, least: int) -> bool:
    """Are these the two sides of a window, or the like?"""
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int and least <= n < _MAX_WINDOW for n in value)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _last(name: str) -> Any:
    """From a name to that of the direct submodule of `name`, or nothing."""
    prefix = f"{name}." if name else ""
    return lambda full: full.removeprefix(prefix) if full.startswith(prefix) and "." not in full.removeprefix(prefix) else ""
