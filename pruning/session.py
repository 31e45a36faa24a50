"""A pruning run in progress: what a method is given, and where it leaves what it made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.counting import cost_of
from gkp.pruning.data import DataSet, Shard
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.run_folder import CHECKPOINTS, PUBLIC, RunFolder, plain
from gkp.pruning.training import Hooks, Recipe, Training, accuracy_of, make_accelerator, seed_of
from gkp.types import Progress, silent

if TYPE_CHECKING:
    from accelerate import Accelerator

Stage = Literal["baseline", "pruned", "grouped", "finetuned"]


class Session:
    """arch: canonical names, no prefix. baseline: the dense network, in eval mode, float32, on the CPU; copy it before
    changing it. data: None without --data. snapshots: the folder of --snapshots. epochs: --epochs, which overrides the
    settings' number of epochs of every training phase (0: no training at all). multi: --multi. public: --public.
    """

    def __init__(
        self, *, arch: Architecture, baseline: nn.Module, folder: RunFolder, data: DataSet | None = None,
        snapshots: Path | None = None, epochs: int | None = None, seed: int = 0, multi: bool = False,
        public: bool = False, accelerator: Accelerator | None = None, say: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.arch = replace(arch, scheme="canonical", prefix="")
        self.baseline, self.data, self.snapshots = baseline, data, snapshots
        self.epochs, self.seed, self.multi, self.wants_public = epochs, seed, multi, public
        self._folder, self._accelerator = folder, accelerator or make_accelerator()
        self._say, self._progress = say, progress or silent

    def log(self, text: str) -> None:
        """One line in experiment.log, and on the screen with -v."""
        self._folder.log(text)
        if self._say is not None:
            self._say(text)

    def progress(self, text: str, share: float | None) -> None:
        """What is going on, and how far it is (0 to 1; None: unknown)."""
        self._progress(text, share)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A phase that a resumed run does not repeat: its result, read from checkpoints/<name>.pt or made now.

        The result holds tensors, numbers, strings, None, lists and dicts (no numpy arrays); tensors come back on the CPU.
        """
        found = self._folder.read(name)
        self._accelerator.wait_for_everyone()  # all have looked before one writes: they agree on what is left to do
        if found is None:
            found = plain(make())
            self._folder.write(name, found)
            if self._accelerator.num_processes > 1:
                self._accelerator.wait_for_everyone()
                found = self._folder.read(name) or found
        return found

    def rng(self, name: str) -> np.random.Generator:
        """A generator of its own for this name, from the seed: the same whatever ran before."""
        return np.random.default_rng(seed_of(self.seed, "numpy", name))

    def torch_rng(self, name: str) -> torch.Generator:
        """The same for torch, on the CPU."""
        return torch.Generator().manual_seed(seed_of(self.seed, "torch", name) % 2**63)

    def accuracy(self, model: nn.Module) -> float | None:
        """Share of the test images that the network labels right, 0 to 1; None without data. Its mode is kept."""
        return None if self.data is None else accuracy_of(model, self.data, self._accelerator)

    def save(self, stage: Stage, model: nn.Module, **results: float | int | str | None) -> None:
        """Write OUT/<stage>, and add its accuracy, MACs, parameters and `results` to setting.json.

        model: what gkp.pruning.models.checkpoint.save takes. accuracy: measured unless it is among `results`. With
        --epochs 0 the stage "finetuned" is not written. The command itself saves "baseline" before the method runs.
        """
        if stage == "finetuned" and self.epochs == 0:
            return
        weights = _digest(model)
        earlier = self._folder.results.get(stage, {})
        if "accuracy" not in results:
            same = earlier.get("weights_sha256") == weights
            results["accuracy"] = earlier.get("accuracy") if same else self.accuracy(model)
        cost = cost_of(model, self.arch.input_shape)
        self._write(self._folder.path / stage, model, {"stage": stage, "test_accuracy": results["accuracy"]})
        self._folder.record(stage, {"macs": cost.macs, "parameters": cost.parameters, "weights_sha256": weights,
                                    **plain(results)})
        accuracy = results["accuracy"]
        measured = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
        self.log(f"{stage}: {cost.macs / 1e6:.2f}M multiply-accumulates, {cost.parameters} parameters{measured}")

    def document(self, name: str, content: bytes) -> None:
        """A file of the method's own in OUT, beside the stages."""
        self._folder.write_document(name, content)

    def public(self, name: str, write: Callable[[Path, float | None], None]) -> None:
        """With --public, OUT/public/<name>: the network of the last stage, which was saved before, in the form that the
        method's own program reads.

        write: is called with the path and that stage's test accuracy (0 to 1, None without data), and writes atomically.
        """
        if not self.wants_public:
            return
        accuracy = self._folder.results["grouped" if self.epochs == 0 else "finetuned"]["accuracy"]
        self._folder.write_public(name, lambda path: write(path, accuracy))
        self.log(f"{PUBLIC}/{name}: the same network in the form of the method's own program")

    def train(self, name: str, model: nn.Module, recipe: Recipe, hooks: Hooks | None = None) -> float | None:
        """Train in place; the test accuracy of the epoch whose weights are in the model afterwards (on the CPU, eval
        mode). A phase called `name` that was finished before is not repeated: its weights and hooks.extra are loaded.
        --epochs shortens the recipe; with --epochs 0 nothing happens and None is returned.

        UsageError: there is no data. GkpError: the loss became NaN or infinite.
        """
        recipe = recipe if self.epochs is None else recipe.shortened(self.epochs)
        if recipe.epochs == 0:
            return None
        return Training(
            name, model, recipe, hooks or Hooks(), self._images(), self.seed, self._accelerator, self._folder,
            snapshot=lambda epoch: self._write(self._folder.path / CHECKPOINTS / f"{name}-epoch_{epoch}.pt", model,
                                               {"phase": name, "epoch": epoch}),
            log=self.log, progress=self.progress,
        ).run()

    def batches(self, name: str, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of augmented training batches on the CPU, in an order that follows from the seed and `name`: x
        float32 [N, C, H, W], normalised, y int64 [N]. UsageError: there is no data."""
        return self._images().train(self.rng(f"batches/{name}"), batch_size, Shard(), torch.device("cpu"))

    def _images(self) -> DataSet:
        if self.data is None:
            raise UsageError("this needs training images", "give --data cifar10:DIR, or train nothing with --epochs 0")
        return self.data

    def _write(self, path: Path, model: nn.Module, meta: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            own = {"method": self._folder.setting.get("method"), "seed": self.seed}
            if self.data is not None:
                scale = self.data.normalisation
                own |= {"data": self.data.description, "mean": list(scale.mean), "std": list(scale.std)}
            checkpoint.save(path, model, self.arch, own | meta)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
