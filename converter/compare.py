"""`gkp verify A B`: two models, each a file or an artefact directory, compared on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from gkp import manifest as manifest_module
from gkp.converter.compare_int8 import Pair, compare_int8
from gkp.converter.sources import OpenOptions, open_model
from gkp.converter.sources.base import sample_inputs
from gkp.converter.verify import TOLERANCE, WINOGRAD_TOLERANCE, verify
from gkp.errors import FileError, UsageError
from gkp.images.normalisation import Normalisation
from gkp.manifest import Manifest, Verification
from gkp.runtime.load import open_runner
from gkp.text import clean
from gkp.types import Progress, Run, silent

_SCALES = (("random", 1.0), ("zeros", 0.0), ("large", 16.0), ("small", 1e-3))


@dataclass(frozen=True)
class Runnable:
    """Something that computes. shapes: per input, the axis sizes, None where any size goes. fixed_batch: the only batch
    size it takes, or None. relative: the error it was allowed when it was verified (see gkp.converter.verify); written: of
    an artefact; normalisation: of one that takes pixels."""

    name: str
    system: str
    run: Run
    inputs: Sequence[str]
    shapes: Sequence[tuple[int | None, ...]]
    dtypes: Sequence[str]
    relative: float = TOLERANCE["fp32"]
    written: Manifest | None = None
    normalisation: Normalisation | None = None

    @property
    def fixed_batch(self) -> int | None:
        return self.shapes[0][0] if self.shapes[0] else None

    @property
    def precision(self) -> str:
        return "fp32" if self.written is None else self.written.precision


def open_runnable(path: Path, options: OpenOptions) -> Runnable:
    """An artefact directory or a model file."""
    if path.is_dir():
        written = manifest_module.read(path)
        manifest_module.check_files(path, written)
        shapes = [tuple(n if isinstance(n, int) else None for n in i.shape) for i in written.inputs]
        runner, dtypes = open_runner(path, written, options.trust_code), {i.name: i.dtype for i in written.inputs}
        return Runnable(path.name, written.source.system,
                        lambda feeds: runner.run({name: x.astype(dtypes[name], copy=False) for name, x in feeds.items()}),
                        list(dtypes), shapes, list(dtypes.values()), _relative(written), written, _normalisation(written))
    opened = open_model(path, options)
    torch_like = opened.at_batch is not None
    shapes = []
    for value in opened.model.graph.input:
        axes = opened.dynamic.get(value.name, {})
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        shapes.append(tuple(None if a in axes or (a == 0 and torch_like) else n for a, n in enumerate(dims)))
    types = {name: str(x.dtype) for name, x in sample_inputs(opened.model).items()}
    return Runnable(path.name, opened.system,
                    lambda feeds: opened.reference({name: x.astype(types[name], copy=False) for name, x in feeds.items()}),
                    list(types), shapes, list(types.values()))


def compare_models(a: Path, b: Path, options: OpenOptions, precision: str | None = None, calibration: str | None = None,
                   progress: Progress = silent) -> Verification:
    """Compare on random, zero, large and small inputs at batch 1, and at batch 3 where both take any batch; an artefact in
    int8 as gkp.converter.compare_int8 does. precision: whose tolerance to apply; None: that of the artefact that
    rounds most; calibration: as of compare_int8. UsageError when their inputs differ."""
    opened = []
    for path in (a, b):
        progress(f"opening {clean(path.name, 60)}", None)
        opened.append(open_runnable(path, options))
    one, two = _fed_alike(*opened)
    shapes = [_common(s, t) for s, t in zip(one.shapes, two.shapes, strict=len(one.shapes) == len(two.shapes))]
    if len(one.shapes) != len(two.shapes) or any(s is None for s in shapes):
        raise UsageError(f"{one.name} takes inputs {_show(one)}, {two.name} {_show(two)}",
                         "compare models with the same inputs, or give --input-shape")
    for artefact, where, other in ((two, b, one), (one, a, two)):
        if precision is None and artefact.written is not None and artefact.precision == "int8":
            pair = Pair(where, artefact.written, artefact.run, _named(other), other.name, other.fixed_batch)
            return compare_int8(pair, options, calibration, progress)
    if calibration is not None:
        raise UsageError("--calibration is for artefacts in int8", "leave it out")
    batches = [1, 3] if all(s[:1] == (None,) for s in (*one.shapes, *two.shapes)) else [None]
    inputs = []
    for seed, (name, scale) in enumerate(_SCALES):
        for batch in batches:
            rng = np.random.default_rng(seed)
            arrays = [_filled([*(batch or n or 1 for n in s[:1]), *(n or 32 for n in s[1:])], np.dtype(d), scale, rng)
                      for s, d in zip([s for s in shapes if s is not None], one.dtypes, strict=True)]
            inputs.append((name, batch or one.fixed_batch or 1, dict(zip(one.inputs, arrays, strict=True))))

    if precision is None:
        precision = max((one.precision, two.precision), key=lambda name: TOLERANCE.get(name, 0.0))
    return verify(_named(two), two.name, one.run, one.name, inputs, precision, max(one.relative, two.relative),
                  progress)


def _named(runnable: Runnable) -> Run:
    """Takes the same inputs under other names."""
    return lambda feeds: runnable.run(dict(zip(runnable.inputs, feeds.values(), strict=True)))


def _normalisation(written: Manifest) -> Normalisation | None:
    first = written.inputs[0] if written.inputs else None
    if first is None or first.mean is None or first.std is None:
        return None
    sound = all(map(isfinite, (*first.mean, *first.std))) and min(first.std, default=0) >= float(np.finfo(np.float32).tiny)
    if not sound or len(first.shape) != 4 or {len(first.mean), len(first.std)} != {first.shape[1]}:
        raise FileError("the manifest's mean and std are not a number for each channel of the input, std above 0",
                        "convert the model again")
    return Normalisation(tuple(first.mean), tuple(first.std))


def _fed_alike(a: Runnable, b: Runnable) -> tuple[Runnable, Runnable]:
    """Of two models of which one takes pixels, the other takes them too, and gets what these are normalised to."""
    if a.normalisation is not None and b.normalisation is None and b.dtypes[0] == "float32":
        how, run, name = a.normalisation, b.run, b.inputs[0]
        return a, replace(b, run=lambda feeds: run({name: how.of_channels_first(feeds[name])}), dtypes=a.dtypes)
    return (a, b) if b.normalisation is None or a.normalisation is not None else _fed_alike(b, a)[::-1]


def _relative(written: manifest_module.Manifest) -> float:
    """Winograd kernels among the layers' reasons have the tolerance of their algorithm."""
    winograd = written.target == "native" and any("winograd" in layer.reason for layer in written.layers)
    return WINOGRAD_TOLERANCE if winograd else TOLERANCE["fp32"]


def _filled(shape: list[int], dtype: np.dtype[Any], scale: float, rng: np.random.Generator) -> Any:
    """Normal numbers; bytes for pixels, and 0 and 1 for an input of other integers (they are indices, or flags)."""
    if dtype.kind != "f":
        return rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    return (scale * rng.standard_normal(shape)).astype(dtype)


def _common(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    if len(a) != len(b) or any(m is not None and n is not None and m != n for m, n in zip(a, b, strict=True)):
        return None
    return tuple(m if m is not None else n for m, n in zip(a, b, strict=True))


def _show(runnable: Runnable) -> str:
    return ", ".join(str([n if n is not None else "any" for n in s]) for s in runnable.shapes)
