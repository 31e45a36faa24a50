"""The GPU suite: what is measured, in which order, within a hard time budget. Runs on "cuda"; on "cpu" for the tests."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gkp.benchmarks.gpu import sweep
from gkp.benchmarks.gpu.device import environment
from gkp.benchmarks.gpu.engines import COMPILED, ENGINES, Engine
from gkp.benchmarks.gpu.networks import CASES, Case, Forms, make_forms
from gkp.benchmarks.gpu.plan import Job, Report, run_plan
from gkp.benchmarks.gpu.results import DENSE, FORMS, GpuBench, Row, speedup, times
from gkp.benchmarks.gpu.sweep import Shape
from gkp.benchmarks.gpu.timer import DTYPES, clock_for, interleave, random_input

BUDGET_S = 440.0
"""Ends below 8 minutes, the last job included."""
CALIBRATION_S = 240.0
Keep = Callable[[GpuBench], None]


@dataclass(frozen=True)
class Settings:
    """What to measure, in the order of importance. main: the shapes that the rewriting is chosen by. seconds: measuring time
    of a job, its preparation apart."""

    device: str = "cuda"
    budget_s: float = BUDGET_S
    seconds: float = 0.6
    cases: tuple[Case, ...] = CASES
    engines: tuple[Engine, ...] = ENGINES
    batches: tuple[int, ...] = (32, 1, 256)
    precisions: tuple[str, ...] = ("fp16", "fp32")
    main: tuple[Shape, ...] = sweep.MAIN
    rest: tuple[Shape, ...] = sweep.REST
    gathers: tuple[Shape, ...] = sweep.GATHERS


def run_suite(settings: Settings, report: Report, keep: Keep = lambda bench: None) -> GpuBench:
    """The main shapes of the sweep, every network on every engine but torch.compile, torch.compile at the first batch and
    precision, the rest of the sweep, the rest of torch.compile. keep is called with what there is after every job."""
    started = time.monotonic()
    bench = GpuBench(environment(settings.device), settings.budget_s)
    suite = _Suite(settings, bench, keep)
    quick = [e for e in settings.engines if e is not COMPILED]
    slow = [e for e in settings.engines if e is COMPILED]
    first, *others = [(p, b) for p in settings.precisions for b in settings.batches]
    with _measuring(settings.device):
        jobs = [*suite.layer_jobs(settings.main), *suite.gather_jobs(), *suite.network_jobs(quick, [first, *others]),
                *suite.network_jobs(slow, [first]), *suite.layer_jobs(settings.rest), *suite.network_jobs(slow, others)]
        run_plan(jobs, settings.budget_s, report, started)
    bench.seconds = round(time.monotonic() - started, 1)
    return bench


def run_sweep(settings: Settings, report: Report) -> GpuBench:
    """The sweep alone: what the cost table of --target trt is made of."""
    started = time.monotonic()
    bench = GpuBench(environment(settings.device), settings.budget_s)
    suite = _Suite(settings, bench)
    with _measuring(settings.device):
        jobs = [*suite.layer_jobs(settings.main), *suite.gather_jobs(), *suite.layer_jobs(settings.rest)]
        run_plan(jobs, settings.budget_s, report, started)
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

    def __init__(self, settings: Settings, bench: GpuBench, keep: Keep = lambda bench: None) -> None:
        self._settings, self._bench, self._keep = settings, bench, keep
        self._layer_engine = sweep.layer_engine(settings.device)
        self._forms: dict[tuple[str, str], Forms] = {}

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
    def network_jobs(self, engines: Sequence[Engine], runs: Sequence[tuple[str, int]]) -> list[Job]:
        """runs: (precision, batch). What an engine cannot run here is noted at once."""
        jobs = []
        absent = {engine.name: engine.missing(self._settings.device) for engine in engines}
        for precision, batch in runs:
            for case in self._settings.cases:
                for engine in engines:
                    of = (case, engine, precision, batch)
                    if (reason := absent[engine.name]) is not None:
                        self._no_network(*of, reason)
                        continue
                    alike = f"{case.name} {engine.name}" + ("" if engine is COMPILED else f" {batch}")
                    jobs.append(Job(f"{engine.name}, batch {batch}, {precision}", alike, engine.seconds,
                                    partial(self._network, *of), partial(self._no_network, *of)))
        return jobs

    def _network(self, case: Case, engine: Engine, precision: str, batch: int) -> None:
        """The three forms of a network on one engine, turn by turn."""
        device, running = self._settings.device, {}
        try:
            networks = self._made(case, precision).networks
            x = random_input((batch, *case.shape), precision, device)
            try:
                for form in FORMS:
                    network = copy.deepcopy(networks[form]).to(device, DTYPES[precision])
                    running[form] = engine.start(network, x)
                samples = interleave(device, running, self._settings.seconds)
            finally:
                for call in running.values():
                    call.close()
        except Exception as e:  # whatever an engine raises
            self._no_network(case, engine, precision, batch, why(e))
        else:
            for form in FORMS:
                self._bench.rows.append(Row(case.name, form, engine.name, batch, precision, times(samples[form]),
                                            speedup(samples[DENSE], samples[form]), clock_for(device, running[form])))
        running.clear()
        self._tidy()

    def _no_network(self, case: Case, engine: Engine, precision: str, batch: int, reason: str) -> None:
        self._bench.rows += [Row(case.name, form, engine.name, batch, precision, missing=reason) for form in FORMS]

    def _made(self, case: Case, precision: str) -> Forms:
        """Rewritten by what the sweep has found by now."""
        key = (case.name, precision)
        if key not in self._forms:
            self._forms[key] = made = make_forms(case, sweep.best_groups(self._bench.points, precision))
            self._bench.forms[f"{case.name}, {precision}"] = made.groups
        return self._forms[key]

    def _tidy(self) -> None:
        """Give memory back, and hand on what there is."""
        if self._settings.device == "cuda":
            torch.cuda.empty_cache()
        self._keep(self._bench)


def why(error: BaseException) -> str:
    """An engine's error in one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of GPU memory"
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
