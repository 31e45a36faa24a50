"""`gkp bench`: artefacts measured again where they are, each turn by turn with its dense baseline. Needs no onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from gkp import manifest as manifest_module
from gkp.benchmarks.results import Row
from gkp.benchmarks.wording import clean, interval, milliseconds, times
from gkp.manifest import Manifest, Timing
from gkp.runtime.load import open_baseline, open_runner
from gkp.runtime.measure import interleave, ratio, timing

Report = Callable[[str, float | None], None]


def bench(directories: Sequence[Path], batches: Sequence[int], seconds: float, report: Report,
          trust_code: bool = False) -> list[Row]:
    """Measure every artefact at the given batch sizes (default: those it was measured at). trust_code: open native
    libraries of others too."""
    rows = []
    for number, directory in enumerate(directories):
        written = manifest_module.read(directory)
        manifest_module.check_files(directory, written)
        for batch in batches or [m.batch for m in written.measurements] or [_declared_batch(written)]:
            report(f"{clean(directory.name, 24)}, batch {batch}", number / len(directories))
            rows.append(_row(directory, written, batch, seconds, trust_code))
    return rows


def _declared_batch(written: Manifest) -> int:
    first = written.inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def _row(directory: Path, written: Manifest, batch: int, seconds: float, trust_code: bool) -> Row:
    runners = {"converted": open_runner(directory, written, trust_code)}
    if (dense := open_baseline(directory, written, trust_code)) is not None:
        runners["dense"] = dense
    try:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal([batch, *(n if isinstance(n, int) else 1 for n in i.shape[1:])]).astype(i.dtype)
                  for i in written.inputs]
        calls = {name: (lambda r=r: r.run(dict(zip(r.inputs, arrays, strict=True))))
                 for name, r in runners.items()}
        samples = interleave(calls, budget_s=seconds)
    finally:
        for runner in runners.values():
            runner.close()
    reference = samples.get("dense")
    return Row(name=clean(directory.name, 60), target=written.target, batch=batch, threads=written.threads,
               dense_ms=timing(reference) if reference else None, as_is_ms=None, converted_ms=timing(samples["converted"]),
               speedup=ratio(reference, samples["converted"]) if reference else None, vs_as_is=None,
               theoretical=written.speedup.theoretical)


def rows_of(name: str, written: Manifest) -> list[Row]:
    """The measurements that a conversion has just made, as rows."""
    return [Row(name=name, target=written.target, batch=m.batch, threads=m.threads, dense_ms=m.latency_ms.dense,
                as_is_ms=m.latency_ms.as_is, converted_ms=m.latency_ms.converted, speedup=m.speedup.vs_dense,
                vs_as_is=m.speedup.vs_as_is, theoretical=m.speedup.theoretical)
            for m in written.measurements if m.latency_ms.converted is not None]


def missing_row(name: str, target: str, batch: int, threads: int, why: str) -> Row:
    """A conversion that there is not."""
    return Row(name=name, target=target, batch=batch, threads=threads, dense_ms=None, as_is_ms=None, converted_ms=None,
               speedup=None, vs_as_is=None, theoretical=None, missing=why)


def table(rows: Sequence[Row]) -> Table:
    """Fits 80 columns. The column of the model as given is there when it was measured."""
    given = any(row.as_is_ms is not None for row in rows)
    out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("model", overflow="fold", max_width=24)
    out.add_column("target")
    for heading in ("batch", "dense ms", *(["as given"] if given else []), "now ms", "speedup (95 %)", "limit"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(Text(row.name), row.target, str(row.batch), _ms(row.dense_ms), *([_as_given(row)] if given else []),
                    _ms(row.converted_ms), "not measured" if row.speedup is None else interval(row.speedup),
                    "-" if row.theoretical is None else times(row.theoretical))
    return out


def _ms(measured: Timing | None) -> str:
    return "-" if measured is None else milliseconds(measured.median)


def _as_given(row: Row) -> str:
    """Speed of the model as given, relative to the dense baseline."""
    if row.as_is_ms is None or row.dense_ms is None:
        return "-"
    return times(row.dense_ms.median / row.as_is_ms.median)
