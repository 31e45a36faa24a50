"""TMI-GKP from baseline to fine-tuned network, and against the published run: same clusters, same kept channels."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from prune_kit import data, network, session
from torch import nn
from torch_kit import images, shared

import gkp
from gkp.branched import BranchedConv
from gkp.converter.sources.dense import open_dense
from gkp.errors import FileError, UsageError
from gkp.pruning import masks
from gkp.pruning.counting import cost_of
from gkp.pruning.methods.cluster_info import Grouping
from gkp.pruning.methods.kernel_selection import select_channels
from gkp.pruning.methods.snapshots import read_snapshot, snapshot_path
from gkp.pruning.methods.tickets import magnitude_increase
from gkp.pruning.methods.tmi_gkp import TmiGkp, check, form_of, group_layer, mask_of, prunable
from gkp.pruning.methods.tmi_settings import TmiGkpSettings
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.training import Recipe

R50 = Architecture("imagenet_resnet", 50, "conv", 10, (3, 64, 64))
METHOD = TmiGkp()
QUICK = TmiGkpSettings(clustering_method="KPCA")


def snapshots(folder: Path, epochs: range = range(35, 38)) -> Path:
    """Snapshots of a training in which the weights slowly grow to those of network()."""
    folder.mkdir()
    for epoch in epochs:
        state = {name: tensor * (epoch / 70) for name, tensor in network().state_dict().items()}
        torch.save({"model_state_dict": state, "epoch": epoch, "loss": 1.0}, folder / f"epoch_{epoch}.pt")
    return folder


def lines(folder: Path) -> list[str]:
    """The log without times."""
    return [line[20:] for line in (folder / "experiment.log").read_text().splitlines()]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


# ---- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_without_training_groups_every_layer(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path, epochs=0), QUICK)
    model = open_dense(tmp_path / "pruned").module
    opened = gkp.open(tmp_path / "grouped").layers
    names = [f"stage_{s}.0.conv_{c}" for s in (1, 2, 3) for c in "ab"]
    assert [line.partition(":")[0] for line in lines(tmp_path) if "Method: K-PCA; votes: none;" in line] == names
    for name, channels in zip(names, (16, 16, 16, 32, 32, 64), strict=True):
        branches = opened[name].branches
        assert len(branches) == 8
        assert {b.weight.shape[:2] for b in branches} == {(opened[name].out_channels // 8, channels * 9 // 16)}
        assert all((np.diff(b.in_index) > 0).all() for b in branches)
        mask = model.get_submodule(name).weight.detach().numpy().any((2, 3))
        for b in branches:
            assert (np.flatnonzero(mask[b.out_index[0]]) == b.in_index).all()
    assert not (tmp_path / "finetuned").exists()


def test_the_grouped_network_computes_the_pruned_one(tmp_path: Path) -> None:
    baseline = network()
    groupings = {name: group_layer(weight, QUICK) for name, weight in prunable(baseline, multi=False).items()}
    pruned = copy.deepcopy(baseline)
    masks.apply_masks(pruned, {n: torch.from_numpy(mask_of(g, prunable(baseline, False)[n].shape))
                               for n, g in groupings.items()})
    grouped = masks.grouped(baseline, {n: form_of(masks.conv_named(baseline, n), g) for n, g in groupings.items()})
    x = images(3)
    with torch.inference_mode():
        torch.testing.assert_close(grouped(x), pruned(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_snapshots_vote_and_a_resumed_run_asks_nobody_again(tmp_path: Path) -> None:
    settings = TmiGkpSettings(ticket_end_epoch=37)
    out, folder = tmp_path / "out", snapshots(tmp_path / "snapshots")
    METHOD.run(session(out, epochs=0, snapshots=folder), settings)
    votes = [re.search(r"Method: (K-PCA|Spectral|DBSCAN); votes: (.*);", line) for line in lines(out) if "Method" in line]
    assert len(votes) == 6
    for found in votes:
        assert found is not None
        counts = {name: int(count) for name, count in (vote.split() for vote in found[2].split(", "))}
        assert sum(counts.values()) == 3
        assert counts[found[1]] == max(counts.values())
    before, grouped = lines(out), state_of(out / "grouped")
    (out / "grouped").unlink()
    for path in folder.iterdir():
        path.unlink()
    METHOD.run(session(out, epochs=0, snapshots=folder), settings)
    assert [line for line in lines(out) if "Method" in line] == [line for line in before if "Method" in line]
    again = state_of(out / "grouped")
    assert all(torch.equal(again[name], grouped[name]) for name in grouped)


def test_training_with_the_zeros_kept_is_training_in_groups(tmp_path: Path) -> None:
    """Four steps of SGD with momentum and weight decay, once as masked dense convolutions, once as branches."""
    METHOD.run(session(tmp_path, epochs=0), QUICK)
    setting = session(tmp_path / "masked", images=data(64, 16), epochs=1)
    METHOD.run(setting, msgspec.structs.replace(QUICK, batch_size=16, lr=0.02))
    grouped = checkpoint.from_tensors(arrays(tmp_path / "grouped"))
    session(tmp_path / "other", images=data(64, 16), epochs=1).train(
        "finetune", grouped, Recipe(1, 0.02, 0.9, 5e-4, 16))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tuned = checkpoint.from_tensors(arrays(tmp_path / "masked" / "finetuned"))
    with torch.inference_mode():
        torch.testing.assert_close(grouped.eval()(x), tuned(x), atol=1e-3, rtol=1e-3)
        before = checkpoint.from_tensors(arrays(tmp_path / "grouped"))(x)
    assert not torch.allclose(before, tuned(x), atol=1e-2)


def arrays(path: Path) -> dict[str, Any]:
    """A gkp checkpoint with numpy arrays, as from_tensors takes it."""
    payload = torch.load(path, weights_only=True)
    return {**payload, "state_dict": {name: tensor.numpy() for name, tensor in payload["state_dict"].items()}}


def test_fine_tuning_moves_the_weights_and_not_the_wiring(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path, images=data(32, 16), epochs=1), QUICK)
    grouped, tuned = state_of(tmp_path / "grouped"), state_of(tmp_path / "finetuned")
    assert grouped.keys() == tuned.keys()
    same = {name for name in grouped if torch.equal(grouped[name], tuned[name])}
    assert {name for name in grouped if name.endswith(("_index", "_sizes", ".channels"))} <= same
    assert not any(name.endswith("conv_a.weight") for name in same)


def test_a_run_is_replayed_from_its_cluster_info(tmp_path: Path) -> None:
    METHOD.run(session(tmp_path / "one", epochs=0, seed=5), QUICK)
    cluster = json.loads((tmp_path / "one" / "cluster.json").read_text())
    assert set(cluster) == {"permutation", "method", "kernel"}
    assert cluster["method"] == ["K-PCA"] * 6
    first = state_of(tmp_path / "one" / "grouped")
    reads = first["stage_1.0.conv_a.in_index"].split(first["stage_1.0.conv_a.in_sizes"].tolist())
    assert cluster["kernel"][0] == [part.tolist() for part in reads]
    published = json.loads(PUBLISHED_SETTING)
    published["prune_params"]["clustering_assignment"] = "permutation matrix"
    published["cluster_info"] = {"method_list": None, "permutation_matrix_list": cluster["permutation"]}
    METHOD.run(session(tmp_path / "two", epochs=0), METHOD.read_settings(published))
    second = state_of(tmp_path / "two" / "grouped")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "two" / "cluster.json").read_text())["kernel"] == cluster["kernel"]


PUBLISHED_SETTING = """{
  "train_params": {"weight_decay": 5e-4, "gamma": 0.1, "lr": 0.01, "lr_step_size": 100, "train_batch_size": 64,
                   "epoch_num": [300]},
  "prune_params": {"pruning_rate": [0.4375], "n_clusters": 8, "ticket_start_epoch": 35, "ticket_end_epoch": 70,
                   "ticket_step": 1, "clustering_method": "ALL", "criterion": "tickets magnitute increase",
                   "eval_pruned_kernel_relationship": true, "eval_kept_kernel_ratio": 0.2, "cost_balancer": "auto"}}"""


def test_methods_may_be_given_layer_by_layer(tmp_path: Path) -> None:
    methods: Any = ("K-PCA", "Spectral", "K-PCA", "Spectral", "Spectral", "K-PCA")
    METHOD.run(session(tmp_path, epochs=0), TmiGkpSettings(methods=methods))
    assert tuple(json.loads((tmp_path / "cluster.json").read_text())["method"]) == methods


# ---- which layers ----------------------------------------------------------------------------------------------------
def test_bottlenecks_give_their_3x3_convs_or_all() -> None:
    model = skeleton(R50)
    assert len(prunable(model, multi=False)) == 16
    assert {name[-5:] for name in prunable(model, multi=False)} == {"conv2"}
    assert len(prunable(model, multi=True)) == 48


def test_basic_blocks_give_both_convs_and_no_shortcut() -> None:
    names = list(prunable(skeleton(Architecture("imagenet_resnet", 18, "conv", 10, (3, 64, 64))), multi=False))
    assert len(names) == 16
    assert names[:2] == ["layer1.0.conv1", "layer1.0.conv2"]


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TmiGkpSettings(n_clusters=3), "stage_1.0.conv_a has 16 filters, which 3 groups do not divide"),
        (TmiGkpSettings(pruning_rate=0.99), "keeps 0 of stage_1.0.conv_a's 16 input channels"),
        (TmiGkpSettings(pruning_rate=0.001), "keeps 16 of"),
        (TmiGkpSettings(), "needs snapshots"),
        (TmiGkpSettings(methods=("K-PCA",)), "1 methods, the network has 6 layers"),
        (TmiGkpSettings(permutations=((0,),)), "1 permutations, the network has 6 layers"),
        (TmiGkpSettings(permutations=(tuple(range(16)),) * 6), "permutation given for stage_2.0.conv_a"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(tmp_path: Path, settings: TmiGkpSettings, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        METHOD.run(session(tmp_path, epochs=0), settings)
    assert not (tmp_path / "pruned").exists()


def test_a_network_without_residual_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="residual blocks"):
        prunable(nn.Sequential(nn.Conv2d(3, 8, 3)), multi=False)


def test_a_missing_snapshot_is_named_before_any_is_read(tmp_path: Path) -> None:
    folder = snapshots(tmp_path / "snapshots")
    (folder / "epoch_35.pt").write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"no snapshot .*epoch_38\.pt"):
        METHOD.run(session(tmp_path / "out", epochs=0, snapshots=folder), TmiGkpSettings(ticket_end_epoch=38))


def test_filters_that_are_all_equal_have_no_kernel_components() -> None:
    with pytest.raises(UsageError, match="no components"):
        group_layer(np.ones((8, 4, 1, 1)), QUICK)


# ---- against the published run ---------------------------------------------------------------------------------------
R20 = "tmi_gkp/resnet20_cifar10/"


@functools.cache
def dense() -> nn.Module:
    return open_dense(shared(R20 + "baseline")).module


@functools.cache
def published() -> dict[str, BranchedConv]:
    """The 18 grouped convs of the published network; their branches are its groups, in order."""
    layers = gkp.open(shared(R20 + "grouped")).layers
    return {name: form for name, form in layers.items() if len(form.branches) == 8}


def groups_in(form: BranchedConv) -> list[list[int]]:
    return [branch.out_index.tolist() for branch in form.branches]


def test_every_published_group_keeps_the_channels_that_selection_finds() -> None:
    convs = prunable(dense(), multi=False)
    assert list(published()) == list(convs)
    for name, form in published().items():
        for branch in form.branches:
            kept = select_channels(convs[name][branch.out_index], len(branch.in_index))
            assert kept.tolist() == branch.in_index.tolist(), name


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("KPCA", ["stage_1.0.conv_a", "stage_1.2.conv_b", "stage_2.0.conv_a", "stage_2.2.conv_a", "stage_3.1.conv_a"]),
        ("SPECTRAL", ["stage_2.1.conv_b", "stage_2.2.conv_b"]),
    ],
)
def test_published_clusters_are_found_again_in_their_order(method: Any, names: list[str]) -> None:
    """The layers that the published run clustered so, but for the spectral ones of 16 filters (any eigenvectors do); those
    clustered on t-SNE maps depend on rounding."""
    convs = prunable(dense(), multi=False)
    for name in names:
        grouping = group_layer(convs[name], TmiGkpSettings(clustering_method=method))
        assert [list(group) for group in grouping.groups] == groups_in(published()[name]), name


def test_the_published_groups_make_the_published_network_and_its_cost() -> None:
    orders = tuple(tuple(f for group in groups_in(form) for f in group) for form in published().values())
    settings, convs = TmiGkpSettings(permutations=orders), prunable(dense(), multi=False)
    check(convs, settings)
    forms = {name: form_of(masks.conv_named(dense(), name), group_layer(weight, settings, number))
             for number, (name, weight) in enumerate(convs.items())}
    model = masks.grouped(dense(), forms)
    cost = cost_of(model, (3, 32, 32))
    assert (round(cost_of(dense(), (3, 32, 32)).macs / 1e6, 2), round(cost.macs / 1e6, 2)) == (40.55, 23.00)
    assert cost.parameters == 152_794
    assert sum(isinstance(module, BranchedConv2d) for module in model.modules()) == 18
    other = masked_as(published())
    x = images(4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)


def masked_as(forms: dict[str, BranchedConv]) -> nn.Module:
    """The baseline with the published wiring, and the baseline's weights in it."""
    baseline = copy.deepcopy(dense())
    kept = {}
    for name, form in forms.items():
        mask = np.zeros((form.out_channels, form.in_channels), dtype=bool)
        for branch in form.branches:
            mask[np.ix_(branch.out_index, branch.in_index)] = True
        kept[name] = torch.from_numpy(mask)
    masks.apply_masks(baseline, kept)
    return baseline


def test_published_snapshots_give_scores_that_fall_towards_the_end() -> None:
    weight = prunable(dense(), multi=False)["stage_3.2.conv_b"]
    totals = []
    for epoch in (35, 70):
        path = snapshot_path(shared(R20 + "snapshots"), epoch)
        earlier = read_snapshot(path, {"stage_3.2.conv_b": weight.shape})["stage_3.2.conv_b"]
        totals.append(magnitude_increase(weight, earlier).sum())
    assert totals[0] > totals[1] > 0


@pytest.mark.slow
def test_a_published_layer_goes_through_the_vote() -> None:
    weight = prunable(dense(), multi=False)["stage_2.0.conv_a"]
    scores = []
    for epoch in range(35, 71, 5):
        path = snapshot_path(shared(R20 + "snapshots"), epoch)
        scores.append(magnitude_increase(weight, read_snapshot(path, {"stage_2.0.conv_a": weight.shape})["stage_2.0.conv_a"]))
    grouping = group_layer(weight, TmiGkpSettings(), scores=np.stack(scores))
    assert isinstance(grouping, Grouping)
    assert sum(count for _, count in grouping.votes) == 8
    assert grouping.method in dict(grouping.votes)
    assert sorted(f for group in grouping.groups for f in group) == list(range(32))
    assert {len(kept) for kept in grouping.kept} == {9}
