"""Written split models: real checkpoints compute the same on any number of devices; nothing is left after a failure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx_kit import Net
from split_kit import (
    LINK,
    MODES,
    SHARED,
    aligned_net,
    assert_standard,
    between_devices,
    check_wiring,
    devices,
    drafted,
    placed,
    split_model,
    written,
)

from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.draft import draft
from gkp.edge.divide.prepare import prepare
from gkp.edge.plan.schema import COORDINATOR, read_plan
from gkp.errors import FileError, UsageError, VerificationError
from gkp.manifest import sha256

CHECKPOINTS = {"tmi-gkp": SHARED / "tmi_gkp/resnet20_cifar10/grouped", "dsp": SHARED / "dsp/resnet20_g4.pt"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(aligned_net(), path)
    return path


def check_folder(out: Path) -> None:
    """Files, checksums and manifests agree; segments are valid and standard."""
    plan = read_plan(out)
    check_wiring(plan)
    for device in range(len(plan.devices)):
        folder = out / f"device_{device}"
        files = plan.files[str(device)]
        assert {p.name for p in folder.iterdir()} == {*files, "plan.json", "manifest.json"}
        assert (folder / "plan.json").read_bytes() == (out / "plan.json").read_bytes()
        about = json.loads((folder / "manifest.json").read_text())
        assert (about["device"], about["plan"]) == (device, plan.hash)
        for name, digest in files.items():
            assert sha256(folder / name) == digest
            segment = onnx.load(folder / name)
            onnx.checker.check_model(segment, full_check=True)
            assert_standard(segment)
            planned = next(s for s in plan.segments if s.file == name)
            assert [i.name for i in segment.graph.input] == planned.inputs
            assert [o.name for o in segment.graph.output] == planned.outputs


@pytest.mark.parametrize("mode", MODES)
def test_a_written_folder_is_complete_and_runs(mode: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "split"
    plan = split_model(model, devices(3), LINK, out, mode=mode)
    check_folder(out)
    assert plan == read_plan(out)
    assert plan.model == "net.onnx"
    assert plan.model_sha256 == sha256(model)
    assert any(n.startswith("verified against") for n in plan.notes)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    run = InProcessExecutor.open(plan, out)
    want = open_any(model, OpenOptions()).reference({"x": x})[0]
    np.testing.assert_allclose(run.run(x), want, atol=5e-5 * max(1, np.abs(want).max()))
    run.close()


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_published_checkpoints_are_split_in_every_mode(checkpoint: str, mode: str, n: int, tmp_path: Path) -> None:
    if not CHECKPOINTS[checkpoint].exists():
        pytest.skip("the published checkpoints are not here")
    opened = _opened(checkpoint)
    made = _drafted(checkpoint, mode, n)
    plan = written(opened, made, tmp_path / "split")
    check_folder(tmp_path / "split")
    run = InProcessExecutor.open(plan, tmp_path / "split")
    run.run(np.zeros((1, 3, 32, 32), np.float32))
    moved = sum(t.bytes for t in run.moved if COORDINATOR not in (t.source, t.target))
    assert moved == between_devices(plan)
    assert (moved == 0) == (mode in ("local", "replicas"))
    run.close()


_CACHE: dict[str, Any] = {}


def _opened(checkpoint: str) -> Any:
    if checkpoint not in _CACHE:
        opened = open_any(CHECKPOINTS[checkpoint], OpenOptions())
        _CACHE[checkpoint] = opened, prepare(opened.model)
    return _CACHE[checkpoint][0]


def _drafted(checkpoint: str, mode: str, n: int) -> Any:
    _opened(checkpoint)
    graph = _CACHE[checkpoint][1]
    return draft(graph, mode, placed(mode, graph, n), devices(n), LINK)


def test_stock_tmi_groups_exchange_most_of_what_they_compute() -> None:
    """shared/facts/edge.md: 0.65 MB per image at two devices after optimising the placement."""
    if not CHECKPOINTS["tmi-gkp"].exists():
        pytest.skip("the published checkpoints are not here")
    assert 0.6e6 < between_devices(_drafted("tmi-gkp", "branch", 2).plan) < 0.75e6


@pytest.mark.slow
@pytest.mark.parametrize(("form", "side"), [("tmi_style", 224), ("block_diagonal", 128)])
def test_resnet50_is_split_in_every_mode(form: str, side: int, tmp_path: Path) -> None:
    from gkp.benchmarks import networks

    module = networks.resnet50(getattr(networks, form))
    opened = open_any(module, OpenOptions({"": (1, 3, side, side)}))
    graph = prepare(opened.model)
    for mode, n in (("branch", 2), ("branch", 4), ("spatial", 4), ("pipeline", 3)):
        made = draft(graph, mode, placed(mode, graph, n), devices(n), LINK)
        plan = written(opened, made, tmp_path / f"{mode}-{n}")
        assert any(note.startswith("verified") for note in plan.notes)


# ---- failures ---------------------------------------------------------------------------------------------------------
def test_a_split_model_that_computes_something_else_is_not_written(model: Path, tmp_path: Path) -> None:
    opened = open_any(model, OpenOptions())
    wrong = replace(opened, reference=lambda feeds: [2 * y for y in opened.reference(feeds)])
    out = tmp_path / "split"
    with pytest.raises(VerificationError, match="computes something else"):
        written(wrong, drafted(opened.model, "branch", 2), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]


def test_an_existing_destination_is_kept_unless_forced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "split"
    split_model(model, devices(2), LINK, out, mode="local")
    with pytest.raises(UsageError, match="exists"):
        split_model(model, devices(3), LINK, out, mode="branch")
    assert len(read_plan(out).devices) == 2
    split_model(model, devices(3), LINK, out, mode="branch", force=True)
    assert len(read_plan(out).devices) == 3
    check_folder(out)


def test_a_folder_of_something_else_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not written by gkp split"):
        split_model(model, devices(2), LINK, out, mode="local", force=True)
    assert (out / "letter.txt").read_text() == "keep me"


def test_a_missing_model_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        split_model(tmp_path / "none.onnx", devices(2), LINK, tmp_path / "split")


def test_open_shapes_are_fixed_when_a_size_is_given(tmp_path: Path) -> None:
    net = Net("n", 3, "h", 8)
    onnx.save(net.model(net.relu(net.conv3("x", 3, 8))), tmp_path / "open.onnx")
    plan = split_model(tmp_path / "open.onnx", devices(2), LINK, tmp_path / "split", mode="spatial",
                       options=OpenOptions({"x": (2, 3, 6, 8)}))
    assert plan.values[0].shape == [2, 3, 6, 8]


def test_names_from_the_model_reach_the_plan_printable(tmp_path: Path) -> None:
    made = aligned_net()
    for node in made.graph.node:
        node.name = f"\x1b[31m{node.name}"
        node.output[:] = [o if o in {g.name for g in made.graph.output} else f"\x07{o}" for o in node.output]
        node.input[:] = [i if i == "x" or i in {t.name for t in made.graph.initializer} else f"\x07{i}" for i in node.input]
    del made.graph.value_info[:]
    onnx.save(made, tmp_path / "rude.onnx")
    plan = split_model(tmp_path / "rude.onnx", devices(2), LINK, tmp_path / "split", mode="branch")
    assert all(c.isprintable() or c == "\n" for c in (tmp_path / "split" / "plan.json").read_text())
    text = json.dumps(msgspec.to_builtins(plan), ensure_ascii=False)
    assert all(c.isprintable() for c in text)
