"""The networks are the published ones: sizes, wiring, names."""

import numpy as np
import pytest
import torch

from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.resnet_cifar import PadShortcut, cifar_resnet
from gkp.pruning.models.resnet_imagenet import Bottleneck, imagenet_resnet


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_cifar_resnet_has_the_published_number_of_parameters(depth: int, count: int) -> None:
    assert parameters(cifar_resnet(depth)) == count


def test_conv_shortcut_adds_two_1x1_convs_with_batchnorm() -> None:
    added = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(cifar_resnet(44, shortcut="conv")) == parameters(cifar_resnet(44)) + added


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)])
def test_imagenet_resnet_has_the_published_number_of_parameters(depth: int, count: int) -> None:
    assert parameters(imagenet_resnet(depth)) == count


@pytest.mark.parametrize("depth", [2, 19, 21])
def test_depth_that_is_no_cifar_resnet_is_refused(depth: int) -> None:
    with pytest.raises(UsageError, match=str(depth)):
        cifar_resnet(depth)


def test_imagenet_depth_without_a_network_is_refused() -> None:
    with pytest.raises(UsageError, match="19"):
        imagenet_resnet(19)


def test_skeleton_refuses_an_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModelError, match="resnet99") as caught:
        skeleton(Architecture("resnet99", 20, "pad", 10, (3, 32, 32)))
    assert "--arch" in caught.value.hint


def test_pad_shortcut_subsamples_and_appends_zero_channels() -> None:
    x = torch.randn(2, 4, 5, 6)
    behind, both = PadShortcut(4)(x), PadShortcut(4, 2)(x)
    assert torch.equal(behind[:, :4], x[:, :, ::2, ::2])
    assert not behind[:, 4:].any()
    assert torch.equal(both[:, 2:6], x[:, :, ::2, ::2])
    assert not both[:, :2].any()
    assert not both[:, 6:].any()
    assert behind.shape == both.shape == (2, 8, 3, 3)


def test_bottleneck_strides_in_its_3x3() -> None:
    block = imagenet_resnet(50).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_block_without_residual_is_relu_of_the_shortcut(stride: int) -> None:
    block = Bottleneck(8 if stride == 2 else 16, 4, stride).eval()
    block.remove_residual()
    x = torch.randn(2, 8 if stride == 2 else 16, 6, 6)
    shortcut = x if block.downsample is None else block.downsample(x)
    assert torch.equal(block(x), torch.relu(shortcut))
    assert all(name.startswith("downsample.") for name in block.state_dict())


def test_small_stem_keeps_the_resolution() -> None:
    model = imagenet_resnet(18, 10, small_stem=True)
    x = torch.zeros(1, 3, 32, 32)
    assert model.maxpool(model.conv1(x)).shape == (1, 64, 32, 32)
    assert imagenet_resnet(18, 10).maxpool(imagenet_resnet(18, 10).conv1(x)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("shape", [(32, 32), (40, 28)])
def test_networks_take_any_image_size(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape)
    for model in (cifar_resnet(8).eval(), imagenet_resnet(18, 7).eval()):
        with torch.inference_mode():
            logits = model(x).numpy()
        assert logits.shape[0] == 2
        assert np.isfinite(logits).all()
