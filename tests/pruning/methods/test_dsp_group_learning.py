"""DSP's training step: the task's step, the assignments' gradient through an unrolled step, the penalty for good."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_kit import R8_CONV, random_state

from gkp.errors import FileError
from gkp.pruning.methods import dsp_regulariser as formulas
from gkp.pruning.methods.dsp_group_learning import GroupLearner, Learning, task_step
from gkp.pruning.methods.dsp_network import Layer, chains_of, layers_of
from gkp.pruning.models.architecture import skeleton
from gkp.pruning.training import StepContext

LEARNING = Learning(groups=3, penalty=0.1, temperature=0.5, lr=0.01, seed=7)


class Accelerator:
    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def context(model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 3) -> StepContext:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)
    return StepContext(model, model, x, y, optimizer, 0, step, 10, Accelerator())


def network() -> nn.Module:
    model = skeleton(R8_CONV)
    model.load_state_dict(random_state(R8_CONV))
    return model.train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def learner_of(model: nn.Module, learning: Learning = LEARNING) -> GroupLearner:
    return GroupLearner(layers_of(chains_of(model, (3, 32, 32))), learning)


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    other = b.state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, other[name]), name


def test_without_a_penalty_the_network_trains_as_if_alone() -> None:
    """The unrolled step leaves no trace: not in weights, running statistics, counters or momentum."""
    alone, model = network(), network()
    optimizers = sgd(alone), sgd(model)
    learner = learner_of(model, replace(LEARNING, penalty=0.0))
    for step in range(2):
        assert learner.step(context(model, optimizers[1], step)) == task_step(context(alone, optimizers[0], step))
    assert_equal_states(alone, model)
    momenta = [[s["momentum_buffer"] for s in o.state.values()] for o in optimizers]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert all(bool(logits.any()) for logits in learner.logits.values())


def test_penalty_with_hard_groups_stays_on_the_weights() -> None:
    """lambda 0.1, lr 0.05, fourth of ten steps: 0.1 * 0.05 * 4 / 10, times the layer's scale."""
    alone, model = network(), network()
    task_step(context(alone, sgd(alone)))
    learner = learner_of(model)
    learner.step(context(model, sgd(model)))
    groups = learner.groups()
    for layer in layers_of(chains_of(model, (3, 32, 32))):
        before, after = (m.get_submodule(layer.name).weight.detach() for m in (alone, model))
        hard = formulas.one_hot(torch.from_numpy(groups[layer.name]), 3, before)
        scale = formulas.penalty_scale(layer.channels, *layer.plane, 3, 3, layer.filters)
        expected = before - 0.002 * scale * formulas.weight_gradient(before, hard)
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6)
        assert not torch.equal(before, after)
    for name, tensor in alone.state_dict().items():
        if ".conv_" not in name:
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_step_that_a_loss_scaler_skips_leaves_no_momentum_of_the_lookahead() -> None:
    class Skipping(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1
            if self.steps > 1:
                super().step(closure)

    model = network()
    optimizer = Skipping(model.parameters(), 0.05, momentum=0.9)
    learner_of(model, replace(LEARNING, penalty=0.0)).step(context(model, optimizer))
    assert optimizer.steps == 2
    assert not optimizer.state


@dataclass(frozen=True)
class Linear(StepContext):
    """The loss <slope, W>, for which the unrolled step can be differentiated as a whole."""

    def loss(self) -> torch.Tensor:
        return (self.x * self.model.conv.weight).sum()


def test_logits_get_the_gradient_through_the_unrolled_step() -> None:
    """Against autograd of (lr / p) loss(W1) + R(W2) by the logits, p = the scaled amount of the penalty."""
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.conv = nn.Conv2d(5, 6, 3, bias=False)
    layer = Layer("conv", "bn", 6, 5, 3, 9, (32, 32), 900, False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    learner = GroupLearner([layer], LEARNING)
    with torch.no_grad():
        learner.logits["conv"].normal_()
    start, slope = model.conv.weight.detach().clone(), torch.randn(6, 5, 3, 3)
    logits = learner.logits["conv"].detach().clone().requires_grad_()
    learner.step(Linear(model, model, slope, torch.zeros(1), optimizer, 0, 3, 10, Accelerator()))

    amount = 0.1 * 0.05 * 4 / 10 * formulas.penalty_scale(5, 32, 32, 3, 3, 6)
    a = formulas.gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(LEARNING.seed + 3))
    weight = (start - 0.05 * slope).requires_grad_()
    (gradient,) = torch.autograd.grad(formulas.regulariser(weight, a), weight, create_graph=True)
    first = weight - amount * gradient
    second = first - 0.05 * slope
    objective = 0.05 / amount * (slope * first).sum() + formulas.regulariser(second, a)
    (expected,) = torch.autograd.grad(objective, logits)
    assert learner.logits["conv"].grad is not None
    np.testing.assert_allclose(learner.logits["conv"].grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_restored_state_goes_on_as_if_uninterrupted() -> None:
    model = network()
    optimizer, learner = sgd(model), learner_of(model)
    learner.step(context(model, optimizer, 0))
    saved = learner.state_dict()
    twin, other = copy.deepcopy(model), learner_of(model)
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learner.step(context(model, optimizer, 1))
    other.load_state_dict(saved)
    other.step(context(twin, twin_optimizer, 1))
    assert_equal_states(model, twin)
    for name, logits in learner.logits.items():
        assert torch.equal(logits, other.logits[name])


def test_state_of_another_number_of_groups_is_refused() -> None:
    model = network()
    with pytest.raises(FileError, match="number of groups"):
        learner_of(model).load_state_dict(learner_of(model, replace(LEARNING, groups=4)).state_dict())


def test_groups_planted_in_the_weights_are_found_without_data() -> None:
    """Filters of one group read the same quarter of the channels."""
    model, rng = network(), np.random.default_rng(0)
    layers = list(layers_of(chains_of(model, (3, 32, 32))))
    planted = {layer.name: rng.permutation(np.arange(layer.filters) % 4) for layer in layers}
    for layer in layers:
        reads = planted[layer.name][:, None] == np.arange(layer.channels) % 4
        with torch.no_grad():
            model.get_submodule(layer.name).weight.mul_(torch.from_numpy(reads)[:, :, None, None])
    learner = learner_of(model, replace(LEARNING, groups=4))
    learner.learn_from_weights(model)
    found = learner.groups()
    pure = sum(np.bincount(found[layer.name][planted[layer.name] == g]).max() for layer in layers for g in range(4))
    assert pure >= 0.9 * sum(layer.filters for layer in layers)
