"""--target cpu: the fastest of the CPU targets is written, measured against the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
from brief_kit import measure_briefly
from cli_kit import save, small_net
from fake_target import FakeTarget, groups
from onnx_kit import Net

from gkp.converter import conversion, fastest
from gkp.converter.convert import ConvertOptions, convert
from gkp.converter.lower.candidates import candidates
from gkp.converter.sources import open_any
from gkp.converter.targets.openvino import OpenVinoTarget
from gkp.converter.targets.ort import OrtTarget
from gkp.converter.trials import Trials
from gkp.errors import BackendMissingError, UsageError
from gkp.manifest import Manifest
from gkp.options.convert import convert_options
from gkp.options.targets import CpuOptions, OpenVinoOptions, OrtOptions
from gkp.runtime.load import load
from gkp.runtime.measure import BLOCKS
from gkp.types import silent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = Net(1, 8, 12, 12)
    y = net.conv("x", net.weight(16, 4, 3, 3), group=2, pads=[1] * 4)
    path = tmp_path / "net.onnx"
    path.write_bytes(net.model(net.op("Relu", y)).SerializeToString())
    return path


def test_the_fastest_of_all_installed_targets_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)
    out = tmp_path / "out"
    made = convert(model, ConvertOptions(target=CpuOptions(), output=out, threads=1))
    names = [struct.name for struct in fastest.TARGETS]
    assert made.manifest.target in names
    note = next(n for n in made.manifest.notes if n.startswith("--target cpu"))
    assert note.startswith(f"--target cpu took {made.manifest.target}: batch 1: ")
    assert all(name in note for name in names), note
    assert len(re.findall(r"\d ms \((?:slower|faster|not surely different), \d+\.\d\dx, \d", note)) == len(names) - 1, note
    with load(out) as opened:
        assert opened.manifest.target == json.loads((out / "manifest.json").read_text())["target"] == made.manifest.target


class FakeOrt(FakeTarget):
    name: ClassVar[str] = "ort"


class FakeOpenVino(FakeTarget):
    name: ClassVar[str] = "openvino"


class FakeNative(FakeTarget):
    name: ClassVar[str] = "native"


Costs = Callable[[onnx.ModelProto, int], float]


def on_one_clock(monkeypatch: pytest.MonkeyPatch, **costs: Costs) -> list[FakeTarget]:
    kinds = {"ort": FakeOrt, "openvino": FakeOpenVino, "native": FakeNative}
    made = [kinds[name](monkeypatch, cost, version=f"fake {name}") for name, cost in costs.items()]
    for target in made:
        target.clock = made[-1].clock
    return made


def taken(model: Path, targets: list[FakeTarget]) -> tuple[Manifest, str]:
    """What is written, and the note that says why."""
    made = convert(model, ConvertOptions(target=CpuOptions(), dry_run=True, threads=1), targets=targets).manifest
    return made, next(note for note in made.notes if note.startswith("--target cpu took"))


def test_a_target_that_is_clearly_behind_is_not_run_to_the_end(model: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    targets = on_one_clock(monkeypatch, native=lambda model, batch: 30.0, openvino=lambda model, batch: 10.0,
                           ort=lambda model, batch: 11.0)
    made, note = taken(model, targets)
    assert made.target == "openvino"
    assert note.startswith("--target cpu took openvino: batch 1: 10 ms, ort 11 ms (slower, 1.10x, 1.10 to 1.10), ")
    assert "native 30 ms (slower, 3.00x, 3.00 to 3.00) in a first run" in note
    native, openvino, ort = (len(target.calls) for target in targets)
    assert native < 0.6 * openvino
    assert ort > 0.9 * openvino, "as often as openvino in both runs; the trials of forms have room for fewer rounds"


def two_forms(tmp_path: Path) -> Path:
    """A model with a layer that has several forms."""
    return save(small_net(channels=32), tmp_path / "m.onnx")


@pytest.mark.parametrize(("times", "tried"), [(1.2, True), (3.0, False)])
def test_forms_are_tried_only_on_engines_that_come_near_the_fastest(times: float, tried: bool, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine has one form of everything, as native kernels have."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, asked = two_forms(tmp_path), list[str]()
    run = Trials.run
    monkeypatch.setattr(Trials, "run", lambda self: asked.append(self.target.name) or run(self))
    native, openvino = on_one_clock(monkeypatch, native=lambda model, batch: 10.0,
                                    openvino=lambda model, batch: 10.0 * times)
    monkeypatch.setattr(native, "candidates", lambda conv, plane: candidates(conv, 4, plane)[:1])
    made, note = taken(model, [native, openvino])
    assert made.target == "native"
    assert f"openvino {10 * times:.3g} ms (slower, {times:.2f}x" in note
    assert asked == (["openvino"] if tried else [])


def test_the_fastest_engine_is_written_in_the_forms_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model expects something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ort, openvino = on_one_clock(monkeypatch, ort=lambda model, batch: 30.0,
                                 openvino=lambda model, batch: 5.0 if groups(model) == 2 else 10.0)
    made, _ = taken(two_forms(tmp_path), [ort, openvino])
    assert made.target == "openvino"
    assert made.latency_ms.converted is not None
    assert made.latency_ms.converted.median == pytest.approx(5.0)
    (layer,) = (layer for layer in made.layers if len(layer.candidates) > 1)
    assert "measured" in layer.reason


def test_the_numbers_that_chose_are_those_of_the_report(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, note = taken(model, on_one_clock(monkeypatch, openvino=lambda model, batch: 10.0, ort=lambda model, batch: 11.0))
    assert made.latency_ms.converted is not None
    assert made.latency_ms.converted.median == pytest.approx(10.0)
    assert made.measurements[0].blocks == BLOCKS
    assert "batch 1: 10 ms" in note


def test_the_checkpoint_is_opened_once_for_all_targets(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(conversion, "open_any", lambda source, *more: opened.append(source) or open_any(source, *more))
    made, _ = taken(model, on_one_clock(monkeypatch, openvino=lambda model, batch: 10.0, ort=lambda model, batch: 11.0))
    assert opened == [model]
    assert made.layers


class Absent(OpenVinoTarget):
    """A runtime that is not installed."""

    def require(self, precision: str) -> None:
        raise BackendMissingError("not here")


def test_what_is_not_installed_is_left_out_and_named(model: Path) -> None:
    targets = [Absent(OpenVinoOptions()), OrtTarget(OrtOptions())]
    made = convert(model, ConvertOptions(target=CpuOptions(), dry_run=True, threads=1), targets=targets)
    assert made.manifest.target == "ort"
    assert "--target cpu left out: openvino (not here)" in made.manifest.notes


class Slow(OpenVinoTarget):
    """Of a processor without the precision."""

    def require(self, precision: str) -> None:
        raise UsageError("no bf16 here")


def test_a_target_that_lacks_the_precision_on_this_processor_is_left_out(model: Path) -> None:
    targets = [Slow(OpenVinoOptions()), OrtTarget(OrtOptions())]
    made = convert(model, ConvertOptions(target=CpuOptions(), dry_run=True, threads=1), targets=targets)
    assert "--target cpu left out: openvino (no bf16 here)" in made.manifest.notes


def test_nothing_installed_is_one_error(model: Path) -> None:
    with pytest.raises(BackendMissingError, match=r"openvino \(not here\)"):
        convert(model, ConvertOptions(target=CpuOptions(), dry_run=True), targets=[Absent(OpenVinoOptions())])


def test_in_a_lower_precision_only_the_targets_that_have_it_are_tried() -> None:
    def names(precision: str, **more: Any) -> list[str]:
        return [t.name for t in fastest.cpu_targets(convert_options("cpu", precision=precision, **more), silent)]

    assert names("fp32") == ["native", "openvino", "ort"]
    assert names("bf16") == ["native", "openvino"]
    assert names("fp16") == ["native", "ort"]
    assert names("int8", calibration="random") == ["native", "openvino", "ort"]


def test_it_must_measure(model: Path) -> None:
    with pytest.raises(UsageError, match="measure"):
        convert(model, ConvertOptions(target=CpuOptions(), benchmark=False, dry_run=True))
    with pytest.raises(UsageError, match="measure"):
        convert(model, ConvertOptions(target=CpuOptions(), precision="auto", benchmark=False, dry_run=True))
