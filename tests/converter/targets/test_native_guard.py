"""Native kernels are never silently slower than a stock engine: real engines on small networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import save
from onnx_kit import Net

from gkp.converter.convert import convert
from gkp.manifest import Manifest
from gkp.options.convert import convert_options
from gkp.report import wording


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully connected layer as a 1x1 convolution of one pixel, which has no vectors to share: no case for these kernels."""
    net = Net(1, 256, 1, 1)
    y = net.op("Relu", net.conv("x", net.weight(256, 256, 1, 1)))
    return save(net.model(net.op("Relu", net.conv(y, net.weight(256, 256, 1, 1)))), tmp_path_factory.mktemp("net") / "m.onnx")


def converted(network: Path, *, benchmark: bool, **more: object) -> Manifest:
    options = {"dry_run": True, "threads": 1, "benchmark": benchmark, **more}
    return convert(network, convert_options("native", **options)).manifest


def test_the_headline_begins_with_a_stock_engine_if_and_only_if_one_was_faster(network: Path) -> None:
    made = converted(network, benchmark=True)
    (row,) = made.measurements
    assert {r.engine for r in row.stock} == {"ort", "openvino"}
    best = wording.fastest_rival([*row.stock, *(r for r in row.rivals if not r.as_installed)])
    assert best is not None
    assert best.ratio is not None
    name = wording.ENGINES[best.engine]
    assert wording.headline(made).startswith(f"{name} runs this model ") is (best.ratio.value < 1)
    assert all((r.ms is None) == (r.missing is not None) for r in row.stock), "far slower, or a time"
    assert made.estimated_vs_stock is None, "it was measured"


def test_an_unmeasured_library_that_the_models_expect_to_lose_says_so_as_an_estimate(network: Path, tmp_path: Path) -> None:
    assert converted(network, benchmark=False).estimated_vs_stock is None, "nothing was compiled"
    made = converted(network, benchmark=False, dry_run=False, output=tmp_path / "out")
    assert made.estimated_vs_stock is not None
    assert 0 < made.estimated_vs_stock < 0.9
    assert wording.headline(made).startswith("estimated slower than a stock engine, 0.")
    assert made.measurements == []
