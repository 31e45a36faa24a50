"""Packages that are not installed: exit code 4 where the request needs them, no difference where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import FAST, GROUPED, Outcome, assert_refused, blocked_gkp, gkp, listing, save, small_net

from gkp import manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(batch="n"), tmp_path / "m.onnx")


@pytest.mark.parametrize(("missing", "target"), [("onnxruntime", "ort"), ("openvino", "openvino")])
def test_a_target_without_its_runtime_is_refused(missing: str, target: str, model: Path, tmp_path: Path) -> None:
    outcome = blocked_gkp([missing], "convert", model, "--target", target, "-o", tmp_path / "out", *FAST)
    assert_refused(outcome, 4, "not installed", f'pip install ".[{target}]"')
    assert listing(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("strategy", ["auto", "split", "fuse", "dense"])
def test_target_onnx_needs_no_runtime(strategy: str, model: Path, tmp_path: Path) -> None:
    outcome = blocked_gkp(["onnxruntime", "openvino", "torch"], "convert", model, "--target", "onnx", "-o", tmp_path / "out",
                          "--strategy", strategy, *FAST)
    assert outcome.code == 0, outcome.err
    made = manifest.read(tmp_path / "out")
    assert made.verification is not None
    assert made.verification.passed
    assert made.verification.engine == "onnx.reference"
    assert len(made.verification.checks) > 4


@pytest.mark.slow
def test_a_torch_checkpoint_converts_to_onnx_without_a_runtime(tmp_path: Path) -> None:
    outcome = blocked_gkp(["onnxruntime", "openvino"], "convert", GROUPED, "--target", "onnx", "-o", tmp_path / "o", *FAST)
    assert outcome.code == 0, outcome.err


def test_inspect_needs_no_runtime(model: Path) -> None:
    outcome = blocked_gkp(["onnxruntime", "openvino", "torch", "jinja2"], "inspect", model)
    assert outcome.code == 0, outcome.err
    assert "conv_t6" in outcome.err


def test_the_manifest_of_an_artefact_is_shown_by_the_base_install(model: Path, tmp_path: Path) -> None:
    gkp("convert", model, "-o", tmp_path / "out", "--target", "onnx", *FAST, expect=0)
    outcome = blocked_gkp(["onnx", "onnx_graphsurgeon", "torch", "onnxruntime", "openvino", "jinja2"], "inspect", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "conv_t6" in outcome.err


def test_an_artefact_runs_without_the_converters_packages(model: Path, tmp_path: Path) -> None:
    import numpy as np

    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.float32))
    outcome = blocked_gkp(["onnx", "onnx_graphsurgeon", "torch", "openvino", "jinja2"], "run", tmp_path / "out", "--input",
                          tmp_path / "x.npy")
    assert outcome.code == 0, outcome.err


def test_a_torch_checkpoint_needs_torch(tmp_path: Path) -> None:
    outcome = blocked_gkp(["torch"], "convert", GROUPED, "--target", "onnx", "-o", tmp_path / "out", *FAST)
    assert_refused(outcome, 4, "PyTorch, which is not installed", 'pip install ".[torch]"')
    assert listing(tmp_path) == []


def test_a_report_needs_jinja2_and_says_so_before_the_work(tmp_path: Path) -> None:
    """The model does not exist either."""
    outcome = blocked_gkp(["jinja2"], "convert", tmp_path / "nowhere.pt", "--report", tmp_path / "r.html")
    assert_refused(outcome, 4, "jinja2", ".[report]")


def test_converting_needs_onnx(model: Path, tmp_path: Path) -> None:
    for command in (["convert", model, "-o", tmp_path / "out"], ["inspect", model], ["verify", model, model]):
        outcome: Outcome = blocked_gkp(["onnx", "onnx_graphsurgeon"], *command)
        assert_refused(outcome, 4, ".[convert]")
