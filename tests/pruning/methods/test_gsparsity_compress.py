"""Compression removes zero filters and keeps the function: everywhere, or where it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_kit import images, liven

from gkp.errors import UsageError
from gkp.pruning.methods.gsparsity_compress import Compression, compress, zero_filters, zeroed
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.resnet_cifar import CifarBlock
from gkp.pruning.models.resnet_imagenet import Bottleneck

R14 = Architecture("cifar_resnet", 14, "pad", 10, (3, 32, 32))
R14_CONV = Architecture("cifar_resnet", 14, "conv", 10, (3, 32, 32))
R18 = Architecture("imagenet_resnet_3x3_stem", 18, "conv", 10, (3, 32, 32))
R50 = Architecture("imagenet_resnet", 50, "conv", 10, (3, 64, 64))

Zero = dict[str, torch.Tensor]


def network(arch: Architecture) -> torch.nn.Module:
    torch.manual_seed(0)
    return liven(skeleton(arch))


def some(model: torch.nn.Module, names: list[str], seed: int = 0, share: float = 0.4) -> Zero:
    rng = np.random.default_rng(seed)
    widths = {name: model.get_submodule(name).out_channels for name in names}
    return {name: torch.from_numpy(rng.random(width) < share) for name, width in widths.items()}


def inner(model: torch.nn.Module, last: bool = False) -> list[str]:
    """Convs inside the blocks but the last of each, or with it."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and n.count(".") == 2]
    ends = ("conv_b",) if any("conv_b" in n for n in names) else ("conv3",) if any("conv3" in n for n in names) else ("conv2",)
    return [n for n in names if last or not n.endswith(ends)]


def outputs(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(x)


def assert_kept(model: torch.nn.Module, zero: Zero, done: Compression, x: torch.Tensor) -> None:
    expected = outputs(zeroed(model, zero), x)
    torch.testing.assert_close(outputs(done.model, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ---- the function is kept --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", [False, True], ids=["conv12", "all-conv"])
@pytest.mark.parametrize("arch", [R14, R14_CONV, R18], ids=["pad", "conv", "resnet18"])
def test_basic_blocks_compute_the_same(arch: Architecture, last: bool) -> None:
    model = network(arch)
    zero = some(model, inner(model, last))
    done = compress(model, zero)
    assert_kept(model, zero, done, images(2, 32))
    assert done.inexact == []
    assert done.removed == {name: int(mask.sum()) for name, mask in zero.items() if mask.any()}


@pytest.mark.parametrize("last", [False, True], ids=["conv12", "all-conv"])
def test_bottlenecks_compute_the_same(last: bool) -> None:
    model = network(R50)
    zero = some(model, inner(model, last))
    done = compress(model, zero)
    assert_kept(model, zero, done, images(1, 64))
    assert all(name.endswith("conv1") for name in done.carriers)  # conv3 does not pad: conv2's constants fold
    block, carried = done.model.layer2[1], "layer2.1.conv1" in done.carriers
    assert block.conv1.out_channels == int((~zero["layer2.1.conv1"]).sum()) + carried
    assert (block.conv2.in_channels, block.conv2.out_channels) == (block.conv1.out_channels, int((~zero["layer2.1.conv2"]).sum()))
    assert isinstance(block.conv3, BranchedConv2d) == last


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([1, 2]), st.booleans())
def test_any_choice_of_filters_keeps_the_function_of_a_block(seed: int, share: float, stride: int, deep: bool) -> None:
    torch.manual_seed(seed)
    block = liven(Bottleneck(12, 3, stride) if deep else CifarBlock(12, 12, 1, "pad"), seed)
    model = torch.nn.Sequential(block)
    zero = some(model, [f"0.{conv}" for conv, _ in block.chain], seed, share)
    assert_kept(model, zero, compress(model, zero), torch.rand(2, 12, 7, 6))


def test_silent_filters_leave_no_carrier() -> None:
    model = network(R14)
    for block in model.stage_2:
        block.bn_a.bias.data.fill_(-10)  # relu of the constant is zero
    zero = some(model, ["stage_2.0.conv_a", "stage_3.0.conv_a"])
    done = compress(model, zero)
    assert done.carriers == ["stage_3.0.conv_a"]
    assert_kept(model, zero, done, images())


def test_nothing_to_remove_changes_nothing() -> None:
    model = network(R14)
    done = compress(model, some(model, inner(model), share=0))
    assert (done.removed, done.carriers, done.blocks) == ({}, [], [])
    assert torch.equal(outputs(done.model, images()), outputs(model, images()))


def test_the_given_network_stays_as_it_is() -> None:
    model = network(R14)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, some(model, inner(model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- whole branches --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kept_as"), [("layer2.1", "constant"), ("layer3.0", "norm")])
def test_branch_without_conv2_filters_is_its_constant(name: str, kept_as: str) -> None:
    model = network(R50)
    zero = some(model, inner(model)) | {f"{name}.conv2": torch.ones(model.get_submodule(f"{name}.conv2").out_channels, dtype=torch.bool)}
    done = compress(model, zero)
    assert done.blocks == [name]
    assert_kept(model, zero, done, images(1, 64))
    block = done.model.get_submodule(name)
    assert (block.constant is not None) == (kept_as == "constant")
    assert not block.has_residual


def test_branch_without_conv1_filters_keeps_its_borders() -> None:
    model = network(R50)
    zero: Zero = {"layer1.1.conv1": torch.ones(64, dtype=torch.bool)}
    done = compress(model, zero)
    assert (done.blocks, done.carriers) == ([], ["layer1.1.conv1"])
    assert done.model.layer1[1].conv1.out_channels == 1
    assert_kept(model, zero, done, images(1, 64))
    assert compress(model, zero, exact=False).blocks == ["layer1.1"]


def test_branch_that_yields_nothing_leaves_no_constant() -> None:
    model = network(R14)
    model.stage_1[1].bn_b.bias.data.zero_()
    model.stage_1[1].bn_b.running_mean.zero_()
    zero: Zero = {"stage_1.1.conv_b": torch.ones(16, dtype=torch.bool)}
    done = compress(model, zero)
    assert not [name for name in done.model.state_dict() if name.startswith("stage_1.1.")]
    assert_kept(model, zero, done, images())


# ---- exact: false ----------------------------------------------------------------------------------------------------
def test_inexact_compression_differs_at_the_borders_only_and_says_where() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(liven(CifarBlock(8, 8, 1, "pad")))
    zero = {"0.conv_a": torch.arange(8) < 3}
    done = compress(model, zero, exact=False)
    assert (done.inexact, done.carriers) == (["0.conv_b"], [])
    assert done.model[0].conv_a.out_channels == 5
    x = torch.rand(1, 8, 9, 9)
    error = (outputs(done.model, x) - outputs(zeroed(model, zero), x)).abs().amax((0, 1))
    assert float(error[1:-1, 1:-1].max()) < 1e-5
    assert float(error.max()) > 1e-2


# ---- training --------------------------------------------------------------------------------------------------------
def test_carrier_stays_a_constant_in_training() -> None:
    model = network(R14)
    done = compress(model, some(model, ["stage_2.1.conv_a"]))
    optimizer = torch.optim.SGD(done.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    done.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(done.model(images(4)), torch.arange(4)).backward()
        optimizer.step()
    block = done.model.stage_2[1]
    assert not block.conv_a.weight[-1].any()
    assert float(block.bn_a.weight[-1]) == 0
    assert float(block.bn_a.bias[-1]) not in (0, 1)  # it trains
    assert all(bool(torch.isfinite(tensor).all()) for tensor in done.model.state_dict().values())


# ---- which filters ---------------------------------------------------------------------------------------------------
def test_threshold_counts_norms_up_to_it() -> None:
    model = network(R14)
    weight = model.stage_1[0].conv_a.weight.data
    weight[:] = 1
    weight[3], weight[5] = 0, 0
    weight[5, 2, 1, 1] = 1e-6  # as a float32 a little below
    weight[7] = 1e-6  # 144 of them: a norm of 1.2e-5
    (found,) = zero_filters(model, ["stage_1.0.conv_a"], 1e-6).values()
    assert torch.nonzero(found).flatten().tolist() == [3, 5]
    assert not zeroed(model, {"stage_1.0.conv_a": found}).stage_1[0].conv_a.weight[5].any()


def test_bad_weights_and_names_are_refused() -> None:
    model = network(R14)
    with pytest.raises(UsageError, match=r"stage_1\.7"):
        zero_filters(model, ["stage_1.7.conv_a"], 0)
    with pytest.raises(UsageError, match="conv_1_3x3"):
        compress(model, {"conv_1_3x3": torch.zeros(16, dtype=torch.bool)})
    model.stage_1[0].conv_a.weight.data[0] = float("nan")
    with pytest.raises(UsageError, match="finite"):
        zero_filters(model, ["stage_1.0.conv_a"], 0)
