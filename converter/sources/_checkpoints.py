"""What the pruning systems' checkpoints have in common: where the network is in the file, and how it is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.budget import Budget
from gkp.converter.sources import torch_export
from gkp.converter.sources._modules import Classes, check_wrapper, compare
from gkp.converter.sources._own_module import own_module
from gkp.converter.sources._public_networks import public_hint
from gkp.converter.sources._records import Record
from gkp.converter.sources._torchfile import CHECKPOINTS
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError
from gkp.pruning.tensor_names import prefixes
from gkp.text import clean
from gkp.types import Array

if TYPE_CHECKING:
    import torch

    from gkp.pruning.models.architecture import Architecture

Tensors = dict[str, Array]

_STATE_KEYS = ("state_dict", "model_state_dict", "net", "model", "small_model")
_PARALLEL = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")


# ---- where it is in the file -----------------------------------------------------------------------------------------
def payload_of(file: SourceFile) -> Any:
    """The payload of a file that torch.save, pickle or safetensors wrote, None for other files."""
    return file.payload if file.kind in CHECKPOINTS else None


def network_in(payload: Any) -> Record | None:
    """The network of a whole-module pickle: the payload, or its entry `model` or `net`, without DataParallel.

    UnsupportedModelError: DataParallel has hooks."""
    found = payload
    if isinstance(payload, dict):
        found = next((payload[key] for key in ("model", "net") if isinstance(payload.get(key), Record)), None)
    if isinstance(found, Record) and found.name in _PARALLEL:
        check_wrapper(found)
        modules = found.fields.get("_modules")
        found = modules.get("module") if isinstance(modules, dict) else None
    return found if isinstance(found, Record) else None


def state_dict_in(payload: Any) -> Tensors | None:
    """The state dict of a checkpoint: the payload, or the entry under one of the usual keys."""
    if not isinstance(payload, dict):
        return None
    for value in (payload, *(payload.get(key) for key in _STATE_KEYS)):
        if isinstance(value, dict) and value and all(_is_tensor(k, v) for k, v in value.items()):
            return value
    return None


def masked(tensors: Mapping[str, Array], name: str, mask: Array, budget: Budget) -> Array:
    """The tensor times its mask, whose missing last axes have length one. FileError: their shapes do not fit.

    Many names can share one tensor, but not the products."""
    weight = tensors[name]
    mask = mask.reshape(*mask.shape, *(1,) * (weight.ndim - mask.ndim))
    fits = mask.ndim == weight.ndim and all(m in (1, w) for m, w in zip(mask.shape, weight.shape, strict=True))
    if not fits:
        raise FileError(f"the mask of {clean(name)} has shape {list(mask.shape)}, the weight {list(weight.shape)}",
                        "the file is damaged: get it again")
    budget.bytes(weight.nbytes)
    return np.asarray(weight * mask.astype(weight.dtype))


def _is_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def without_prefix(tensors: Mapping[str, Array]) -> Tensors:
    """The tensors without the longest prefix that all names share: DataParallel's, a Lightning module's."""
    prefix = prefixes(tensors)[-1]
    return {name.removeprefix(prefix): array for name, array in tensors.items()}


# ---- how it is rebuilt -----------------------------------------------------------------------------------------------
def open_network(
    file: SourceFile,
    tensors: Mapping[str, Array],
    forms: Mapping[str, BranchedConv] | None = None,
    *,
    system: str,
    options: OpenOptions,
    pruned: bool = False,
    description: str,
    record: Record | None = None,
    classes: Classes | None = None,
    shortcut: str | None = None,
    image: tuple[int, int, int] | None = None,
    reference_name: str = "the network rebuilt in PyTorch",
) -> GroupedModel:
    """Rebuild and export the network that a checkpoint holds.

    tensors, forms: see gkp.pruning.models.build. With options.arch the user's own module is filled instead, and every
    form becomes a dense weight with zeros in the holes; groups are then that module's. record, classes: the pickled module,
    which the rebuilt one must be (see _modules), and the classes that it may be made of; without it, what is opened is only
    assumed. shortcut, image: what the names leave open (else as `recognise` guesses). A network with fewer channels than its
    architecture counts as pruned; where it is nowhere wider, the architecture at full width is its dense ancestor.
    UnsupportedModelError: not a known architecture, or another one than the pickled module's. UsageError: options.arch
    does not fit.
    """
    torch_export.import_torch()
    from gkp.pruning.models.architecture import skeleton

    forms = dict(forms or {})
    dense, assumed = None, ""
    if options.arch:
        module, default, name = own_module(options.arch, {**tensors, **_dense(forms)}), image, options.arch
    else:
        try:
            arch, module = rebuild(tensors, forms, record, classes, shortcut, file.budget)
        except UnsupportedModelError as e:
            raise UnsupportedModelError(e.message, public_hint(tensors, record is not None) or e.hint) from e
        default, assumed = image or arch.input_shape, arch.assumed if record is None else ""
        name = f"assumed {assumed}" if assumed else f"{arch.name}, every submodule compared"
        beside = widths(module, arch)
        if beside.narrower:
            description += f", {beside.narrower} of {beside.of} convolutions narrower"
        if beside.within and (pruned or not beside.gone):  # a network of fewer blocks is not pruned for that alone
            dense = partial(skeleton, arch)
        pruned = pruned or beside.narrower > 0
    opened = torch_export.from_module(
        module,
        system=system,
        options=options,
        pruned=pruned,
        description=f"{description}, {name}",
        default_shape=None if default is None else (1, *default),
        reference_name=reference_name,
        dense=dense,
    )
    return replace(opened, assumed=assumed, own_groups=bool(options.arch))


def _dense(forms: Mapping[str, BranchedConv]) -> Tensors:
    dense = {f"{name}.weight": form.to_dense() for name, form in forms.items()}
    return dense | {f"{name}.bias": np.asarray(form.bias) for name, form in forms.items() if np.any(form.bias)}


def rebuild(tensors: Mapping[str, Array], forms: Mapping[str, BranchedConv], record: Record | None, classes: Classes | None,
            shortcut: str | None, budget: Budget) -> tuple[Architecture, torch.nn.Module]:
    """The architecture of these tensors, and the network with them in it. See open_network."""
    from gkp.pruning.models.build import build, recognise

    arch = recognise(tensors, forms)
    if shortcut is not None and arch.shortcut != "conv":
        arch = replace(arch, shortcut=shortcut)  # type: ignore[arg-type]
    module = build(arch, tensors, forms)
    if record is not None:
        compare(record, arch, module, classes or {}, budget)
    return arch, module


@dataclass(frozen=True)
class Widths:
    """The convolutions of a network beside its architecture's, those with a form included: how many are narrower in their
    inputs or outputs, wider, gone with their block; and how many the architecture has."""

    narrower: int
    wider: int
    gone: int
    of: int

    @property
    def lost(self) -> bool:
        """Is something missing of the architecture?"""
        return self.narrower > 0 or self.gone > 0

    @property
    def within(self) -> bool:
        """Is something missing and nothing more than there? Then the architecture at full width is its dense ancestor."""
        return self.lost and not self.wider


def widths(module: torch.nn.Module, arch: Architecture) -> Widths:
    """How wide the rebuilt network is."""
    import torch

    from gkp.pruning.models.architecture import skeleton

    own = dict(module.named_modules())
    with torch.device("meta"):
        convs = {name: _channels(part) for name, part in skeleton(arch).named_modules() if isinstance(part, torch.nn.Conv2d)}
    pairs = [(_channels(own[name]), full) for name, full in convs.items() if name in own]
    narrower = sum(any(n < f for n, f in zip(has, full, strict=True)) for has, full in pairs)
    wider = sum(any(n > f for n, f in zip(has, full, strict=True)) for has, full in pairs)
    return Widths(narrower, wider, len(convs) - len(pairs), len(convs))


def _channels(conv: torch.nn.Module) -> tuple[int, int]:
    return conv.in_channels, conv.out_channels
