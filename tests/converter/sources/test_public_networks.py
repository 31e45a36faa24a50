"""State dicts of torchvision's and timm's networks: the error names the --arch that opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_kit import assert_computes, classes_as, forward, images, save

from gkp.converter.sources import open_model
from gkp.converter.sources._public_networks import public_hint
from gkp.errors import UnsupportedModelError
from gkp.types import Array

Shapes = dict[str, tuple[int, ...]]


# ---- their names and shapes, as their papers and documentation have them ----------------------------------------------
def conv(name: str, *shape: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()}


def resnet(blocks: tuple[int, ...], widths: tuple[int, ...] = (64, 128, 256, 512), groups: int = 1, deep: bool = True,
           deep_stem: bool = False) -> Shapes:
    """He et al. 2016; ResNeXt, Xie et al. 2017; the stem and the shortcuts of ResNet-D, He et al. 2019. widths: of the inner
    convolutions."""
    shapes: Shapes = {}
    if deep_stem:
        for place, (f, c) in zip((0, 3, 6), ((32, 3), (32, 32), (64, 32)), strict=True):
            shapes |= conv(f"conv1.{place}", f, c, 3, 3) | (norm(f"conv1.{place + 1}", f) if place < 6 else {})
    else:
        shapes |= conv("conv1", 64, 3, 7, 7)
    shapes |= norm("bn1", 64)
    read = 64
    for stage, (count, inner) in enumerate(zip(blocks, widths, strict=True)):
        out = (256 if deep else 64) << stage
        for number in range(count):
            name = f"layer{stage + 1}.{number}"
            sizes = ([(inner, read, 1), (inner, inner // groups, 3), (out, inner, 1)] if deep
                     else [(out, read, 3), (out, out, 3)])
            for place, (f, c, k) in enumerate(sizes, 1):
                shapes |= conv(f"{name}.conv{place}", f, c, k, k) | norm(f"{name}.bn{place}", f)
            if read != out:
                at = 1 if deep_stem else 0
                shapes |= conv(f"{name}.downsample.{at}", out, read, 1, 1) | norm(f"{name}.downsample.{at + 1}", out)
            read = out
    return shapes | conv("fc", 1000, read, bias=True)


def vgg(stages: tuple[int, ...], norms: bool) -> Shapes:
    """Simonyan and Zisserman 2015."""
    shapes: Shapes = {}
    place, read = 0, 3
    for width, count in zip((64, 128, 256, 512, 512), stages, strict=True):
        for _ in range(count):
            shapes |= conv(f"features.{place}", width, read, 3, 3, bias=True)
            shapes |= norm(f"features.{place + 1}", width) if norms else {}
            place, read = place + (3 if norms else 2), width
        place += 1
    return (shapes | conv("classifier.0", 4096, 25088, bias=True) | conv("classifier.3", 4096, 4096, bias=True)
            | conv("classifier.6", 1000, 4096, bias=True))


def densenet(layers: tuple[int, ...], growth: int = 32, stem: int = 64) -> Shapes:
    """Huang et al. 2017."""
    shapes = conv("features.conv0", stem, 3, 7, 7) | norm("features.norm0", stem)
    width = stem
    for block, count in enumerate(layers, 1):
        for layer in range(1, count + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            shapes |= norm(f"{name}.norm1", width) | conv(f"{name}.conv1", 4 * growth, width, 1, 1)
            shapes |= norm(f"{name}.norm2", 4 * growth) | conv(f"{name}.conv2", growth, 4 * growth, 3, 3)
            width += growth
        if block < len(layers):
            name = f"features.transition{block}"
            shapes |= norm(f"{name}.norm", width) | conv(f"{name}.conv", width // 2, width, 1, 1)
            width //= 2
    return shapes | norm("features.norm5", width) | conv("classifier", 1000, width, bias=True)


def mobilenet_v2() -> Shapes:
    """Sandler et al. 2018, table 2."""
    shapes = conv("features.0.0", 32, 3, 3, 3) | norm("features.0.1", 32)
    read, number = 32, 1
    for expand, out, count in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(count):
            name, inner = f"features.{number}.conv", read * expand
            parts = ([(inner, read, 1)] if expand > 1 else []) + [(inner, 1, 3)]
            for place, (f, c, k) in enumerate(parts):
                shapes |= conv(f"{name}.{place}.0", f, c, k, k) | norm(f"{name}.{place}.1", f)
            shapes |= conv(f"{name}.{len(parts)}", out, inner, 1, 1) | norm(f"{name}.{len(parts) + 1}", out)
            read, number = out, number + 1
    return (shapes | conv(f"features.{number}.0", 1280, read, 1, 1) | norm(f"features.{number}.1", 1280)
            | conv("classifier.1", 1000, 1280, bias=True))


WIDE, WIDER = (128, 256, 512, 1024), (256, 512, 1024, 2048)
NETWORKS = {
    "torchvision.models:mobilenet_v2": mobilenet_v2(),
    "torchvision.models:resnet152": resnet((3, 8, 36, 3)),
    "torchvision.models:resnext50_32x4d": resnet((3, 4, 6, 3), WIDE, 32),
    "torchvision.models:resnext101_32x8d": resnet((3, 4, 23, 3), WIDER, 32),
    "torchvision.models:resnext101_64x4d": resnet((3, 4, 23, 3), WIDER, 64),
    "torchvision.models:densenet121": densenet((6, 12, 24, 16)),
    "torchvision.models:densenet161": densenet((6, 12, 36, 24), 48, 96),
    "torchvision.models:densenet169": densenet((6, 12, 32, 32)),
    "torchvision.models:densenet201": densenet((6, 12, 48, 32)),
    **{f"torchvision.models:vgg{depth}{'_bn' * norms}": vgg(stages, norms)
       for depth, stages in ((11, (1, 1, 2, 2, 2)), (13, (2,) * 5), (16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4)))
       for norms in (False, True)},
    "timm.models:resnet26": resnet((2, 2, 2, 2)),
    "timm.models:resnet18d": resnet((2, 2, 2, 2), deep=False, deep_stem=True),
    "timm.models:resnet26d": resnet((2, 2, 2, 2), deep_stem=True),
    "timm.models:resnet34d": resnet((3, 4, 6, 3), deep=False, deep_stem=True),
    "timm.models:resnet50d": resnet((3, 4, 6, 3), deep_stem=True),
    "timm.models:resnet101d": resnet((3, 4, 23, 3), deep_stem=True),
}


def arrays(shapes: Shapes, prefix: str = "") -> dict[str, Array]:
    """Without memory for their numbers."""
    return {prefix + name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


# ---- the hint --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "module.model."])
@pytest.mark.parametrize("arch", NETWORKS)
def test_the_arch_is_named(arch: str, prefix: str) -> None:
    assert public_hint(arrays(NETWORKS[arch], prefix)) == f"pass --arch {arch} --input-shape 1,3,224,224"


@pytest.mark.parametrize("arch", NETWORKS)
def test_another_network_is_not_taken_for_one_of_theirs(arch: str) -> None:
    """One that is narrower, such as a pruned one, or has a tensor more: that --arch would not fit."""
    named = arrays(NETWORKS[arch])
    narrow = {name: array if array.ndim != 4 else array[: max(1, len(array) // 2)] for name, array in named.items()}
    thin = {name: array if array.ndim != 2 else array[: len(array) // 2] for name, array in narrow.items()}
    assert public_hint(thin) is None
    assert public_hint({**named, "more.weight": np.zeros(1)}) is None


@pytest.mark.parametrize("shapes", [resnet((3, 4, 6, 3)), resnet((3, 4, 6, 3), WIDE), resnet((2, 2, 2, 2), deep=False), {}])
def test_what_gkp_builds_needs_no_arch(shapes: Shapes) -> None:
    """A Wide ResNet among them."""
    assert public_hint(arrays(shapes)) is None


@pytest.mark.parametrize("arch", ["torchvision.models:mobilenet_v2", "torchvision.models:resnext50_32x4d",
                                  "timm.models:resnet26d"])
def test_a_state_dict_is_refused_with_the_arch_that_opens_it(arch: str, tmp_path: Path) -> None:
    state = {f"model.{name}": torch.ones(shape, dtype=torch.float16) for name, shape in NETWORKS[arch].items()}
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(save(tmp_path / "x.pth", {"state_dict": state}))
    assert caught.value.hint == f"pass --arch {arch} --input-shape 1,3,224,224"


def test_a_whole_module_is_refused_with_the_arch_that_opens_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (kind,) = classes_as(monkeypatch, torchvision_DOT_models_DOT_mobilenetv2__MobileNetV2=nn.Module)
    module = kind()
    for name, shape in NETWORKS["torchvision.models:mobilenet_v2"].items():
        *path, last = name.split(".")
        part = module
        for step in path:
            if step not in part._modules:
                part.add_module(step, nn.Module())
            part = part.get_submodule(step)
        part.register_buffer(last, torch.ones(shape, dtype=torch.float16))
    with pytest.raises(UnsupportedModelError, match=r"torchvision\.models\.mobilenetv2\.MobileNetV2") as caught:
        open_model(save(tmp_path / "x.pt", module))
    assert "--arch torchvision.models:mobilenet_v2" in caught.value.hint
    assert "if no layer of it was changed" in caught.value.hint  # --arch compares nothing


def test_inner_convolutions_wider_than_usual_open_as_they_are(tmp_path: Path) -> None:
    """A Wide ResNet, of which only the first stage is wide here."""
    torch.manual_seed(0)
    shapes = resnet((3, 4, 6, 3), (128, 8, 8, 8))
    state = {name: torch.randn(shape) / 50 if len(shape) > 1 else torch.ones(shape) for name, shape in shapes.items()}
    x = images(1, 32)
    assert_computes(open_model(save(tmp_path / "x.pth", state)), forward(state, x), x)
