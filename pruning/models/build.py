"""From tensors to a network: the architecture that their names and shapes gave (recognise), with these tensors in it.

A state dict holds no graph. The architecture gives what the tensors do not say: how the layers are wired, and the
stride and padding of every convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.family import ARCH_HINT, CLASSIFIERS, SPURIOUS
from gkp.pruning.models.names import FileNames
from gkp.pruning.models.recognise import recognise
from gkp.pruning.models.residual import ResidualBlock
from gkp.pruning.models.widths import LACKS_HINT, WIDTHS_HINT, check, fit
from gkp.pruning.tensor_names import is_counter
from gkp.types import Array

__all__ = ["Architecture", "Normalize", "build", "recognise"]


class Normalize(nn.Module):  # type: ignore[misc]
    """(x - mean) / std per channel. mean, std float32 [C]."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean.reshape(1, -1, 1, 1)) / self.std.reshape(1, -1, 1, 1)


def build(arch: Architecture, tensors: Mapping[str, Array], branched: Mapping[str, BranchedConv] | None = None) -> nn.Module:
    """The network with these tensors, in eval mode and float32.

    tensors: name -> float array; branched: name of a conv -> what it becomes, a BranchedConv2d (tensors under such a
    name are not looked at). Both in the checkpoint's own names. The widths follow the tensors (see widths), and a
    residual block without any tensor but its shortcut's and `constant` is relu(shortcut + constant). Stride, padding and
    dilation are the architecture's, whatever those of `branched` say. `normalize.mean` and `.std` [3], where present,
    become the first layer.
    UnsupportedModelError: a tensor is missing, superfluous, of another shape or not finite; named as the checkpoint does.
    """
    tensors = {name: array for name, array in tensors.items() if not is_counter(name)}
    forms = {arch.canonical(name): form for name, form in (branched or {}).items()}
    own = {arch.canonical(name): array for name, array in tensors.items()}
    theirs = FileNames(arch.canonical, (*tensors, *(f"{name}.weight" for name in branched or {})))
    if len(own) < len(tensors):
        raise UnsupportedModelError("two tensors of the checkpoint have the same meaning", ARCH_HINT)
    inside = tuple(f"{name}." for name in forms)
    own = {name: array for name, array in own.items() if not name.startswith(inside) and name != SPURIOUS}
    classifier = next((own[f"{name}.weight"] for name in CLASSIFIERS if f"{name}.weight" in own), None)
    if classifier is None or classifier.shape[:1] != (arch.num_classes,):
        raise UnsupportedModelError(f"no classifier weight of {arch.num_classes} classes in the checkpoint", ARCH_HINT)
    with torch.device("meta"):  # every layer is replaced
        model = skeleton(arch)
    _remove_absent_residuals(model, own, forms)
    convs = {name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    if unknown := forms.keys() - convs:
        raise UnsupportedModelError(f"{arch.name} has no convolution {min(map(theirs, unknown))}", ARCH_HINT)
    fit(model, own, forms, theirs)
    if "normalize.mean" in own and "normalize.std" in own:
        model.normalize = Normalize(torch.zeros(3), torch.ones(3))
    wanted = _check_names(model, own, arch.name, theirs)
    check(model.eval(), theirs)
    _load(model, own, wanted, theirs)
    return model


def _remove_absent_residuals(model: nn.Module, own: Mapping[str, Array], forms: Collection[str]) -> None:
    names = [*own, *(f"{name}.weight" for name in forms)]
    for prefix, block in model.named_modules():
        if isinstance(block, ResidualBlock):
            inside = {n.removeprefix(f"{prefix}.") for n in names if n.startswith(f"{prefix}.")}
            if all(n == "constant" or n.startswith("downsample.") for n in inside):
                constant = own.get(f"{prefix}.constant")
                block.remove_residual(None if constant is None else torch.zeros(constant.size))


def _check_names(model: nn.Module, own: Mapping[str, Array], name: str, theirs: FileNames) -> set[str]:
    """The names that the tensors must have, which they have. Convs that are BranchedConv2d keep what they hold."""
    branched = [f"{n}." for n, m in model.named_modules() if isinstance(m, BranchedConv2d)]
    wanted = {k for k in model.state_dict() if not is_counter(k) and not k.startswith(tuple(branched))}
    for problem, keys in (("lacks", wanted - own.keys()), ("holds the unexpected tensor", own.keys() - wanted)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            hint = LACKS_HINT if problem == "lacks" else ARCH_HINT
            raise UnsupportedModelError(f"the checkpoint {problem} {theirs(min(keys))}{more}, for {name}", hint)
    return wanted


def _load(model: nn.Module, own: Mapping[str, Array], wanted: Collection[str], theirs: FileNames) -> None:
    """Copy the tensors of these names into the model."""
    state = model.state_dict()
    for key in sorted(wanted):
        array = own[key]
        if array.shape != tuple(state[key].shape):
            expected = [*state[key].shape]
            raise UnsupportedModelError(f"{theirs(key)} has shape {[*array.shape]}, expected {expected}", WIDTHS_HINT)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UnsupportedModelError(f"{theirs(key)} is not an array of finite floats", "the checkpoint is not usable")
        state[key] = torch.from_numpy(np.array(array, dtype=np.float32))
    model.load_state_dict(state, strict=True)
