"""Where a conversion writes when nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkp.converter.stages import default_output


@pytest.mark.parametrize(("source", "target", "name"), [
    ("runs/net.pt", "ort", "net.ort"), ("net.onnx", "onnx", "net-gkp.onnx"), ("runs/net.onnx", "onnx", "net-gkp.onnx"),
    ("net.onnx", "ort", "net.ort"), ("grouped", "native", "grouped.native"), (".hidden", "ort", ".hidden.ort")])
def test_the_default_is_never_the_source(source: str, target: str, name: str) -> None:
    assert default_output(Path(source), target) == Path(name)
