"""A session: phases that are not repeated, generators, accuracy, what is saved, what a network costs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune_kit import RESNET8, data, network, session
from torch import nn

from gkp.branched import BranchedConv
from gkp.converter.sources.base import SourceFile
from gkp.converter.sources.gkp_checkpoint import matches
from gkp.errors import UsageError
from gkp.pruning.counting import cost_of, planes_of
from gkp.pruning.data import Shard
from gkp.pruning.models import checkpoint
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.training import Recipe


def grouped(model: nn.Module) -> nn.Module:
    """A copy whose conv of 16 -> 16 channels has two branches of 8 -> 8."""
    model = copy.deepcopy(model)
    weight = model.stage_1[0].conv_a.weight.detach().numpy()
    halves = [(range(h, h + 8), range(h, h + 8), weight[h:h + 8, h:h + 8]) for h in (0, 8)]
    model.stage_1[0].conv_a = BranchedConv2d(BranchedConv.build(16, 16, halves, kernel_shape=(3, 3), pads=(1,) * 4))
    return model


def reopened(path: Path) -> nn.Module:
    payload = torch.load(path, weights_only=True)
    payload["state_dict"] = {name: tensor.numpy() for name, tensor in payload["state_dict"].items()}
    return checkpoint.from_tensors(payload)


# ---- phases and generators ------------------------------------------------------------------------------------------
def test_a_phase_is_made_once_and_looks_the_same_afterwards(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"masks": {"a": torch.eye(2)}, "score": np.float32(0.5), "names": ["x", None]}

    first = session(tmp_path / "out").once("grouping", make)
    second = session(tmp_path / "out").once("grouping", make)
    assert len(calls) == 1
    for found in (first, second):
        assert torch.equal(found["masks"]["a"], torch.eye(2))
        assert found["score"] == 0.5
        assert found["names"] == ["x", None]


def test_an_interrupted_phase_is_made_again(tmp_path: Path) -> None:
    def cut() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session(tmp_path / "out").once("grouping", cut)
    assert session(tmp_path / "out").once("grouping", lambda: {"x": 1}) == {"x": 1}


def test_generators_follow_from_seed_and_name_alone(tmp_path: Path) -> None:
    run, again, other = (session(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    run.rng("something else").random(100)
    assert run.rng("x").random() == again.rng("x").random() != other.rng("x").random()
    assert run.rng("x").random() != run.rng("y").random()
    draws = [torch.rand(2, generator=s.torch_rng("x")).tolist() for s in (run, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_batches_outside_training_follow_from_the_name(tmp_path: Path) -> None:
    run = session(tmp_path / "out", images=data(32))
    first, again, other = (torch.cat([x for x, _ in run.batches(name, 8)]) for name in ("a", "a", "b"))
    assert first.shape == (32, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [None, data()])
def test_zero_epochs_train_nothing(tmp_path: Path, images: Any) -> None:
    run = session(tmp_path / "out", epochs=0, images=images)
    before = copy.deepcopy(run.baseline.state_dict())
    assert run.train("t", run.baseline, Recipe(300, 0.1)) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in run.baseline.state_dict().items())
    run.save("finetuned", run.baseline)
    assert not (tmp_path / "out" / "finetuned").exists()


def test_training_without_images_is_refused(tmp_path: Path) -> None:
    run = session(tmp_path / "out")
    with pytest.raises(UsageError, match="needs training images") as error:
        run.train("t", run.baseline, Recipe(1, 0.1))
    assert "--data" in error.value.hint
    with pytest.raises(UsageError):
        run.batches("x", 4)
    assert run.accuracy(run.baseline) is None


def test_epochs_of_the_command_line_scale_the_schedule(tmp_path: Path) -> None:
    run = session(tmp_path / "out", epochs=2, images=data())
    run.train("t", run.baseline, Recipe(300, 0.1, batch_size=16, milestones=(150,)))
    log = (tmp_path / "out" / "experiment.log").read_text()
    assert "epoch 1 of 2, lr 0.1," in log
    assert "epoch 2 of 2, lr 0.01," in log


def test_every_tenth_epoch_stays_as_a_network_that_gkp_opens(tmp_path: Path) -> None:
    run = session(tmp_path / "out", epochs=11, images=data(8, 4))
    model = grouped(run.baseline)
    run.train("finetune", model, Recipe(11, 0.01, batch_size=8))
    found = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert found == ["finetune-epoch_9.pt", "most_recent_checkpoint.pt", "train-finetune.pt"]
    path = tmp_path / "out" / "checkpoints" / "finetune-epoch_9.pt"
    assert matches(SourceFile(path))
    assert isinstance(reopened(path).stage_1[0].conv_a, BranchedConv2d)


# ---- accuracy and what is saved -------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [False, True])
def test_accuracy_is_the_share_of_right_labels_and_leaves_the_network_alone(tmp_path: Path, training: bool) -> None:
    run = session(tmp_path / "out", images=data(8, 700))
    model = network().train(training)
    with torch.no_grad():
        model.classifier.weight[:] = 0
        model.classifier.bias[:] = torch.eye(10)[3]
    before = copy.deepcopy(model.state_dict())
    labels = torch.cat([y for _, y in data(8, 700).test(100, Shard(), torch.device("cpu"))])
    assert run.accuracy(model) == float((labels == 3).double().mean())
    assert model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_saved_stage_computes_the_same_and_its_results_are_in_the_settings(tmp_path: Path) -> None:
    run = session(tmp_path / "out", images=data(8, 20))
    model = grouped(run.baseline)
    run.save("grouped", model, kept=0.5, best=None)
    found = reopened(tmp_path / "out" / "grouped")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(x), model(x))
    result = json.loads((tmp_path / "out" / "setting.json").read_text())["results"]["grouped"]
    assert result["accuracy"] == run.accuracy(model)
    assert (result["kept"], result["best"]) == (0.5, None)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    meta = torch.load(tmp_path / "out" / "grouped", weights_only=True)["meta"]
    assert meta["test_accuracy"] == result["accuracy"]
    assert meta["mean"] == list(run.data.normalisation.mean)


def test_a_given_accuracy_is_not_measured_and_one_of_the_same_weights_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path / "out", images=data(8, 20))
    run.save("pruned", run.baseline, accuracy=0.25)
    assert run._folder.results["pruned"]["accuracy"] == 0.25
    run.save("grouped", run.baseline)
    measured = run._folder.results["grouped"]["accuracy"]
    again, calls = session(tmp_path / "out", images=data(8, 20)), []
    monkeypatch.setattr(again, "accuracy", lambda model: calls.append(1))
    again.save("grouped", network())
    assert (again._folder.results["grouped"]["accuracy"], calls) == (measured, [])
    again.save("grouped", network(seed=1))
    assert calls == [1]


def test_log_lines_reach_the_file_and_the_screen(tmp_path: Path) -> None:
    said: list[str] = []
    session(tmp_path / "out", say=said.append).log("stage_1.0.conv_a Method: K-PCA")
    assert said == ["stage_1.0.conv_a Method: K-PCA"]
    assert (tmp_path / "out" / "experiment.log").read_text().endswith(" stage_1.0.conv_a Method: K-PCA\n")


# ---- what a network costs -------------------------------------------------------------------------------------------
def test_costs_worked_out_by_hand() -> None:
    """ResNet-8 on 32x32: stem 3*16*9*1024; stage 1 2*16*16*9*1024; stage 2 (16*32 + 32*32)*9*256; stage 3
    (32*64 + 64*64)*9*64; classifier 640. Parameters: the weights, two per BatchNorm channel, ten biases."""
    weights = 3 * 16 * 9, 2 * 16 * 16 * 9, (16 * 32 + 32 * 32) * 9, (32 * 64 + 64 * 64) * 9
    macs = sum(w * plane for w, plane in zip(weights, (1024, 1024, 256, 64), strict=True)) + 640
    norms = 2 * (16 + 2 * 16 + 2 * 32 + 2 * 64)
    cost = cost_of(network(), RESNET8.input_shape)
    assert (cost.macs, cost.parameters) == (macs, sum(weights) + norms + 650)
    halved = cost_of(grouped(network()), RESNET8.input_shape)
    assert (cost.macs - halved.macs, cost.parameters - halved.parameters) == (8 * 16 * 9 * 1024, 8 * 16 * 9)
    masked = network()
    with torch.no_grad():
        masked.stage_3[0].conv_b.weight[:, :16] = 0
    assert cost.macs - cost_of(masked, RESNET8.input_shape).macs == 64 * 16 * 9 * 64


def test_counting_leaves_the_network_as_it_is() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    cost_of(model, RESNET8.input_shape)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_planes_of_convs_and_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 2)).train()
    assert planes_of(model, (3, 8, 8)) == {"0": ((8, 8), (4, 4)), "1": ((4, 4), (4, 4)), "3": ((1, 1), (1, 1))}
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_network_grouped_as_tmi_gkp_published_costs_what_was_published() -> None:
    """ResNet-20, 8 groups that read 9/16 of the channels each: 40.55M to 23.00M multiply-accumulates, 269,722 to 152,794
    parameters (index lists are none)."""
    arch = replace(RESNET8, depth=20)
    model = network(arch)
    dense = cost_of(model, arch.input_shape)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and name.startswith("stage_"):
            (out, channels), kept = conv.weight.shape[:2], conv.in_channels * 9 // 16
            triples = [(range(kept), range(g * out // 8, (g + 1) * out // 8), np.ones((out // 8, kept, 3, 3), np.float32))
                       for g in range(8)]
            form = BranchedConv.build(channels, out, triples, kernel_shape=(3, 3), strides=conv.stride, pads=(1,) * 4)
            model.set_submodule(name, BranchedConv2d(form))
    grouped = cost_of(model, arch.input_shape)
    assert (round(dense.macs / 1e6, 2), dense.parameters) == (40.55, 269_722)
    assert (round(grouped.macs / 1e6, 2), grouped.parameters) == (23.00, 152_794)
