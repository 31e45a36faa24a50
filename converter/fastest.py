"""--target cpu: the same model for every CPU target that is installed, timed against each other; the fastest is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gkp.converter.conversion import Conversion, default_output
from gkp.converter.options import ConvertOptions
from gkp.converter.rows import Timed, time_rows
from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError
from gkp.runtime.measure import timing

CPU = "cpu"
TARGETS = ("native", "openvino", "ort")
Progress = Callable[[str, float | None], None]


def fastest(source: Any, options: ConvertOptions, progress: Progress) -> Conversion:
    """The measured conversion that is fastest here. UsageError when nothing may be measured, BackendMissingError when no
    CPU target is installed."""
    if not options.benchmark:
        raise UsageError("--target cpu has to measure to know what is fastest", "leave --no-benchmark out")
    output = options.output or (default_output(Path(source), CPU) if isinstance(source, str | Path) else None)
    made: dict[str, Conversion] = {}
    left_out: list[str] = []
    for name in TARGETS:
        try:
            conversion = Conversion(source, replace(options, target=name, output=output), _labelled(progress, name))
            conversion.measure()
            made[name] = conversion
        except (BackendMissingError, UnsupportedModelError) as e:
            left_out.append(f"{name} ({e.message})")
    if not made:
        raise BackendMissingError(f"no CPU target can take the model: {'; '.join(left_out)}",
                                  'pip install "gkp[native]", "gkp[ort]" or "gkp[openvino]"')
    best = _best(made, progress)
    best.notes += [f"--target cpu left out: {text}" for text in left_out]
    return best


def _best(made: dict[str, Conversion], progress: Progress) -> Conversion:
    """Interleaved once more, because conversions one after another meet different phases of a machine."""
    first = next(iter(made.values()))
    if len(made) == 1:
        return first
    models = {name: (lambda batch, c=c: c.model) for name, c in made.items()}
    engines = {name: c.target for name, c in made.items()}
    timed = time_rows(models, first.opened.model, first.target, first.threads, first.batches, first.dynamic, engines,
                      progress=progress)
    if not all(timed.samples.values()):
        raise GkpError(f"no target ran the model: {'; '.join(timed.notes)}", "choose a target yourself, with --target")
    best = min(made, key=lambda name: _total(timed, name))
    made[best].notes.append(f"--target cpu: {best} is the fastest of {_shown(timed)}")
    return made[best]


def _total(timed: Timed, name: str) -> float:
    """Sum over the batches of the time relative to the fastest at that batch, so that every batch counts the same."""
    medians = [{n: timing(s).median for n, s in found.items()} for found in timed.samples.values()]
    return sum(m.get(name, float("inf")) / min(m.values()) for m in medians)


def _shown(timed: Timed) -> str:
    return "; ".join(f"batch {batch}: " + ", ".join(f"{n} {timing(s).median:.3g} ms" for n, s in found.items())
                     for batch, found in timed.samples.items())


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda text, share: progress(f"{name}: {text}", share)
