"""GConv-Prune's group configurations are read, checked and matched with a network's layers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gkp.errors import FileError, UsageError
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.group_config import LayerGroups, groups_of, read_group_config

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "checkpoints" / "gconv_prune"


def write(path: Path, config: Any) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_layers_are_read_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "a.json", {f"{prefix}layer1.0.conv1": {"G": 8, "F": 64, "C": 32, "id": 8}})
    assert read_group_config(path) == {"layer1.0.conv1": LayerGroups(8, 64, 32)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_groups_are_given_under_the_networks_own_names(prefix: str) -> None:
    config = {"conv1": LayerGroups(1, 64, 3), "layer1.0.conv1": LayerGroups(8, 64, 64)}
    convs = {f"{prefix}conv1": (64, 3), f"{prefix}layer1.0.conv1": (64, 64), f"{prefix}layer1.0.conv2": (64, 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert groups_of(config, convs) == {f"{prefix}conv1": 1, f"{prefix}layer1.0.conv1": 8}


def test_names_that_match_nothing_are_warned_of() -> None:
    config = {"conv1": LayerGroups(1, 64, 3), "layer9.0.conv1": LayerGroups(8, 64, 64)}
    with pytest.warns(UserWarning, match=r"1 of 2 layers .* layer9\.0\.conv1"):
        assert groups_of(config, {"conv1": (64, 3)}) == {"conv1": 1}


def test_other_channels_than_the_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="64 filters"):
        groups_of({"conv1": LayerGroups(2, 32, 32)}, {"conv1": (64, 32)})


@pytest.mark.parametrize("groups", [-1, 0, 3, 64])
def test_groups_that_do_not_divide_the_channels_are_refused(tmp_path: Path, groups: int) -> None:
    path = write(tmp_path / "a.json", {"conv1": {"G": groups, "F": 64, "C": 32}})
    with pytest.raises(UsageError, match="conv1"):
        read_group_config(path)


def test_layer_named_twice_is_refused(tmp_path: Path) -> None:
    layer = {"G": 1, "F": 8, "C": 8}
    with pytest.raises(UsageError, match="twice"):
        read_group_config(write(tmp_path / "a.json", {"conv1": layer, "module.conv1": layer}))


@pytest.mark.parametrize(
    "config", [[], {}, {"conv1": 4}, {"conv1": {"G": 1, "F": 8}}, {"conv1": {"G": 1.0, "F": 8, "C": 8}},
               {"conv1": {"G": True, "F": 8, "C": 8}}, {"conv1": {"G": 1, "F": 8, "C": "8"}}],
)
def test_other_json_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(FileError):
        read_group_config(write(tmp_path / "a.json", config))


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 100_000])
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(FileError):
        read_group_config(tmp_path / "a.json")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        read_group_config(tmp_path / "a.json")


def test_published_configuration_fits_resnet34_but_for_a_name_with_a_slip_of_the_pen() -> None:
    path = SHARED / "resnet34_A.json"
    if not path.exists():
        pytest.skip("the published configuration is not beside the checkout")
    with torch.device("meta"):
        model = skeleton(Architecture("imagenet_resnet", 34, "conv", 1000, (3, 224, 224)))
    convs = {n: (m.out_channels, m.in_channels) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    config = read_group_config(path)
    with pytest.warns(UserWarning, match=r"1 of 36 .*: layer4\.downsample\.0$"):
        groups = groups_of(config, convs)
    assert set(convs) - set(groups) == {"layer4.0.downsample.0"}
    dense = sum(layer.out_channels * layer.in_channels for layer in config.values())
    kept = sum(layer.out_channels * layer.in_channels // layer.groups for layer in config.values())
    assert kept / dense == pytest.approx(0.796, abs=0.001)
