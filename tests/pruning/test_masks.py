"""Masks become branches, and the network with branches computes what the masked one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import UsageError
from gkp.pruning.masks import apply_masks, branches_of_mask, form_of_mask, grouped, in_groups, mask_keeper, plain_convs
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.resnet_cifar import cifar_resnet


def test_equal_rows_form_a_branch_and_empty_rows_none() -> None:
    mask = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]], bool)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1)
    (in0, out0, w0), (in1, out1, w1) = branches_of_mask(weight, mask)
    assert (in0.tolist(), out0.tolist(), w0[..., 0, 0].tolist()) == ([0, 2], [0, 3], [[0.0, 2.0], [9.0, 11.0]])
    assert (in1.tolist(), out1.tolist(), w1[..., 0, 0].tolist()) == ([1], [1], [[4.0]])


def test_cleared_taps_are_zeros_of_a_channel_that_is_read() -> None:
    mask = np.zeros((2, 2, 1, 2), bool)
    mask[:, 0, 0, 1] = mask[:, 1, 0, 0] = True
    weight = np.array([[[[1, 2]], [[3, 4]]], [[[5, 6]], [[7, 8]]]], np.float32)
    ((ins, outs, w),) = branches_of_mask(weight, mask)
    assert (ins.tolist(), outs.tolist()) == ([0, 1], [0, 1])
    assert w.tolist() == [[[[0, 2]], [[3, 0]]], [[[0, 6]], [[7, 0]]]]


@pytest.mark.parametrize("shape", [(4, 2), (3, 4), (4, 3, 1, 1), (4,)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        branches_of_mask(np.ones((4, 3, 3, 3), np.float32), np.ones(shape, bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from((1, 2)), st.booleans())
def test_form_computes_the_masked_convolution(seed: int, taps: bool, stride: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    conv = nn.Conv2d(4, 6, 3, stride, 1, bias=bias)
    patterns = rng.random((3, 4, 3, 3) if taps else (3, 4)) < 0.5
    mask = patterns[rng.integers(0, 3, 6)]
    form = form_of_mask(conv, mask)
    assert len(form.branches) <= 3
    module = nn.Sequential(conv)
    new = grouped(module, {"0": form})
    apply_masks(module, {"0": torch.from_numpy(mask)})
    x = torch.from_numpy(rng.standard_normal((2, 4, 7, 6)).astype(np.float32))
    with torch.inference_mode():
        torch.testing.assert_close(new(x), module(x), rtol=0, atol=1e-5)


def test_grouped_copies_and_keeps_the_geometry() -> None:
    model = cifar_resnet(8).eval()
    name = "stage_2.0.conv_a"
    conv = model.get_submodule(name)
    mask = np.zeros((32, 16), bool)
    mask[:16, :8] = mask[16:, 8:] = True
    form = BranchedConv.build(16, 32, branches_of_mask(conv.weight.detach().numpy(), mask), kernel_shape=(3, 3))
    new = grouped(model, {name: form})
    assert model.get_submodule(name) is conv
    module = new.get_submodule(name)
    assert isinstance(module, BranchedConv2d)
    assert module.strides == (2, 2)
    assert not module.training
    apply_masks(model, {name: torch.from_numpy(mask)})
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(new(x), model(x), rtol=0, atol=1e-5)


def test_full_mask_stays_an_ordinary_conv_with_the_forms_weights_and_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False))
    other = nn.Conv2d(3, 4, 1)
    new = grouped(model, {"0": form_of_mask(other, np.ones((4, 3), bool))})
    assert isinstance(new[0], nn.Conv2d)
    assert torch.equal(new[0].weight, other.weight)
    assert torch.equal(new[0].bias, other.bias)
    biased = grouped(model, {"1": form_of_mask(nn.Conv2d(4, 4, 1), np.ones((4, 4), bool))})
    assert isinstance(biased[1], BranchedConv2d)  # the conv it replaces has no place for a bias
    assert biased[1].bias is not None


def test_masks_are_kept_through_training_steps() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, bias=False))
    mask = torch.tensor([[True, False], [False, True]])
    keep = mask_keeper({"0": mask})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2, 4, 4)).sum().backward()
        optimizer.step()
        keep(model)
        assert torch.equal((model[0].weight != 0).all(3).all(2), mask)
    assert torch.equal((in_groups(model, {"0": mask})(torch.ones(1, 2, 4, 4))), model(torch.ones(1, 2, 4, 4)))


def test_unknown_names_other_channels_and_grouped_convs_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1))
    form = form_of_mask(model[1], np.eye(4, dtype=bool))
    with pytest.raises(UsageError, match="no convolution named conv9"):
        grouped(model, {"conv9": form})
    with pytest.raises(UsageError, match="other channels"):
        grouped(nn.Sequential(nn.Conv2d(4, 5, 1)), {"0": form})
    with pytest.raises(UsageError, match="ordinary"):
        form_of_mask(model[0], np.ones((4, 4), bool))
    assert list(plain_convs(model)) == ["1"]
