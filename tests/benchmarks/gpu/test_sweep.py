"""The shape sweep: measured for real on the CPU, and the choice that follows from points."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from gkp.benchmarks.cases import gpu_cases
from gkp.benchmarks.gpu import engines, sweep
from gkp.benchmarks.gpu.sweep import CUDNN, Shape
from gkp.benchmarks.gpu.timer import random_input
from gkp.manifest import Ratio
from gkp.pruning.models.branched import BranchedConv2d


# ---- measuring ------------------------------------------------------------------------------------------------------
def test_a_layer_is_measured_dense_and_with_every_number_of_groups() -> None:
    points = sweep.measure_layer(Shape(32, 8, batch=2), "fp32", "cpu", CUDNN, 0.02)
    assert [p.groups for p in points] == [2, 4, 8]
    assert {p.dense_ms for p in points} == {points[0].dense_ms}
    for p in points:
        assert p.ms is not None
        assert p.dense_ms is not None
        assert p.ratio is not None
        assert 0 < p.ratio.low <= p.ratio.value <= p.ratio.high
        assert (p.precision, p.kernel, p.stride, p.channels, p.plane, p.batch) == ("fp32", 3, 1, 32, 8, 2)


def test_of_two_memory_formats_the_faster_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"1 NCHW": 2.0, "1 NHWC": 1.0, "2 NCHW": 0.4, "2 NHWC": 0.8, "4 NCHW": 5.0, "4 NHWC": 0.25}

    def fixed(device: str, calls: dict[str, object], seconds: float) -> dict[str, list[float]]:
        assert set(calls) == set(ms)
        return {name: [ms[name]] * 7 for name in calls}

    monkeypatch.setattr(sweep, "interleave", fixed)
    points = sweep.measure_layer(Shape(16, 4, batch=1), "fp32", "cpu", CUDNN, 0.0)
    assert [(p.groups, p.dense_ms, p.ms, p.ratio) for p in points] == [
        (2, 1.0, 0.4, Ratio(value=2.5, low=2.5, high=2.5)), (4, 1.0, 0.25, Ratio(value=4.0, low=4.0, high=4.0))]


def test_a_gather_counts_what_it_reads_and_writes() -> None:
    (found,) = sweep.measure_gather(Shape(16, 8, batch=2), "fp32", "cpu", 0.02)
    assert found.gathered == 8 * 9
    assert found.ms is not None
    assert found.gbs == pytest.approx(2 * 72 * 2 * 64 * 4 / found.ms / 1e6)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shape_is_named_by_its_output(stride: int) -> None:
    shape = Shape(16, 7, stride=stride, batch=3)
    with torch.no_grad():
        for running in sweep._torch_calls(shape, 2, "fp32", "cpu").values():
            assert running.call().shape == (3, 16, 7, 7)  # type: ignore[attr-defined]


def test_the_activations_of_a_chain_neither_die_nor_explode() -> None:
    for groups in (1, 8):
        chain = nn.Sequential(*(sweep._convolution(Shape(64, 14), groups) for _ in range(10)))
        with torch.no_grad():
            assert 0.01 < float(chain(random_input((2, 64, 14, 14), "fp32", "cpu")).std()) < 10


def test_groups_keep_four_channels() -> None:
    assert Shape(16, 32).groups == (2, 4)
    assert Shape(512, 7).groups == (2, 4, 8, 16, 32, 64)


def test_the_main_shapes_are_the_branched_layers_of_the_first_network() -> None:
    case = gpu_cases()[0]
    network, seen = case.source(), set()
    for module in network.modules():
        if isinstance(module, BranchedConv2d):
            module.register_forward_hook(lambda m, x, y: seen.add((m.out_channels, y.shape[-1], m.strides[0])))
    with torch.no_grad():
        network(torch.zeros(case.input_shape))
    assert seen == {(s.channels, s.plane, s.stride) for s in sweep.MAIN}
    assert {s.batch for s in sweep.MAIN} == {sweep.BATCH}


def test_every_shape_of_the_sweep_is_a_point_that_the_cost_table_takes() -> None:
    shapes = [*sweep.MAIN, *sweep.REST]
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert shape.groups
        assert all(shape.channels % g == 0 and shape.channels // g >= 4 for g in shape.groups)


def test_without_a_gpu_the_kernels_would_be_those_of_cudnn() -> None:
    assert sweep.layer_engine("cpu") == CUDNN


@pytest.mark.parametrize("groups", [1, 4])
def test_tensorrt_builds_the_chains_of_the_sweep(groups: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    from gkp.converter.trt.backend import find_backend
    from gkp.converter.trt.build import build_engines
    from gkp.options.trt import TrtOptions

    chain = nn.Sequential(*(sweep._convolution(Shape(32, 8), groups) for _ in range(10)))
    with torch.no_grad():
        data = engines.to_onnx(chain, random_input((2, 32, 8, 8), "fp32", "cpu"))
    options = TrtOptions(compute_capability=((8, 9),), channels_last=True)
    (built,) = build_engines(onnx.load_from_string(data), options, find_backend("tensorrt_rtx"))
    assert [layer.groups for layer in built.info.layers if layer.kind == "CONVOLUTION"] == [groups] * 10
    assert [t.name for t in (*built.info.inputs, *built.info.outputs)] == ["x", "y"]
