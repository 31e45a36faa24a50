"""The whole GPU suite on the CPU: what it measures, in which order, and what it says of what it could not measure."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec.structs import replace as changed
from rich.cells import cell_len
from rich.console import Console

from gkp.benchmarks.gpu import suite
from gkp.benchmarks.gpu.results import CONVERTED, DENSE, FORMS, PUBLISHED, GpuBench, GpuRow
from gkp.benchmarks.gpu.suite import Settings, run_suite, run_sweep
from gkp.benchmarks.gpu.sweep import Shape, missing_gather, missing_layer
from gkp.benchmarks.gpu.tables import gpu_tables
from gkp.benchmarks.gpu.ways import WAYS, Way, artefacts
from gkp.errors import GkpError
from gkp.manifest import Ratio, Timing
from gkp.types import silent

PYTORCH = {"channels_last", "PyTorch eager"}
STAND_IN = artefacts("ORT CPU", "ort", 1.0, lambda device: None, lambda batches: {"dynamic_batch": True})


def ratio(value: float, spread: float = 0.0) -> Ratio:
    return Ratio(value=value, low=value - spread, high=value + spread)


def draw(bench: GpuBench, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, _environ={}).print(gpu_tables(bench))
    text = out.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    return text


def numbers(value: Any) -> bool:
    """Is every row either measured or explained?"""
    return (value["missing"] is None) == (value["ms"] is not None)


def test_everything_that_runs_on_a_cpu_is_measured(settings: Settings) -> None:
    """With ONNX Runtime on the CPU in the place of a GPU's engines."""
    found = run_suite(replace(settings, ways=(STAND_IN, *WAYS)), silent)
    timed = {(r.engine, r.batch, r.form) for r in found.rows if r.ms is not None}
    assert timed == {(e, b, f) for e in PYTORCH for b in (1, 2) for f in FORMS} | {
        ("ORT CPU", b, f) for b in (1, 2) for f in (DENSE, CONVERTED)}
    for row in found.rows:
        if row.ms is not None:
            assert row.vs_dense is not None
            assert row.ms.q1 <= row.ms.median <= row.ms.q3
            assert row.artefact == ("ort" if row.form == CONVERTED else None)
    assert all(r.vs_dense == ratio(1.0) for r in found.rows if r.form == DENSE and r.ms)
    assert {(p.kernel, p.groups) for p in found.points if p.ratio} == {(3, 2), (3, 4), (1, 2)}
    assert found.gather_gbs == found.gathers[0].gbs is not None
    assert list(found.forms) == ["small, ort fp32"]
    assert found.forms["small, ort fp32"]["stage_1.0.conv_a"]
    assert found.seconds is not None
    assert 0 < found.seconds < 300


def test_engines_of_a_gpu_are_explained_and_null(settings: Settings) -> None:
    found = run_suite(settings, silent)
    absent = [r for r in found.rows if r.engine not in PYTORCH]
    assert {r.engine for r in absent} == {way.name for way in WAYS} - PYTORCH == {"TensorRT", "ORT CUDA", "torch.compile"}
    assert {r.missing for r in absent} == {"needs an NVIDIA GPU"}
    assert all(r.ms is r.vs_dense is r.artefact is None for r in absent)
    assert len(absent) == 2 * (2 + 2 + 3)
    lonely = [r for r in found.rows if r.engine in PYTORCH and r.form == CONVERTED]
    assert {r.missing for r in lonely} == {"there is no artefact to compare with"}
    assert all(r.ms for r in found.rows if r.engine in PYTORCH and r.form != CONVERTED)


def test_the_json_has_the_environment_and_null_for_what_is_not_known(settings: Settings) -> None:
    read = json.loads(run_suite(settings, silent).json())
    assert read["schema_version"] == 2
    assert read["gather_gbs"] > 0
    assert torch.__version__.startswith(read["environment"]["packages"]["torch"].partition("+")[0])
    assert {read["environment"][k] for k in ("gpu", "capability", "driver", "cudnn")} == {None}
    assert "random" in read["weights"]
    assert all(numbers(entry) for part in ("rows", "points", "gathers") for entry in read[part])


def test_without_time_everything_is_null_with_the_reason(settings: Settings) -> None:
    found = run_suite(replace(settings, budget_s=0.0), silent)
    everything: list[Any] = [*found.rows, *found.points, *found.gathers]
    assert len(everything) == 2 * (2 * 2 + 3 * 3) + 3 + 1
    assert all(e.ms is None and e.missing for e in everything)
    assert {e.missing for e in (*found.points, *found.gathers)} == {"no time left of the 0 s"}
    assert found.gather_gbs is None
    assert "convolutions, Gather: no time left of the 0 s" in " ".join(draw(found).split())


def test_the_most_important_comes_first(settings: Settings) -> None:
    said: list[str] = []
    run_suite(settings, lambda text, share: said.append(text))
    assert said == ["3x3, 16 channels, batch 2, fp32", "Gather, 16 channels, fp32", "channels_last, batch 1, fp32",
                    "PyTorch eager, batch 1, fp32", "channels_last, batch 2, fp32", "PyTorch eager, batch 2, fp32",
                    "1x1, 8 channels, batch 2, fp32"]


def test_a_conversion_is_a_job_of_its_own(settings: Settings) -> None:
    said: list[str] = []
    run_suite(replace(settings, ways=(STAND_IN,)), lambda text, share: said.append(text))
    assert said[2:-1] == ["converting for ORT CPU, fp32", "ORT CPU, batch 1, fp32", "ORT CPU, batch 2, fp32"]


def test_without_time_for_a_conversion_only_its_networks_are_missing(settings: Settings) -> None:
    long = artefacts("ORT CPU", "ort", 1e6, lambda device: None, lambda batches: {"dynamic_batch": True})
    found = run_suite(replace(settings, ways=(long, *WAYS)), silent)
    assert {r.missing for r in found.rows if r.engine == "ORT CPU"} == {"no time left of the 300 s"}
    assert all(r.ms for r in found.rows if r.engine in PYTORCH and r.form != CONVERTED)
    assert found.forms == {}


def test_a_run_that_is_cut_off_has_handed_over_what_it_had(settings: Settings) -> None:
    kept: list[int] = []

    def keep(bench: GpuBench) -> None:
        kept.append(len(json.loads(bench.json())["rows"]))
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(settings, silent, keep)
    assert len(kept) == 3
    assert kept[0] < kept[2]


def test_an_engine_that_fails_is_a_reason_and_the_others_go_on(settings: Settings) -> None:
    closed: list[str] = []

    def break_at_run(networks: Any, form: str, x: Any, stack: Any) -> Any:
        def call() -> None:
            raise RuntimeError("no kernel\nfor this \x1b[31mshape")

        stack.callback(closed.append, "closed")
        return call

    def break_later(networks: Any, form: str, x: Any, stack: Any) -> Any:
        calls = iter(range(3))
        stack.callback(closed.append, "closed")
        return lambda: next(calls)

    def out_of_memory(networks: Any, form: str, x: Any, stack: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate a lot")

    made = [Way(name, 0.1, start, lambda device: None) for name, start in (
        ("A", break_at_run), ("B", out_of_memory), ("C", break_later))]
    found = run_suite(replace(settings, ways=(*made, STAND_IN), batches=(1,)), silent)
    assert {(r.engine, r.missing) for r in found.rows} == {
        ("A", "no kernel for this ?[31mshape"), ("B", "out of GPU memory"), ("C", "StopIteration"), ("ORT CPU", None)}
    assert closed == ["closed"] * 6


def test_a_form_that_fails_leaves_the_others(settings: Settings) -> None:
    def only_dense(networks: Any, form: str, x: Any, stack: Any) -> Any:
        if form != DENSE:
            raise GkpError("not this one")
        return lambda: None

    way = Way("A", 0.1, only_dense, lambda device: None)
    found = run_suite(replace(settings, ways=(way,), batches=(1,)), silent)
    assert {r.form: r.missing for r in found.rows} == {DENSE: None, PUBLISHED: "not this one", CONVERTED: "not this one"}


def test_a_layer_that_cannot_be_measured_is_a_reason(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("cuDNN says no")

    monkeypatch.setattr(suite.sweep, "measure_layer", refuse)  # type: ignore[attr-defined]
    monkeypatch.setattr(suite.sweep, "measure_gather", refuse)  # type: ignore[attr-defined]
    found = run_sweep(settings, silent)
    assert {p.missing for p in (*found.points, *found.gathers)} == {"cuDNN says no"}
    assert len(found.points) == 3


def test_the_sweep_alone_measures_no_network(settings: Settings) -> None:
    found = run_sweep(settings, silent)
    assert found.rows == []
    assert all(p.ratio for p in found.points)
    assert len(found.points) == 3


# ---- the tables -----------------------------------------------------------------------------------------------------
def made_up() -> GpuBench:
    """A complete outcome with long names and every kind of number."""
    time, slower, faster = Timing(median=1234.5, q1=1.0, q3=2.0, runs=9), ratio(0.41, 0.01), ratio(10.41, 0.01)
    name = "ResNet-50 block-diagonal 3x3, 8 groups, with a name that goes on and on and on and on"
    bench = GpuBench(environment={"gpu": "NVIDIA RTX 6000 Ada Generation", "capability": "8.9", "driver": "580.159.03", "cuda": "13.0",
                      "packages": {"torch": "2.11.0+cu130"}}, budget_s=440.0)
    for engine in (way.name for way in WAYS):
        for batch in (1, 256):
            for form, found in zip(FORMS, (ratio(1.0), slower, faster), strict=True):
                bench.rows.append(GpuRow(model=name, form=form, engine=engine, batch=batch, precision="fp16", ms=time, vs_dense=found))
    bench.rows += [GpuRow(model=name, form=form, engine="ORT CUDA", batch=32, precision="fp32",
                          missing="this ONNX Runtime has no CUDA provider") for form in FORMS]
    for point in missing_layer(Shape(512, 7, stride=2, batch=256), "fp16", "TensorRT", ""):
        bench.points.append(changed(point, missing=None, dense_ms=0.123, ms=0.05,
                                    ratio=Ratio(value=point.groups * 0.9, low=1.1, high=60)))
    bench.points += missing_layer(Shape(512, 7, batch=256), "fp32", "TensorRT", "no time left of the 440 s")[:1]
    bench.gathers.append(changed(missing_gather(Shape(64, 56), "fp16", "")[0], missing=None, ms=0.1, gbs=1234.5))
    return bench


def test_the_tables_fit_and_say_everything() -> None:
    text = draw(made_up())
    lines = text.splitlines()
    assert lines[0].startswith("NVIDIA RTX 6000 Ada Generation, capability 8.9, driver 580.159.03, CUDA 13.0")
    (row,) = (line for line in lines if line.startswith("torch.compile") and " 256 " in line)
    assert row.split() == ["torch.compile", "256", "fp16", "1,234", "0.41x", "10.41x", "(10.40", "to", "10.42)"]
    (row,) = (line for line in lines if line.startswith("512 x 7, 3x3/2"))
    assert row.split()[4:] == ["256", "fp16", "0.123", "1.80", "3.60", "7.20", "14.40", "28.80", "57.60"]
    flat = " ".join(text.split())
    assert "channel Gather, GB/s: 1,234 (64 x 56, fp16)" in flat
    assert flat.count("not measured: ") == 2
    assert "not measured: ORT CUDA: this ONNX Runtime has no CUDA provider" in flat
    assert "not measured: convolutions: no time left of the 440 s" in flat


def test_a_hostile_name_cannot_style_the_terminal() -> None:
    bench = made_up()
    bench.environment["gpu"] = "[red]x[/red]\x1b[31m"
    assert "\x1b" not in draw(bench)
    assert "[red]x[/red]" in draw(bench)


def test_a_measured_outcome_is_drawn_too(settings: Settings) -> None:
    text = draw(run_suite(settings, silent))
    assert "small" in text
    assert "not measured: " in text
