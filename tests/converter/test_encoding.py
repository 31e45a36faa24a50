"""Encoding: a model becomes one file, which is run, verified and written; nothing travels in its metadata."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from cli_kit import save, small_net
from fake_target import FakeRunner, FakeTarget

from gkp.converter.convert import convert
from gkp.converter.encoding import Encoding
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.errors import UnsupportedModelError, UsageError
from gkp.options.convert import convert_options


def test_the_bytes_that_run_are_the_bytes_that_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = FakeTarget(monkeypatch, lambda model, batch: 1.0)
    built = target.build(simplify(recognise(Graph(small_net()))), {}, {}, Encoding(opset=18), 1)
    runner = built.runner()
    assert isinstance(runner, FakeRunner)
    opened = runner.model
    built.emit(tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == built.file.data
    assert opened is built.file.model
    assert opened.opset_import[0].version == 18
    assert sum(built.operators.values()) == len(opened.graph.node)
    assert built.operators["Conv"] == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_stranger_writes_into_the_metadata_means_nothing(precision: str, tmp_path: Path) -> None:
    given = small_net()
    given.metadata_props.add(key="gkp.fp32", value='["conv_t6"]')
    given.metadata_props.add(key="gkp.any_batch", value="yes")
    plain = small_net()
    written = []
    for name, model in (("given", given), ("plain", plain)):
        wanted = convert_options("onnx", precision=precision, output=tmp_path / name, benchmark=False)
        convert(save(model, tmp_path / f"{name}.onnx"), wanted)
        made = onnx.load(tmp_path / name / "model.onnx")
        del made.metadata_props[:]
        written.append(made)
    assert written[0] == written[1]


def test_nodes_that_stay_in_fp32_are_named_beside_the_file() -> None:
    model = small_net()
    name = next(n.name for n in model.graph.node if n.op_type == "Conv")
    file = Encoding("fp16", wide={name: "too large"}).file(model)
    assert file.kept == (name,)
    assert not file.model.metadata_props
    assert Encoding("fp32", wide={name: "too large"}).file(model).kept == ()


def test_an_opset_out_of_reach_is_a_usage_error_and_nonsense_is_no_onnx() -> None:
    with pytest.raises(UsageError, match="opset 99"):
        Encoding(opset=99).file(small_net())
    broken = small_net()
    broken.graph.node[0].input[0] = "nowhere"
    with pytest.raises(UnsupportedModelError, match="not valid ONNX"):
        Encoding().file(broken).check()
