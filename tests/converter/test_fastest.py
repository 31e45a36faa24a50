"""--target cpu: the fastest of the CPU targets is written, measured against the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx_kit import Net

from gkp.converter import fastest
from gkp.converter.convert import ConvertOptions, convert
from gkp.errors import BackendMissingError, UsageError
from gkp.runtime.load import load


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = Net(1, 8, 12, 12)
    y = net.conv("x", net.weight(16, 4, 3, 3), group=2, pads=[1] * 4)
    path = tmp_path / "net.onnx"
    path.write_bytes(net.model(net.op("Relu", y)).SerializeToString())
    return path


def test_the_fastest_of_all_installed_targets_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = convert(model, ConvertOptions(target="cpu", output=out, threads=1))
    assert made.manifest.target in fastest.TARGETS
    note = next(n for n in made.manifest.notes if n.startswith("--target cpu"))
    assert all(name in note for name in fastest.TARGETS), note
    with load(out) as opened:
        assert opened.manifest.target == json.loads((out / "manifest.json").read_text())["target"] == made.manifest.target


def test_what_is_not_installed_is_left_out_and_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: fastest.Conversion) -> None:
        if self.options.target != "ort":
            raise BackendMissingError("not here")
        original(self)

    original = fastest.Conversion.measure  # type: ignore[attr-defined]
    monkeypatch.setattr(fastest.Conversion, "measure", measure)  # type: ignore[attr-defined]
    made = convert(model, ConvertOptions(target="cpu", dry_run=True, threads=1))
    assert made.manifest.target == "ort"
    assert {"--target cpu left out: native (not here)", "--target cpu left out: openvino (not here)"} <= set(made.manifest.notes)


def test_nothing_installed_is_one_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: fastest.Conversion) -> None:
        raise BackendMissingError("not here")

    monkeypatch.setattr(fastest.Conversion, "measure", measure)  # type: ignore[attr-defined]
    with pytest.raises(BackendMissingError, match=r"native \(not here\)"):
        convert(model, ConvertOptions(target="cpu", dry_run=True))


def test_it_must_measure(model: Path) -> None:
    with pytest.raises(UsageError, match="measure"):
        convert(model, ConvertOptions(target="cpu", benchmark=False, dry_run=True))
