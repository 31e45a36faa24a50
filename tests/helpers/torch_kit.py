"""Random networks, their forward passes written out, and files as the pruning systems save them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from onnx_kit import MOVES
from torch import nn
from torch.nn import functional as F

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources.base import GroupedModel
from gkp.pruning.models.architecture import Architecture, skeleton

State = dict[str, torch.Tensor]

R8_PAD = Architecture("cifar_resnet", 8, "pad", 10, (3, 32, 32))
R8_CONV = Architecture("cifar_resnet", 8, "conv", 10, (3, 32, 32))
R18 = Architecture("imagenet_resnet_3x3_stem", 18, "conv", 10, (3, 32, 32))
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "checkpoints"


def shared(name: str) -> Path:
    """A published checkpoint, or skip."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the published checkpoint {name} is not beside the checkout")
    return path


# ---- networks --------------------------------------------------------------------------------------------------------
def liven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, and BatchNorms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in ((m.running_mean, -0.5, 0.5), (m.running_var, 0.5, 2), (m.weight, 0.5, 1),
                                      (m.bias, -0.3, 0.3)):
                tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def random_state(arch: Architecture) -> State:
    """Tensors under the architecture's own names."""
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in liven(skeleton(arch)).state_dict().items()}


def layer_names(state: Mapping[str, torch.Tensor]) -> State:
    """Canonical CIFAR names as conv1, bn1, layer1.0.{conv1,bn1,conv2,bn2,downsample}, fc."""
    pairs = (("conv_1_3x3", "conv1"), ("bn_1", "bn1"), ("stage_", "layer"), ("conv_a", "conv1"), ("bn_a", "bn1"),
             ("conv_b", "conv2"), ("bn_b", "bn2"), ("classifier", "fc"))
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def forward(state: Mapping[str, torch.Tensor], x: torch.Tensor, shortcut: str = "pad") -> torch.Tensor:
    """A ResNet of basic or bottleneck blocks, written out: stem, layer{1..}, pooling, fc, in torchvision's names."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        parts = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(y, *parts)

    def block(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        short = x
        if f"{name}.downsample.0.weight" in state:
            short = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        elif stride == 2:
            short, zeros = x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])
            half = zeros.shape[1] // 2
            short = torch.cat((short, zeros) if shortcut == "pad" else (zeros[:, :half], short, zeros[:, :half]), 1)
        deep = f"{name}.conv3.weight" in state
        if f"{name}.conv1.weight" not in state:
            return F.relu(short)
        y = x
        for number in (1, 2, 3) if deep else (1, 2):
            weight = state[f"{name}.conv{number}.weight"]
            step = stride if number == (2 if deep else 1) else 1
            y = norm(F.conv2d(y, weight, stride=step, padding=weight.shape[-1] // 2), f"{name}.bn{number}")
            y = F.relu(y) if f"{name}.conv{number + 1}.weight" in state else y
        return F.relu(y + short)

    stem = state["conv1.weight"]
    y = F.relu(norm(F.conv2d(x, stem, stride=1 if stem.shape[-1] == 3 else 2, padding=stem.shape[-1] // 2), "bn1"))
    if stem.shape[-1] == 7:
        y = F.max_pool2d(y, 3, 2, 1)
    for layer in (1, 2, 3, 4):
        count = max((int(n.split(".")[1]) + 1 for n in state if n.startswith(f"layer{layer}.")), default=0)
        for number in range(count):
            y = block(y, f"layer{layer}.{number}", 2 if layer > 1 and number == 0 else 1)
    return F.linear(y.mean((2, 3)), state["fc.weight"], state["fc.bias"])


# ---- files -----------------------------------------------------------------------------------------------------------
def save(path: Path, value: Any, legacy: bool = False) -> Path:
    """torch.save, in the zip or the legacy format."""
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def classes_as(monkeypatch: pytest.MonkeyPatch, **paths: type) -> Iterator[type]:
    """Look-alikes: for each "module__Name" a subclass that pickles as module.Name ("_DOT_" is a dot)."""
    for path, base in paths.items():
        module_name, _, name = path.replace("_DOT_", ".").rpartition("__")
        module = sys.modules.get(module_name) or ModuleType(module_name)
        look_alike = type(name, (base,), {"__module__": module_name, "__qualname__": name})
        monkeypatch.setattr(module, name, look_alike, raising=False)
        monkeypatch.setitem(sys.modules, module_name, module)
        if "." in module_name:  # pickle imports the parent, too
            parent = module_name.partition(".")[0]
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))
        yield look_alike


# ---- comparisons -----------------------------------------------------------------------------------------------------
def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_computes(opened: GroupedModel, expected: torch.Tensor, x: torch.Tensor) -> None:
    """The opened model's reference gives these outputs."""
    (got,) = opened.reference({"input": x.numpy()})
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-5 * scale)


def recognised(opened: GroupedModel) -> Graph:
    """The exported model in the one form, simplified."""
    return simplify(recognise(Graph(opened.model)))


def branches(graph: Graph) -> dict[str, int]:
    """Layer -> number of branches, without layers that only move channels."""
    forms = {n.name: branched_node.read(n) for n in graph.branched()}
    return {name: len(form.branches) for name, form in forms.items() if not form.is_copy}


def moves(graph: Graph) -> list[str]:
    """Operators that move channels around and are still there."""
    return [node.op for node in graph.nodes if node.op in MOVES]

