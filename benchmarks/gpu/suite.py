"""The GPU suite: what is measured, in which order, within a hard time budget. Runs on "cuda"; on "cpu" for the tests."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from gkp.benchmarks.cases import Case, gpu_cases
from gkp.benchmarks.gpu import sweep
from gkp.benchmarks.gpu.device import environment
from gkp.benchmarks.gpu.plan import Job, run_plan
from gkp.benchmarks.gpu.results import CONVERTED, DENSE, GpuBench, GpuRow
from gkp.benchmarks.gpu.sweep import Shape
from gkp.benchmarks.gpu.ways import COMPILED, WAYS, Call, Networks, Way
from gkp.runtime.measure import interleave, ratio, timing
from gkp.text import one_line
from gkp.types import Progress

BUDGET_S = 440.0
"""Ends below 8 minutes, the last job included."""
CALIBRATION_S = 240.0
Keep = Callable[[GpuBench], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What to measure, in the order of importance. main: the shapes that matter most. seconds: measuring time
    of a job, its preparation apart."""

    device: str = "cuda"
    budget_s: float = BUDGET_S
    seconds: float = 0.6
    cases: tuple[Case, ...] = gpu_cases()
    ways: tuple[Way, ...] = WAYS
    batches: tuple[int, ...] = (32, 1, 256)
    precisions: tuple[str, ...] = ("fp16", "fp32")
    main: tuple[Shape, ...] = sweep.MAIN
    rest: tuple[Shape, ...] = sweep.REST
    gathers: tuple[Shape, ...] = sweep.GATHERS


def run_suite(settings: Settings, report: Progress, keep: Keep = lambda bench: None) -> GpuBench:
    """The main shapes of the sweep, every network in every way but torch.compile, torch.compile at the first batch and
    precision, the rest of the sweep, the rest of torch.compile. keep is called with what there is after every job."""
    quick = [way for way in settings.ways if way is not COMPILED]
    slow = [way for way in settings.ways if way is COMPILED]
    first, *others = [(p, b) for p in settings.precisions for b in settings.batches]

    def jobs(suite: _Suite) -> list[Job]:
        return [*suite.layer_jobs(settings.main), *suite.gather_jobs(), *suite.network_jobs(quick, [first, *others]),
                *suite.network_jobs(slow, [first]), *suite.layer_jobs(settings.rest), *suite.network_jobs(slow, others)]

    return _run(settings, jobs, report, keep)


def run_sweep(settings: Settings, report: Progress) -> GpuBench:
    """The sweep alone: what the cost table of --target trt is made of."""
    return _run(settings, lambda suite: [*suite.layer_jobs(settings.main), *suite.gather_jobs(),
                                         *suite.layer_jobs(settings.rest)], report)


def _run(settings: Settings, jobs: Callable[[_Suite], list[Job]], report: Progress,
         keep: Keep = lambda bench: None) -> GpuBench:
    started = time.monotonic()
    bench = GpuBench(environment=environment(settings.device), budget_s=settings.budget_s)
    with _measuring(settings.device), tempfile.TemporaryDirectory(prefix="gkp-gpu-") as folder:
        run_plan(jobs(_Suite(settings, bench, Path(folder), keep)), settings.budget_s, report, started)
    bench.seconds = round(time.monotonic() - started, 1)
    return bench


@contextlib.contextmanager
def _measuring(device: str) -> Iterator[None]:
    """No gradients; on a GPU a stream of our own (TensorRT synchronises on the default one), and the fastest of cuDNN's
    kernels instead of the one that its heuristics name, which can be 8 times slower on grouped shapes
    (pytorch/pytorch#146096)."""
    with torch.no_grad():
        if device != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream()), torch.backends.cudnn.flags(
                enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            _wake()
            yield


def _wake(seconds: float = 1.0) -> None:
    """An idle GPU has low clocks."""
    x = torch.randn(2048, 2048, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(x, x)
        torch.cuda.synchronize()


class _Suite:
    """The jobs of a run; what they find goes into `bench`."""

    def __init__(self, settings: Settings, bench: GpuBench, folder: Path, keep: Keep) -> None:
        self._settings, self._bench, self._folder, self._keep = settings, bench, folder, keep
        self._layer_engine = sweep.layer_engine(settings.device)
        self._networks: dict[tuple[str, str], Networks] = {}

    def _job(self, name: str, kind: str, seconds: float, into: list[T], measure: Callable[[], list[T]],
             missing: Callable[[str], list[T]]) -> Job:
        """What `measure` finds goes into a list, or else what `missing` makes of the reason."""
        def run() -> None:
            try:
                into.extend(measure())
            except Exception as e:  # of PyTorch, cuDNN, TensorRT: memory, shapes they do not take
                skip(why(e))
            self._tidy()

        def skip(reason: str) -> None:
            into.extend(missing(reason))

        return Job(name, kind, seconds, run, skip)

    def layer_jobs(self, shapes: Sequence[Shape]) -> list[Job]:
        engine, device, seconds = self._layer_engine, self._settings.device, self._settings.seconds
        return [self._job(f"{s.kernel}x{s.kernel}, {s.channels} channels, batch {s.batch}, {precision}", f"layer {s.batch}",
                          4.0, self._bench.points, partial(sweep.measure_layer, s, precision, device, engine, seconds),
                          partial(sweep.missing_layer, s, precision, engine))
                for precision in self._settings.precisions for s in shapes]

    def gather_jobs(self) -> list[Job]:
        device, seconds = self._settings.device, self._settings.seconds
        return [self._job(f"Gather, {s.channels} channels, {precision}", "gather", 2.0, self._bench.gathers,
                          partial(sweep.measure_gather, s, precision, device, seconds),
                          partial(sweep.missing_gather, s, precision))
                for precision in self._settings.precisions for s in self._settings.gathers]

    def network_jobs(self, ways: Sequence[Way], runs: Sequence[tuple[str, int]]) -> list[Job]:
        """runs: (precision, batch). What cannot be had here is noted at once."""
        jobs = []
        absent = {way.name: way.missing(self._settings.device) for way in ways}
        for precision, batch in runs:
            for case in self._settings.cases:
                for way in ways:
                    missing = partial(self._no_network, case, way, precision, batch)
                    if (reason := absent[way.name]) is not None:
                        self._bench.rows += missing(reason)
                        continue
                    if way.convert and way.target and batch == self._settings.batches[0]:
                        # Without time for it, its networks are missing at every batch.
                        networks = self._made(case, precision)
                        jobs.append(Job(f"converting for {way.name}, {precision}", f"{case.name} {way.name} conversion",
                                        way.convert_s, partial(way.convert, networks), partial(networks.leave, way.target)))
                    alike = f"{case.name} {way.name}" + ("" if way is COMPILED else f" {batch}")
                    jobs.append(self._job(f"{way.name}, batch {batch}, {precision}", alike, way.seconds, self._bench.rows,
                                          partial(self._network, case, way, precision, batch), missing))
        return jobs

    def _network(self, case: Case, way: Way, precision: str, batch: int) -> list[GpuRow]:
        """The forms of a network in one way, turn by turn; a form that fails leaves the others."""
        networks = self._made(case, precision)
        x = np.random.default_rng(0).standard_normal((batch, *(case.input_shape or ())[1:]), np.float32)
        calls: dict[str, Call] = {}
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            for form in way.forms:
                try:
                    call = way.open(networks, form, x, stack)
                    call()
                    calls[form] = call
                except Exception as e:  # whatever an engine raises
                    failed[form] = why(e)
            samples = interleave(calls, budget_s=self._settings.seconds, sample_ms=2.0)
            calls.clear()
        dense = samples.get(DENSE)
        row = partial(GpuRow, model=case.name, engine=way.name, batch=batch, precision=precision)
        return [row(form=form, missing=failed[form]) if form in failed else row(
            form=form, ms=timing(samples[form]), vs_dense=ratio(dense, samples[form]) if dense else None,
            artefact=(way.target or networks.converted()) if form == CONVERTED else None) for form in way.forms]

    def _no_network(self, case: Case, way: Way, precision: str, batch: int, reason: str) -> list[GpuRow]:
        return [GpuRow(model=case.name, form=form, engine=way.name, batch=batch, precision=precision, missing=reason)
                for form in way.forms]

    def _made(self, case: Case, precision: str) -> Networks:
        key = (case.name, precision)
        if key not in self._networks:
            folder = self._folder / str(len(self._networks))
            folder.mkdir()
            self._networks[key] = Networks(case, precision, self._settings.device, self._settings.batches, folder)
        return self._networks[key]

    def _tidy(self) -> None:
        """Give memory back, and hand on what there is."""
        for (case, precision), networks in self._networks.items():
            self._bench.forms.update({f"{case}, {target} {precision}": {layer.name: layer.chosen for layer in found.layers}
                                      for (form, target), found in networks.manifests.items() if form == CONVERTED})
        if self._settings.device == "cuda":
            torch.cuda.empty_cache()
        self._keep(self._bench)


def why(error: BaseException) -> str:
    """An engine's error in one printable line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory"
    return one_line(error, 200) or type(error).__name__
