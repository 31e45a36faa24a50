"""`gkp bench --calibrate trt`: from points to the user's cost table."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from gkp.benchmarks.gpu import sweep
from gkp.benchmarks.gpu.calibrate import entry_of, write_table
from gkp.benchmarks.gpu.results import GpuBench
from gkp.benchmarks.gpu.suite import Settings, run_sweep
from gkp.benchmarks.gpu.sweep import CUDNN, TENSORRT, Shape
from gkp.converter.trt.costs import Costs
from gkp.errors import GkpError
from gkp.manifest import Ratio


def measured(engine: str = CUDNN) -> GpuBench:
    """256 channels in 8 groups, 4.2 times dense; two Gathers; one layer without a time."""
    bench = GpuBench(environment={"gpu": "a GPU", "capability": "9.0"}, budget_s=240.0)
    shape = Shape(256, 14)
    bench.points = [point for point in (
        *sweep.missing_layer(shape, "fp16", engine, "no time left"), *sweep.missing_layer(shape, "fp32", engine, "no time left"))
        if point.groups == 8]
    bench.points[0] = replace(bench.points[0], missing=None, dense_ms=0.42, ms=0.1, ratio=Ratio(value=4.20001, low=4.1, high=4.3))
    bench.gathers = [replace(sweep.missing_gather(shape, "fp16", "")[0], missing=None, ms=0.1, gbs=gbs) for gbs in (800.0, 500.0)]
    return bench


def test_the_table_that_is_written_is_the_one_that_is_chosen_by(tmp_path: Path) -> None:
    path = write_table(measured(), (9, 0), tmp_path / "costs.json")
    table = Costs.load(path).table([(9, 0)])
    assert table.measured
    assert "a GPU: PyTorch cuDNN" in table.source
    assert table.speedup("fp16", 3, 1, 32, 32, 8, 14, 32) == 4.2
    (entry,) = table.entries
    assert (entry.gather_gbs, entry.environment, len(entry.points)) == (500.0, {"gpu": "a GPU", "capability": "9.0"}, 1)
    assert entry.points[0].dense_ms == 0.42
    assert not Costs.load(path).table([(8, 9)]).measured


def test_only_tensorrts_own_kernels_need_no_margin() -> None:
    assert entry_of(measured(TENSORRT)).margin == 1.0
    assert entry_of(measured(CUDNN)).margin == 1.1


def test_without_a_gather_none_is_ever_emitted(tmp_path: Path) -> None:
    bench = measured()
    bench.gathers = sweep.missing_gather(Shape(256, 14), "fp16", "no time left")
    assert entry_of(bench).gather_gbs is None


def test_a_run_that_measured_nothing_writes_nothing(tmp_path: Path) -> None:
    bench = measured()
    bench.points = bench.points[1:]
    with pytest.raises(GkpError, match="nothing was measured: no time left"):
        write_table(bench, (9, 0), tmp_path / "costs.json")
    assert not list(tmp_path.iterdir())


def test_a_table_can_be_made_from_a_json_of_the_suite(settings: Settings) -> None:
    found = run_sweep(settings, lambda text, share: None)
    read = msgspec.json.decode(found.json(), type=GpuBench)
    assert entry_of(read) == entry_of(found)
    assert {(p.kernel, p.groups) for p in entry_of(read).points} == {(3, 2), (3, 4), (1, 2)}
