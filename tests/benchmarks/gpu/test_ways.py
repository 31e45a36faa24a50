"""The ways to run a network: what gkp convert wrote, for real on the CPU, and PyTorch; from and to the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gkp import manifest
from gkp.benchmarks import adapter
from gkp.benchmarks.cases import Case, gpu_cases
from gkp.benchmarks.gpu import ways
from gkp.benchmarks.gpu.results import CONVERTED, DENSE, FORMS, PUBLISHED
from gkp.benchmarks.gpu.ways import ARTEFACTS, WAYS, Networks, Way, artefacts
from gkp.benchmarks.networks import block_diagonal, resnet20, tmi_style
from gkp.errors import BackendMissingError, GkpError
from gkp.pruning.models.branched import BranchedConv2d

EAGER = next(way for way in WAYS if way.name == "PyTorch eager")
STAND_IN = artefacts("ORT CPU", "ort", 1.0, lambda device: None, lambda batches: {"dynamic_batch": True})


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def networks(small: Case, tmp_path: Path) -> Networks:
    return Networks(small, "fp32", "cpu", (2, 1, 3), tmp_path)


def computed(way: Way, networks: Networks, form: str, x: Any) -> Any:
    with ExitStack() as stack:
        return np.asarray(way.open(networks, form, x, stack)())


def images(batch: int) -> Any:
    return np.random.default_rng(1).standard_normal((batch, 3, 8, 8), np.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_artefact_computes_what_pytorch_does(networks: Networks, batch: int) -> None:
    x = images(batch)
    pairs = [(computed(STAND_IN, networks, CONVERTED, x), computed(EAGER, networks, PUBLISHED, x)),
             (computed(STAND_IN, networks, DENSE, x), computed(EAGER, networks, DENSE, x)),
             (computed(EAGER, networks, CONVERTED, x), computed(STAND_IN, networks, CONVERTED, x))]
    for got, want in pairs:
        assert got.shape == (batch, 10)
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert not np.allclose(pairs[0][0], pairs[1][0]), "two networks"


def test_what_is_timed_is_what_gkp_convert_writes(networks: Networks) -> None:
    folder = networks.artefact(CONVERTED, "ort", {"dynamic_batch": True})
    written = manifest.read(folder)
    assert (written.target, written.precision) == ("ort", "fp32")
    assert sum(layer.branches == 8 for layer in written.layers) == 18
    assert written.verification is not None
    assert written.verification.passed
    assert networks.manifests[CONVERTED, "ort"] == written
    assert networks.converted() == "ort"


def test_an_artefact_is_written_once_and_a_failure_told_again(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def convert(source: Any, target: str, **options: Any) -> Any:
        calls.append({"target": target, **options})
        raise BackendMissingError("no engine was built")

    monkeypatch.setattr(adapter, "convert", convert)
    for _ in range(2):
        with pytest.raises(BackendMissingError, match="no engine was built"):
            computed(ARTEFACTS[0], networks, CONVERTED, images(1))
    with pytest.raises(GkpError, match="there is no artefact to compare with"):
        computed(EAGER, networks, CONVERTED, images(1))
    assert len(calls) == 1
    with pytest.raises(BackendMissingError):
        computed(ARTEFACTS[1], networks, DENSE, images(1))
    shared = {"input_shapes": {"": (1, 3, 8, 8)}, "precision": "fp32", "benchmark": False}
    assert calls == [
        {"target": "trt", "output": networks.folder / "converted.trt", "batch_profile": "1,2,3", **shared},
        {"target": "ort", "output": networks.folder / "dense.ort", "dynamic_batch": True, "provider": "cuda", **shared}]


def test_an_engine_that_was_not_built_is_an_error(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorRT the conversion still writes its ONNX file."""
    def absent(name: str | None = None) -> Any:
        raise BackendMissingError("TensorRT is not installed")

    monkeypatch.setattr("gkp.converter.targets.trt.find_backend", absent)
    with pytest.raises(BackendMissingError, match=r"TensorRT is not installed: model\.onnx was written, no engine"):
        Networks(small, "fp32", "cpu", (1,), tmp_path).artefact(CONVERTED, "trt", {})


def test_each_call_gets_a_network_of_its_own(networks: Networks) -> None:
    assert networks.module(DENSE) is not networks.module(DENSE)
    assert any(isinstance(m, BranchedConv2d) for m in networks.module(PUBLISHED).modules())
    dense = [m for m in networks.module(DENSE).modules() if isinstance(m, nn.Conv2d)]
    assert all((m.weight != 0).all() for m in dense), "no hole that a compiler could exploit"


def test_only_pytorchs_plain_ways_run_without_a_gpu() -> None:
    assert {way.name for way in WAYS if way.missing("cpu") is None} == {"channels_last", "PyTorch eager"}
    assert {way.forms for way in WAYS if way.target is None} == {FORMS}
    assert {tuple(way.forms) for way in ARTEFACTS} == {(DENSE, CONVERTED)}


def test_onnx_runtime_without_cuda_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (ort,) = (way for way in WAYS if way.target == "ort")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert ort.missing("cuda") == "this ONNX Runtime has no CUDA provider"


def test_with_nothing_that_runs_an_artefact_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    here = artefacts("A", "trt", 1.0, lambda device: None, lambda batches: {})
    absent = artefacts("B", "ort", 1.0, lambda device: "not here", lambda batches: {})
    monkeypatch.setattr(ways, "ARTEFACTS", (here, absent))
    ways.require_artefacts()
    monkeypatch.setattr(ways, "ARTEFACTS", (absent,))
    with pytest.raises(BackendMissingError, match="B: not here") as caught:
        ways.require_artefacts()
    assert ".[torch,gpu,trt]" in str(caught.value.hint)


def test_the_suite_has_a_disjoint_and_an_overlapping_case() -> None:
    first, second = gpu_cases()
    assert (first.source.args, second.source.args) == ((block_diagonal,), (tmi_style,))  # type: ignore[attr-defined]
    assert (first.input_shape, second.input_shape) == ((1, 3, 224, 224), (1, 3, 32, 32))
    assert second.source.func is resnet20  # type: ignore[attr-defined]
