"""GConv-Prune as a method: settings, numbers of groups, and whole runs on a small network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_kit import RESNET8, data, network, session
from torch.nn import functional as F
from torch_kit import shared

import gkp
from gkp.errors import UsageError
from gkp.pruning.counting import cost_of
from gkp.pruning.masks import plain_convs
from gkp.pruning.methods.gconv_prune import GconvPrune, GconvSettings, group_numbers
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.checkpoint import from_tensors

METHOD = GconvPrune()
R34 = Architecture("imagenet_resnet", 34, "conv", 1000, (3, 224, 224))


def run(folder: Path, payload: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """Run the method; the state dict of `grouped`."""
    here = session(folder, **options)
    METHOD.run(here, METHOD.read_settings(payload))
    state: dict[str, torch.Tensor] = torch.load(folder / "grouped", weights_only=True)["state_dict"]
    return state


def opened(path: Path) -> torch.nn.Module:
    """The network in one of a run's files."""
    payload = torch.load(path, weights_only=True)
    return from_tensors(payload | {"state_dict": {n: t.numpy() for n, t in payload["state_dict"].items()}})


def shapes(arch: Architecture = RESNET8) -> dict[str, tuple[int, int]]:
    return {name: (c.out_channels, c.in_channels) for name, c in plain_convs(skeleton(arch)).items()}


def config(path: Path, layers: dict[str, tuple[int, int, int]], prefix: str = "") -> str:
    path.write_text(json.dumps({f"{prefix}{n}": {"G": g, "F": f, "C": c, "id": 0} for n, (g, f, c) in layers.items()}))
    return str(path)


# ---- settings --------------------------------------------------------------------------------------------------------
def test_defaults_are_the_published_cifar_schedule() -> None:
    settings = METHOD.read_settings({})
    recipe = settings.recipe()
    assert (recipe.epochs, recipe.lr, recipe.milestones, recipe.weight_decay, recipe.batch_size) == (60, 0.01, (30, 45), 5e-4, 128)
    assert (settings.perm, settings.num_sort_iters, settings.max_groups) == ("GRPS", 10, 64)


@pytest.mark.parametrize(("payload", "named"), [
    ({"groups": 4}, "groups"),
    ({"num_groups": 1}, "num_groups"),
    ({"num_groups": 4, "mcpg": 8}, "exclude"),
    ({"group_cfg": "a.json", "max_num_ops": 5}, "exclude"),
    ({"max_num_params": 0}, "max_num_params"),
    ({"perm": "BEST"}, "perm"),
    ({"criterion": "fisher"}, "criterion"),
    ({"num_sort_iters": 0}, "num_sort_iters"),
])
def test_settings_that_make_no_sense_are_refused(payload: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        METHOD.read_settings(payload)


# ---- numbers of groups -----------------------------------------------------------------------------------------------
def test_uniform_groups_leave_the_first_conv_dense() -> None:
    numbers = group_numbers(shapes(), GconvSettings(num_groups=4), RESNET8)
    assert numbers.pop("conv_1_3x3") == 1
    assert set(numbers.values()) == {4}


def test_mcpg_divides_the_wider_side() -> None:
    numbers = group_numbers(shapes(), GconvSettings(mcpg=8), RESNET8)
    assert numbers == {"conv_1_3x3": 1, "stage_1.0.conv_a": 2, "stage_1.0.conv_b": 2, "stage_2.0.conv_a": 4,
                       "stage_2.0.conv_b": 4, "stage_3.0.conv_a": 8, "stage_3.0.conv_b": 8}


@pytest.mark.parametrize("settings", [GconvSettings(num_groups=7), GconvSettings(mcpg=5), GconvSettings(mcpg=64)])
def test_groups_that_divide_nothing_are_refused(settings: GconvSettings) -> None:
    with pytest.raises(UsageError, match="no layer"):
        group_numbers(shapes(), settings, RESNET8)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("names", ["canonical", "layer"])
def test_configuration_may_use_public_names_and_module(tmp_path: Path, prefix: str, names: str) -> None:
    layer = {"canonical": "stage_2.0.conv_b", "layer": "layer2.0.conv2"}[names]
    path = config(tmp_path / "a.json", {layer: (8, 32, 32)}, prefix)
    numbers = group_numbers(shapes(), GconvSettings(group_cfg=path), RESNET8)
    assert {name for name, g in numbers.items() if g == 8} == {"stage_2.0.conv_b"}
    assert sum(numbers.values()) == 8 + 6


def test_published_configuration_fits_resnet34() -> None:
    path = shared("gconv_prune/resnet34_A.json")
    numbers = group_numbers(shapes(R34), GconvSettings(group_cfg=str(path)), R34)
    assert sorted(set(numbers.values())) == [1, 2, 4, 8]


@pytest.mark.parametrize(("layers", "problem"), [
    ({"layer9.0.conv1": (2, 16, 16)}, "not in this network"),
    ({"stage_1.0.conv_a": (2, 16, 16), "somewhere.conv1": (2, 16, 16)}, "1 of 2"),
    ({"stage_1.0.conv_a": (1, 16, 16), "somewhere.conv1": (1, 16, 16)}, "nothing would be pruned"),
    ({"stage_1.0.conv_a": (2, 32, 16)}, "16 filters"),
    ({"stage_1.0.conv_a": (3, 16, 16)}, "3 groups"),
    ({"stage_1.0.conv_a": (-1, 16, 16)}, "-1 groups"),
])
def test_configuration_of_another_network_is_refused(
    tmp_path: Path, layers: dict[str, tuple[int, int, int]], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        group_numbers(shapes(), GconvSettings(group_cfg=config(tmp_path / "a.json", layers)), RESNET8)


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_grouped_network_computes_what_the_masked_one_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = run(out, {"num_groups": 4}, epochs=0)
    assert state["stage_3.0.conv_b.in_sizes"].tolist() == [16] * 4
    assert not (out / "finetuned").exists()
    lines = (out / "experiment.log").read_text()
    assert "stage_3.0.conv_b: 4 groups," in lines
    assert "conv_1_3x3: dense" in lines
    x = torch.randn(2, 3, 32, 32)
    nets = {stage: opened(out / stage) for stage in ("pruned", "grouped")}
    with torch.inference_mode():
        torch.testing.assert_close(nets["grouped"](x), nets["pruned"](x), rtol=0, atol=1e-5)
    layers = gkp.open(out / "grouped").layers
    assert [len(layers[name].branches) for name in ("stage_1.0.conv_a", "stage_3.0.conv_b", "conv_1_3x3")] == [4, 4, 1]


def test_weights_inside_the_groups_are_the_baselines(tmp_path: Path) -> None:
    run(tmp_path / "out", {"num_groups": 2}, epochs=0)
    pruned = torch.load(tmp_path / "out" / "pruned", weights_only=True)["state_dict"]
    for name, conv in plain_convs(network()).items():
        weight = pruned[f"{name}.weight"]
        kept = weight != 0
        assert torch.equal(weight[kept], conv.weight.detach()[kept])
        assert kept.float().mean() == (1 if name == "conv_1_3x3" else 0.5)


def test_search_meets_its_budget_and_preserves_more_where_it_can(tmp_path: Path) -> None:
    baseline = network()
    full = cost_of(baseline, (3, 32, 32))
    limit = round(full.parameters * 0.4 / 1e6, 4)
    run(tmp_path / "a", {"max_num_params": limit}, epochs=0, settings=1)
    grouped = json.loads((tmp_path / "a" / "setting.json").read_text())["results"]["grouped"]
    assert grouped["parameters"] <= limit * 1e6
    assert grouped["parameters"] > 0.3 * full.parameters
    ops = round(full.macs * 0.5 / 1e6, 3)
    run(tmp_path / "b", {"max_num_ops": ops, "min_factor": 8}, epochs=0)
    grouped = json.loads((tmp_path / "b" / "setting.json").read_text())["results"]["grouped"]
    assert grouped["macs"] <= ops * 1e6


def test_budgets_out_of_reach_and_budgets_already_met_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be met"):
        run(tmp_path / "a", {"max_num_params": 0.0001}, epochs=0)
    with pytest.raises(UsageError, match="within the budget"):
        run(tmp_path / "b", {"max_num_params": 100}, epochs=0)


def test_fine_tuning_keeps_the_zeros_and_moves_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, {"num_groups": 2, "batch_size": 16, "lr": 0.1}, images=data(), epochs=2)
    before, after = (torch.load(out / stage, weights_only=True)["state_dict"] for stage in ("grouped", "finetuned"))
    name = "stage_2.0.conv_a"
    assert torch.equal(before[f"{name}.in_index"], after[f"{name}.in_index"])
    assert torch.equal(before[f"{name}.out_index"], after[f"{name}.out_index"])
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    results = json.loads((out / "setting.json").read_text())["results"]
    assert results["finetuned"]["macs"] == results["grouped"]["macs"]


@pytest.mark.parametrize("option", ["no_weight", "train_from_scratch"])
def test_only_the_topology_remains(tmp_path: Path, option: str) -> None:
    kept = run(tmp_path / "kept", {"num_groups": 2}, epochs=0)
    fresh = run(tmp_path / "fresh", {"num_groups": 2, option: True}, epochs=0)
    again = run(tmp_path / "again", {"num_groups": 2, option: True}, epochs=0)
    name = "stage_1.0.conv_b"
    for key in ("in_index", "out_index"):
        assert torch.equal(kept[f"{name}.{key}"], fresh[f"{name}.{key}"])
    assert not torch.equal(kept[f"{name}.weight"], fresh[f"{name}.weight"])
    same_rest = torch.equal(kept["classifier.weight"], fresh["classifier.weight"])
    assert same_rest == (option == "no_weight")
    assert torch.equal(fresh[f"{name}.weight"], again[f"{name}.weight"])


def test_taylor_criterion_uses_the_gradient_of_the_training_loss(tmp_path: Path) -> None:
    images, payload = data(), {"num_groups": 2, "criterion": "taylor", "batch_size": 16, "taylor_batches": 2}
    here = session(tmp_path / "out", images=images, epochs=0)
    METHOD.run(here, METHOD.read_settings(payload))
    model = network()
    sum(F.cross_entropy(model(x), y) for x, y in here.batches("taylor", 16)).backward()
    worth = {n: (c.weight * c.weight.grad).abs().sum((2, 3)) for n, c in plain_convs(model).items()}
    grouped = gkp.open(tmp_path / "out" / "grouped").layers["stage_3.0.conv_b"]
    kept = (grouped.to_dense() != 0).any((2, 3))
    share = float(worth["stage_3.0.conv_b"][torch.from_numpy(kept)].sum() / worth["stage_3.0.conv_b"].sum())
    line = next(ln for ln in (tmp_path / "out" / "experiment.log").read_text().splitlines() if "stage_3.0.conv_b: 2" in ln)
    assert f"{share:.1%}" in line


def test_taylor_criterion_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training images"):
        run(tmp_path / "out", {"criterion": "taylor"}, epochs=0)


def test_bottlenecks_and_shortcuts_are_grouped_too(tmp_path: Path) -> None:
    arch = Architecture("imagenet_resnet_3x3_stem", 50, "conv", 4, (3, 32, 32))
    numbers = group_numbers(shapes(arch), GconvSettings(num_groups=8), arch)
    assert numbers["layer1.0.downsample.0"] == 8
    assert numbers["layer4.2.conv3"] == 8
    assert numbers["conv1"] == 1
    assert group_numbers(shapes(arch), GconvSettings(num_groups=8), replace(arch, num_classes=9)) == numbers
