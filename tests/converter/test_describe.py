"""What `gkp inspect` says of a layer: multiply-accumulates at full size, whatever was dropped since."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from cli_kit import gkp, save
from onnx_kit import Net
from prune_kit import network, session
from torch_kit import shared

from gkp.pruning.counting import planes_of
from gkp.pruning.masks import plain_convs
from gkp.pruning.methods.structure_lth import StructureLth

DSP = "dsp/resnet20_g4.pt"


def inspected(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(gkp("inspect", path, "--target", "onnx", "--json", "-", expect=0).out)
    return made


def test_refilled_layers_count_in_full_though_their_dead_filters_are_dropped(tmp_path: Path) -> None:
    method = StructureLth()
    method.run(session(tmp_path / "run", epochs=0), method.read_settings({"rounds": 6}))
    found = inspected(tmp_path / "run/grouped")
    model = network()
    convs, planes = plain_convs(model), planes_of(model, (3, 32, 32))
    full = {name: conv.weight.numel() * prod(planes[name][1]) for name, conv in convs.items()}
    layers = {layer["name"]: layer for layer in found["layers"] if layer["name"] in full}
    assert {name: layer["macs_dense"] for name, layer in layers.items()} == full
    narrow = [name for name, layer in layers.items() if layer["channels"] != [convs[name].in_channels, convs[name].out_channels]]
    assert narrow  # channels are gone between the convolutions, and yet the whole layer counts
    assert sum(layer["macs_kept"] for layer in layers.values()) < 0.6 * sum(full.values())
    assert found["macs"]["dense"] == sum(full.values()) + 640  # and the classifier


def test_packed_layers_count_at_the_width_they_were_pruned_from() -> None:
    found = inspected(shared(DSP))
    kernels = {"x".join(map(str, layer["kernel"])) for layer in found["layers"]}
    assert kernels == {"3x3", "1x1"}
    assert sum(layer["macs_dense"] for layer in found["layers"]) + 640 == found["macs"]["dense"]
    assert found["macs"]["dense"] == pytest.approx(40.81e6, rel=1e-3)


def test_a_model_without_an_ancestor_counts_what_its_file_holds(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    dead = net.weight(6, 3, 3, 3)
    dead[2:] = 0
    inner = net.relu(net.conv("x", dead))
    found = inspected(save(net.model(net.conv3(inner, 6, 4)), tmp_path / "m.onnx"))
    first, second = found["layers"]
    assert first["macs_dense"] == 6 * 3 * 9 * first["plane"][0] * first["plane"][1]
    assert second["macs_dense"] == 4 * 6 * 9 * second["plane"][0] * second["plane"][1]
    assert first["channels"] == [3, 2]
