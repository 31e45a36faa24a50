"""gkp split --input-type uint8: requests bring pixels, a quarter of the bytes, and every device normalises what it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import assert_refused, gkp
from split_kit import LINK, MODES, aligned_net, check_wiring, devices, placed, written

from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.draft import draft
from gkp.edge.divide.prepare import prepare
from gkp.edge.plan.schema import COORDINATOR, read_plan
from gkp.images.normalisation import CIFAR10

GIVEN = ("--input-type", "uint8", "--mean", ",".join(map(str, CIFAR10.mean)), "--std", ",".join(map(str, CIFAR10.std)))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_the_same_of_pixels(mode: str, tmp_path: Path) -> None:
    onnx.save(aligned_net(), tmp_path / "net.onnx")
    opened = open_any(tmp_path / "net.onnx", OpenOptions())
    graph = prepare(opened.model, CIFAR10)
    made = draft(graph, mode, placed(mode, graph, 3), devices(3), LINK)
    floats = draft(prepare(opened.model), mode, placed(mode, graph, 3), devices(3), LINK)
    plan = written(opened, made, tmp_path / "split", normalisation=CIFAR10)  # verifies it, too
    check_wiring(plan)
    assert (plan.mean, plan.std) == (list(CIFAR10.mean), list(CIFAR10.std))
    entering = [t.bytes for t in plan.transfers if t.source == COORDINATOR]
    assert [4 * n for n in entering] == [t.bytes for t in floats.plan.transfers if t.source == COORDINATOR]
    between = [[t for t in p.transfers if COORDINATOR not in (t.source, t.target)] for p in (plan, floats.plan)]
    assert between[0] == between[1]
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)
    run = InProcessExecutor.open(plan, tmp_path / "split")
    want = opened.reference({"x": CIFAR10.of_channels_first(x)})[0]
    np.testing.assert_allclose(run.run(x), want, atol=5e-5 * max(1, np.abs(want).max()))
    run.close()


def test_a_split_of_pixels_runs_on_workers(tmp_path: Path) -> None:
    onnx.save(aligned_net(), tmp_path / "net.onnx")
    gkp("split", tmp_path / "net.onnx", "--devices", "2", "--mode", "branch", *GIVEN, "-o", tmp_path / "split", expect=0)
    plan = read_plan(tmp_path / "split")
    assert next(v.dtype for v in plan.values if v.name == plan.input) == "uint8"
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    gkp("run", tmp_path / "split", "--local", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", expect=0)
    want = open_any(tmp_path / "net.onnx", OpenOptions()).reference({"x": CIFAR10.of_channels_first(x)})[0]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=5e-5 * max(1, np.abs(want).max()))
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    refused = gkp("run", tmp_path / "split", "--local", "--input", tmp_path / "x.npy")
    assert_refused(refused, 2, "float32, expected uint8")


@pytest.mark.parametrize(("words", "said"), [
    (("--input-type", "uint8"), "needs --mean and --std"), (("--mean", "0,0,0"), "for --input-type uint8"),
    (("--input-type", "uint8", "--mean", "0", "--std", "1"), "--mean has 1 number")])
def test_a_normalisation_must_be_given_whole_and_only_for_pixels(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    onnx.save(aligned_net(), tmp_path / "net.onnx")
    assert_refused(gkp("split", tmp_path / "net.onnx", "--devices", "2", "-o", tmp_path / "split", *words), 2, said)
    assert not (tmp_path / "split").exists()
