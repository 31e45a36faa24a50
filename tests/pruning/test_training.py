"""Training: the schedule, what a step computes, what remains, and going on after an interruption."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prune_kit import data, network, session
from torch import nn
from torch.nn import functional as F

from gkp.errors import FileError, GkpError, UsageError
from gkp.images.normalisation import NONE
from gkp.pruning.data import Shard
from gkp.pruning.run_folder import CHECKPOINTS
from gkp.pruning.training import Hooks, Recipe, StepContext, seed_of

HELPERS = Path(__file__).parents[1] / "helpers"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the schedule ---------------------------------------------------------------------------------------------------
def test_steps_multiply_the_rate_at_each_milestone() -> None:
    recipe = Recipe(6, 1.0, milestones=(2, 4), gamma=0.1)
    assert [recipe.factor(e) for e in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_cosine_begins_again_with_every_cycle() -> None:
    recipe = Recipe(8, 1.0, cosine=4)
    assert [recipe.factor(e) for e in range(8)] == pytest.approx([1, 0.853553, 0.5, 0.146447] * 2, abs=1e-6)


def test_a_shortened_recipe_keeps_its_proportions() -> None:
    recipe = Recipe(300, 0.01, milestones=(100, 200), cosine=60)
    short = recipe.shortened(30)
    assert (short.epochs, short.milestones, short.cosine, short.lr) == (30, (10, 20), 6, 0.01)
    assert recipe.shortened(300) == recipe
    assert recipe.shortened(0).epochs == 0
    assert Recipe(0, 0.01, milestones=(1,)).shortened(5).epochs == 5


@given(epochs=st.integers(1, 50), published=st.integers(1, 400), data=st.data())
def test_the_first_epoch_of_a_shortened_recipe_has_the_full_rate(epochs: int, published: int, data: Any) -> None:
    at = data.draw(st.lists(st.integers(1, published), max_size=3))
    short = Recipe(published, 0.1, milestones=tuple(at)).shortened(epochs)
    assert short.factor(0) == 1
    assert all(1 <= m <= epochs for m in short.milestones)


@pytest.mark.parametrize("bad", [{"epochs": -1}, {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"batch_size": 0}, {"cosine": 0}])
def test_impossible_recipes_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe(**({"epochs": 1, "lr": 0.1} | bad))


def test_seeds_differ_by_name_and_epoch() -> None:
    assert len({seed_of(0, "a", 0), seed_of(0, "a", 1), seed_of(0, "b", 0), seed_of(1, "a", 0)}) == 4
    assert seed_of(7, "finetune", 3) == seed_of(7, "finetune", 3)


# ---- what a step computes -------------------------------------------------------------------------------------------
def test_training_is_momentum_sgd_with_weight_decay(tmp_path: Path) -> None:
    """Against the update of Sutskever et al. 2013 as PyTorch documents it, written out here."""
    images, recipe = data(24, 8), Recipe(2, 0.05, momentum=0.8, weight_decay=1e-3, batch_size=8, milestones=(1,))
    run = session(tmp_path / "out", images=images)
    trained, wanted = copy.deepcopy(run.baseline), copy.deepcopy(run.baseline)
    run.train("t", trained, recipe, Hooks(keep="last"))
    speed = {name: torch.zeros_like(p) for name, p in wanted.named_parameters()}
    for epoch in range(2):
        wanted.train()
        rng = np.random.default_rng(seed_of(0, "t", epoch, "images"))
        for x, y in images.train(rng, 8, Shard(), torch.device("cpu")):
            wanted.zero_grad()
            F.cross_entropy(wanted(x), y).backward()
            for name, p in wanted.named_parameters():
                speed[name] = 0.8 * speed[name] + p.grad + 1e-3 * p.detach()
                p.data -= (0.05, 0.005)[epoch] * speed[name]
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_network_and_another_seed_another(tmp_path: Path) -> None:
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = session(tmp_path / folder, baseline=network(), images=data(), seed=seed)
        run.train("t", run.baseline, Recipe(1, 0.05, batch_size=16))
        found.append(state(run.baseline))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_the_network_comes_back_in_eval_mode_as_ordinary_tensors(tmp_path: Path) -> None:
    run = session(tmp_path / "out", images=data())
    run.train("t", run.baseline, Recipe(1, 0.05, batch_size=16))
    assert not run.baseline.training
    assert "forward" not in vars(run.baseline)
    for p in run.baseline.parameters():
        assert (p.device.type, p.dtype, p.is_contiguous()) == ("cpu", torch.float32, True)


# ---- hooks ----------------------------------------------------------------------------------------------------------
def test_a_mask_that_is_reapplied_after_every_step_holds(tmp_path: Path) -> None:
    run = session(tmp_path / "out", images=data())

    def reapply(model: Any) -> None:
        model.conv_1_3x3.weight.data[:4] = 0

    run.train("t", run.baseline, Recipe(2, 0.05, batch_size=16), Hooks(after_step=reapply))
    assert not run.baseline.conv_1_3x3.weight[:4].any()
    assert run.baseline.conv_1_3x3.weight[4:].all()


def test_a_step_of_the_methods_own_replaces_the_usual_one(tmp_path: Path) -> None:
    run, seen = session(tmp_path / "out", images=data(32)), []

    def step(here: StepContext) -> torch.Tensor:
        assert here.model is run.baseline
        assert here.model.training
        seen.append((here.epoch, here.step, here.total_steps, tuple(here.x.shape), len(here.y), here.optimizer.param_groups[0]["lr"]))
        return torch.tensor(1.0)

    before = state(run.baseline)
    run.train("t", run.baseline, Recipe(2, 0.5, batch_size=16, milestones=(1,)), Hooks(step=step))
    assert seen == [(e, 2 * e + s, 4, (16, 3, 32, 32), 16, (0.5, 0.05)[e]) for e in (0, 1) for s in (0, 1)]
    assert same(before, state(run.baseline))


def test_groups_of_a_methods_own_optimizer_follow_the_schedule(tmp_path: Path) -> None:
    run, rates = session(tmp_path / "out", images=data()), []

    def make(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
        assert recipe.epochs == 3
        rest = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
        return torch.optim.Adam([{"params": rest, "lr": 0.001}, {"params": model.classifier.parameters(), "lr": 0.01}])

    def step(here: StepContext) -> torch.Tensor:
        rates.append(tuple(group["lr"] for group in here.optimizer.param_groups))
        loss = here.loss()
        here.optimizer.zero_grad()
        here.accelerator.backward(loss)
        here.optimizer.step()
        return loss

    run.train("t", run.baseline, Recipe(3, 99.0, batch_size=32, milestones=(1, 2)), Hooks(optimizer=make, step=step))
    assert rates == [pytest.approx((0.001 * f, 0.01 * f)) for f in (1, 0.1, 0.01)]


class Scored:
    """Images whose test labels make the accuracies what the test wants: of 8 images, so many are right in each call."""

    def __init__(self, model: nn.Module, right: list[int]) -> None:
        self._inner, self._model, self._right = data(16, 8), model, list(right)
        self.description, self.classes, self.image, self.test_size = "scored", 10, (3, 32, 32), 8
        self.normalisation = NONE
        self.steps, self.train = self._inner.steps, self._inner.train

    def test(self, batch_size: int, shard: Shard, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ((x, _),) = self._inner.test(batch_size, shard, device)
        guess = self._model(x).argmax(1)
        wrong = torch.arange(8) >= self._right.pop(0)
        yield x, torch.where(wrong, (guess + 1) % 10, guess)


@pytest.mark.parametrize(("hooks", "epoch"), [
    ({}, 1), ({"keep_from": 2}, 3), ({"keep": "last"}, 4), ({"keep_from": 99}, 4)])
def test_the_weights_of_the_best_or_last_epoch_remain(tmp_path: Path, hooks: dict[str, Any], epoch: int) -> None:
    """Accuracies 2, 7, 3, 5, 5 of 8: the best is epoch 1, from epoch 2 on it is epoch 3 (the first of equals)."""
    right, model, after = [2, 7, 3, 5, 5], network(), []
    run = session(tmp_path / "out", baseline=model, images=Scored(model, right))

    def keep(number: int, trained: nn.Module, accuracy: float | None) -> None:
        assert accuracy == right[number] / 8
        after.append(state(trained))

    accuracy = run.train("t", model, Recipe(5, 0.05, batch_size=16), Hooks(after_epoch=keep, **hooks))
    assert accuracy == right[epoch] / 8
    assert same(state(model), after[epoch])
    assert not same(after[0], after[1])


# ---- interruption ---------------------------------------------------------------------------------------------------
class Counter:
    """State beside the network's: how many steps there were, and a tensor."""

    def __init__(self) -> None:
        self.steps, self.logits = 0, torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "logits": self.logits}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.steps, self.logits = saved["steps"], saved["logits"].clone()


def noisy_run(folder: Path, stop_in: tuple[int, int] | None = None, mixed: str = "no") -> tuple[dict[str, Any], Counter]:
    """Three epochs with momentum, noise from the global generator and state of its own; Ctrl-C in (epoch, step)."""
    run, counter = session(folder, baseline=network(), images=data(48, 8)), Counter()

    def step(here: StepContext) -> torch.Tensor:
        if (here.epoch, here.step % 3) == stop_in:
            raise KeyboardInterrupt
        counter.steps += 1
        counter.logits += torch.rand(3)
        here.optimizer.zero_grad()
        loss = here.loss() + 1e-3 * counter.logits.sum() + torch.rand(()) * here.model.conv_1_3x3.weight.sum()
        here.accelerator.backward(loss)
        here.optimizer.step()
        return loss

    model = copy.deepcopy(run.baseline)
    run.train("t", model, Recipe(3, 0.05, batch_size=16, milestones=(2,)), Hooks(step=step, extra=counter, keep="last"))
    return state(model), counter


@pytest.mark.parametrize("stop_in", [(0, 1), (1, 0), (1, 2), (2, 2)])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, stop_in: tuple[int, int]) -> None:
    wanted, counted = noisy_run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        noisy_run(tmp_path / "cut", stop_in)
    assert [p for p in (tmp_path / "cut").rglob("*") if p.name.startswith(".")] == []
    found, counter = noisy_run(tmp_path / "cut")
    assert same(found, wanted)
    assert counter.steps == counted.steps == 9
    assert torch.equal(counter.logits, counted.logits)
    log = (tmp_path / "cut" / "experiment.log").read_text()
    assert log.count("epoch 1 of 3") == 1
    assert log.count("epoch 3 of 3") == 1


def test_the_best_epoch_is_remembered_over_an_interruption(tmp_path: Path) -> None:
    model, after = network(), []
    run = session(tmp_path / "out", baseline=model, images=Scored(model, [7, 2]))

    def stop(number: int, trained: nn.Module, _: float | None) -> None:
        after.append(state(trained))
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train("t", model, Recipe(3, 0.05, batch_size=16), Hooks(after_epoch=stop))
    model = network(seed=5)
    run = session(tmp_path / "out", baseline=model, images=Scored(model, [2, 3]))
    assert run.train("t", model, Recipe(3, 0.05, batch_size=16)) == 7 / 8
    assert same(state(model), after[0])


def test_a_finished_phase_is_not_repeated(tmp_path: Path) -> None:
    wanted, counted = noisy_run(tmp_path / "out")
    found, counter = noisy_run(tmp_path / "out", (0, 0))  # would stop in its first step
    assert same(found, wanted)
    assert torch.equal(counter.logits, counted.logits)


def test_phases_do_not_resume_from_one_another(tmp_path: Path) -> None:
    run, epochs = session(tmp_path / "out", images=data()), []
    for name in ("first", "second"):
        run.train(name, run.baseline, Recipe(2, 0.05, batch_size=16), Hooks(after_epoch=lambda e, *_: epochs.append(e)))
    assert epochs == [0, 1, 0, 1]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run = session(tmp_path / "out", images=data())
    run.train("t", run.baseline, Recipe(1, 0.05, batch_size=16))
    with pytest.raises(FileError, match="does not fit"):
        session(tmp_path / "out", images=data()).train("t", nn.Linear(3, 10), Recipe(1, 0.05, batch_size=16))


def test_an_epoch_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full while the second epoch is written: the first is still there, and the run goes on from it."""
    run, real, calls = session(tmp_path / "out", images=data()), torch.save, []

    def full(payload: Any, path: Path, *rest: Any) -> None:
        calls.append(path)
        real(payload, path, *rest)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:500])
            raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match="disk full"):
        run.train("t", run.baseline, Recipe(3, 0.05, batch_size=16))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "out" / CHECKPOINTS).iterdir()] == ["most_recent_checkpoint.pt"]
    session(tmp_path / "out", images=data()).train("t", network(), Recipe(3, 0.05, batch_size=16))
    assert "resumed after epoch 1" in (tmp_path / "out" / "experiment.log").read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_epochs_before(tmp_path: Path, value: float) -> None:
    run = session(tmp_path / "out", images=data())

    def step(here: StepContext) -> torch.Tensor:
        return torch.tensor(value if here.epoch == 1 else 1.0)

    with pytest.raises(GkpError, match=r"finetune: the loss is not a finite number in epoch 2, step 1") as error:
        run.train("finetune", run.baseline, Recipe(3, 0.05, batch_size=16), Hooks(step=step))
    assert "learning rate" in error.value.hint
    saved = torch.load(tmp_path / "out" / CHECKPOINTS / "most_recent_checkpoint.pt", weights_only=True)
    assert saved["epochs"] == 1


# ---- mixed precision and several processes: one setting per process of Python ---------------------------------------
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from prune_kit import data, network, session
from gkp.pruning.run_folder import open_run
from gkp.pruning.session import Session
from gkp.pruning.training import Hooks, Recipe, make_accelerator
import prune_kit, torch
accelerator = make_accelerator(sys.argv[3])
main = accelerator.is_main_process
setting = {"method": "test"}
if not main:
    accelerator.wait_for_everyone()
folder = open_run(Path(sys.argv[2]), setting, writes=main)
if main:
    accelerator.wait_for_everyone()
run = Session(arch=prune_kit.RESNET8, baseline=network(), data=data(48, 10), folder=folder, accelerator=accelerator)
dtypes = []
run.baseline.classifier.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
time.sleep(0 if main else 1)  # the others come when the first one would be done
found = run.once("phase", lambda: {"x": torch.rand(3)})
accuracy = run.train("t", run.baseline, Recipe(2, 0.05, batch_size=16))
run.save("finetuned", run.baseline)
total = sum(float(p.double().sum()) for p in run.baseline.state_dict().values())
said = f"{accelerator.num_processes} {accuracy} {total!r} {float(found['x'].sum())} {dtypes[0]}"
Path(sys.argv[2] + f".said.{accelerator.process_index}").write_text(said)  # a file each: lines of two processes mix on one pipe
accelerator.end_training()
"""


def trained(folder: Path, mixed: str = "no", processes: int = 1) -> list[list[str]]:
    """What each process says."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*(launch if processes > 1 else [sys.executable]), str(script), str(HELPERS), str(folder / "out"), mixed],
                          capture_output=True, text=True, check=False, timeout=110,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / f"out.said.{number}").read_text().split() for number in range(processes)]


@pytest.mark.slow
def test_mixed_precision_computes_in_it_and_keeps_float32_weights(tmp_path: Path) -> None:
    ((_, _, _, _, dtype),) = trained(tmp_path, "bf16")
    assert dtype == "torch.bfloat16"
    saved = torch.load(tmp_path / "out" / "finetuned", weights_only=True)
    assert {t.dtype for t in saved["state_dict"].values()} <= {torch.float32, torch.int64}


@pytest.mark.slow
def test_two_processes_end_with_one_network_written_once(tmp_path: Path) -> None:
    first, second = trained(tmp_path, processes=2)
    assert first[0] == "2"
    assert first == second
    log = (tmp_path / "out" / "experiment.log").read_text()
    assert log.count("epoch 2 of 2") == 1
    assert (tmp_path / "out" / "finetuned").is_file()
