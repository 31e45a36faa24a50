"""Structure-LTH as a method: settings, refusals, and whole runs on a small network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune_kit import data, network, session

import gkp
from gkp.branched import BranchedConv
from gkp.errors import UsageError
from gkp.pruning.masks import plain_convs
from gkp.pruning.methods.imp import RewindPoint, prune_smallest
from gkp.pruning.methods.structure_lth import LthSettings, StructureLth, rewind_epoch
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.checkpoint import from_tensors

METHOD = StructureLth()
REGROUP = {"structure": "regroup", "parts": 4, "min_rows": 4, "rounds": 3}
SHORT = {"rounds": 2, "batch_size": 16, "rewind_epoch": 80}


def run(folder: Path, payload: dict[str, Any], **options: Any) -> None:
    METHOD.run(session(folder, **options), METHOD.read_settings(payload))


def state_of(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def forms_of(path: Path) -> dict[str, BranchedConv]:
    """The convs in branches of one of a run's files."""
    payload = torch.load(path, weights_only=True)
    model = from_tensors(payload | {"state_dict": {n: t.numpy() for n, t in payload["state_dict"].items()}})
    return {name: m.to_branched() for name, m in model.named_modules() if isinstance(m, BranchedConv2d)}


# ---- settings --------------------------------------------------------------------------------------------------------
def test_defaults_are_the_published_schedule() -> None:
    settings = METHOD.read_settings({})
    recipe = settings.recipe()
    assert (recipe.epochs, recipe.lr, recipe.milestones, recipe.weight_decay) == (160, 0.1, (80, 120), 1e-4)
    assert (settings.rounds, settings.rate, settings.rewind_epoch, settings.parts) == (10, 0.2, 16, 8)


@pytest.mark.parametrize(("payload", "named"), [
    ({"rate": 0}, "rate"), ({"rate": 1}, "rate"), ({"rate": 1.5}, "rate"), ({"fillback_rate": 1}, "fillback_rate"),
    ({"rounds": 0}, "rounds"), ({"structure": "reform"}, "structure"), ({"criterion": "taylor"}, "criterion"),
    ({"rewind_epoch": 161}, "rewind_epoch 161"), ({"parts": 1}, "parts"), ({"colour": 1}, "colour"),
])
def test_settings_that_make_no_sense_are_refused(payload: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        METHOD.read_settings(payload)


def test_rewind_epoch_scales_with_a_shortened_training() -> None:
    settings = LthSettings()
    assert [rewind_epoch(settings, epochs) for epochs in (160, 80, 10, 2)] == [16, 8, 1, 1]
    assert rewind_epoch(LthSettings(rewind_epoch=0), 10) == 0


# ---- runs without training -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["remain", "magnitude"])
def test_refill_leaves_one_branch_of_whole_filters(tmp_path: Path, criterion: str) -> None:
    out = tmp_path / "out"
    run(out, {"criterion": criterion, "rounds": 4}, epochs=0)
    forms, baseline = forms_of(out / "grouped"), plain_convs(network())
    assert set(forms) == set(baseline) - {"conv_1_3x3"}  # 0.8 ** 4 is less than half of every layer
    for name, form in forms.items():
        (branch,) = form.branches
        assert branch.in_index.size == form.in_channels
        assert branch.out_index.size < form.out_channels
        np.testing.assert_array_equal(branch.weight, baseline[name].weight.detach().numpy()[branch.out_index])
    assert not any(form.is_dense for form in list(gkp.open(out / "grouped").layers.values())[1:])
    assert not (out / "finetuned").exists()


def test_magnitude_scores_the_whole_filters_of_the_dense_network(tmp_path: Path) -> None:
    """Written out after the public program's rule: the ticket's mask says how many filters remain, the L1 norms of the
    pretrained network, which has no mask, say which."""
    run(tmp_path / "out", {"criterion": "magnitude", "rounds": 4}, epochs=0)
    convs = dict(list(plain_convs(network()).items())[1:])
    weights = {name: conv.weight.detach() for name, conv in convs.items()}
    ticket = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for _ in range(4):
        ticket = prune_smallest(weights, ticket, 0.2)
    masked_alike = []
    for name, form in forms_of(tmp_path / "out" / "grouped").items():
        count = int(ticket[name].sum() / weights[name][0].numel()) + 1
        expected = weights[name].double().abs().sum((1, 2, 3)).argsort(descending=True)[:count]
        (branch,) = form.branches
        assert branch.out_index.tolist() == sorted(expected.tolist())
        masked = (weights[name] * ticket[name]).double().abs().sum((1, 2, 3)).argsort(descending=True)[:count]
        masked_alike.append(sorted(masked.tolist()) == sorted(expected.tolist()))
    assert not all(masked_alike)  # scoring what the ticket keeps would choose others


def test_every_round_scores_the_dense_network_that_the_search_began_with(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    torch.save({"model_state_dict": network(seed=9).state_dict()}, tmp_path / "snapshots" / "epoch_80.pt")
    payload = {**SHORT, "criterion": "magnitude", "lr": 1.0, "rate": 0.4}  # training changes the order of the filters
    run(tmp_path / "out", payload, images=data(), epochs=1, snapshots=tmp_path / "snapshots")
    baseline = plain_convs(network())
    for name, form in forms_of(tmp_path / "out" / "grouped").items():
        (branch,) = form.branches
        norms = baseline[name].weight.detach().double().abs().sum((1, 2, 3))
        assert branch.out_index.tolist() == sorted(norms.argsort(descending=True)[: branch.out_index.size].tolist())


def test_refill_plus_keeps_more_filters(tmp_path: Path) -> None:
    kept = []
    for rate in (0.0, 0.5):
        run(tmp_path / str(rate), {"fillback_rate": rate}, epochs=0)
        kept.append(json.loads((tmp_path / str(rate) / "setting.json").read_text())["results"]["pruned"]["remaining"])
    assert kept[0] < 0.8**10 * 2
    assert kept[1] > kept[0] + 0.2


@pytest.mark.parametrize("criterion", ["l1", "l2", "saliency"])
def test_activation_criteria_run_on_training_images(tmp_path: Path, criterion: str) -> None:
    run(tmp_path / "out", {"criterion": criterion, "rounds": 3, "batch_size": 8}, epochs=0, images=data())
    lines = (tmp_path / "out" / "experiment.log").read_text()
    assert "of 64 filters" in lines
    with pytest.raises(UsageError, match="training images"):
        run(tmp_path / "other", {"criterion": criterion}, epochs=0)


@pytest.mark.parametrize("extraction", ["corrected", "published"])
def test_regroup_leaves_dense_blocks_of_im2col_columns(tmp_path: Path, extraction: str) -> None:
    pytest.importorskip("mtkahypar")
    out = tmp_path / "out"
    run(out, {**REGROUP, "extraction": extraction, "rounds": 6}, epochs=0)
    pruned, forms = state_of(out / "pruned"), forms_of(out / "grouped")
    for name, form in forms.items():
        np.testing.assert_array_equal(form.to_dense(), pruned[f"{name}.weight"].numpy())
        for branch in form.branches:
            assert ((branch.weight != 0) == (branch.weight != 0).any(0)).all()  # dense over the block's columns
            assert 4 <= branch.out_index.size <= form.out_channels / 4 * 1.1
    assert len(forms["stage_3.0.conv_b"].branches) == 4
    opened = [form for form in gkp.open(out / "grouped").layers.values() if form.kernel_shape == (3, 3)]
    assert sorted(len(form.branches) for form in opened) == [1] + [4] * 6
    results = json.loads((out / "setting.json").read_text())["results"]
    assert results["grouped"]["macs"] <= results["pruned"]["macs"]
    assert results["grouped"]["structured_layers"] >= 2


def test_same_seed_gives_the_same_network(tmp_path: Path) -> None:
    pytest.importorskip("mtkahypar")
    for payload in (REGROUP, {"rounds": 3}):
        for folder in ("a", "b"):
            run(tmp_path / folder, payload, epochs=0, seed=4, force=True)
        first, second = (state_of(tmp_path / folder / "grouped") for folder in "ab")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_too_small_for_a_block_are_refused_before_any_training(tmp_path: Path) -> None:
    pytest.importorskip("mtkahypar")
    with pytest.raises(UsageError, match=r"8 parts of at most 64 filters .* a block needs 17") as error:
        run(tmp_path / "out", {"structure": "regroup"}, images=data())
    assert '"min_rows"' in error.value.hint
    hinted = json.loads("{" + error.value.hint.removeprefix("settings such as ").split(" suit")[0] + "}")
    run(tmp_path / "hinted", {"structure": "regroup", **hinted}, epochs=0)


# ---- runs with training ----------------------------------------------------------------------------------------------
def test_snapshot_is_what_the_ticket_is_rewound_to(tmp_path: Path) -> None:
    early = network(seed=9)
    (tmp_path / "snapshots").mkdir()
    torch.save({"model_state_dict": early.state_dict()}, tmp_path / "snapshots" / "epoch_80.pt")
    out = tmp_path / "out"
    run(out, SHORT, images=data(), epochs=1, snapshots=tmp_path / "snapshots")
    pruned = state_of(out / "pruned")
    assert not (out / "checkpoints" / "train-round_0.pt").exists()
    for name, conv in plain_convs(early).items():
        weight = pruned[f"{name}.weight"]
        rows = weight.flatten(1).any(1)
        assert torch.equal(weight[rows], conv.weight.detach()[rows])
    assert torch.equal(pruned["classifier.weight"], early.state_dict()["classifier.weight"])
    assert not torch.equal(state_of(out / "finetuned")["classifier.weight"], pruned["classifier.weight"])


def test_missing_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"epoch_16\.pt"):
        run(tmp_path / "out", {}, images=data(), snapshots=tmp_path)


def test_dropped_filters_stay_zero_through_every_round(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, {**SHORT, "every_round": True, "rate": 0.5}, images=data(), epochs=1)
    grouped, finetuned = state_of(out / "grouped"), state_of(out / "finetuned")
    name = "stage_3.0.conv_b"
    assert torch.equal(grouped[f"{name}.out_index"], finetuned[f"{name}.out_index"])
    log = (out / "experiment.log").read_text()
    assert log.count("in the refilled mask") == 2
    assert log.count("round_1: epoch 1 of 1") == 1
    assert "round 0: no snapshots" in log


def test_interrupted_run_goes_on_with_the_same_rewind_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    payload = {**SHORT, "rounds": 1, "rewind_epoch": 1, "epochs": 3, "milestones": [2]}
    run(whole, payload, images=data())
    follow = RewindPoint.after_epoch

    def stop(self: RewindPoint, epoch: int, model: torch.nn.Module, accuracy: float | None) -> None:
        follow(self, epoch, model, accuracy)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RewindPoint, "after_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(halved, payload, images=data())
    run(halved, payload, images=data())
    assert "resumed after epoch 1" in (halved / "experiment.log").read_text()
    first, second = (state_of(folder / "pruned") for folder in (whole, halved))
    assert all(torch.equal(first[name], second[name]) for name in first)
