"""Small ONNX files that ask for much memory or time are refused before they get it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cost_kit import Cost, costs
from hostile_onnx import COSTLY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ALLOWED = {"external data in subgraphs": 3, "recursive functions": 6, "sparse": 6}
"""Exit codes of what is refused for another reason than its cost."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Cost, Cost]]:
    """By name: bytes of the file and its neighbours, what inspecting it costs, and what converting it costs."""
    files = {name: make(tmp_path_factory.mktemp("hostile")) for name, make in COSTLY.items()}
    looks = costs([["inspect", path] for path in files.values()])
    made = costs([["convert", path, "--target", "onnx", "-o", path.parent / "out", "--no-benchmark", "--threads", "1"]
                  for path in files.values()])
    return {name: (_size(path.parent), look, conversion)
            for (name, path), look, conversion in zip(files.items(), looks, made, strict=True)}


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_that_asks_for_much_is_refused_within_the_budget(name: str, measured: dict[str, tuple[int, Cost, Cost]]) -> None:
    size, *outcomes = measured[name]
    for outcome in outcomes:
        assert outcome.code == ALLOWED.get(name, 5), outcome.err
        assert outcome.err.startswith("error: ")
        assert "internal" not in outcome.err
        assert outcome.memory < 8 * size + (512 << 20)
        assert outcome.seconds < 10 + 2e-6 * size
