"""The standard suite: published checkpoints where they are at hand, ResNet-50 with grouped 3x3 convolutions generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.benchmarks.bench import missing_row, rows_of
from gkp.benchmarks.networks import block_diagonal, resnet50, tmi_style
from gkp.benchmarks.results import Bench, Row
from gkp.errors import GkpError
from gkp.runtime.environment import fingerprint

Report = Callable[[str, float | None], None]
CPU_TARGETS = ("ort", "openvino", "native")
BATCHES = (1, 64)


@dataclass(frozen=True)
class Case:
    """One model of the suite. source: a path or a module; baseline: a dense model file, or None for the twin."""

    name: str
    source: Callable[[], Any]
    baseline: Path | None = None
    input_shape: tuple[int, ...] | None = None


def cpu_cases(checkpoints: Path | None) -> Iterator[Case]:
    """The cases of --suite cpu."""
    if checkpoints is not None:
        tmi = checkpoints / "tmi_gkp" / "resnet20_cifar10"
        if (tmi / "grouped").is_file():
            yield Case("TMI-GKP ResNet-20", lambda: tmi / "grouped", tmi / "baseline")
        dsp = checkpoints / "dsp" / "resnet20_g4.pt"
        if dsp.is_file():
            yield Case("DSP ResNet-20 g4", lambda: dsp)
    yield Case("ResNet-50 block-diagonal 3x3, 8 groups", lambda: resnet50(block_diagonal), None, (1, 3, 224, 224))
    yield Case("ResNet-50 TMI-GKP style 3x3", lambda: resnet50(tmi_style), None, (1, 3, 224, 224))


def run_cpu(checkpoints: Path | None, report: Report, seconds: float = 1.0) -> Bench:
    """Every case, one thread, batch 1 and 64: converted for every CPU target (dry run), compared over the engines; then
    the layers of the native kernels against the core's peak, and two threads against one at batch 64. What is not
    installed is a row that says so. seconds: budget per engine and batch size."""
    from gkp.benchmarks.engines import Native, compare, entries, make_pair
    from gkp.benchmarks.layers import native_layers, scaling
    from gkp.converter.sources import OpenOptions, open_any

    cases, native = list(cpu_cases(checkpoints)), Native()
    out = Bench(rows=[], environment=fingerprint())
    for number, case in enumerate(cases):
        def progress(text: str, share: float | None = None, number: int = number, case: Case = case) -> None:
            report(f"{case.name}, {text}", number / len(cases))

        source = case.source()
        for target in CPU_TARGETS:
            out.rows.extend(_conversion(case, source, target, progress))
        opened = open_any(source, OpenOptions(_shapes(case)))
        pair = make_pair(opened, open_any(case.baseline, OpenOptions(_shapes(case))) if case.baseline else None)
        out.engines.extend(compare(case.name, pair, entries(pair, 1, native.start), BATCHES, 1, seconds=seconds,
                                   progress=progress))
        progress("native, layers")
        out.layers.append(native_layers(case.name, pair.pruned, native.start))
        progress("native, two threads")
        out.scaling.append(scaling(case.name, pair.pruned, native.start))
    return out


def _conversion(case: Case, source: Any, target: str, progress: Callable[[str, float | None], None]) -> list[Row]:
    """The rows of a conversion; rows without times when the target is not here or refuses the model."""
    from gkp.converter.convert import ConvertOptions, convert

    options = ConvertOptions(target=target, threads=1, dynamic_batch=True, dry_run=True, baseline=case.baseline,
                             input_shapes=_shapes(case))
    try:
        made = convert(source, options, lambda text, share: progress(f"{target}: {text}", share))
    except GkpError as e:
        return [missing_row(case.name, target, batch, 1, e.message) for batch in BATCHES]
    return rows_of(case.name, made.manifest)


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {} if case.input_shape is None else {"": case.input_shape}
