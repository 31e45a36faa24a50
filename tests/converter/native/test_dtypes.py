"""A type goes with a value from the tensor to the C interface: seen with one that no kernel computes with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from native_kit import native_run, two_step_plan
from onnx import TensorProto
from onnx_kit import Net, run_ort

from gkp.converter.graph import Graph
from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.dtypes import DTYPES, FLOAT32, UINT8, DType
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.layout import channels_last, planar
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Copy, Dequantise, Grid, Port, Program, Quantise, Value
from gkp.converter.native.reading.frontend import program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.native.reading.parts import parts
from gkp.errors import UnsupportedModelError, UsageError
from gkp.runtime.native import _DTYPES

CPU = CPUS["x86-64-v3"]
INT8 = DType("int8", "signed char", 1)


def test_what_the_compiler_writes_the_runtime_reads() -> None:
    assert {t.name: t.numpy for t in DTYPES} == {name: np.dtype(kind) for name, kind in _DTYPES.items()}
    assert all(t.numpy.itemsize == t.bytes for t in DTYPES)


@pytest.mark.parametrize("layout", [planar, channels_last])
def test_buffers_are_as_large_as_their_elements(layout: object) -> None:
    small, large = (layout(Value(5, 7, 9, t), (1, 1, 1, 1)) for t in (INT8, FLOAT32))  # type: ignore[operator]
    assert small.size == large.size
    assert 4 * small.bytes == large.bytes == 4 * large.size


def test_an_arena_of_small_elements_is_small() -> None:
    """Two copies of a value, one after the other."""
    def arena(dtype: DType) -> int:
        values = (Value(8, 32, 32, dtype),) * 3
        steps = tuple(Copy(n, n + 1, np.arange(8)[::-1]) for n in range(2))
        ports = Port("x", 0, (8, 32, 32), dtype), Port("y", 2, (8, 32, 32), dtype)
        return make_plan(Program(values, steps, ports[:1], ports[1:]), CPU).arena

    assert arena(INT8) < 0.4 * arena(FLOAT32)  # whole pages, hence not a quarter


def test_the_library_says_each_ports_type_and_moves_on_by_its_bytes(tmp_path: Path) -> None:
    plan = two_step_plan(CPU, (3, 5, 7))
    source.write(replace(plan, inputs=(replace(plan.inputs[0], dtype=INT8),)), tmp_path)
    about = json.loads((tmp_path / "describe.json").read_text())
    assert [port["dtype"] for port in (*about["inputs"], *about["outputs"])] == ["int8", "float32"]
    text = (tmp_path / "model.cpp").read_text()
    assert "INPUT_BYTES[] = {105};" in text
    assert "OUTPUT_BYTES[] = {420};" in text


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8])
def test_other_types_are_refused_where_tensors_become_values(kind: int) -> None:
    net = Net(2, 3, 6, 6)
    model = net.model(net.relu("x"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    with pytest.raises(UnsupportedModelError, match=r"input x is \w+ .2, 3, 6, 6."):
        program(Graph(model))
    with pytest.raises(UnsupportedModelError):
        parts(Graph(model), hybrid=False)


def test_values_and_ports_of_a_graph_have_a_type() -> None:
    net = Net(2, 3, 6, 6)
    found = program(Graph(net.model(net.op("Flatten", net.op("Pad", net.conv3("x", 3, 4), net.ints(0, 0, 1, 1, 0, 0, 1, 1))))))
    assert {v.dtype for v in found.values} == {p.dtype for p in (*found.inputs, *found.outputs)} == {FLOAT32}


# ---- bytes ------------------------------------------------------------------------------------------------------------
def bytes_net(shape: tuple[int, ...] = (2, 3, 9, 10)) -> onnx.ModelProto:
    """An image of uint8, as channels last; then float32."""
    net = Net(shape[0], *shape[2:], shape[1], dtype=TensorProto.UINT8)
    net.numpy, net.dtype = np.dtype(np.float32), TensorProto.FLOAT
    planes = net.op("Transpose", net.op("Cast", "x", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    return net.model(net.conv3(planes, shape[1], 4, bias=True))


def test_an_input_of_bytes_becomes_the_same_numbers() -> None:
    model, x = bytes_net(), np.random.default_rng(0).integers(0, 256, (2, 9, 10, 3), np.uint8)
    found = fuse(program(Graph(model)))
    assert found.inputs[0].dtype == UINT8
    assert {v.dtype for v in found.values} == {FLOAT32}
    np.testing.assert_allclose(native_run(make_plan(found, host_cpu()), {"x": x})[0], run_ort(model, {"x": x})[0], rtol=1e-5,
                               atol=1e-3)


def test_an_input_of_bytes_that_is_quantised_is_so_on_the_way_in() -> None:
    plain = fuse(program(Graph(bytes_net())))
    grid = Grid(float(np.float32(2.3)), 40)
    values = (plain.values[0], Value(*plain.values[0].shape, UINT8, grid), plain.values[0])
    steps = (Quantise(0, 1), Dequantise(1, 2))
    found = fuse(Program(values, steps, plain.inputs, (Port("y", 2, plain.values[0].shape),)))
    assert [type(step) for step in found.steps] == [Dequantise]
    x = np.arange(2 * 9 * 10 * 3).astype(np.uint8).reshape(2, *plain.inputs[0].shape)
    got = native_run(make_plan(found, host_cpu()), {"x": x})[0]
    want = (np.clip(np.rint(x / np.float32(2.3)) + 40, 0, 255) - 40) * np.float32(2.3)
    np.testing.assert_array_equal(got, want.astype(np.float32).reshape(got.shape))


def test_numbers_that_are_no_bytes_are_no_input_of_bytes() -> None:
    plan = make_plan(fuse(program(Graph(bytes_net()))), host_cpu())
    for wrong in (np.uint16, np.int8, np.float32):
        with pytest.raises(UsageError, match="expected uint8"):
            native_run(plan, {"x": np.zeros((2, 9, 10, 3), wrong)})


def test_nothing_is_computed_with_bytes() -> None:
    net = Net(1, 4, dtype=TensorProto.UINT8)
    for model in (net.model(net.op("Add", "x", "x")), net.model(net.op("Reshape", "x", net.ints(1, 4, 1)))):
        with pytest.raises(UnsupportedModelError, match="uint8"):
            program(Graph(model))
