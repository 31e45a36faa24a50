"""tools/export_zoo.py: networks come out as ONNX files that compute what the modules do, and what is missing is said."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_kit import run_ort

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_zoo", ROOT / "tools" / "export_zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_unet(tool: ModuleType) -> Any:
    return tool.Network("unet", partial(tool.UNet, width=8, levels=2), size=32)


def test_there_are_twenty_networks(tool: ModuleType) -> None:
    names = [network.name for network in tool.ZOO]
    assert len(names) == len(set(names)) == 20
    assert {network.package for network in tool.ZOO} == {"torchvision", "timm", None}


def test_a_network_is_written_for_batch_1_with_activations_in_range_and_always_the_same(tool: ModuleType,
                                                                                        tmp_path: Path) -> None:
    assert tool.run(tmp_path / "zoo", [small_unet(tool)]) == 0
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == ["unet.onnx"]
    model = onnx.load(tmp_path / "zoo" / "unet.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert {"Conv", "ConvTranspose", "MaxPool", "Concat"} <= {node.op_type for node in model.graph.node}
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    (y,) = run_ort(model, {"input": x})
    assert y.shape == (1, 2, 32, 32)
    assert 0.1 < y.std() < 10
    assert tool.run(tmp_path / "again", [small_unet(tool)]) == 0
    np.testing.assert_array_equal(run_ort(onnx.load(tmp_path / "again" / "unet.onnx"), {"input": x})[0], y)


def test_normalisations_that_begin_at_zero_compute_something(tool: ModuleType) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8, affine=False))
    torch.nn.init.zeros_(net[1].weight)
    with torch.no_grad():
        tool.calibrate(net, torch.randn(4, 3, 8, 8))
    assert (net[1].weight == 1).all()


def test_normalisations_have_the_statistics_of_what_they_read(tool: ModuleType) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.5)).train()
    x = 5 + 3 * torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        tool.calibrate(net, x)
        y = net(x)
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)


def test_torchvision_is_asked_for_no_weights(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def resnet18(**options: Any) -> Any:
        asked.append(options)
        return torch.nn.Conv2d(3, 4, 3)

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=SimpleNamespace(resnet18=resnet18)))
    assert tool.main([str(tmp_path), "--only", "resnet18"]) == 0
    assert asked == [{"weights": None}]
    assert (tmp_path / "resnet18.onnx").is_file()


def test_a_missing_package_is_one_line_before_anything_is_written(tool: ModuleType, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert tool.main([str(tmp_path / "zoo"), "--only", "resnet18", "ghostnet_100", "unet"]) == 4
    assert not (tmp_path / "zoo").exists()
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: torchvision is not installed; timm is not installed"
    assert hint.startswith("  try: pip install")


def test_a_network_that_fails_is_said_and_the_others_are_written(tool: ModuleType, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Any:
        raise RuntimeError("no such\nlayer")

    def infinite() -> Any:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Threshold(1e30, float("inf")))

    networks = [tool.Network("broken", broken), tool.Network("infinite", infinite, size=16), small_unet(tool)]
    assert tool.run(tmp_path, networks) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unet.onnx"], "and nothing half-written"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/3] broken: failed: no such layer"
    assert "not finite" in lines[1]
    assert lines[2].startswith("[3/3] unet: ")
    assert lines[3:] == ["error: 2 networks of 3 could not be exported"]


def test_an_unknown_name_is_refused_with_those_that_there_are(tool: ModuleType, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path / "zoo"), "--only", "resnet19"]) == 2
    assert "resnet18" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()
