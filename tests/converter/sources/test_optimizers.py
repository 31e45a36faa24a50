"""Optimizers and schedulers that torch.save pickled as objects, as some training scripts do, are read as inert data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as rates
from torch_kit import save

from gkp.converter.sources._torchfile import read_torch


def constant(epoch: int) -> float:
    return 0.5


OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "LBFGS")
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: rates.StepLR(o, 3),
    "multistep": lambda o: rates.MultiStepLR(o, [2, 3]),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 5),
    "restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 4),
    "plateau": lambda o: rates.ReduceLROnPlateau(o),
    "one cycle": lambda o: rates.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "lambda": lambda o: rates.LambdaLR(o, constant),
    "exponential": lambda o: rates.ExponentialLR(o, 0.9),
    "polynomial": lambda o: rates.PolynomialLR(o),
    "sequence": lambda o: rates.SequentialLR(o, [rates.ConstantLR(o), rates.StepLR(o, 2)], [2]),
    "chain": lambda o: rates.ChainedScheduler([rates.ConstantLR(o), rates.StepLR(o, 2)]),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("kind", "schedule"), [*((kind, "step") for kind in OPTIMIZERS), *(("SGD", s) for s in SCHEDULERS)])
def test_pickled_optimizers_and_schedulers_are_read(tmp_path: Path, legacy: bool, kind: str, schedule: str) -> None:
    """Not their state dicts: the objects, as they are after three steps."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1))
    settings = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(net.parameters(), 0.01, **settings)
    scheduler = SCHEDULERS[schedule](optimizer)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = net(torch.ones(2, 3, 4, 4)).square().mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
        scheduler.step(*([1.0] if schedule == "plateau" else []))
    value = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    loaded = read_torch(save(tmp_path / "checkpoint", value, legacy))
    fields = loaded["optimizer"].fields
    parameters = [p for group in fields["param_groups"] for p in group["params"]]
    assert [id(key.tensor) for key in fields["state"]] == [id(p) for p in parameters[: len(optimizer.state)]]
    for found, held in zip(fields["state"].values(), optimizer.state.values(), strict=True):
        for name in [name for name, entry in held.items() if isinstance(entry, torch.Tensor)]:
            np.testing.assert_array_equal(found[name], held[name].numpy())
    assert loaded["model"].fields["_modules"]["0"].fields["_parameters"]["weight"] is parameters[0]
    first = loaded["scheduler"].fields
    assert (first["_schedulers"][0].fields if schedule == "chain" else first)["optimizer"] is loaded["optimizer"]
