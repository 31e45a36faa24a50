"""Training a network: the recipe, the hooks of a method, and the loop, which survives interruption."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import FileError, GkpError, UsageError
from gkp.pruning.data import DataSet, Shard
from gkp.pruning.run_folder import RunFolder, plain
from gkp.require import require
from gkp.types import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_RECENT = "most_recent_checkpoint"
SNAPSHOT_EVERY = 10  # epochs
TEST_BATCH = 500
CHECK_EVERY = 50  # steps between two looks at the loss on a GPU, each of which waits for it
MAX_RATE = 1e30  # of learning and weight decay: float32 ends soon after


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training phase: SGD and the schedule of its learning rate, constant within an epoch.

    batch_size: images per step, over all processes. Step schedule: lr is multiplied by gamma at each milestone (epochs
    from 0). cosine: instead, the length in epochs of one cosine cycle from lr towards 0, repeated.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    cosine: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not 0 < self.lr <= MAX_RATE or not 0 <= self.weight_decay <= MAX_RATE:
            raise UsageError(f"cannot train {self.epochs} epochs with batch {self.batch_size}, lr {self.lr} and weight "
                             f"decay {self.weight_decay}", "epochs from 0, batch size from 1, a positive learning rate")
        if self.cosine is not None and self.cosine < 1:
            raise UsageError(f"a cosine cycle of {self.cosine} epochs is none", "give at least 1")

    def factor(self, epoch: int) -> float:
        """Learning rate of an epoch (from 0) / lr."""
        if self.cosine is not None:
            return 0.5 * (1 + math.cos(math.pi * (epoch % self.cosine) / self.cosine))
        return self.gamma ** sum(epoch >= m for m in self.milestones)

    def shortened(self, epochs: int) -> Recipe:
        """The same schedule for another number of epochs: milestones and cycle scale with it, to whole epochs from 1."""
        if epochs == self.epochs or self.epochs == 0:
            return replace(self, epochs=epochs)

        def scaled(at: int) -> int:
            return max(1, round(at * epochs / self.epochs))

        cosine = None if self.cosine is None else scaled(self.cosine)
        return replace(self, epochs=epochs, milestones=tuple(scaled(m) for m in self.milestones), cosine=cosine)


class Stateful(Protocol):
    """State beside the network's: saved with every epoch, loaded on resuming. Tensors, numbers, strings, lists, dicts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class StepContext:
    """One training step, for `Hooks.step`.

    model: the network, in training mode, on the accelerator's device. forward: its logits [N, classes] for x, through
    mixed precision and several processes: use this to compute, and `model` to reach parameters. x float32 [N, C, H, W],
    y int64 [N]. optimizer: zero_grad() and step() as usual; accelerator.backward(loss) in place of loss.backward().
    epoch, step: from 0, step within all total_steps of the phase.
    """

    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    optimizer: torch.optim.Optimizer
    epoch: int
    step: int
    total_steps: int
    accelerator: Any

    def loss(self) -> torch.Tensor:
        """Cross entropy of the batch, a scalar."""
        return F.cross_entropy(self.forward(self.x).float(), self.y)


@dataclass(frozen=True)
class Hooks:
    """What a method adds to training.

    optimizer: made from the network and the recipe (default SGD); each group's lr follows the recipe's schedule.
    step: replaces zero_grad, forward, backward and optimizer.step; returns the loss, a scalar without gradient.
    after_step: called with the network after every step (reapply masks). after_epoch: with the epoch from 0, the network
    and its test accuracy (epochs done before a resumption are not repeated). extra: state to save beside the network's.
    keep: whose weights (and extra) remain: those of the last epoch, or of the best test accuracy from epoch keep_from on.

    The random number generators of torch, numpy and python are seeded anew at the start of every epoch from the
    session's seed, the phase's name and the epoch, so a resumed run draws what an uninterrupted one would.
    """

    optimizer: Callable[[nn.Module, Recipe], torch.optim.Optimizer] | None = None
    after_step: Callable[[nn.Module], None] | None = None
    step: Callable[[StepContext], torch.Tensor] | None = None
    after_epoch: Callable[[int, nn.Module, float | None], None] | None = None
    extra: Stateful | None = None
    keep: Literal["best", "last"] = "best"
    keep_from: int = 0


# ---- random numbers -------------------------------------------------------------------------------------------------
def seed_of(seed: int, *names: object) -> int:
    """A 64-bit seed that follows from the run's seed and what it is for."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


# ---- where it runs --------------------------------------------------------------------------------------------------
def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """The GPU or GPUs of this machine (and others, under `accelerate launch`), else the CPU.

    BackendMissingError: accelerate is not installed. UsageError: this device does not have the precision.
    """
    library = require("accelerate", "prune", "gkp prune")
    hint = "use --mixed-precision no"
    if mixed_precision == "fp16" and library.PartialState().device.type == "cpu":  # accelerate would compute in float32
        raise UsageError("mixed precision fp16 needs a GPU", hint)
    try:
        made: Accelerator = library.Accelerator(mixed_precision=mixed_precision)
        return made
    except ValueError as error:
        raise UsageError(f"no mixed precision {mixed_precision} here: {error}", hint) from error


def shard_of(accelerator: Accelerator) -> Shard:
    """This process's part of every batch."""
    return Shard(accelerator.process_index, accelerator.num_processes)


def accuracy_of(model: nn.Module, data: DataSet, accelerator: Accelerator) -> float:
    """Share of the test images that the network labels right. Mode and device of the network stay as they are."""
    mode, home = model.training, next(model.parameters()).device
    model.to(accelerator.device).eval()
    right = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for x, y in data.test(TEST_BATCH, shard_of(accelerator), accelerator.device):
            right += (model(x).argmax(1) == y).sum()
    model.to(home).train(mode)
    return int(accelerator.reduce(right, "sum")) / data.test_size


# ---- the loop -------------------------------------------------------------------------------------------------------
class _Network(nn.Module):  # type: ignore[misc]
    """What accelerate wraps, so that the network itself stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@dataclass
class _Kept:
    """The epoch whose weights remain."""

    epoch: int
    accuracy: float
    model: dict[str, Any]
    extra: dict[str, Any] | None


@dataclass
class Training:
    """One training phase. name: its own among those of a run. snapshot: called with the epoch after every tenth, to keep
    the network as it is then. log, progress: as in Session."""

    name: str
    model: nn.Module
    recipe: Recipe
    hooks: Hooks
    data: DataSet
    seed: int
    accelerator: Accelerator
    folder: RunFolder
    snapshot: Callable[[int], None]
    log: Callable[[str], None]
    progress: Progress
    _kept: _Kept | None = field(default=None, init=False)

    def run(self) -> float:
        """Train, or load what an earlier run has trained; the accuracy of the epoch whose weights are in the model.

        GkpError: the loss became NaN or infinite. FileError: a checkpoint does not fit the model.
        """
        finished = self.folder.read(f"train-{self.name}")
        if finished is None:
            finished = self._train()
            self.folder.write(f"train-{self.name}", finished)
            self.accelerator.wait_for_everyone()
        self._load(finished)
        self.model.eval()
        accuracy: float = finished["accuracy"]
        return accuracy

    def _train(self) -> dict[str, Any]:
        on_cpu = self.accelerator.device.type == "cpu"
        layout = torch.channels_last if on_cpu else torch.contiguous_format
        self.model.to(self.accelerator.device, memory_format=layout)
        make = self.hooks.optimizer or _sgd
        network, optimizer = self.accelerator.prepare(_Network(self.model), make(self.model, self.recipe))
        try:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            for epoch in range(self._resume(optimizer), self.recipe.epochs):
                self._epoch(epoch, network, optimizer)
        finally:
            self.accelerator.free_memory()
            self.model.to("cpu", memory_format=torch.contiguous_format)
        assert self._kept is not None  # an epoch was trained or resumed from
        kept = self._kept
        return {"epoch": kept.epoch, "accuracy": kept.accuracy, "model": kept.model, "extra": kept.extra}

    def _epoch(self, epoch: int, network: nn.Module, optimizer: Any) -> None:
        began, factor = time.monotonic(), self.recipe.factor(epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        loss = self._steps(epoch, network, optimizer)
        if self.accelerator.num_processes > 1:
            _share_buffers(self.model)
        self.progress(f"{self.name}: testing epoch {epoch + 1}", (epoch + 1) / self.recipe.epochs)
        accuracy = accuracy_of(self.model, self.data, self.accelerator)
        self.log(f"{self.name}: epoch {epoch + 1} of {self.recipe.epochs}, lr {self.recipe.lr * factor:.3g}, "
                 f"loss {loss:.4f}, test accuracy {accuracy:.2%}, {time.monotonic() - began:.1f} s")
        if self.hooks.after_epoch is not None:
            self.hooks.after_epoch(epoch, self.model, accuracy)
        self._keep(epoch, accuracy)
        self._save(epoch, optimizer)

    def _steps(self, epoch: int, network: nn.Module, optimizer: Any) -> float:
        """Train one epoch; the mean loss over its steps."""
        self.model.train()
        _seed_everything(seed_of(self.seed, self.name, epoch))
        rng = np.random.default_rng(seed_of(self.seed, self.name, epoch, "images"))
        steps, device = self.data.steps(self.recipe.batch_size), self.accelerator.device
        on_cpu = device.type == "cpu"
        layout = torch.channels_last if on_cpu else torch.contiguous_format
        total = torch.zeros((), device=device)
        batches = self.data.train(rng, self.recipe.batch_size, shard_of(self.accelerator), device)
        for step, (x, y) in enumerate(batches):
            here = StepContext(self.model, network, x.contiguous(memory_format=layout), y, optimizer, epoch,
                               epoch * steps + step, self.recipe.epochs * steps, self.accelerator)
            total += (self.hooks.step or _plain_step)(here).detach().float()
            if self.hooks.after_step is not None:
                self.hooks.after_step(self.model)
            if (on_cpu or step % CHECK_EVERY == 0 or step == steps - 1) and not math.isfinite(float(total)):
                raise self._diverged("the loss is not a finite number", epoch, step)
            self.progress(f"{self.name}: epoch {epoch + 1} of {self.recipe.epochs}",
                          (epoch + (step + 1) / steps) / self.recipe.epochs)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.model.state_dict().values()):
            raise self._diverged("the weights are not finite numbers", epoch, step)
        return float(total) / steps

    def _diverged(self, what: str, epoch: int, step: int) -> GkpError:
        return GkpError(f"{self.name}: {what} in epoch {epoch + 1}, step {step + 1}",
                        "lower the learning rate in the settings, or use --mixed-precision no")

    def _keep(self, epoch: int, accuracy: float) -> None:
        wanted = min(self.hooks.keep_from, self.recipe.epochs - 1)
        earlier = self._kept if self._kept is not None and self._kept.epoch >= wanted else None
        if earlier is None or self.hooks.keep == "last" or accuracy > earlier.accuracy:
            self._kept = _Kept(epoch, accuracy, self._state(), self._extra())

    def _save(self, epoch: int, optimizer: Any) -> None:
        assert self._kept is not None
        scaler = self.accelerator.scaler
        payload = {
            "phase": self.name, "epochs": epoch + 1, "model": self._state(), "optimizer": plain(optimizer.state_dict()),
            "scaler": None if scaler is None else plain(scaler.state_dict()), "extra": self._extra(),
            "kept": vars(self._kept),
        }
        self.folder.write(MOST_RECENT, payload)
        if epoch % SNAPSHOT_EVERY == SNAPSHOT_EVERY - 1:
            self.snapshot(epoch)
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: Any) -> int:
        """Epochs that were done before; the state after them is loaded."""
        saved = self.folder.read(MOST_RECENT)
        if saved is None or saved.get("phase") != self.name:
            return 0
        self._load(saved)
        try:
            optimizer.load_state_dict(saved["optimizer"])
            if self.accelerator.scaler is not None and saved["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self._kept = _Kept(**saved["kept"])
            done = int(saved["epochs"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _misfit(self.name) from error
        self.log(f"{self.name}: resumed after epoch {done}")
        return done

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            if self.hooks.extra is not None and saved["extra"] is not None:
                self.hooks.extra.load_state_dict(saved["extra"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _misfit(self.name) from error

    def _state(self) -> dict[str, Any]:
        return {name: tensor.contiguous() for name, tensor in plain(self.model.state_dict()).items()}

    def _extra(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = None if self.hooks.extra is None else plain(self.hooks.extra.state_dict())
        return state


def _sgd(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _plain_step(here: StepContext) -> torch.Tensor:
    here.optimizer.zero_grad()
    loss = here.loss()
    here.accelerator.backward(loss)
    here.optimizer.step()
    return loss


def _share_buffers(model: nn.Module) -> None:
    """Every process takes the first one's running statistics."""
    from accelerate.utils import broadcast

    for buffer in model.buffers():
        broadcast(buffer, from_process=0)


def _misfit(name: str) -> FileError:
    return FileError(f"the checkpoint of the phase {name} does not fit the network", "begin again with --force")
