"""Images of the suite: who gets them, who gets random numbers; and what runs in less than float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import small_net

from gkp.benchmarks.adapter import Engines
from gkp.benchmarks.cases import Case
from gkp.benchmarks.engines import make_pair
from gkp.benchmarks.precisions import pictures, precision_contenders
from gkp.converter.calibration import Calibration
from gkp.converter.sources.base import GroupedModel
from gkp.errors import BackendMissingError, FileError
from gkp.types import silent

SHAPE = (3, 8, 8)


@pytest.fixture
def model() -> GroupedModel:
    return GroupedModel(small_net(), "test", lambda feeds: [np.zeros(1)], "nothing", True)


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, str]:
    """Labelled images, all of class 2."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", x=rng.standard_normal((6, *SHAPE)).astype(np.float32), y=np.full(6, 2))
    np.save(tmp_path / "train.npy", rng.standard_normal((7, *SHAPE)).astype(np.float32))
    return {"data": str(tmp_path / "test.npz"), "calibration": str(tmp_path / "train.npy")}


def case(trained: bool) -> Case:
    return Case("small", lambda: None, trained=trained)


class Answers:
    """Says class 2 of a third of the images."""

    inputs, outputs = ("x",), ("y",)

    def run(self, feeds: Any) -> list[Any]:
        scores = np.zeros((len(feeds["x"]), 5), np.float32)
        scores[::3, 2] = 1
        return [scores]


def test_a_trained_case_is_calibrated_and_judged_with_the_images(model: GroupedModel, specs: dict[str, str]) -> None:
    found = pictures(case(True), model, **specs, progress=silent)
    assert found.told == {"images": "6 images, npz", "calibration": "7 images, npy all"}
    assert found.calibration.samples.images.shape == (7, *SHAPE)
    assert found.accuracy(Answers(), silent) == pytest.approx(1 / 3)


def test_an_untrained_case_gets_random_numbers_and_has_no_accuracy(model: GroupedModel, specs: dict[str, str]) -> None:
    found = pictures(case(False), model, **specs, progress=silent)
    assert found.told == {"images": None, "calibration": "random numbers"}
    assert found.accuracy(Answers(), silent) is None


def test_without_images_all_cases_get_random_numbers(model: GroupedModel) -> None:
    found = pictures(case(True), model, None, None, silent)
    assert found.told == {"images": None, "calibration": "random numbers"}


def test_images_that_are_not_there_are_refused_before_anything_is_measured(model: GroupedModel, tmp_path: Path) -> None:
    with pytest.raises(FileError):
        pictures(case(True), model, str(tmp_path / "none.npz"), None, silent)


def test_networks_are_quantised_once_and_only_when_they_are_started(model: GroupedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pictures(case(True), model, None, None, silent)
    quantised: list[Any] = []
    monkeypatch.setattr(Calibration, "graph", lambda self, graph: quantised.append(graph) or graph)
    pair = make_pair(model, None)
    tried = list(precision_contenders(pair, 1, Engines(), found.calibration, cache(found.calibration.graph)))
    assert quantised == []
    for entry in tried:
        if entry.key == ("ort", "pruned", "int8"):
            entry.start().close()
    assert quantised == [pair.pruned]
    assert {entry.precision for entry in tried} == {"fp32", "bf16", "fp16", "int8"}


def test_ncnn_says_why_it_has_no_int8(model: GroupedModel) -> None:
    pytest.importorskip("ncnn")
    calibration = pictures(case(True), model, None, None, silent).calibration
    tried = precision_contenders(make_pair(model, None), 1, Engines(), calibration, calibration.graph)
    (entry,) = (e for e in tried if e.key == ("ncnn", "dense", "int8"))
    with pytest.raises(BackendMissingError, match="ncnn2table and ncnn2int8, which the packages ncnn and pnnx lack"):
        entry.start()


@pytest.mark.slow
def test_int8_in_native_kernels_computes_what_onnx_runtime_computes(model: GroupedModel) -> None:
    calibration = pictures(case(True), model, None, None, silent).calibration
    tried = precision_contenders(make_pair(model, None), 1, Engines(), calibration, cache(calibration.graph))
    started = {entry.engine: entry.start() for entry in tried if entry.key[1:] == ("pruned", "int8") and entry.form != "estimated"}
    feeds = np.random.default_rng(1).standard_normal((2, *SHAPE)).astype(np.float32)
    got, want = (started[engine].run({started[engine].inputs[0]: feeds})[0] for engine in ("native", "ort"))
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    for runner in started.values():
        runner.close()
