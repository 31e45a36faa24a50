"""PreResNet, DenseNet, VGG and MobileNet are the published ones, are recognised, rebuilt, and converted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch_kit import assert_computes, images, liven

import gkp
from gkp.branched import BranchedConv
from gkp.converter.sources import open_model
from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.build import build, recognise
from gkp.pruning.models.densenet import CifarDenseNet86, cifar_densenet
from gkp.pruning.models.preresnet import PreActBottleneck, cifar_preresnet
from gkp.pruning.models.vgg import cifar_vgg, conv_places
from gkp.pruning.models.wiring import chains

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def arch_of(family: str, depth: int, classes: int = 10) -> Architecture:
    return Architecture(family, depth, "conv", classes, IMAGENET if family.startswith("imagenet") else CIFAR)


PRERESNET, SMALL_PRERESNET = arch_of("cifar_preresnet", 164), arch_of("cifar_preresnet", 20)
DENSENET40, DENSENET86 = arch_of("cifar_densenet", 40), arch_of("cifar_densenet", 86)
VGG, VGG_AVGPOOL = arch_of("cifar_vgg", 16), arch_of("cifar_vgg_avgpool", 16)
MOBILENET, CIFAR_MOBILENET = arch_of("imagenet_mobilenet", 28, 1000), arch_of("cifar_mobilenet", 28)
RESNET12 = arch_of("resnet12", 12)
ALL = (PRERESNET, SMALL_PRERESNET, DENSENET40, DENSENET86, VGG, arch_of("cifar_vgg", 19), MOBILENET, CIFAR_MOBILENET, RESNET12)

Tensors = dict[str, np.ndarray]


def network(arch: Architecture) -> torch.nn.Module:
    torch.manual_seed(0)
    return liven(skeleton(arch))


def tensors_of(model: torch.nn.Module) -> Tensors:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: torch.nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convs and linear layers, for one image."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, _, y: found.append(m.weight.numel() * y[0, 0].numel()))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *shape))
    return sum(found)


def assert_same(a: torch.nn.Module, b: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = a(x)
        torch.testing.assert_close(b(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# ---- as published ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "millions", "mmacs"),
    [
        # Liu et al. 2017, "Learning efficient convolutional networks through network slimming", table 1: 1.70M and 1.73M
        # parameters of ResNet-164, 1.02M and 1.06M of DenseNet-40, 20.04M of VGG-19; its FLOPs are two per MAC: 5.00e8,
        # 5.33e8, 7.97e8
        (PRERESNET, 1.70, 250),
        (arch_of("cifar_preresnet", 164, 100), 1.73, 250),
        (DENSENET40, 1.02, 266),
        (arch_of("cifar_densenet", 40, 100), 1.06, 266),
        (arch_of("cifar_vgg", 19), 20.04, 398.5),
        (VGG, 14.73, 313),  # usual figures of VGG-16 on CIFAR-10, e.g. Li et al. 2017, "Pruning filters ...": 3.13e8
        (MOBILENET, 4.23, 569),  # Howard et al. 2017, table 4: 4.2M parameters, 569M mult-adds
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else None,
)
def test_networks_have_the_published_size(arch: Architecture, millions: float, mmacs: float) -> None:
    model = skeleton(arch)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    assert macs(model, arch.input_shape) / 1e6 == pytest.approx(mmacs, rel=0.01)


def test_densenet86_in_four_groups_has_the_size_of_condensenet86() -> None:
    """Huang et al. 2018, table 2: 0.52M parameters, with four groups in every conv but the first."""
    model = CifarDenseNet86()
    grouped = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and "init" not in n)
    assert (parameters(model) - 3 * grouped / 4) / 1e6 == pytest.approx(0.52, abs=0.001)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 85  # and the classifier


def test_preactivation_block_is_written_out_right() -> None:
    block = liven(PreActBottleneck(16, 8, 2))
    x = torch.randn(2, 16, 6, 6)

    def before(norm: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(norm(y))

    y = torch.nn.functional.conv2d(before(block.bn1, x), block.conv1.weight)
    y = torch.nn.functional.conv2d(before(block.bn2, y), block.conv2.weight, stride=2, padding=1)
    y = torch.nn.functional.conv2d(before(block.bn3, y), block.conv3.weight)
    shortcut = torch.nn.functional.conv2d(x, block.downsample[0].weight, stride=2)
    torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize("arch", [SMALL_PRERESNET, DENSENET40, VGG, CIFAR_MOBILENET, RESNET12], ids=lambda a: a.name)
def test_networks_take_other_image_sizes(arch: Architecture) -> None:
    with torch.inference_mode():
        assert network(arch)(torch.randn(2, 3, 40, 48)).shape == (2, 10)


def test_depths_that_are_none_are_refused() -> None:
    for make, depth in ((cifar_preresnet, 165), (cifar_preresnet, 2), (cifar_densenet, 41), (cifar_vgg, 17)):
        with pytest.raises(UsageError, match=str(depth)):
            make(depth)
    for family, depth in (("cifar_preresnet", 10**9), ("cifar_densenet", 100), ("cifar_vgg", 12), ("cifar_mobilenet", 27)):
        with pytest.raises(UnsupportedModelError, match="no architecture"):
            skeleton(arch_of(family, depth))


def rebuilt(tensors: Tensors) -> torch.nn.Module:
    return build(recognise(tensors), tensors)


# ---- recognised and rebuilt ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ALL, ids=lambda a: f"{a.family}-{a.depth}")
def test_every_network_is_recognised_and_rebuilt(arch: Architecture) -> None:
    model = network(arch)
    tensors = {f"module.{name}": array for name, array in tensors_of(model).items()}
    found = recognise(tensors)
    assert (found.family, found.depth, found.num_classes, found.prefix) == (arch.family, arch.depth, arch.num_classes, "module.")
    assert_same(model, build(found, tensors), images(1, min(arch.input_shape[1], 64)))


def test_vgg_behind_a_normalisation_has_four_poolings() -> None:
    model = network(VGG_AVGPOOL)
    tensors = tensors_of(model) | {"normalize.mean": np.zeros(3, np.float32), "normalize.std": np.ones(3, np.float32)}
    found = recognise(tensors)
    assert found == VGG_AVGPOOL
    assert_same(model, build(found, tensors), images())
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in model.modules()) == 4


def test_vgg_of_gconv_prune_has_its_classifier_in_a_sequence() -> None:
    model = network(VGG)
    tensors = {n.replace("classifier.", "classifier.0."): a for n, a in tensors_of(model).items()}
    found = recognise(tensors)
    assert (found.family, found.scheme) == ("cifar_vgg", "layer")
    assert_same(model, build(found, tensors), images())


def test_mobilenet_of_gconv_prune_counts_its_layers_otherwise() -> None:
    model = network(arch_of("imagenet_mobilenet", 28, 120))
    first = {**{i: (1, i) for i in (0, 1)}, **{i: (2, i - 2) for i in (2, 3)}, **{i: (3, i - 4) for i in (4, 5)},
             **{i: (4, i - 6) for i in range(6, 12)}, 12: (5, 0)}
    tensors = {}
    for name, array in tensors_of(model).items():
        parts = name.split(".")
        if parts[0] == "layers":
            layer, place = first[int(parts[1])]
            inside = {"conv1": "d_conv", "conv2": "p_conv"}.get(parts[2], parts[2])
            parts = [f"layer{layer}", str(place), inside, *parts[3:]]
        parts[0] = {"bn1": "bn", "linear": "fc"}.get(parts[0], parts[0])
        tensors[".".join(parts)] = array
    found = recognise(tensors)
    assert (found.family, found.scheme, found.num_classes) == ("imagenet_mobilenet", "layer", 120)
    assert_same(model, build(found, tensors), images(1, 64))


@pytest.mark.parametrize(
    "names",
    [("features.0.weight", "classifier.weight"), ("features.0.weight", "features.1.running_mean", "classifier.weight"),
     ("conv1.weight", "bn.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"),
     ("conv1.weight", "layers.0.conv1.weight", "layers.0.conv1.bias"), ("conv1.weight", "dense3.0.conv.weight")],
)
def test_look_alikes_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError):
        rebuilt({name: np.zeros((10, 3), np.float32) for name in names})


def test_absurd_layer_numbers_are_refused() -> None:
    tensors = tensors_of(network(CIFAR_MOBILENET))
    tensors["layer5.99999.d_conv.weight"] = tensors["layers.0.conv1.weight"]
    with pytest.raises(UnsupportedModelError):
        rebuilt(tensors)


# ---- fewer channels, and branches ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "owner"),
    [(SMALL_PRERESNET, "layer2.1"), (SMALL_PRERESNET, "layer3.0"), (DENSENET86, "features.denseblock_2.denselayer_3")],
)
def test_channels_pruned_inside_a_preactivation_block_follow(arch: Architecture, owner: str) -> None:
    """conv1's filters are those that bn2 normalises and conv2 reads."""
    model = network(arch)
    conv1, kept = f"{owner}.conv1", np.arange(0, model.get_submodule(f"{owner}.conv1").out_channels, 3)
    gone = np.setdiff1d(np.arange(model.get_submodule(conv1).out_channels), kept)
    tensors = tensors_of(model)
    tensors[f"{conv1}.weight"] = tensors[f"{conv1}.weight"][kept]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[f"{owner}.bn2.{name}"] = tensors[f"{owner}.bn2.{name}"][kept]
    tensors[f"{owner}.conv2.weight"] = tensors[f"{owner}.conv2.weight"][:, kept]
    narrow = build(recognise(tensors), tensors)
    assert narrow.get_submodule(f"{owner}.bn2").num_features == len(kept)
    model.get_submodule(f"{owner}.conv2").weight.data[:, gone] = 0
    assert_same(model, narrow, images())


def test_narrow_vgg_follows_its_tensors() -> None:
    tensors = tensors_of(network(VGG))
    first, second = conv_places(16)[3:5]
    for name in ("weight", "bias"):
        tensors[f"features.{first}.{name}"] = tensors[f"features.{first}.{name}"][:100]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[f"features.{first + 1}.{name}"] = tensors[f"features.{first + 1}.{name}"][:100]
    with pytest.raises(UnsupportedModelError, match=rf"features\.{second} reads 128 channels, but gets 100"):
        build(VGG, tensors)
    tensors[f"features.{second}.weight"] = tensors[f"features.{second}.weight"][:, :100]
    assert build(VGG, tensors).get_submodule(f"features.{first}").out_channels == 100


@pytest.mark.parametrize(
    ("arch", "name", "axis", "says"),
    [(SMALL_PRERESNET, "layer2.1.conv3", 0, "layer2.1.conv3 yields 127 channels, but its shortcut has 128"),
     (SMALL_PRERESNET, "conv1", 0, "layer1.0.downsample.0 reads 16 channels, but gets 15"),
     (DENSENET40, "dense2.3.conv", 0, "dense2.4.bn.weight is of 208 channels, but gets 207"),
     (DENSENET40, "trans1.conv1", 1, "trans1.conv1 reads 159 channels, but gets 160"),
     (CIFAR_MOBILENET, "layers.3.conv1", 0, "layers.3.conv1 reads 127 channels, but gets 128"),
     (CIFAR_MOBILENET, "layers.3.conv2", 0, "layers.3.bn2.weight is of 256 channels, but gets 255")],
)
def test_channels_that_do_not_fit_together_are_named(arch: Architecture, name: str, axis: int, says: str) -> None:
    tensors = tensors_of(network(arch))
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = np.take(weight, range(weight.shape[axis] - 1), axis)
    with pytest.raises(UnsupportedModelError, match=f"^{re.escape(says)}$") as caught:
        build(arch, tensors)
    assert "ONNX or TorchScript" in caught.value.hint


def test_every_conv_is_in_one_chain() -> None:
    for arch in ALL:
        model = skeleton(arch)
        listed = [name for chain in chains(model) for name, _ in chain]
        assert sorted(listed) == sorted(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))


def into_branches(model: torch.nn.Module, names: list[str]) -> None:
    """Two branches of unequal, overlapping inputs, the last output in none."""
    rng = np.random.default_rng(0)
    for name in names:
        conv = model.get_submodule(name)
        f, c = conv.out_channels, conv.in_channels
        outs = rng.permutation(f)[: f - 1]
        triples = []
        for part, count in zip(np.array_split(outs, 2), (c // 2, 2 * c // 3), strict=True):
            ins = np.sort(rng.permutation(c)[:count])
            triples.append((ins, part, conv.weight.detach().numpy()[np.ix_(part, ins)]))
        bias = None if conv.bias is None else conv.bias.detach().numpy()
        form = BranchedConv.build(c, f, triples, bias=bias, kernel_shape=conv.kernel_size, strides=conv.stride,
                                  pads=conv.padding * 2)
        model.set_submodule(name, BranchedConv2d(form))


CONVERTED = [
    (SMALL_PRERESNET, ["layer1.1.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer3.1.conv3"]),
    (DENSENET40, ["dense1.3.conv", "trans1.conv1", "dense3.11.conv"]),
    (CIFAR_MOBILENET, ["layers.2.conv2", "layers.7.conv2", "layers.12.conv2"]),
]
LARGE = [
    (PRERESNET, [f"layer{s}.{i}.conv2" for s in (1, 2, 3) for i in range(18)]),
    (DENSENET86, ["features.denseblock_1.denselayer_2.conv1", "features.denseblock_3.denselayer_14.conv2"]),
    (VGG, ["features.3", "features.17", "features.40"]),
    (MOBILENET, [f"layers.{i}.conv2" for i in range(13)]),
]


def assert_converts(folder: Path, arch: Architecture, names: list[str]) -> None:
    model = network(arch)
    into_branches(model, names)
    model.eval()
    checkpoint.save(folder / "grouped", model, arch, {})
    artefact = gkp.convert(folder / "grouped", target="onnx", output=folder / "out", benchmark=False)  # verifies, too
    assert artefact.manifest.source.system == "gkp"
    assert sum(layer.branches == 2 for layer in artefact.manifest.layers) == len(names)
    x = images(1, arch.input_shape[1])
    running = onnxruntime.InferenceSession(str(folder / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = running.run(None, {running.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        expected = model(x).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("arch", "names"), CONVERTED, ids=lambda v: v.name if isinstance(v, Architecture) else "")
def test_checkpoint_with_branches_opens_and_converts(tmp_path: Path, arch: Architecture, names: list[str]) -> None:
    assert_converts(tmp_path, arch, names)


@pytest.mark.parametrize("arch", [SMALL_PRERESNET, DENSENET40, CIFAR_MOBILENET], ids=lambda a: a.name)
def test_plain_state_dict_opens(tmp_path: Path, arch: Architecture) -> None:
    model = network(arch)
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "model.pth.tar")
    x = images()
    with torch.inference_mode():
        assert_computes(open_model(tmp_path / "model.pth.tar"), model(x), x)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "names"), LARGE, ids=lambda v: v.name if isinstance(v, Architecture) else "")
def test_large_network_with_branches_opens_and_converts(tmp_path: Path, arch: Architecture, names: list[str]) -> None:
    assert_converts(tmp_path, arch, names)
