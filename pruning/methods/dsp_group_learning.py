"""DSP's differentiable group learning: which filters belong together, learned beside the weights.

One step on a batch: the task's step; one unrolled step of penalty, task and penalty, from which the assignments get
their gradient and after which the weights are put back; Adam on the assignments' logits; the penalty, for good, with hard
groups. The grouping never changes the forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.errors import FileError
from gkp.pruning.masks import conv_named
from gkp.pruning.methods.dsp_network import Layer
from gkp.pruning.methods.dsp_regulariser import (
    assignment_gradient,
    gumbel_softmax,
    lookahead_gradient,
    one_hot,
    penalty_scale,
    weight_gradient,
)
from gkp.pruning.training import StepContext

Tensors = dict[str, torch.Tensor]

ADAM_EPSILON = 1e-12
# Without data: logits weigh less against the noise, or they settle on whatever comes first (measured on planted groups).
STEPS_WITHOUT_DATA = 1000
LR_WITHOUT_DATA = 0.05
TEMPERATURE_WITHOUT_DATA = 2.0


@dataclass(frozen=True)
class Learning:
    """groups: G. penalty: lambda. temperature: of the Gumbel-softmax. lr: of the logits' Adam. seed: of the noise."""

    groups: int
    penalty: float
    temperature: float
    lr: float
    seed: int


class GroupLearner:
    """The logits [G, F] of every layer and their Adam; `step` and the state are what gkp.pruning.training.Hooks takes.

    layers: what to group, with the input planes that a CIFAR image gives, whatever the network is trained on.
    """

    def __init__(self, layers: Iterable[Layer], learning: Learning) -> None:
        self.learning, layers = learning, list(layers)
        count = learning.groups
        shapes = {layer.name: (count, layer.filters) for layer in layers}
        self.scales = {layer.name: penalty_scale(layer.channels, *layer.plane, layer.kernel, count, layer.filters)
                       for layer in layers}
        self.logits = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self.adam = torch.optim.Adam(self.logits.values(), lr=learning.lr, eps=ADAM_EPSILON)

    # ---- one step -------------------------------------------------------------------------------------------------
    def step(self, context: StepContext) -> torch.Tensor:
        """One training step, as the module's docstring says; returns the task's loss at the weights it began with."""
        convs = {name: conv_named(context.model, name) for name in self.logits}
        self._follow(next(iter(convs.values())).weight.device)
        soft = self._sample(context.step, self.learning.temperature)
        lr = context.optimizer.param_groups[0]["lr"]
        amount = self.learning.penalty * lr * (context.step + 1) / context.total_steps
        loss = task_step(context)
        hard = {name: a.detach() for name, a in soft.items()}
        self._adam_step(soft, self._lookahead(context, convs, hard, amount))
        self._penalise(convs, {name: self._hard(name) for name in convs}, amount)
        return loss

    def _lookahead(self, context: StepContext, convs: Mapping[str, nn.Conv2d], a: Tensors, amount: float) -> Tensors:
        """Gradient of every assignment through one unrolled step; network and optimizer end as they began."""
        kept = _Kept(context.model, context.optimizer)
        start = _weights(convs)
        self._penalise(convs, a, amount)
        penalised = _weights(convs)
        task_step(context)
        trained = _weights(convs)
        self._penalise(convs, a, amount)
        again = _weights(convs)
        kept.put_back()
        return {n: lookahead_gradient(a[n], start[n], penalised[n], trained[n], again[n]) for n in convs}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _penalise(self, convs: Mapping[str, nn.Conv2d], a: Tensors, amount: float) -> None:
        for name, conv in convs.items():
            conv.weight.sub_(weight_gradient(conv.weight, a[name]), alpha=amount * self.scales[name])

    def _adam_step(self, soft: Tensors, gradients: Tensors) -> None:
        self.adam.zero_grad()
        torch.autograd.backward([soft[name] for name in gradients], list(gradients.values()))
        self.adam.step()

    def _sample(self, step: int, temperature: float) -> Tensors:
        """Soft assignments. Their noise follows from the seed and the step: resumed runs and all processes draw the same."""
        generator = torch.Generator().manual_seed((self.learning.seed + step) % 2**63)
        return {n: gumbel_softmax(logits, temperature, generator) for n, logits in self.logits.items()}

    def _hard(self, name: str) -> torch.Tensor:
        return one_hot(self.logits[name].detach().argmax(0), self.learning.groups, self.logits[name])

    # ---- without data ---------------------------------------------------------------------------------------------
    def learn_from_weights(self, model: nn.Module) -> None:
        """Groups without any training: the logits alone follow dR/da at the network's weights, which stay."""
        weights = _weights({name: conv_named(model, name) for name in self.logits})
        self.adam.param_groups[0]["lr"] = LR_WITHOUT_DATA
        for step in range(STEPS_WITHOUT_DATA):
            soft = self._sample(step, TEMPERATURE_WITHOUT_DATA)
            self._adam_step(soft, {n: assignment_gradient(weights[n], a.detach()) for n, a in soft.items()})

    # ---- results and state ----------------------------------------------------------------------------------------
    def groups(self) -> dict[str, npt.NDArray[np.int64]]:
        """Conv -> int64 [F], the group of every filter."""
        return {name: logits.detach().argmax(0).cpu().numpy() for name, logits in self.logits.items()}

    def state_dict(self) -> dict[str, Any]:
        """The logits and Adam's state."""
        logits = {name: parameter.detach().cpu().clone() for name, parameter in self.logits.items()}
        return {"logits": logits, "adam": copy.deepcopy(self.adam.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """FileError: the state is of other layers or another number of groups."""
        found = {name: tuple(tensor.shape) for name, tensor in state["logits"].items()}
        if found != {name: tuple(p.shape) for name, p in self.logits.items()}:
            raise FileError("the checkpoint of the group learning is of another network or number of groups",
                            "begin again with --force")
        with torch.no_grad():
            for name, parameter in self.logits.items():
                parameter.copy_(state["logits"][name])
        self.adam.load_state_dict(state["adam"])

    def _follow(self, device: torch.device) -> None:
        """Move the logits and Adam's state to the network's device."""
        if any(p.device != device for p in self.logits.values()):
            for parameter in self.logits.values():
                parameter.data = parameter.data.to(device)
            self.adam.load_state_dict(self.adam.state_dict())


class _Kept:
    """Copies of everything that a training step changes, to be put back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.state = optimizer.state
        self.known = set(self.state)  # a first step that a loss scaler skipped leaves no momentum
        momenta = [value for entry in self.state.values() for value in entry.values() if torch.is_tensor(value)]
        self.tensors = [t.detach() for t in (*model.parameters(), *model.buffers())] + momenta
        self.copies = [tensor.clone() for tensor in self.tensors]

    def put_back(self) -> None:
        for tensor, before in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(before)
        for parameter in set(self.state) - self.known:
            del self.state[parameter]


def task_step(context: StepContext) -> torch.Tensor:
    """One step of the task alone; returns the loss at the weights it began with."""
    context.optimizer.zero_grad()
    loss = context.loss()
    context.accelerator.backward(loss)
    context.optimizer.step()
    return loss.detach()


def _weights(convs: Mapping[str, nn.Conv2d]) -> Tensors:
    return {name: conv.weight.detach().clone() for name, conv in convs.items()}
