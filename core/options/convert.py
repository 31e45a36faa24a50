"""What a conversion can be asked for."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from gkp.errors import UsageError
from gkp.images.normalisation import INPUTS, Normalisation, numbers, of_input
from gkp.manifest import MAX_THREADS
from gkp.options.base import Declared, Options, declared, option
from gkp.options.forms import FormOptions, TargetOptions
from gkp.options.targets import EVERY, CpuOptions, NativeOptions, OrtOptions, TargetKeywords
from gkp.text import clean

Precision = Literal["fp32", "bf16", "fp16", "int8", "auto"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
IoPrecision = Literal["fp32", "fp16"]
_IO: tuple[IoPrecision, ...] = get_args(IoPrecision)
InputType = Literal["float32", "uint8"]
_IMAGES = "Precision and accuracy"


def _numbers(value: Any, option: str) -> tuple[float, ...] | None:
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ",".join(map(str, value))
    return numbers(str(value), option)


def _spec(value: Any) -> str:
    """Of images: a text, or the path of a file of arrays."""
    if not isinstance(value, str | Path):
        raise UsageError(f"calibration is a text or a path, not {type(value).__name__}",
                         "save arrays with numpy.save and give the file")
    return str(value)


def _points(value: Any) -> float:
    try:
        points = float(value)
    except (TypeError, ValueError):
        points = math.nan
    if not 0 <= points <= 100:
        raise UsageError(f"--max-drop needs percentage points from 0 to 100, not {clean(value, 80)!r}", "e.g. 0.5")
    return points


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What any target can be asked for, and the target's own options. input_shapes: shape by input name ("": of the only
    one), where the file does not say it; arch: "pkg:callable" that builds the module of a state dict; trust_code: open
    files that run code when they are loaded; output: None: a name made from the model's; max_drop: None: 0.5 with precision
    "auto", else whatever it is."""

    target: TargetOptions = field(default_factory=OrtOptions)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    arch: str | None = None
    trust_code: bool = False
    output: Path | None = option(None, "Directory to write. [default: MODEL-stem.TARGET, here]", path=True,
                                 metavar="DIR", flags=("-o", "--output"))
    force: bool = option(False, "Overwrite a directory that gkp wrote before.")
    precision: str = option("fp32", "fp32, bf16, fp16, int8 (with --calibration), or auto: the fastest that is as accurate "
                            "as fp32, see --data.", choices=PRECISIONS, metavar="NAME")
    baseline: Path | None = option(None, "The dense model that this one was pruned from. [default: a dense twin]",
                                   metavar="MODEL", path=True)
    dynamic_batch: bool = option(False, "Any batch size at run time; measured at 1 and 64 (16 or 4 if that takes long).")
    threads: int | None = option(None, "Threads at run time. [default: physical cores]", metavar="N",
                                 between=(1, MAX_THREADS))
    benchmark: bool = option(True, "Measure nothing; forms and kernels are chosen by estimates.")
    dry_run: bool = option(False, "Do everything but write.")
    calibration: str | None = option(None, "Images to learn the ranges of int8 from; with another precision, those of the "
                                     "dense model in int8 beside it: cifar10:DIR (training images), folder:DIR, FILE.npy, "
                                     "FILE.npz; random is for timing only.", group=_IMAGES,
                                     metavar="IMAGES", parse=_spec)
    calibration_images: int = option(300, "How many of them.", group=_IMAGES, metavar="N", between=(1, 100_000))
    data: str | None = option(None, "Labelled images to measure accuracy on: cifar10:DIR (test images), folder:DIR, "
                              "FILE.npz. Those of --calibration are left out.", group=_IMAGES, metavar="IMAGES")
    max_drop: float | None = option(None, "The most accuracy that may be lost against fp32, in percentage points; with a "
                                    "given precision nothing is written beyond it. Needs --data. [default with --precision "
                                    "auto: 0.5]", group=_IMAGES, metavar="POINTS", parse=_points)
    mean: tuple[float, ...] | None = option(None, "Normalisation of these images. [default: the one the system was trained "
                                            "with]", group=_IMAGES, metavar="R,G,B",
                                            parse=partial(_numbers, option="--mean"))
    std: tuple[float, ...] | None = option(None, "Normalisation of these images.", group=_IMAGES, metavar="R,G,B",
                                           parse=partial(_numbers, option="--std"))
    io_precision: str = option("fp32", "fp16: type of the inputs and outputs.", group=_IMAGES, choices=_IO)
    input_type: str = option("float32", "uint8: the model takes pixels as they are, [N, C, H, W], and normalises them "
                             "itself, by --mean and --std.", group=_IMAGES, choices=INPUTS, metavar="NAME")

    @property
    def free_batch(self) -> bool:
        """Any batch size at run time, or the range that the target has to know."""
        return self.dynamic_batch or self.target.batch_range is not None

    @property
    def forms(self) -> FormOptions:
        """How forms are chosen; the defaults where the target has one form."""
        return self.target if isinstance(self.target, FormOptions) else FormOptions()

    @property
    def normalisation(self) -> Normalisation | None:
        """What the converted model does with pixels; None where it takes floats."""
        return of_input(self.input_type, self.mean, self.std)

    def check(self) -> None:
        for shape in self.input_shapes.values():
            if not isinstance(shape, tuple) or len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise UsageError(f"{clean(repr(shape), 80)} is not an input shape", "e.g. (1, 3, 224, 224)")
        if not isinstance(self.arch, str | None) or not isinstance(self.trust_code, bool):
            raise UsageError("arch must be a text, and trust_code True or False", "see help(gkp.convert)")
        if self.precision not in (*self.target.precisions, "auto"):
            raise UsageError(f"--target {self.target.name} computes in {', '.join(self.target.precisions)}, not "
                             f"{self.precision}", _others(self.precision))
        if self.precision == "int8" and self.calibration is None:
            raise UsageError("--precision int8 learns ranges from images",
                             "add --calibration cifar10:DIR, folder:DIR, FILE.npy, FILE.npz, or random to time it only")
        if self.max_drop is not None and self.data is None:
            raise UsageError("--max-drop is measured on labelled images",
                             "add --data cifar10:DIR, folder:DIR or FILE.npz")
        if self.io_precision != "fp32" and self.precision != "fp16":
            raise UsageError("--io-precision is for --precision fp16", "leave it out, or add --precision fp16")
        if self.io_precision != "fp32" and isinstance(self.target, NativeOptions | CpuOptions):
            raise UsageError(f"--target {self.target.name} takes and gives float32, whatever it computes in",
                             "leave --io-precision out")
        if of_input(self.input_type, self.mean, self.std) is None and (self.mean or self.std) and not (
                self.calibration or self.data):
            raise UsageError("--mean and --std normalise images, and no images are given",
                             "add --calibration or --data, or --input-type uint8 for a model that normalises by itself")


class ConvertKeywords(TargetKeywords, total=False):
    """Of gkp.convert, with the options of all targets; None: not given. (`dry_run` is among its other parameters.)"""

    arch: str | None
    trust_code: bool
    force: bool
    precision: Precision
    baseline: str | os.PathLike[str] | None
    dynamic_batch: bool
    threads: int | None
    benchmark: bool
    calibration: str | Path | None
    calibration_images: int
    data: str | None
    max_drop: float | None
    mean: str | float | Sequence[float] | None
    std: str | float | Sequence[float] | None
    io_precision: IoPrecision
    input_type: InputType


def _others(precision: str) -> str:
    """Which targets compute in it."""
    return f"targets that compute in {precision}: {', '.join(s.name for s in EVERY if precision in s.precisions)}"


def convert_options(target: str = "ort", **values: Any) -> ConvertOptions:
    """The options of a conversion from their names alone, as the command line and gkp.convert have them: those of the target
    among the others; None: not given. UsageError for an unknown target, an option of other targets that is not left at its
    default, and an unknown one."""
    struct = next((s for s in EVERY if s.name == target), None)
    if struct is None:
        raise UsageError(f"unknown target {clean(repr(target), 80)}", f"choose one of: {', '.join(s.name for s in EVERY)}")
    values = {name: value for name, value in values.items() if value is not None}
    own = {d.name for d in declared(struct)}
    common = {f.name for f in dataclasses.fields(ConvertOptions)} - {"target"}
    for name in values.keys() - own - common:
        _check_foreign(name, values[name], struct)
    return ConvertOptions(target=struct(**{k: v for k, v in values.items() if k in own}),
                          **{k: v for k, v in values.items() if k in common})


def _check_foreign(name: str, value: Any, struct: type[TargetOptions]) -> None:
    """Of an option that the target does not have."""
    having = {s.name: d for s in EVERY for d in declared(s) if d.name == name}
    if not having:
        raise UsageError(f"gkp.convert() got an unexpected keyword argument {name!r}", "see help(gkp.convert)")
    found = next(iter(having.values()))
    if value not in (found.default, ()):
        *others, last = having
        names = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(f"{found.flags[-1]} is for --target {names}, not {struct.name}{struct.otherwise}",
                         "leave it out, or choose such a target")


def every_option() -> Iterator[Declared]:
    """The options of gkp-convert: the common ones, then those of each target that no target before it has."""
    known: set[str] = set()
    structs: tuple[type[Options], ...] = (ConvertOptions, *EVERY)
    for struct in structs:
        for found in declared(struct):
            if found.name not in known:
                known.add(found.name)
                yield found
