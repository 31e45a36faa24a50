"""Networks pruned to other widths are rebuilt with the widths of their tensors, and refused where these do not fit together."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_kit import at_random, narrow, wires_of
from torch import nn
from torch_kit import forward, images, layer_names, liven

from gkp.errors import UnsupportedModelError
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.build import build, recognise
from gkp.pruning.models.family import CIFAR

Tensors = dict[str, np.ndarray]


def arch_of(family: str, depth: int) -> Architecture:
    return Architecture(family, depth, "conv", 10, CIFAR)


RESNET20, RESNET18, RESNET50 = (
    arch_of("cifar_resnet", 20), arch_of("imagenet_resnet_3x3_stem", 18), arch_of("imagenet_resnet_3x3_stem", 50))
ALL = (RESNET20, RESNET18, RESNET50, arch_of("cifar_vgg", 16), arch_of("cifar_preresnet", 20), arch_of("resnet12", 12),
       arch_of("cifar_densenet", 40), arch_of("cifar_densenet", 86), arch_of("cifar_mobilenet", 28))
SEEDS = st.integers(0, 2**32 - 1)


@cache
def base(arch: Architecture) -> nn.Module:
    """A quarter as wide: quicker."""
    torch.manual_seed(0)
    return narrow(liven(skeleton(arch)), lambda group, size: np.arange(1, size, 4))


def narrowed(arch: Architecture, rng: np.random.Generator) -> nn.Module:
    return narrow(base(arch), at_random(rng))


def tensors_of(model: nn.Module) -> Tensors:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if "num_batches" not in name}


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_any_widths_that_fit_together_are_rebuilt_exactly(arch: Architecture, seed: int) -> None:
    model, x = narrowed(arch, np.random.default_rng(seed)), images(1)
    tensors = tensors_of(model)
    assert torch.equal(logits(build(recognise(tensors), tensors), x), logits(model, x))


@pytest.mark.parametrize("arch", [RESNET20, RESNET18, RESNET50], ids=lambda arch: arch.name)
def test_a_narrow_network_computes_what_is_written_out(arch: Architecture) -> None:
    model, x = narrowed(arch, np.random.default_rng(0)), images(2)
    tensors = tensors_of(model)
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    expected = forward(layer_names(state) if arch is RESNET20 else state, x)
    torch.testing.assert_close(logits(build(recognise(tensors), tensors), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_one_tensor_of_another_width_is_refused(arch: Architecture, data: st.DataObject) -> None:
    """One axis of one tensor, any of them."""
    tensors = tensors_of(narrowed(arch, np.random.default_rng(data.draw(SEEDS))))
    name = data.draw(st.sampled_from(sorted(tensors)))
    axis = data.draw(st.integers(0, tensors[name].ndim - 1))
    length = data.draw(st.integers(1, 2 * tensors[name].shape[axis]).filter(lambda n: n != tensors[name].shape[axis]))
    tensors[name] = np.resize(np.moveaxis(tensors[name], axis, 0), (length, *np.delete(tensors[name].shape, axis)))
    tensors[name] = np.ascontiguousarray(np.moveaxis(tensors[name], 0, axis))
    with pytest.raises(UnsupportedModelError):
        build(recognise(tensors), tensors)


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_one_layer_that_lost_other_channels_than_its_neighbours_is_refused(arch: Architecture, data: st.DataObject) -> None:
    """Its weight, bias and norm agree with one another, and not with what reads them or is added to them."""
    wires, tensors = wires_of(base(arch)), tensors_of(base(arch))
    conv = data.draw(st.sampled_from(sorted(name for name, wire in wires.items() if wire.writes)))
    for name, wire in wires.items():
        norm = isinstance(base(arch).get_submodule(name), nn.BatchNorm2d)
        if name == conv or (norm and wire.reads == (wires[conv].writes,)):
            tensors |= {key: array[:-1] for key, array in tensors.items() if key.rpartition(".")[0] == name}
    with pytest.raises(UnsupportedModelError):
        build(recognise(tensors), tensors)
