"""--arch `pkg:callable`: code that the user names, for a network that gkp does not know. It is found, called, and what it
returns filled with the file's tensors."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gkp.converter.sources import torch_export
from gkp.errors import BackendMissingError, UsageError
from gkp.pruning.tensor_names import is_counter, prefixes
from gkp.text import clean, first_line, one_line
from gkp.types import Array

if TYPE_CHECKING:
    import torch

_PUBLIC = ("torchvision", "timm")  # packages that users have, and gkp does not need
_CLASSES = "num_classes"
_HINT = "it must be importable from here and take no arguments"


def own_module(arch: str, tensors: Mapping[str, Array]) -> torch.nn.Module:
    """What the callable returns, with these tensors in it, float32 and in eval mode.

    The names may differ by a prefix in front of all of them, on one side or the other. A callable that takes `num_classes`
    is called with the file's number of classes where its own does not fit.
    UsageError: it fails, returns something else, or the tensors do not fit. BackendMissingError: it needs torchvision or
    timm, which is not there."""
    torch = torch_export.import_torch()
    make = _callable(arch)
    given = {name: array for name, array in tensors.items() if not is_counter(name)}
    module = _called(arch, make)
    named = _named_as(given, module)
    classes = _other_classes(named, module)
    if classes is not None and _takes_classes(make):
        module = _called(arch, make, **{_CLASSES: classes})
    own = module.state_dict()
    for name, array in named.items():
        if name in own and own[name].is_floating_point() and array.dtype.kind != "f":
            raise UsageError(f"{clean(name, 120)} holds {array.dtype} numbers, floats in the module of --arch {arch}",
                             "gkp does not open quantised weights: save the network in floats")
    state = {name: tensor for name, tensor in own.items() if is_counter(name)}
    state |= {name: torch.from_numpy(np.array(array)) for name, array in named.items()}
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError, TypeError) as e:
        raise UsageError(f"the state dict does not fit the module of --arch {arch}: {_misfit(state, own) or first_line(e)}",
                         "return the module that this checkpoint was saved from, in its widths, or export it to ONNX") from e
    return module.float().eval()


# ---- the callable ----------------------------------------------------------------------------------------------------
def _callable(arch: str) -> Callable[..., Any]:
    """What `pkg:callable` names. The current folder can be imported from."""
    package, _, name = arch.partition(":")
    if not package or not name:
        raise UsageError(f"--arch {arch!r} is not of the form pkg:callable", "e.g. --arch mynets.resnet:resnet20")
    found = _imported(package, arch)
    for place, part in enumerate(parts := name.split(".")):
        inner = _in_current_folder(lambda: getattr(found, part, None), arch)  # noqa: B023 (called at once)
        if inner is None:
            raise UsageError(f"--arch {arch}: there is no {clean(part, 80)}", _similar(package, parts[:place], part, found))
        found = inner
    if not callable(found):
        raise UsageError(f"--arch {arch} is a {type(found).__name__}, which cannot be called", _HINT)
    return found  # type: ignore[no-any-return]


def _imported(package: str, arch: str) -> Any:
    root = package.partition(".")[0]
    try:
        return _in_current_folder(lambda: importlib.import_module(package), arch)
    except UsageError as e:
        if root not in _PUBLIC or (isinstance(e.__cause__, ModuleNotFoundError) and e.__cause__.name == package):
            raise
        raise BackendMissingError(f"--arch {arch} needs {root}, which does not work here: {one_line(e.__cause__, 200)}",
                                  f"install the release of {root} that fits your PyTorch") from e


def _similar(package: str, above: list[str], name: str, found: Any) -> str:
    """What may be meant by `name`, which is not in `found`, the object called package:above."""
    if inspect.isfunction(found):  # timm's names of weights go on behind a dot
        return f"did you mean {package}:{'.'.join(above)}?"
    names = [other for other, value in vars(found).items() if callable(value)] if inspect.ismodule(found) else []
    close = [".".join((*above, other)) for other in difflib.get_close_matches(name, names, n=4)]
    return f"did you mean {', '.join(f'{package}:{other}' for other in close)}?" if close else _HINT


def _called(arch: str, make: Callable[..., Any], **arguments: int) -> torch.nn.Module:
    torch = torch_export.import_torch()
    module = _in_current_folder(lambda: make(**arguments), arch)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"--arch {arch} returns {type(module).__name__}", "it must return a torch.nn.Module")
    return module


def _in_current_folder(run: Callable[[], Any], arch: str) -> Any:
    """What the user's code returns. UsageError: it fails. BackendMissingError: as `own_module`."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return run()
    except Exception as e:  # whatever the user's code raises
        lacks = e.name or "" if isinstance(e, ModuleNotFoundError) else ""
        if lacks in _PUBLIC:
            raise BackendMissingError(f"--arch {arch} needs {lacks}, which is not installed", f"pip install {lacks}") from e
        raise UsageError(f"--arch {arch} fails: {type(e).__name__}: {first_line(e, 200)}", _HINT) from e
    finally:
        sys.path.remove(here)


# ---- its tensors -----------------------------------------------------------------------------------------------------
def _named_as(given: Mapping[str, Array], module: torch.nn.Module) -> dict[str, Array]:
    """The tensors under the module's names: without one of their prefixes, or behind one of the module's, as most names
    agree."""
    wanted = {name for name in module.state_dict() if not is_counter(name)}
    ways = [*((cut, "") for cut in prefixes(given)), *(("", added) for added in prefixes(wanted)[1:])]
    renamed = [{added + name.removeprefix(cut): array for name, array in given.items()} for cut, added in ways]
    return max(renamed, key=lambda named: len(wanted & named.keys()))


def _misfit(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """What the file lacks, has beyond the module, and has in another shape: the first of each, and how many more."""
    shapes = [f"{clean(name, 120)} has shape {[*tensor.shape]}, in the module {[*own[name].shape]}"
              for name, tensor in state.items() if name in own and tensor.shape != own[name].shape]
    lacks = [f"it lacks {clean(name, 120)}" for name in own if name not in state]
    beyond = [f"the module has no {clean(name, 120)}" for name in state if name not in own]
    return "; ".join(f"{found[0]}{f' and {len(found) - 1:,} more' if len(found) > 1 else ''}"
                     for found in (lacks, beyond, shapes) if found)


def _other_classes(given: Mapping[str, Array], module: torch.nn.Module) -> int | None:
    """The rows of the tensors that do not fit, where the module has another number of rows in all of them."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = {(array.shape, own[name]) for name, array in given.items() if name in own and array.shape != own[name]}
    rows = {(theirs[:1], ours[:1]) for theirs, ours in wrong}
    same = all(theirs[1:] == ours[1:] and theirs and ours for theirs, ours in wrong)
    return int(rows.pop()[0][0]) if same and len(rows) == 1 else None


def _takes_classes(make: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # a builtin
        return False
    return _CLASSES in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
