"""Architectures are recognised from names and shapes, and networks rebuilt from tensors compute the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gkp.branched import BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.build import build, recognise

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "checkpoints"

R20 = Architecture("cifar_resnet", 20, "pad", 10, (3, 32, 32))
R18_SMALL = Architecture("imagenet_resnet_3x3_stem", 18, "conv", 10, (3, 32, 32))
R50 = Architecture("imagenet_resnet", 50, "conv", 7, (3, 224, 224))
ALL = (
    *(Architecture("cifar_resnet", d, "pad", 10, (3, 32, 32)) for d in (20, 32, 44, 56, 110)),
    Architecture("cifar_resnet", 20, "conv", 100, (3, 32, 32)),
    *(Architecture("imagenet_resnet", d, "conv", 7, (3, 224, 224)) for d in (18, 34, 50, 101)),
    R18_SMALL,
)

Tensors = dict[str, np.ndarray]


def random_model(arch: Architecture) -> torch.nn.Module:
    """A network whose BatchNorms do something."""
    torch.manual_seed(0)
    model = skeleton(arch)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    return model.eval()


def tensors_of(model: torch.nn.Module) -> Tensors:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def layer_names(tensors: Tensors, shortcut: str = "shortcut", classifier: str = "linear") -> Tensors:
    """The canonical tensors of a CIFAR ResNet under the usual names."""
    pairs = (("conv_1_3x3", "conv1"), ("bn_1", "bn1"), ("stage_", "layer"), ("conv_a", "conv1"), ("bn_a", "bn1"),
             ("conv_b", "conv2"), ("bn_b", "bn2"), ("downsample", shortcut), ("classifier", classifier))
    renamed = {}
    for name, array in tensors.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[name] = array
    return renamed


def assert_same(a: torch.nn.Module, b: torch.nn.Module, size: int = 32) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ALL, ids=lambda a: f"{a.family}-{a.depth}-{a.shortcut}")
def test_every_architecture_is_recognised_and_rebuilt(arch: Architecture) -> None:
    model = random_model(arch)
    tensors = tensors_of(model)
    found = recognise(tensors)
    assert found == arch
    rebuilt = build(found, tensors)
    assert not rebuilt.training
    assert_same(model, rebuilt)


def test_data_parallel_prefix_and_missing_counters_change_nothing() -> None:
    model = random_model(R20)
    tensors = {f"module.{n}": a for n, a in tensors_of(model).items() if not n.endswith("num_batches_tracked")}
    found = recognise(tensors)
    assert (found.prefix, found.depth, found.shortcut) == ("module.", 20, "pad")
    assert_same(model, build(found, tensors))


@pytest.mark.parametrize("names", [("shortcut", "linear"), ("downsample", "fc")])
def test_usual_cifar_names_with_a_conv_shortcut(names: tuple[str, str]) -> None:
    model = random_model(Architecture("cifar_resnet", 20, "conv", 10, (3, 32, 32)))
    tensors = layer_names(tensors_of(model), *names)
    found = recognise(tensors)
    assert (found.scheme, found.shortcut) == ("layer", "conv")
    assert_same(model, build(found, tensors))


@pytest.mark.parametrize(("spurious", "shortcut"), [(True, "pad"), (False, "pad_both")])
def test_parameter_free_shortcut_under_usual_names_is_tmi_gkps_only_with_its_mark(
    spurious: bool, shortcut: str
) -> None:
    model = random_model(Architecture("cifar_resnet", 20, shortcut, 10, (3, 32, 32)))
    tensors = layer_names(tensors_of(model))
    if spurious:
        tensors["new_weight"] = tensors["layer3.2.conv2.weight"]
    found = recognise(tensors)
    assert found.shortcut == shortcut
    assert_same(model, build(found, tensors))


def test_small_image_resnet_with_shortcut_and_linear_names() -> None:
    model = random_model(R18_SMALL)
    tensors = tensors_of(model)
    tensors = {n.replace("downsample", "shortcut").replace("fc.", "linear."): a for n, a in tensors.items()}
    found = recognise(tensors)
    assert (found.family, found.scheme) == ("imagenet_resnet_3x3_stem", "layer")
    assert_same(model, build(found, tensors))


def test_mean_and_std_become_the_first_layer() -> None:
    model = random_model(R18_SMALL)
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    tensors = tensors_of(model) | {"normalize.mean": mean, "normalize.std": std}
    built = build(recognise(tensors), tensors)
    x = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy((x - mean[:, None, None]) / std[:, None, None]))
        torch.testing.assert_close(built(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-4)


def test_filter_pruned_bottleneck_gets_the_widths_of_its_tensors() -> None:
    tensors = tensors_of(random_model(R50))
    kept1, kept2 = np.arange(0, 64, 3), np.arange(5, 64, 2)
    block = "layer1.1"
    for name in [n for n in tensors if n.startswith((f"{block}.bn1", f"{block}.bn2")) and tensors[n].ndim]:
        tensors[name] = tensors[name][kept1 if ".bn1." in name else kept2]
    tensors[f"{block}.conv1.weight"] = tensors[f"{block}.conv1.weight"][kept1]
    tensors[f"{block}.conv2.weight"] = tensors[f"{block}.conv2.weight"][np.ix_(kept2, kept1)]
    tensors[f"{block}.conv3.weight"] = tensors[f"{block}.conv3.weight"][:, kept2]
    model = build(recognise(tensors), tensors)
    assert (model.layer1[1].conv1.out_channels, model.layer1[1].conv2.out_channels) == (22, 30)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("block", ["layer1.0", "layer2.1", "layer4.2"])
def test_block_without_tensors_is_relu_of_its_shortcut(block: str) -> None:
    model = random_model(R50)
    model.get_submodule(block).remove_residual()
    tensors = tensors_of(model)
    assert recognise(tensors) == R50
    assert_same(model, build(R50, tensors))


@pytest.mark.parametrize(
    ("arch", "names"),
    [(R20, ["stage_2.1.conv_a", "stage_3.0.conv_a", "stage_3.2.conv_b"]), (R50, ["layer2.0.conv2", "layer3.1.conv3"])],
)
def test_branched_convs_take_their_place_with_the_stride_of_the_architecture(
    arch: Architecture, names: list[str]
) -> None:
    model, rng, forms = random_model(arch), np.random.default_rng(0), {}
    for name in names:
        conv = model.get_submodule(name)
        mask = np.repeat(rng.random((4, conv.in_channels)) < 0.6, conv.out_channels // 4, axis=0)
        conv.weight.data *= torch.from_numpy(mask[rng.permutation(len(mask)), :, None, None].astype(np.float32))
        forms[name] = BranchedConv.from_dense(conv.weight.detach().numpy())
    tensors = {n: a for n, a in tensors_of(model).items() if n.removesuffix(".weight") not in names}
    assert recognise(tensors, forms) == arch
    built = build(arch, tensors, forms)
    assert [n for n, m in built.named_modules() if isinstance(m, BranchedConv2d)] == names
    assert_same(model, built)


def test_branched_names_are_the_checkpoints_own() -> None:
    model = random_model(Architecture("cifar_resnet", 20, "conv", 10, (3, 32, 32)))
    tensors = {f"module.{n}": a for n, a in layer_names(tensors_of(model)).items()}
    name = "module.layer3.1.conv1"
    forms = {name: BranchedConv.from_dense(tensors.pop(f"{name}.weight"))}
    built = build(recognise(tensors, forms), tensors, forms)
    assert isinstance(built.stage_3[1].conv_a, BranchedConv2d)
    assert_same(model, built)


def test_conv_with_every_weight_pruned_yields_its_bias() -> None:
    model = random_model(R20)
    model.stage_2[1].conv_b.weight.data.zero_()
    tensors = tensors_of(model)
    forms = {"stage_2.1.conv_b": BranchedConv.from_dense(tensors["stage_2.1.conv_b.weight"])}
    assert_same(model, build(R20, tensors, forms))


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: a for n, a in tensors.items() if n != name}


def damaged(tensors: Tensors, kind: str) -> Tensors:
    weight = tensors["stage_2.1.conv_a.weight"]
    return {
        "missing conv": without(tensors, "stage_2.1.conv_a.weight"),
        "missing norm": without(tensors, "bn_1.running_var"),
        "superfluous": tensors | {"stage_2.1.attention.weight": weight},
        "kernel": tensors | {"stage_2.1.conv_a.weight": weight[:, :, :1]},
        "inside": tensors | {"stage_2.1.conv_a.weight": weight[:20]},
        "stream": tensors | {"stage_2.1.conv_b.weight": weight[:20]},
        "norm": tensors | {"bn_1.weight": np.ones(17, np.float32)},
        "nan": tensors | {"bn_1.weight": np.full(16, np.nan, np.float32)},
        "integers": tensors | {"bn_1.weight": np.ones(16, np.int8)},
        "twice": tensors | {"module.bn_1.weight": np.ones(16, np.float32)},
        "classes": tensors | {"classifier.weight": np.ones((11, 64), np.float32)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("missing conv", "stage_2.1.conv_a.weight"), ("missing norm", "bn_1.running_var"),
     ("superfluous", "stage_2.1.attention.weight"), ("kernel", r"\[32, 32, 1, 3\], expected \[32, 32, 3, 3\]"),
     ("inside", "stage_2.1.bn_a.weight is of 32 channels, but gets 20"),
     ("stream", "stage_2.1.bn_b.weight is of 32 channels, but gets 20"),
     ("norm", "bn_1.weight"), ("nan", "bn_1.weight"), ("integers", "bn_1.weight"), ("twice", "same meaning"),
     ("classes", "10 classes")],
)
def test_tensors_that_do_not_fit_are_named(kind: str, names: str) -> None:
    tensors = damaged(tensors_of(random_model(R20)), kind)
    arch = Architecture("cifar_resnet", 20, "pad", 10, (3, 32, 32), "canonical", "module." if kind == "twice" else "")
    with pytest.raises(UnsupportedModelError, match=names) as caught:
        build(arch, tensors)
    assert caught.value.hint
    assert ("ONNX or TorchScript, which open at any widths" in caught.value.hint) == (kind in ("inside", "stream", "norm"))


def test_branched_conv_that_the_architecture_lacks_is_named() -> None:
    form = BranchedConv.from_dense(np.ones((16, 16, 3, 3), np.float32))
    with pytest.raises(UnsupportedModelError, match=r"stage_1\.9\.conv_a"):
        build(R20, tensors_of(random_model(R20)), {"stage_1.9.conv_a": form})


@pytest.mark.parametrize(
    "names",
    [(), ("features.0.weight",), ("conv1.weight", "layer4.x.conv1.weight"),
     ("conv1.weight", "layer4.99999.conv1.weight"),
     ("conv_1_3x3.weight", "stage_1.0.conv_a.weight", "stage_2.0.conv_a.weight", "stage_3.1.conv_a.weight"),
     ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv1.weight")],
)
def test_unknown_networks_are_refused_with_a_way_out(names: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        recognise({name: np.zeros((1, 1, 3, 3), np.float32) for name in names})
    assert "--arch" in caught.value.hint


def test_published_baseline_is_recognised_and_yields_ten_logits() -> None:
    path = SHARED / "tmi_gkp" / "resnet20_cifar10" / "snapshots" / "epoch_70.pt"
    if not path.exists():
        pytest.skip("the published TMI-GKP snapshots are not beside the checkout")
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    found = recognise(tensors)
    assert found == R20
    with torch.inference_mode():
        logits = build(found, tensors)(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all()
