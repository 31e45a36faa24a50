"""Quantised networks: divided like others, with the same answers; what is quantised travels as its integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import gkp
from int8_kit import stock_by_hand
from onnx_kit import feeds_of, run_ort
from split_kit import LINK, devices, drafted, placed, residual

from gkp.converter.quantiser import is_quantiser
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.draft import Draft, draft
from gkp.edge.divide.engines import make_engine
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.rules import BOTH, rule_of
from gkp.edge.plan.schema import COORDINATOR, read_plan


@pytest.fixture(scope="module")
def quantised() -> onnx.ModelProto:
    return stock_by_hand(residual())


def divided(model: onnx.ModelProto, mode: str, wire: str) -> tuple[Draft, np.ndarray]:
    """The split model, and its answer."""
    graph, engine = prepare(model), make_engine("ort")
    made = draft(graph, mode, placed(mode, graph, 2), devices(2), LINK, wire=wire, engine=engine)
    executor = InProcessExecutor(made.plan, lambda s: engine.open(made.subgraphs[s.index], None, 1), wire=wire)
    (x,) = feeds_of(model).values()
    answer = executor.run(x)
    executor.close()
    return made, answer


@pytest.mark.parametrize("mode", ["branch", "spatial"])
def test_integers_travel_and_the_answer_is_the_same_to_the_bit(quantised: onnx.ModelProto, mode: str) -> None:
    want = run_ort(quantised, feeds_of(quantised))[0]
    (plain, first), (made, second) = (divided(quantised, mode, wire) for wire in ("float32", "int8"))
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(second, want)
    values = {v.name: v for v in made.plan.values}
    quartered = 0
    for a, b in zip(plain.plan.transfers, made.plan.transfers, strict=True):
        integers = COORDINATOR not in (b.source, b.target) and values[b.value].grid is not None
        assert b.bytes == (a.bytes // 4 if integers else a.bytes)
        quartered += integers
    assert quartered


def test_quantisers_and_quantised_matrices_are_divided(quantised: onnx.ModelProto) -> None:
    graph = prepare(quantised)
    kinds = [rule_of(node).kinds for node in graph.nodes if is_quantiser(node) and len(node.outputs[0].shape) == 4]
    assert kinds
    assert set(kinds) == {BOTH}
    assert not any(node.op == "DequantizeLinear" for node in graph.nodes)


def test_multiply_accumulates_are_counted_as_those_of_floats_are(quantised: onnx.ModelProto) -> None:
    macs = [drafted(model, "local", 1).plan.segments[0].macs for model in (quantised, residual())]
    assert macs[0] == macs[1] > 0


def test_segments_of_a_quantised_network_are_native(quantised: onnx.ModelProto) -> None:
    graph = prepare(quantised)
    made = draft(graph, "spatial", placed("spatial", graph, 2), devices(2), LINK, engine=make_engine("native"))
    assert {subgraph.suffix for subgraph in made.subgraphs} == {".so"}


def test_a_written_split_model_verifies_and_says_what_travels(quantised: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(quantised, str(tmp_path / "q.onnx"))
    gkp("split", tmp_path / "q.onnx", "--devices", "2", "--mode", "branch", "--wire", "int8", "-o", tmp_path / "out", expect=0)
    plan = read_plan(tmp_path / "out")
    assert plan.wire == "int8"
    assert plan.notes[-1].endswith("by up to 0")


def test_a_network_of_floats_has_nothing_to_send_as_int8(tmp_path: Path) -> None:
    onnx.save(residual(), str(tmp_path / "model.onnx"))
    said = gkp("split", tmp_path / "model.onnx", "--devices", "2", "--wire", "int8", "-o", tmp_path / "out", expect=2)
    assert "not quantised" in said.err
