"""Verification: the tolerances are kept, every kind of difference is found, and the first wrong layer is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import save, small_net
from onnx import numpy_helper
from onnx_kit import Net

import gkp
from gkp.converter.reference import evaluator, reference
from gkp.converter.verify import TOLERANCE, check_inputs, compare, first_difference, verify, worst
from gkp.errors import UnsupportedModelError, VerificationError
from gkp.runtime.runners import OpenVinoRunner

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(("precision", "scale"), [("fp32", 0.5), ("fp32", 100.0), ("fp16", 1.0), ("fp16", 100.0)])
def test_the_tolerance_is_relative_to_the_largest_output(precision: str, scale: float) -> None:
    allowed = TOLERANCE[precision] * max(1.0, scale)
    want = scale * np.array([[1.0, 0.0, -1.0]])
    assert compare([want + 0.9 * allowed], [want], "x", 1, precision).passed
    assert not compare([want + 1.1 * allowed], [want], "x", 1, precision).passed


@pytest.mark.parametrize("got", [[], [ONES, ONES], [ONES[:1]], [ONES[:, :2]], [ONES.ravel()], [ONES * np.nan], [ONES * np.inf],
                                 [-ONES]])
def test_other_outputs_fail(got: list[np.ndarray]) -> None:
    check = compare(got, [ONES], "x", 2)
    assert not check.passed
    assert np.isfinite(check.max_abs_error), "JSON knows no infinity"


def test_equal_outputs_pass() -> None:
    check = compare([ONES], [ONES], "x", 2)
    assert (check.passed, check.max_abs_error, check.top1_agreement) == (True, 0.0, 1.0)


def test_fp16_needs_the_same_classes_too() -> None:
    want = np.tile(np.array([[1.0, 0.999]]), (100, 1))
    got = want.copy()
    got[0] = [0.999, 1.0]
    assert not compare([got], [want], "x", 100, "fp16").passed
    assert compare([got], [want], "x", 100, "fp16").max_abs_error < TOLERANCE["fp16"]


def test_the_inputs_hold_zeros_large_and_small_ones_and_other_batches_and_sizes() -> None:
    model = small_net()
    inputs = check_inputs(model, {"x": {0: "n", 2: "h", 3: "w"}})
    assert {name for name, _, _ in inputs} == {"random", "zeros", "large", "small", "larger image"}
    assert {batch for _, batch, _ in inputs} == {1, 2, 5}
    for name, batch, feeds in inputs:
        assert feeds["x"].shape[0] == batch
        assert (feeds["x"].shape[2] > 8) == (name == "larger image")
        assert feeds["x"].dtype == np.float32
    assert {batch for _, batch, _ in check_inputs(model, {})} == {1}
    assert not np.any(next(f for n, _, f in inputs if n == "zeros")["x"])


def test_one_wrong_check_fails_the_whole_and_is_the_worst() -> None:
    def twice(feeds: object) -> list[np.ndarray]:
        return [2 * feeds["x"]]  # type: ignore[index]

    def right(feeds: object) -> list[np.ndarray]:
        return [feeds["x"]]  # type: ignore[index]

    inputs = [("zeros", 1, {"x": np.zeros((1, 4))}), ("random", 1, {"x": np.ones((1, 4))})]
    result = verify(twice, "a", right, "b", inputs)
    assert [check.passed for check in result.checks] == [True, False]
    assert not result.passed
    assert worst(result).name == "random"


def test_the_first_tensor_that_differs_is_named() -> None:
    given, wrong = small_net(), small_net()
    conv = next(n for n in wrong.graph.node if n.name == "conv_t6")
    weight = next(t for t in wrong.graph.initializer if t.name == conv.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    assert first_difference(given, wrong, feeds) == conv.output[0]
    assert first_difference(given, given, feeds) is None


def test_onnx_reference_agrees_with_the_runtime() -> None:
    model = small_net(batch=3)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    name, run = evaluator(model)
    assert name == "ONNX Runtime"
    np.testing.assert_allclose(run(feeds)[0], reference(model)(feeds)[0], atol=1e-4)


def test_a_model_in_the_one_form_runs_in_both() -> None:
    from gkp.converter.graph import Graph
    from gkp.converter.recognise import recognise, simplify

    given = small_net()
    form: onnx.ModelProto = simplify(recognise(Graph(given))).to_model()
    assert "BranchedConv" in {n.op_type for n in form.graph.node}
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    want = evaluator(given)[1](feeds)[0]
    for run in (evaluator(form)[1], reference(form)):
        np.testing.assert_allclose(run(feeds)[0], want, atol=1e-4)


def test_a_batch_that_the_network_keeps_is_said_so(tmp_path: Path) -> None:
    """A Concat with a constant of the batch that the form was made at."""
    net = Net("n", 3, 8, 8)
    y = net.conv3("x", 3, 8)
    batch = net.op("Slice", net.op("Shape", y), net.ints(0), net.ints(1))
    token = net.op("Expand", net.const(net.weight(1, 1, 8, 8)), net.op("Concat", batch, net.ints(1, 8, 8), axis=0))
    path = save(net.model(net.op("Concat", y, token, axis=1)), tmp_path / "token.onnx")
    with pytest.raises(UnsupportedModelError, match=r"runs at batch 1, not at 2: .*Concat") as caught:
        gkp.convert(path, "ort", tmp_path / "out", benchmark=False, threads=1)
    assert "--dynamic-batch" in caught.value.hint


def test_a_fault_of_openvino_is_not_taken_for_one_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime computes right of the same file is for another target, and no bug to report."""
    run = OpenVinoRunner.run
    monkeypatch.setattr(OpenVinoRunner, "run", lambda self, feeds: [y + 1 for y in run(self, feeds)])
    path = save(small_net(), tmp_path / "net.onnx")
    with pytest.raises(VerificationError, match="OpenVINO computes something else than the file says") as caught:
        gkp.convert(path, "openvino", tmp_path / "out", benchmark=False, threads=1)
    assert "--target ort" in caught.value.hint
    assert not (tmp_path / "out").exists()
