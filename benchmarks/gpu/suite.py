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

import numpy as np
import torch
from msgspec.structs import replace

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

    # ---- layers -------------------------------------------------------------------------------------------------
    def layer_jobs(self, shapes: Sequence[Shape]) -> list[Job]:
        return [Job(f"{s.kernel}x{s.kernel}, {s.channels} channels, batch {s.batch}, {precision}",
                    f"layer {s.batch}", 4.0, partial(self._layer, s, precision),
                    partial(self._no_layer, s, precision))
                for precision in self._settings.precisions for s in shapes]

    def _layer(self, shape: Shape, precision: str) -> None:
        try:
            self._bench.points += sweep.measure_layer(shape, precision, self._settings.device, self._layer_engine,
                                                      self._settings.seconds)
        except Exception as e:  # of PyTorch, cuDNN, TensorRT: memory, shapes they do not take
            self._no_layer(shape, precision, why(e))
        self._tidy()

    def _no_layer(self, shape: Shape, precision: str, reason: str) -> None:
        self._bench.points += sweep.missing_layer(shape, precision, self._layer_engine, reason)

    def gather_jobs(self) -> list[Job]:
        return [Job(f"Gather, {s.channels} channels, {precision}", "gather", 2.0, partial(self._gather, s, precision),
                    partial(self._no_gather, s, precision))
                for precision in self._settings.precisions for s in self._settings.gathers]

    def _gather(self, shape: Shape, precision: str) -> None:
        try:
            self._bench.gathers.append(sweep.measure_gather(shape, precision, self._settings.device, self._settings.seconds))
        except Exception as e:
            self._no_gather(shape, precision, why(e))
        self._tidy()

    def _no_gather(self, shape: Shape, precision: str, reason: str) -> None:
        self._bench.gathers.append(sweep.missing_gather(shape, precision, reason))

    # ---- networks -----------------------------------------------------------------------------------------------
    def network_jobs(self, ways: Sequence[Way], runs: Sequence[tuple[str, int]]) -> list[Job]:
        """runs: (precision, batch). What cannot be had here is noted at once."""
        jobs = []
        absent = {way.name: way.missing(self._settings.device) for way in ways}
        for precision, batch in runs:
            for case in self._settings.cases:
                for way in ways:
                    of = (case, way, precision, batch)
                    if (reason := absent[way.name]) is not None:
                        self._no_network(*of, reason)
                        continue
                    alike = f"{case.name} {way.name}" + ("" if way is COMPILED else f" {batch}")
                    jobs.append(Job(f"{way.name}, batch {batch}, {precision}", alike, way.seconds,
                                    partial(self._network, *of), partial(self._no_network, *of)))
        return jobs

    def _network(self, case: Case, way: Way, precision: str, batch: int) -> None:
        """The forms of a network in one way, turn by turn; a form that fails leaves the others."""
        networks = self._made(case, precision)
        shape = (batch, *(case.input_shape or ())[1:])
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        calls: dict[str, Call] = {}
        failed: dict[str, str] = {}
        samples: dict[str, list[float]] = {}
        with ExitStack() as stack:
            for form in way.forms:
                try:
                    call = way.open(networks, form, x, stack)
                    call()
                    calls[form] = call
                except Exception as e:  # whatever an engine raises
                    failed[form] = why(e)
            try:
                samples = interleave(calls, budget_s=self._settings.seconds, sample_ms=2.0)
            except Exception as e:
                failed.update(dict.fromkeys(calls, why(e)))
            calls.clear()
        for form in way.forms:
            row = GpuRow(model=case.name, form=form, engine=way.name, batch=batch, precision=precision)
            self._bench.rows.append(replace(row, missing=failed[form]) if form in failed else replace(
                row, ms=timing(samples[form]), vs_dense=ratio(samples[DENSE], samples[form]) if DENSE in samples else None,
                artefact=(way.target or networks.converted()) if form == CONVERTED else None))
        self._tidy()

    def _no_network(self, case: Case, way: Way, precision: str, batch: int, reason: str) -> None:
        self._bench.rows += [GpuRow(model=case.name, form=form, engine=way.name, batch=batch, precision=precision,
                                    missing=reason) for form in way.forms]

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
