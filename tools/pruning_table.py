"""Writes docs/benchmarks/data/pruning.json from runs of `gkp prune`, and the table of docs/benchmarks/pruning.md from it.

usage: python tools/pruning_table.py [RUN ...]

RUN is a folder that `gkp prune ... -o RUN` wrote; the report of its conversion, from
`gkp-convert RUN/finetuned --baseline RUN/baseline --json RUN.json`, is found beside it. Without one the run's speed is not
measured. Without any RUN the page is written again from the data that are there.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gkp import manifest
from gkp.errors import GkpError, UsageError
from gkp.files import plain_json, write_file
from gkp.manifest import Manifest, Ratio
from gkp.pruning.methods import METHODS
from gkp.report.wording import interval, times
from gkp.structs import read_json
from gkp.text import clean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "data" / "pruning.json"
PAGE = ROOT / "docs" / "benchmarks" / "pruning.md"
START, END = "<!-- results: written by tools/pruning_table.py -->", "<!-- /results -->"
BATCHES = (1, 64)
STAGES = ("baseline", "grouped", "finetuned")
NOT_MEASURED = "-"
_HEADINGS = ("method", "network", "epochs, settings", *(f"accuracy {stage}" for stage in STAGES), "MACs", "parameters",
             "converted to", *(f"speedup, batch {batch}" for batch in BATCHES), "limit")
_PACKAGES = ("onnxruntime", "openvino", "ncnn", "ziglang", "tensorrt", "torch")
_LONGEST = 80  # characters of a setting's value; longer ones are lists of groups


S = TypeVar("S", bound=msgspec.Struct)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """accuracy: 0 to 1 on the test images. macs: multiply-accumulates for one image."""

    macs: int
    parameters: int
    accuracy: float | None = None


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds per call (median), and dense / converted."""

    batch: int
    dense_ms: float | None = None
    converted_ms: float | None = None
    speedup: Ratio | None = None


class Conversion(msgspec.Struct, frozen=True, kw_only=True):
    """A conversion of `stage`. asked: the --target; target: what was written. theoretical: dense MACs / kept MACs."""

    stage: str
    asked: str
    target: str
    precision: str
    threads: int
    dynamic_batch: bool
    verified: bool | None
    theoretical: float | None
    speeds: list[Speed]
    environment: dict[str, Any]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run folder. settings: those that are not the defaults. Paths are names only."""

    name: str
    gkp_version: str
    method: str
    model: str
    baseline: str
    data: str | None
    snapshots: str | None
    seed: int
    epochs: int | None
    multi: bool
    mixed_precision: str
    settings: dict[str, Any]
    stages: dict[str, Stage]
    conversion: Conversion | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    runs: list[Run] = []
    schema_version: int = 1


class _File(msgspec.Struct, frozen=True, kw_only=True):
    path: str


class _Setting(msgspec.Struct, frozen=True, kw_only=True):
    """setting.json, as gkp.pruning.command writes it."""

    gkp_version: str
    method: str
    model: str
    baseline: _File
    data: str | None
    snapshots: str | None
    seed: int
    epochs: int | None
    multi: bool
    mixed_precision: str
    settings: dict[str, Any]
    results: dict[str, Stage]


# ---- reading ---------------------------------------------------------------------------------------------------------
def read(path: Path = RESULTS) -> Results:
    """The results in a file. FileError when it holds something else."""
    return _decoded(path, Results)


def run_of(folder: Path) -> Run:
    """A run folder and the report beside it. FileError: one of them cannot be read. UsageError: the report is of another
    network, or the folder of another method."""
    setting = _decoded(folder / "setting.json", _Setting)
    report = folder.with_name(f"{folder.name}.json")
    return Run(
        name=folder.name, gkp_version=setting.gkp_version, method=setting.method, model=setting.model,
        baseline=Path(setting.baseline.path).name, data=setting.data,
        snapshots=None if setting.snapshots is None else Path(setting.snapshots).name, seed=setting.seed,
        epochs=setting.epochs, multi=setting.multi, mixed_precision=setting.mixed_precision,
        settings=_changed(setting), stages={name: setting.results[name] for name in STAGES if name in setting.results},
        conversion=_conversion(folder, report) if report.is_file() else None,
    )


def _decoded(path: Path, kind: type[S]) -> S:
    return read_json(path, kind, limit=64 << 20, what="what this gkp writes", hint="write it again with this gkp",
                     missing=f"{path} cannot be read: it is not there", missing_hint="give a folder that gkp prune wrote")


def _changed(setting: _Setting) -> dict[str, Any]:
    """The settings that are not the method's defaults; of a path the name."""
    from gkp.pruning.methods import load_method  # the page can be written without PyTorch

    if setting.method not in [method.name for method in METHODS]:
        raise UsageError(f"{clean(setting.method)} is no method of this gkp", "run it again with this version")
    defaults = json.loads(msgspec.json.encode(load_method(setting.method).read_settings({})))
    return {name: Path(value).name if isinstance(value, str) else value
            for name, value in setting.settings.items() if value != defaults.get(name)}


def _conversion(folder: Path, report: Path) -> Conversion:
    found = _decoded(report, Manifest)
    stage = next((s for s in ("finetuned", "grouped") if _is(found.source.sha256, folder / s)), None)
    if stage is None:
        raise UsageError(f"{report} is not about {folder}/finetuned or {folder}/grouped, or they have changed since",
                         f"convert again, with --json {report}")
    if found.baseline is None or not _is(found.baseline.sha256, folder / "baseline"):
        raise UsageError(f"{report} does not compare with {folder}/baseline",
                         f"convert again, with --baseline {folder}/baseline")
    speeds = [Speed(batch=m.batch, speedup=m.speedup.vs_dense,
                    dense_ms=None if m.latency_ms.dense is None else m.latency_ms.dense.median,
                    converted_ms=None if m.latency_ms.converted is None else m.latency_ms.converted.median)
              for m in found.measurements if m.threads == found.threads]
    return Conversion(
        stage=stage, asked="cpu" if any(note.startswith("--target cpu") for note in found.notes) else found.target,
        target=found.target, precision=found.precision, threads=found.threads,
        dynamic_batch=any(isinstance(axis, str) for tensor in found.inputs for axis in tensor.shape[:1]),
        verified=None if found.verification is None else found.verification.passed,
        theoretical=found.speedup.theoretical, speeds=speeds, environment=found.environment,
    )


def _is(digest: str | None, path: Path) -> bool:
    return path.is_file() and digest == manifest.sha256(path)


# ---- writing ---------------------------------------------------------------------------------------------------------
def encode(results: Results) -> bytes:
    """Indented JSON."""
    return plain_json(msgspec.json.format(msgspec.json.encode(results), indent=2)) + b"\n"


def section(results: Results) -> str:
    """What follows, the table, what it was measured on, the commands, as Markdown. A method without a run has a row of its
    own."""
    lines = [*_conclusion(results.runs), _line(_HEADINGS), _line(["---"] * 3 + ["---:"] * 5 + ["---"] + ["---:"] * 3)]
    for method in METHODS:
        runs = [run for run in results.runs if run.method == method.name]
        nothing = [f"`{method.name}`", *[NOT_MEASURED] * (len(_HEADINGS) - 1)]
        lines += [_line(_cells(run)) for run in runs] or [_line(nothing)]
    for sentence in _conditions(results.runs):
        lines += ["", sentence]
    if results.runs:
        lines += ["", "```text", *_commands(results.runs), "```"]
    return "\n".join(lines)


def _conclusion(runs: Iterable[Run]) -> Iterator[str]:
    """A sentence and the empty line behind it; nothing where nothing was measured."""
    speedups = [speed.speedup.value for run in runs if run.conversion is not None for speed in run.conversion.speeds
                if speed.speedup is not None]
    reached = {name: [stage.accuracy for run in runs if (stage := run.stages.get(name)) and stage.accuracy is not None]
               for name in ("baseline", "finetuned")}
    told = [f"run **{times(min(speedups))} to {times(max(speedups))}** as fast as the dense one"] if speedups else []
    if reached["finetuned"]:
        dense = f" (the dense one: {max(reached['baseline']):.2%})" if reached["baseline"] else ""
        lowest, highest = min(reached["finetuned"]), max(reached["finetuned"])
        told.append(f"get {lowest:.2%} to {highest:.2%} of the test images right{dense}")
    if told:
        yield from (f"The pruned networks {' and '.join(told)}.", "")


def updated(page: str, text: str) -> str:
    """A page with what is between its two markers replaced. ValueError when a marker is missing."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page lacks {START} or {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def _cells(run: Run) -> list[str]:
    conversion = run.conversion
    asked = "as published" if run.epochs is None else str(run.epochs)
    return [
        f"`{_plain(run.method)}`", _plain(run.model), "; ".join([asked, *map(_plain, _settings(run.settings))]),
        *(_accuracy(run.stages.get(stage)) for stage in STAGES), *_costs(run),
        NOT_MEASURED if conversion is None else _plain(conversion.target),
        *(_speed(conversion, batch) for batch in BATCHES),
        NOT_MEASURED if conversion is None or conversion.theoretical is None else times(conversion.theoretical),
    ]


def _costs(run: Run) -> tuple[str, str]:
    """(MACs, parameters) of the last network, and their share of the dense one's."""
    dense, last = run.stages.get("baseline"), run.stages.get("finetuned", run.stages.get("grouped"))
    if dense is None or last is None:
        return NOT_MEASURED, NOT_MEASURED
    return (f"{last.macs / 1e6:,.2f}M ({last.macs / dense.macs:.1%})",
            f"{last.parameters:,} ({last.parameters / dense.parameters:.1%})")


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """`lr 0.02`, ...; nothing of lists that are too long to read."""
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"{name} {text if len(text) <= _LONGEST else 'given'}"


def _accuracy(stage: Stage | None) -> str:
    return NOT_MEASURED if stage is None or stage.accuracy is None else f"{stage.accuracy:.2%}"


def _speed(conversion: Conversion | None, batch: int) -> str:
    found = next((s.speedup for s in conversion.speeds if s.batch == batch), None) if conversion else None
    return NOT_MEASURED if found is None else f"**{times(found.value)}** ({interval(found).partition(' (')[2]}"


def _conditions(runs: Iterable[Run]) -> Iterator[str]:
    """A sentence for each machine and setting in which conversions were measured."""
    loads: dict[str, list[float]] = {}
    for run in runs:
        if run.conversion is not None:
            loads.setdefault(_machine(run.conversion), []).append(run.conversion.environment.get("load_average", 0.0))
    for machine, found in loads.items():
        yield f"Speed: {machine}, load average {min(found):g} to {max(found):g}; median ratios over interleaved rounds."


def _machine(conversion: Conversion) -> str:
    here, threads = conversion.environment, conversion.threads
    packages = here.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    return _plain(f"{here.get('cpu')}, {here.get('cores')} cores, {here.get('os')}, Python {here.get('python')}; "
                  f"{versions}; {threads} thread{'' if threads == 1 else 's'}, {conversion.precision}")


def _commands(runs: Iterable[Run]) -> Iterator[str]:
    """What was typed, with the names of the files only."""
    for run in runs:
        words = ["gkp", "prune", run.method, "--baseline", run.baseline]
        if run.snapshots is not None:
            words += ["--snapshots", run.snapshots]
        if run.data is not None:
            words += ["--data", "cifar10:data" if run.data.startswith("CIFAR-10") else "folder:data"]
        if run.epochs is not None:
            words += ["--epochs", str(run.epochs)]
        if run.settings:
            words += ["--settings", f"{run.name}.settings.json"]
            yield f"# {run.name}.settings.json: {clean(json.dumps(run.settings), 2000)}"
        words += ["--seed", str(run.seed)] if run.seed else []
        words += ["--multi"] if run.multi else []
        words += ["--mixed-precision", run.mixed_precision] if run.mixed_precision != "no" else []
        yield clean(shlex.join([*words, "-o", run.name]))
        if run.conversion is not None:
            yield clean(shlex.join(_convert(run.name, run.conversion)))


def _convert(name: str, made: Conversion) -> list[str]:
    words = ["gkp-convert", f"{name}/{made.stage}", "--baseline", f"{name}/baseline", "--target", made.asked,
             "--threads", str(made.threads)]
    words += ["--dynamic-batch"] if made.dynamic_batch else []
    words += ["--precision", made.precision] if made.precision != "fp32" else []
    return [*words, "--json", f"{name}.json", "-o", f"{name}.{made.asked}"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return clean(text).replace("|", "/").replace("`", "'")


def main(folders: list[str]) -> None:
    """Read the runs, where there are any, and write both files. GkpError: see run_of."""
    if folders:
        write_file(RESULTS, encode(Results(runs=[run_of(Path(folder)) for folder in folders])))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), section(read(RESULTS))), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GkpError as error:
        sys.exit(f"error: {error.message}\n  try: {error.hint}")
