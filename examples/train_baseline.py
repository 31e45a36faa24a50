"""Train a CIFAR-10 ResNet-20 and keep a snapshot of every epoch: what `gkp prune tmi-gkp` begins with.

    python examples/train_baseline.py --data data -o baseline
    gkp prune tmi-gkp --baseline baseline/dense.pt --snapshots baseline/snapshots --data cifar10:data \
        --settings examples/tmi_gkp.json -o pruned

data holds CIFAR-10 as cifar10_train.npz and cifar10_test.npz (x: uint8 [N, 32, 32, 3], y: int64 [N]) or as the standard
python batches. The second command makes pruned/finetuned; examples/resnet20_cifar10 holds the results of both.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F

from gkp.converter.sources._torchfile import read_pickle_file
from gkp.pruning.data import DataSet, Shard, open_data
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton

BATCH = 128
CPU = torch.device("cpu")
ARCHITECTURE = Architecture("cifar_resnet", 20, "pad", 10, (3, 32, 32))


def accuracy(model: torch.nn.Module, data: DataSet) -> float:
    """Share of the test images that the model labels right."""
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test(500, Shard(), CPU))
    return right / data.test_size


def train(model: torch.nn.Module, data: DataSet, epochs: int, lr: float, seed: int, snapshots: Path,
          console: Console) -> float:
    """SGD with one cycle of the learning rate, in place; one snapshot per epoch. The accuracy after the last one."""
    rng, steps, reached = np.random.default_rng(seed), data.steps(BATCH), 0.0
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)
    with Progress(console=console) as progress:
        for epoch in range(1, epochs + 1):
            model.train()
            task = progress.add_task(f"epoch {epoch} of {epochs}", total=steps)
            for x, y in data.train(rng, BATCH, Shard(), CPU):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(task)
            reached = accuracy(model, data)
            torch.save({"model_state_dict": model.state_dict(), "epoch": epoch, "loss": loss.item()},
                       snapshots / f"epoch_{epoch}.pt")
            progress.console.print(f"epoch {epoch} of {epochs}: test accuracy {reached:.2%}")
    return reached


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False), required=True, help="Folder of CIFAR-10.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(data: str, epochs: int, seed: int, threads: int, output: Path) -> None:
    """Train the dense network; writes dense.pt and snapshots/epoch_N.pt."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    images = open_data(f"cifar10:{data}", ARCHITECTURE.input_shape, read_pickle_file)
    snapshots = output / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    model = skeleton(ARCHITECTURE)
    reached = train(model, images, epochs, 0.2, seed, snapshots, Console(stderr=True))
    checkpoint.save(output / "dense.pt", model, ARCHITECTURE, {
        "dataset": "CIFAR-10", "mean": list(images.normalisation.mean), "std": list(images.normalisation.std), "seed": seed,
        "epochs": epochs, "test_accuracy": reached})


if __name__ == "__main__":
    main()
