"""GSparsity from baseline to retrained network, through sessions; and its results in gkp-convert."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from prune_kit import RESNET8, data, session
from torch_kit import assert_computes, images, liven

import gkp
from gkp.converter.sources import open_model
from gkp.errors import UsageError
from gkp.pruning.methods import load_method
from gkp.pruning.methods.gsparsity import Gsparsity, parameter_groups, prunable
from gkp.pruning.methods.gsparsity_compress import compress
from gkp.pruning.methods.gsparsity_form import save_small_model
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.checkpoint import save

R50 = Architecture("imagenet_resnet", 50, "conv", 10, (3, 64, 64))
METHOD = Gsparsity()


def baseline(arch: Architecture = RESNET8, zeros: int = 5) -> torch.nn.Module:
    """A network whose first filters of every conv in a block are zero."""
    torch.manual_seed(0)
    model = liven(skeleton(arch))
    for name in prunable(arch, model, "all-conv"):
        model.get_submodule(name).weight.data[:zeros] = 0
    return model


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(x)


# ---- scopes and gains ------------------------------------------------------------------------------------------------
def test_conv12_doubles_the_gain_in_the_middle_layers_of_a_resnet50() -> None:
    factors = prunable(R50, skeleton(R50), "conv12")
    assert len(factors) == 2 * (3 + 4 + 6 + 3)
    assert all(re.fullmatch(r"layer\d\.\d\.conv[12]", name) for name in factors)
    assert {(name[5], factor) for name, factor in factors.items()} == {("1", 1.0), ("2", 2.0), ("3", 2.0), ("4", 1.0)}


def test_all_conv_takes_every_conv_of_the_blocks_with_one_gain() -> None:
    factors = prunable(R50, skeleton(R50), "all-conv")
    assert len(factors) == 3 * (3 + 4 + 6 + 3)
    assert set(factors.values()) == {1.0}


def test_cifar_blocks_give_their_first_conv_or_both() -> None:
    model = skeleton(RESNET8)
    assert prunable(RESNET8, model, "conv12") == {"stage_1.0.conv_a": 1.0, "stage_2.0.conv_a": 2.0, "stage_3.0.conv_a": 1.0}
    assert len(prunable(RESNET8, model, "all-conv")) == 6


def test_every_parameter_is_in_one_group_and_only_chosen_convs_have_a_gain() -> None:
    model = skeleton(RESNET8)
    groups = parameter_groups(model, {"stage_2.0.conv_a": 0.1, "stage_3.0.conv_a": 0.05})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    (chosen,) = (group["params"] for group in groups if group["gain"] == 0.1)
    assert chosen == [model.stage_2[0].conv_a.weight]


def test_other_networks_are_refused() -> None:
    arch = Architecture("cifar_vgg", 16, "conv", 10, (3, 32, 32))
    with pytest.raises(UsageError, match="vgg16"):
        prunable(arch, skeleton(arch), "conv12")
    model = baseline()
    done = compress(model, {"stage_1.0.conv_b": torch.arange(16) < 5})
    with pytest.raises(UsageError, match=r"stage_1\.0\.conv_b is in branches"):
        prunable(RESNET8, done.model, "all-conv")


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["conv12", "all-conv"])
def test_zero_filters_go_without_training_and_the_function_stays(tmp_path: Path, scope: str) -> None:
    model = baseline()
    METHOD.run(session(tmp_path / "run", baseline=model, epochs=0), METHOD.read_settings({"scope": scope}))
    x = images()
    for stage in ("pruned", "grouped"):
        opened = open_model(tmp_path / "run" / stage)
        assert opened.system == "gkp"
        assert_computes(opened, logits(model, x), x)
    layers = gkp.open(tmp_path / "run" / "grouped").layers
    assert layers["stage_2.0.conv_a"].out_channels == 32 - 5 + 1  # and the carrier of constants
    assert len(layers["stage_2.0.conv_b"].branches) == 1
    assert int(layers["stage_2.0.conv_b"].written.sum()) == 27
    state = torch.load(tmp_path / "run" / "grouped", weights_only=True)["state_dict"]
    assert ("stage_2.0.conv_b.out_index" in state) == (scope == "all-conv")
    results = json.loads((tmp_path / "run" / "setting.json").read_text())["results"]
    assert results["pruned"]["zero_filters"] == (15 if scope == "conv12" else 30)
    assert results["grouped"]["inexact_layers"] == 0
    assert results["grouped"]["compression_error"] < 1e-5
    assert results["grouped"]["macs"] < results["pruned"]["macs"] * 1.1
    log = (tmp_path / "run" / "experiment.log").read_text()
    assert "stage_1.0.conv_a: 5 of 16 filters are zero" in log
    assert "carrier" in log


def test_inexact_compression_is_said_in_log_and_results(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path / "run", baseline=baseline(), epochs=0), METHOD.read_settings({"exact": False}))
    assert "not exact at the borders" in (tmp_path / "run" / "experiment.log").read_text()
    results = json.loads((tmp_path / "run" / "setting.json").read_text())["results"]["grouped"]
    assert results["inexact_layers"] == 3
    assert results["compression_error"] > 1e-4


def test_run_that_prunes_nothing_says_why(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path / "run", baseline=baseline(zeros=0), epochs=0), METHOD.read_settings({}))
    assert "no filter is zero" in (tmp_path / "run" / "experiment.log").read_text()
    results = json.loads((tmp_path / "run" / "setting.json").read_text())["results"]
    assert results["grouped"]["parameters"] == results["pruned"]["parameters"]


def test_search_zeroes_filters_and_retraining_trains_what_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = METHOD.read_settings({"mu": 1.0, "lr": 0.9, "epochs": 2, "retrain_epochs": 1, "milestones": [],
                                     "batch_size": 4, "threshold": 1e-3})
    METHOD.run(session(tmp_path / "run", baseline=liven(skeleton(RESNET8)), images=data()), settings)
    results = json.loads((tmp_path / "run" / "setting.json").read_text())["results"]
    assert results["pruned"]["zero_filters"] > 0
    assert results["finetuned"]["parameters"] == results["grouped"]["parameters"] < results["pruned"]["parameters"]
    assert results["finetuned"]["accuracy"] is not None
    assert gkp.open(tmp_path / "run" / "finetuned").system == "gkp"


def test_compressed_network_converts(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path / "run", baseline=baseline(), epochs=0), METHOD.read_settings({"scope": "all-conv"}))
    gkp.convert(tmp_path / "run" / "grouped", target="onnx", output=tmp_path / "out", benchmark=False)
    x = images()
    running = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = running.run(None, {running.get_inputs()[0].name: x[:1].numpy()})
    expected = logits(baseline(), x)[:1].numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


def test_settings_are_published_ones_and_bad_ones_are_named() -> None:
    settings = load_method("gsparsity").read_settings({})
    found = (settings.mu, settings.lr, settings.epochs, settings.batch_size, settings.threshold)  # type: ignore[attr-defined]
    assert found == (0.05, 1e-3, 90, 256, 1e-6)
    for payload, word in (({"mew": 1}, "mew"), ({"mu": -1}, "mu"), ({"scope": "conv3"}, "scope"), ({"beta": 1.0}, "beta")):
        with pytest.raises(UsageError, match=word):
            METHOD.read_settings(payload)


# ---- the public form -------------------------------------------------------------------------------------------------
def zero_of(model: torch.nn.Module, **counts: int) -> dict[str, torch.Tensor]:
    names = {name.replace("_", "."): count for name, count in counts.items()}
    return {name: torch.arange(model.get_submodule(name).out_channels) < count for name, count in names.items()}


def test_small_model_opens_as_gsparsity_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = liven(skeleton(R50))
    zero = zero_of(model, layer1_1_conv1=20, layer2_0_conv2=128, layer3_5_conv2=100)
    done = compress(model, zero)
    assert done.blocks == ["layer2.0"]  # its constant is in the BatchNorm of its shortcut
    save_small_model(tmp_path / "small_model_conv12_1e-06.pth.tar", done.model, R50)
    opened = open_model(tmp_path / "small_model_conv12_1e-06.pth.tar")
    assert (opened.system, opened.pruned) == ("gsparsity", True)
    x = images(1, 64)
    assert_computes(opened, logits(done.model, x), x)


def test_public_form_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = liven(skeleton(R50))
    constant = compress(model, zero_of(model, layer2_1_conv2=128)).model
    with pytest.raises(UsageError, match=r"constant of layer2\.1"):
        save_small_model(tmp_path / "x.pth.tar", constant, R50)
    with pytest.raises(UsageError, match=r"layer1\.0\.conv3 is in branches"):
        save_small_model(tmp_path / "x.pth.tar", compress(model, zero_of(model, layer1_0_conv3=9)).model, R50)
    with pytest.raises(UsageError, match="cifar_resnet"):
        save_small_model(tmp_path / "x.pth.tar", baseline(), RESNET8)
    assert list(tmp_path.iterdir()) == []


def test_branch_that_is_a_constant_survives_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = liven(skeleton(R50))
    done = compress(model, zero_of(model, layer2_1_conv2=128))
    save(tmp_path / "model.pt", done.model, R50, {})
    x = images(1, 64)
    assert_computes(open_model(tmp_path / "model.pt"), logits(done.model, x), x)
