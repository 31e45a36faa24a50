"""ncnn, where dense models are measured too: it computes what ONNX Runtime computes, on any batch, and leaves no file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import blocked
from onnx_kit import Net, feeds_of, run_ort

from gkp.converter.ncnn import ncnn_runner
from gkp.errors import BackendMissingError, UnsupportedModelError, UsageError
from gkp.runtime.ncnn import WINOGRAD

pytest.importorskip("ncnn", reason="ncnn is not installed")
pytest.importorskip("pnnx", reason="pnnx is not installed")


def net(height: int = 9, width: int = 7) -> onnx.ModelProto:
    """Convolutions, a residual, two outputs; planes whose size is no multiple of a vector."""
    n = Net(1, 3, height, width)
    a = n.op("Relu", n.conv3("x", 3, 20, bias=True))
    b = n.op("Relu", n.op("Add", n.conv3(a, 20, 20), a))
    flat = n.op("Flatten", n.op("GlobalAveragePool", b))
    return n.model(n.op("Neg", flat), b)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("off", [(), ("winograd43",), WINOGRAD])
def test_it_computes_what_onnx_runtime_computes(batch: int, off: tuple[str, ...]) -> None:
    model = net()
    runner = ncnn_runner(model, 1, off)
    x = np.random.default_rng(batch).standard_normal((batch, 3, 9, 7)).astype(np.float32)
    assert (runner.inputs, runner.outputs) == (["x"], [o.name for o in model.graph.output])
    want = [np.concatenate(y) for y in zip(*(run_ort(model, {"x": x[i:i + 1]}) for i in range(batch)), strict=True)]
    for got, expected in zip(runner.run({"x": x}), want, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-4)
    runner.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_computes_the_same_to_its_rounding(precision: str) -> None:
    """To the last bit, where the processor has none: the suite tells that apart."""
    model = net()
    x = feeds_of(model)
    exact, rounded = (ncnn_runner(model, 1, precision=p).run(x) for p in ("fp32", precision))
    for want, got in zip(exact, rounded, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = net()
    runner = ncnn_runner(model, 1)
    assert list(tmp_path.iterdir()) == []
    assert len(runner.run(feeds_of(model))) == 2  # without its files


@pytest.mark.parametrize("x", [np.zeros((1, 4, 9, 7)), np.zeros((1, 3, 9, 8)), np.zeros((0, 3, 9, 7)), np.zeros((3, 9, 7))])
def test_an_input_that_does_not_fit_is_a_usage_error(x: np.ndarray) -> None:
    runner = ncnn_runner(net(), 1)
    with pytest.raises(UsageError, match="needs shape"):
        runner.run({"x": x.astype(np.float32)})
    with pytest.raises(UsageError, match="needs shape"):
        runner.run({"y": x.astype(np.float32)})


def test_a_batch_left_open_is_refused() -> None:
    model = net()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    with pytest.raises(UnsupportedModelError, match="static"):
        ncnn_runner(model, 1)


def test_what_pnnx_cannot_translate_is_an_error_of_ours() -> None:
    model = net()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "nobody"
    with pytest.raises(UnsupportedModelError, match="pnnx cannot translate"):
        ncnn_runner(model, 1)


@pytest.mark.parametrize("package", ["ncnn", "pnnx"])
def test_a_missing_package_is_named(package: str) -> None:
    outcome = blocked([package], "import onnx\nfrom gkp.converter.ncnn import ncnn_runner\nfrom gkp.errors import *\n"
                      "try:\n    ncnn_runner(onnx.ModelProto(), 1)\n"
                      "except BackendMissingError as e:\n    print(e.message, '|', e.hint)\n")
    assert outcome.code == 0, outcome.err
    assert package in outcome.out
    assert ".[bench]" in outcome.out
    assert BackendMissingError.exit_code == 4
