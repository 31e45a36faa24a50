"""Train a CIFAR-10 ResNet-20, group it by weight magnitude, fine-tune it: a small checkpoint pair to try gkp with.

    python examples/train_resnet20.py --data DIR -o examples/resnet20_cifar10

DIR holds cifar10_train.npz and cifar10_test.npz (x: uint8 [N, 32, 32, 3], y: int64 [N]). Stage 2 (32 channels) gets
2 groups and stage 3 (64 channels) 4, so that a group has 16 channels, the fewest at which stock runtimes run a grouped
convolution at full efficiency; the convolution from stage 2 to stage 3 gets 2 groups of 16 -> 32, the one from stage 1
to stage 2 stays dense. One assignment of channels to groups holds for a stage's whole residual stream, so a converter
can sort the channels of the stage once and needs no gather.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from gkp.branched import BranchedConv
from gkp.errors import FileError
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
BATCH = 128
ARCHITECTURE = Architecture("cifar_resnet", 20, "pad", 10, (3, 32, 32))
STAGE_2_GROUPS, STAGE_3_GROUPS = 2, 4

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


# ---- grouping: pure functions on squared magnitudes -----------------------------------------------------------------
@dataclass(frozen=True)
class StageGroups:
    """Group of every channel of a stage: `stream` [F] for its residual stream, `inner[i]` [F] for conv_a of block i."""

    stream: Ints
    inner: tuple[Ints, ...]
    kept: float


def improve_by_swaps(gain: Floats, assignment: Ints) -> Ints:
    """Exchange the groups of two channels, best exchange first, while that raises sum(gain[c, assignment[c]]).

    gain: [C, groups], what channel c brings in each group. assignment: int64 [C]. Group sizes stay as they are.
    """
    assignment = assignment.copy()
    tolerance = 1e-9 * max(1.0, float(np.abs(gain).max()))
    while True:
        moved = gain[:, assignment]  # [i, j]: channel i in the group of channel j
        stay = np.diagonal(moved)
        rise = moved + moved.T - stay[:, None] - stay[None, :]
        i, j = np.unravel_index(int(rise.argmax()), rise.shape)
        if rise[i, j] <= tolerance:
            return assignment
        assignment[[i, j]] = assignment[[j, i]]


def assign_stage(
    energy_a: list[Floats], energy_b: list[Floats], entry_gain: Floats, rng: np.random.Generator, restarts: int = 24
) -> StageGroups:
    """One balanced assignment for the stream and one per block for the output of conv_a, keeping much magnitude.

    energy_b[i]: [F, F], squared magnitude of conv_b of block i per (output, input) channel. energy_a[i]: the same for
    conv_a of block i + 1 (the first block's reads another stage's stream). entry_gain: [F, groups], what an output of
    the first block's conv_a keeps in each group. Alternates between the stream and the inner assignments, each step
    raising the kept sum, from random starts; the best start wins.
    """
    best: StageGroups | None = None
    channels, groups = entry_gain.shape
    for _ in range(restarts):
        stream, *inner = (rng.permutation(np.arange(channels) % groups) for _ in range(1 + len(energy_b)))
        kept = -1.0
        while True:
            member = np.eye(groups)[stream]
            gains = [entry_gain, *(e @ member for e in energy_a)]
            gains = [g + e.T @ member for g, e in zip(gains, energy_b, strict=True)]
            inner = [improve_by_swaps(g, t) for g, t in zip(gains, inner, strict=True)]
            members = [np.eye(groups)[t] for t in inner]
            gain = sum(e @ m for e, m in zip(energy_b, members, strict=True))
            gain = gain + sum(e.T @ m for e, m in zip(energy_a, members[1:], strict=True))
            stream = improve_by_swaps(gain, stream)
            entered = entry_gain[np.arange(channels), inner[0]].sum()
            now = float(gain[np.arange(channels), stream].sum() + entered)
            if now <= kept * (1 + 1e-9):
                break
            kept = now
        if best is None or kept > best.kept:
            best = StageGroups(stream, tuple(inner), kept)
    assert best is not None
    return best


def block_branches(weight: Floats, out_groups: Ints, in_groups: Ints, stride: int) -> BranchedConv:
    """The blocks of a dense 3x3 weight [F, C, 3, 3] in which output and input channel are of the same group."""
    triples = []
    for group in np.unique(out_groups):
        outs, ins = np.flatnonzero(out_groups == group), np.flatnonzero(in_groups == group)
        triples.append((ins, outs, weight[np.ix_(outs, ins)]))
    channels, strides = (weight.shape[1], weight.shape[0]), (stride, stride)
    return BranchedConv.build(*channels, triples, kernel_shape=(3, 3), strides=strides, pads=(1, 1, 1, 1))


def group_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a ResNet-20 whose stages 2 and 3 are grouped as this file's head says."""
    model, rng = copy.deepcopy(model), np.random.default_rng(seed)
    two = _assign(model.stage_2, np.zeros((32, STAGE_2_GROUPS)), rng)
    _replace(model.stage_2, two)
    # Groups 0 and 1 of stage 3 read group 0 of stage 2, groups 2 and 3 its group 1.
    coarse = np.arange(STAGE_3_GROUPS) * STAGE_2_GROUPS // STAGE_3_GROUPS
    entry = _energy(model.stage_3[0].conv_a) @ np.eye(STAGE_2_GROUPS)[two.stream]
    three = _assign(model.stage_3, entry[:, coarse], rng)
    _replace(model.stage_3, three)
    first = model.stage_3[0]
    weight = first.conv_a.weight.detach().numpy()
    first.conv_a = BranchedConv2d(block_branches(weight, coarse[three.inner[0]], two.stream, 2))
    return model


def _energy(conv: nn.Conv2d) -> Floats:
    energy: Floats = conv.weight.detach().double().square().sum((2, 3)).numpy()
    return energy


def _assign(stage: nn.Sequential, entry_gain: Floats, rng: np.random.Generator) -> StageGroups:
    energy_a = [_energy(block.conv_a) for block in list(stage)[1:]]
    return assign_stage(energy_a, [_energy(block.conv_b) for block in stage], entry_gain, rng)


def _replace(stage: nn.Sequential, groups: StageGroups) -> None:
    """Group every conv of the stage but the first block's conv_a."""
    for i, (block, inner) in enumerate(zip(stage, groups.inner, strict=True)):
        if i > 0:
            weight = block.conv_a.weight.detach().numpy()
            block.conv_a = BranchedConv2d(block_branches(weight, inner, groups.stream, 1))
        block.conv_b = BranchedConv2d(block_branches(block.conv_b.weight.detach().numpy(), groups.stream, inner, 1))


# ---- data and training ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N]."""

    x: npt.NDArray[np.uint8]
    y: Ints


def load_split(folder: Path, name: str) -> Split:
    """FileError: folder/cifar10_<name>.npz is missing or holds something else."""
    path = folder / f"cifar10_{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"cannot read {path}: {error}", "it holds x: uint8 [N, 32, 32, 3] and y: int64 [N]") from error
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or y.shape != x.shape[:1]:
        raise FileError(f"{path} is not CIFAR-10", "it holds x: uint8 [N, 32, 32, 3] and y: int64 [N]")
    return Split(x, y.astype(np.int64))


def to_input(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] -> normalised float32 [N, 3, 32, 32], channels last in memory."""
    x = torch.from_numpy(images).float().div_(255).sub_(torch.tensor(MEAN)).div_(torch.tensor(STD))
    return x.permute(0, 3, 1, 2)


def batches(split: Split, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order: crops of 32x32 after padding by 4, and horizontal flips."""
    padded = np.pad(split.x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    order = rng.permutation(len(split.y))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        i = order[start : start + BATCH]
        rows = rng.integers(0, 9, (BATCH, 1)) + np.arange(32)
        columns = rng.integers(0, 9, (BATCH, 1)) + np.arange(32)
        flip = rng.random(BATCH) < 0.5
        columns[flip] = columns[flip, ::-1]
        yield to_input(padded[i[:, None, None], rows[:, :, None], columns[:, None, :]]), torch.from_numpy(split.y[i])


def accuracy(model: nn.Module, split: Split) -> float:
    """Fraction of the images that the model labels right."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(split.y), 500):
            logits = model(to_input(split.x[start : start + 500]))
            right += int((logits.argmax(1).numpy() == split.y[start : start + 500]).sum())
    return right / len(split.y)


def train(model: nn.Module, data: tuple[Split, Split], epochs: int, lr: float, seed: int, console: Console) -> float:
    """SGD with one cycle of the learning rate, in place; returns the accuracy on data[1] after the last epoch."""
    rng, reached = np.random.default_rng(seed), 0.0
    steps = len(data[0].y) // BATCH
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)
    with Progress(console=console) as progress:
        for epoch in range(1, epochs + 1):
            model.train()
            task = progress.add_task(f"epoch {epoch} of {epochs}", total=steps)
            for x, y in batches(data[0], rng):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                schedule.step()
                progress.advance(task)
            reached = accuracy(model, data[1])
            progress.console.print(f"epoch {epoch} of {epochs}: test accuracy {reached:.2%}")
    return reached


def save(path: Path, model: nn.Module, meta: dict[str, Any], reached: float) -> None:
    """Write the checkpoint with its accuracy, in words too."""
    note = f"{path.stem} {ARCHITECTURE.name}: {reached:.2%} of the CIFAR-10 test images right, epochs {meta['epochs']}"
    if "finetune_epochs" in meta:
        note += f" dense and {meta['finetune_epochs']} grouped; {meta['test_accuracy_dense']:.2%} before grouping"
    checkpoint.save(path, model, ARCHITECTURE, {**meta, "test_accuracy": reached, "note": note})


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="epochs of the dense network")
@click.option("--finetune-epochs", type=click.IntRange(1), default=4, show_default=True, help="epochs once grouped")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(data: Path, epochs: int, finetune_epochs: int, seed: int, threads: int, output: Path) -> None:
    """Train, group and fine-tune; writes dense.pt and grouped.pt."""
    console = Console(stderr=True)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    splits = load_split(data, "train"), load_split(data, "test")
    output.mkdir(parents=True, exist_ok=True)
    model = skeleton(ARCHITECTURE)
    meta = {"dataset": "CIFAR-10", "mean": list(MEAN), "std": list(STD), "seed": seed, "epochs": epochs}
    dense = train(model, splits, epochs, 0.2, seed, console)
    save(output / "dense.pt", model, meta, dense)
    grouped = group_model(model, seed)
    before = accuracy(grouped, splits[1])
    console.print(f"grouped, not yet fine-tuned: test accuracy {before:.2%}")
    after = train(grouped, splits, finetune_epochs, 0.05, seed + 1, console)
    meta |= {"finetune_epochs": finetune_epochs, "test_accuracy_dense": dense, "test_accuracy_before_finetune": before}
    save(output / "grouped.pt", grouped, meta, after)
    console.print(f"dense {dense:.2%}, grouped {after:.2%}: {output}/dense.pt, {output}/grouped.pt")


if __name__ == "__main__":
    main()
