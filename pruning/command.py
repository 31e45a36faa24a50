"""`gkp prune`: from a dense network, a method and its settings to a run folder with the grouped network in it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from torch import nn

from gkp import _version
from gkp.errors import FileError, UsageError
from gkp.images.cifar10 import ReadPickle
from gkp.images.normalisation import NONE, Normalisation
from gkp.manifest import sha256
from gkp.pruning.data import DataSet, open_data
from gkp.pruning.methods import METHODS, load_method
from gkp.pruning.methods.base import Method
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.build import Normalize
from gkp.pruning.models.recognise import recognise
from gkp.pruning.run_folder import open_run
from gkp.pruning.session import Session
from gkp.pruning.training import make_accelerator
from gkp.require import absent
from gkp.types import Progress

_MAX_SETTINGS = 256 << 20
_DAMAGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # from other values than ours
_STAGES = ("baseline", "pruned", "grouped", "finetuned")


@dataclass(frozen=True)
class Baseline:
    """The dense network of --baseline. meta: what its file says beside it, such as "mean" and "std" of its images."""

    path: Path
    arch: Architecture
    module: nn.Module
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The options of the command line, by their names there."""

    method: str
    output: Path
    model: str | None = None
    data: str | None = None
    snapshots: Path | None = None
    settings: Path | None = None
    epochs: int | None = None
    seed: int = 0
    multi: bool = False
    mixed_precision: str = "no"
    public: bool = False
    force: bool = False


def prune(request: Request, baseline: Baseline, read_pickle: ReadPickle, say: Callable[[str], None] | None,
          progress: Progress) -> dict[str, Any] | None:
    """Run the method; the content of setting.json (None in all processes but the first). read_pickle: reads a plain pickle
    without executing anything.

    A failure before the first finished phase or epoch leaves OUT as it was; after it, the same request goes on from there.
    UsageError, FileError, UnsupportedModelError: see docs/tasks/prune.md. GkpError: the loss became NaN.
    """
    method = _method(request.method)
    settings = method.read_settings(read_settings(request.settings))
    _check(request, baseline.arch)
    if request.public:
        _check_public(request.method, baseline)
    accelerator = make_accelerator(request.mixed_precision)
    main = bool(accelerator.is_main_process)
    data = None if request.data is None else _data(request.data, baseline, read_pickle)
    asked = {
        "gkp_version": _version.__version__, "method": request.method, "model": baseline.arch.name,
        "baseline": {"path": str(baseline.path), "sha256": sha256(baseline.path)},
        "data": None if data is None else data.description,
        "snapshots": None if request.snapshots is None else str(request.snapshots),
        "seed": request.seed, "epochs": request.epochs, "multi": request.multi,
        "mixed_precision": request.mixed_precision, "settings": msgspec.to_builtins(settings),
    }
    if not main:
        accelerator.wait_for_everyone()  # until the first process has made the folder
    folder = open_run(request.output, asked, force=request.force and main, writes=main)
    if main:
        accelerator.wait_for_everyone()
    try:
        session = Session(
            arch=baseline.arch, baseline=baseline.module, data=data, snapshots=request.snapshots, epochs=request.epochs,
            seed=request.seed, multi=request.multi, public=request.public, folder=folder, accelerator=accelerator,
            say=say if main else None, progress=progress if main else None,
        )
        session.log(f"{'resumed' if folder.resumed else 'started'}: {request.method} on {baseline.arch.name}")
        session.progress("testing the baseline", None)
        session.save("baseline", baseline.module)
        method.run(session, settings)
    except BaseException as error:
        folder.drop_if_not_begun()
        if folder.resumed and isinstance(error, _DAMAGED):
            raise FileError(f"{request.output} cannot go on, {type(error).__name__}: {error}",
                            "if its files were changed, begin again with --force; -v shows the traceback") from error
        raise
    folder.finish()
    return folder.setting if main else None


def read_settings(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file; {} without one. FileError: it cannot be read. UsageError: it holds something else."""
    if path is None:
        return {}
    try:
        if path.stat().st_size > _MAX_SETTINGS:
            raise FileError(f"{path} is too large for settings", "check --settings")
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", "check --settings") from error
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path} is not JSON: {error}", "check --settings") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a JSON object", 'settings are {"field": value, ...}')
    return content


def summary(setting: Mapping[str, Any], output: Path) -> tuple[Table, str]:
    """The results as a table, and the command to go on with."""
    results = setting["results"]
    table = Table(title=f"{setting['method']} on {setting['model']}", title_justify="left")
    for name in ("", "test accuracy", "MACs", "of dense", "parameters", "of dense"):
        table.add_column(name, justify="right" if name else "left")
    dense = results["baseline"]
    for stage in _STAGES:
        if stage in results:
            row = results[stage]
            accuracy = row.get("accuracy")
            table.add_row(
                stage, "" if accuracy is None else f"{accuracy:.2%}",
                f"{row['macs'] / 1e6:,.2f}M", f"{row['macs'] / dense['macs']:.2%}",
                f"{row['parameters']:,}", f"{row['parameters'] / dense['parameters']:.2%}",
            )
    last = next((stage for stage in reversed(_STAGES) if stage in results and stage != "baseline"), "baseline")
    convert = ["gkp-convert", str(output / last), "--target", "cpu", "--baseline", str(output / "baseline")]
    return table, shlex.join(convert)


def _method(name: str) -> Method:
    try:
        return load_method(name)
    except ImportError as error:
        raise absent(error.name or str(error), "prune", f"gkp prune {name}", error) from error


def _check(request: Request, arch: Architecture) -> None:
    if request.model is not None and request.model.lower() != arch.name:
        raise UsageError(f"the baseline is a {arch.name}, not a {request.model}", f"leave out --model, or give {arch.name}")
    if request.data is None and request.epochs != 0:
        raise UsageError("training needs images", "give --data cifar10:DIR, or train nothing with --epochs 0")
    if request.snapshots is not None and not request.snapshots.is_dir():
        raise FileError(f"no such folder: {request.snapshots}", "check --snapshots")


def _check_public(method: str, baseline: Baseline) -> None:
    """A public form is a state dict, from which the network is guessed: refuse what would be guessed wrong."""
    known = [entry.name for entry in METHODS if entry.public]
    if method not in known:
        raise UsageError(f"gkp prune writes no public form for {method}",
                         f"leave out --public, which is for {', '.join(known)}; gkp-convert opens what is written without")
    arch = baseline.arch
    guessed = recognise({name: tensor.detach().numpy() for name, tensor in baseline.module.state_dict().items()})
    if (guessed.family, guessed.depth, guessed.shortcut) != (arch.family, arch.depth, arch.shortcut):
        raise UsageError(f"a public form holds tensors only, and these would be taken for a {guessed.family} with shortcut "
                         f"{guessed.shortcut}, not the {arch.family} with shortcut {arch.shortcut} that this is",
                         "leave out --public: the files that are written without it say what they are")


def _data(spec: str, baseline: Baseline, read_pickle: ReadPickle) -> DataSet:
    """Normalised as the baseline wants it: by itself, by what its file says, or as usual."""
    normalisation = None
    mean, std = (_triple(baseline.meta.get(key)) for key in ("mean", "std"))
    if isinstance(getattr(baseline.module, "normalize", None), Normalize):
        normalisation = NONE
    elif mean is not None and std is not None and min(std) > 1e-6:  # else the usual one
        normalisation = Normalisation(mean, std)
    data = open_data(spec, baseline.arch.input_shape, read_pickle, normalisation)
    if data.classes != baseline.arch.num_classes:
        raise UsageError(f"the network knows {baseline.arch.num_classes} classes, {spec} has {data.classes}",
                         "give the data that the baseline was trained on")
    return data


def _triple(value: Any) -> tuple[float, ...] | None:
    good = isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) and abs(v) < math.inf for v in value)
    return tuple(value) if good else None
