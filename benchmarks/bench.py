"""`gkp bench`: artefacts measured again where they are, each turn by turn with its dense baseline on every stock engine that
is here. Needs no onnx, but for the dense baseline in int8."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from rich.table import Table
from rich.text import Text

from gkp import manifest as manifest_module
from gkp.benchmarks.results import ArtefactRow
from gkp.errors import GkpError
from gkp.manifest import Manifest, Rival, Timing
from gkp.report.kit import left, ratio_text, right
from gkp.report.kit import table as plain
from gkp.report.wording import (
    NOT_MEASURED,
    fastest_of_kinds,
    interval,
    milliseconds,
    rival_name,
    setting_name,
    shorten,
    times,
)
from gkp.require import require
from gkp.runtime.load import DENSE, STOCK, dense_file, open_baseline, open_rivals, open_runner, stock_baseline, stock_rival
from gkp.runtime.measure import Call, interleave_anew
from gkp.runtime.onnx_file import read_onnx
from gkp.runtime.runners import Runner
from gkp.text import clean
from gkp.types import Progress

_ALWAYS = ("batch", "now ms")


def bench(directories: Sequence[Path], batches: Sequence[int], seconds: float, report: Progress,
          trust_code: bool = False) -> list[ArtefactRow]:
    """Measure every artefact at the given batch sizes (default: those it was measured at). trust_code: open native
    libraries of others too."""
    rows = []
    for number, directory in enumerate(directories):
        written = manifest_module.read(directory)
        manifest_module.check_files(directory, written)
        report(f"{clean(directory.name, 24)}, dense in int8", number / len(directories))
        int8 = _int8(directory, written)
        sizes = batches or [m.batch for m in written.measurements] or [_declared_batch(written)]
        for place, batch in enumerate(sizes):
            def told(share: float, batch: int = batch, before: float = number + place / len(sizes),
                     each: float = 1 / len(sizes), name: str = clean(directory.name, 24)) -> None:
                report(f"{name}, batch {batch}", (before + share * each) / len(directories))

            told(0.0)
            rows.append(_row(directory, written, int8, batch, seconds, trust_code, told))
    return rows


def _declared_batch(written: Manifest) -> int:
    first = written.inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def _int8(directory: Path, written: Manifest) -> bytes | str | None:
    """The dense baseline of an artefact for CPUs in int8, which NNCF makes with random numbers, for its time; why it cannot;
    None where the artefact has no baseline, or has it in int8 itself."""
    if not stock_baseline(written) or dense_file(written, "int8") is not None:
        return None
    try:
        require("onnx", "convert")
        from gkp.benchmarks.adapter import int8_for_timing

        return int8_for_timing(read_onnx(directory / DENSE, written.files[DENSE]))
    except GkpError as e:
        return e.message


def _opened(directory: Path, written: Manifest, int8: bytes | str | None,
            trust_code: bool) -> list[tuple[Rival, Runner | None]]:
    """The dense baseline in every engine."""
    if not stock_baseline(written):
        own = open_baseline(directory, written, trust_code)
        return [(Rival(engine=written.target, precision=written.precision), own)] if own is not None else []
    found = open_rivals(directory, written)
    if isinstance(int8, str):
        return [*found, (Rival(engine="openvino", precision="int8", missing=int8), None)]
    return found if int8 is None else [*found, *(stock_rival(int8, e, "int8", written.threads) for e in STOCK)]


def _row(directory: Path, written: Manifest, int8: bytes | str | None, batch: int, seconds: float, trust_code: bool,
         told: Callable[[float], None]) -> ArtefactRow:
    rivals: dict[str, Rival] = {}
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([batch, *(n if isinstance(n, int) else 1 for n in i.shape[1:])]).astype(i.dtype)
              for i in written.inputs]

    @contextmanager
    def opened(without: Container[str]) -> Iterator[dict[str, Call]]:
        with ExitStack() as stack:
            runners = {"converted": open_runner(directory, written, trust_code)}
            for number, (rival, runner) in enumerate(_opened(directory, written, int8, trust_code)):
                rivals[str(number)] = rival
                if runner is not None:
                    runners[str(number)] = runner
            for runner in runners.values():
                stack.callback(runner.close)
            calls: dict[str, Call] = {name: partial(r.run, dict(zip(r.inputs, arrays, strict=True)))
                                      for name, r in runners.items()}
            for call in calls.values():
                call()
            yield calls

    samples = interleave_anew(opened, threads=written.threads, budget_s=seconds, done=told)
    same = samples.fastest(name for name, r in rivals.items() if r.precision == written.precision and not r.as_installed)
    return ArtefactRow(name=clean(directory.name, 60), target=written.target, batch=batch, threads=written.threads,
                       dense_ms=samples.timing(same) if same else None, converted_ms=samples.timing("converted"),
                       speedup=samples.ratio(same, "converted") if same else None,
                       theoretical=written.speedup.theoretical,
                       rivals=[replace(rival, ms=samples.timing(name), ratio=samples.ratio(name, "converted"))
                               if name in samples.ms else rival for name, rival in rivals.items()],
                       blocks=len(samples.blocks), load=samples.load)


def rows_of(name: str, written: Manifest) -> list[ArtefactRow]:
    """The measurements that a conversion has just made, as rows."""
    return [ArtefactRow(name=name, target=written.target, batch=m.batch, threads=m.threads, dense_ms=m.latency_ms.dense,
                        as_is_ms=m.latency_ms.as_is, converted_ms=m.latency_ms.converted, speedup=m.speedup.vs_dense,
                        vs_as_is=m.speedup.vs_as_is, theoretical=m.speedup.theoretical, rivals=m.rivals, blocks=m.blocks,
                        load=m.load)
            for m in written.measurements if m.latency_ms.converted is not None]


def missing_row(name: str, target: str, batch: int, threads: int, why: str) -> ArtefactRow:
    """A conversion that there is not."""
    return ArtefactRow(name=name, target=target, batch=batch, threads=threads, missing=why)


def table(rows: Sequence[ArtefactRow]) -> Table:
    """Fits 80 columns. Columns that would hold nothing are left out."""
    cells: dict[str, list[Text | str]] = {
        "batch": [str(row.batch) for row in rows],
        "dense ms": [_ms(row.dense_ms) for row in rows], "as given": [_as_given(row) for row in rows],
        "now ms": [_ms(row.converted_ms) for row in rows],
        "speedup (95 %)": [NOT_MEASURED if row.speedup is None else interval(row.speedup) for row in rows],
        "limit": ["-" if row.theoretical is None else times(row.theoretical) for row in rows]}
    shown = {heading: column for heading, column in cells.items() if heading in _ALWAYS or {*column} - {"-", NOT_MEASURED}}
    out = plain(left("model", overflow="fold", max_width=24), left("target"), *map(right, shown), ruled=True)
    for number, row in enumerate(rows):
        out.add_row(Text(row.name), row.target, *(column[number] for column in shown.values()))
    return out


def rival_table(rows: Sequence[ArtefactRow]) -> Table | None:
    """The dense baseline in each precision and as installed, in the engine that is fastest; None where there is none."""
    if not any(row.rivals for row in rows):
        return None
    caption = ("dense: the same network in the fastest engine; speedup: of the artefact over it; int8 by NNCF, calibrated "
               "as the conversion was, else with random numbers, for its time")
    out = plain(left(overflow="fold"), right("dense ms"), right("speedup over it (95 %)"), ruled=True, caption=caption)
    for row in rows:
        if row.rivals:
            out.add_row(Text(f"{row.name}, {row.target}, {setting_name(row.batch, row.threads)}", "bold"))
            for rival in fastest_of_kinds(row.rivals):
                told = Text(shorten(rival.missing, 36), "dim") if rival.missing else ratio_text(rival.ratio)
                out.add_row(Text(f"  {rival_name(rival)}"), _ms(rival.ms), told)
    return out


def _ms(measured: Timing | None) -> str:
    return "-" if measured is None else milliseconds(measured.median)


def _as_given(row: ArtefactRow) -> str:
    """Speed of the model as given, relative to the dense baseline."""
    if row.as_is_ms is None or row.dense_ms is None:
        return "-"
    return times(row.dense_ms.median / row.as_is_ms.median)
