"""The networks of the GPU suite: the rewritten one computes what the published one does, without a copy of channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gkp.benchmarks.gpu.networks import CASES, Case, Layer, folded, make_forms, rewritten
from gkp.benchmarks.gpu.results import DENSE, PUBLISHED, REWRITTEN
from gkp.benchmarks.networks import block_diagonal, resnet20, resnet50, tmi_style
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.resnet_imagenet import Bottleneck

SHAPE = (3, 32, 32)


class Small(nn.Module):
    """A bottleneck whose 3x3 convolution is branched, with batch norms that do something."""

    def __init__(self, form: Any, channels: int = 16, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Bottleneck(12, channels, stride)
        weight = self.block.conv2.weight.detach().numpy()
        if form is not None:
            branched = BranchedConv2d(form(weight, np.random.default_rng(1)))
            branched.strides, branched.pads = (stride, stride), (1, 1, 1, 1)
            self.block.conv2 = branched
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(values, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def same(a: Any, b: Any, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = b(x)
    return bool((a(x) - expected).abs().max() <= 1e-5 * expected.abs().max())


def kinds(model: Any) -> set[type]:
    return {type(m) for m in model.modules()}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_block_diagonal_bottleneck_becomes_one_convolution_of_so_many_groups(groups: int, stride: int) -> None:
    published = Small(block_diagonal, stride=stride).eval()
    asked: list[Layer] = []
    new, chosen = rewritten(published, (12, 8, 8), lambda layer: asked.append(layer) or groups)
    assert asked == [Layer(16, 8, 3, stride, 8 // stride)]
    assert chosen == {"block.conv2": groups}
    assert new.block.conv2.groups == groups
    assert same(new, published, (2, 12, 8, 8))
    assert kinds(new).isdisjoint({BranchedConv2d, nn.BatchNorm2d})
    assert isinstance(published.block.conv2, BranchedConv2d), "the original is left alone"


def test_overlapping_branches_cannot_be_grouped() -> None:
    published = Small(tmi_style).eval()
    asked: list[Layer] = []
    new, _ = rewritten(published, (12, 8, 8), lambda layer: asked.append(layer) or 1)
    assert asked == [Layer(16, 1, 3, 1, 8)]
    assert same(new, published, (2, 12, 8, 8))


def test_a_resnet20_of_overlapping_groups_becomes_dense() -> None:
    forms = make_forms(Case("small", resnet20, tmi_style, SHAPE), lambda layer: pytest.fail("nothing to choose"))
    assert set(forms.groups.values()) == {1}
    assert len(forms.groups) == 18
    assert same(forms.networks[REWRITTEN], forms.networks[PUBLISHED], (2, *SHAPE))
    assert nn.BatchNorm2d in kinds(forms.networks[PUBLISHED])
    assert all(kinds(forms.networks[form]).isdisjoint({BranchedConv2d, nn.BatchNorm2d}) for form in (DENSE, REWRITTEN))
    dense = {n: m.weight for n, m in forms.networks[DENSE].named_modules() if isinstance(m, nn.Conv2d)}
    assert all((weight != 0).all() for weight in dense.values()), "no hole that a compiler could exploit"
    assert {n: m.weight.shape for n, m in forms.networks[REWRITTEN].named_modules() if isinstance(m, nn.Conv2d)} == {
        n: w.shape for n, w in dense.items()}


@pytest.mark.slow
def test_the_resnet50_of_the_suite_is_rewritten_exactly() -> None:
    forms = make_forms(Case("small", resnet50, block_diagonal, SHAPE), lambda layer: min(4, layer.groups))
    assert len(forms.groups) == 16
    assert set(forms.groups.values()) == {4}
    assert same(forms.networks[REWRITTEN], forms.networks[PUBLISHED], (1, *SHAPE))


def test_folding_batch_norms_changes_no_result() -> None:
    model = Small(None).eval()
    x = torch.randn(2, 12, 8, 8)
    expected = model(x)
    assert torch.allclose(folded(model)(x), expected, atol=1e-5 * float(expected.abs().max()))
    assert nn.BatchNorm2d not in kinds(model)


def test_the_suite_has_a_disjoint_and_an_overlapping_case() -> None:
    assert [(case.form, case.shape) for case in CASES] == [(block_diagonal, (3, 224, 224)), (tmi_style, (3, 32, 32))]
