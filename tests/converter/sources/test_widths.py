"""Files of networks that were pruned to other widths: what opens, what counts as their dense ancestor, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from narrow_kit import IMAGE, at_random, narrow, wires_of
from torch import nn
from torch.nn.utils import prune
from torch_kit import R8_CONV, R8_PAD, R18, assert_computes, forward, images, layer_names, liven, random_state, save
from whole_modules import torchvision_resnet

from gkp.converter.sources import open_model
from gkp.converter.sources.base import GroupedModel
from gkp.converter.sources.dense import open_dense
from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton

RNG = np.random.default_rng
VGG, PRERESNET = (Architecture(family, depth, "conv", 10, (3, 32, 32)) for family, depth in (("cifar_vgg", 11), ("cifar_preresnet", 11)))


def network(arch: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return liven(skeleton(arch))


def widened(module: nn.Module, block: str) -> nn.Module:
    """Twice the channels inside a block, as in a Wide ResNet."""
    inside = f"{block}.conv_a"
    return narrow(module, lambda group, size: np.concatenate([np.arange(size)] * (1 + (group == inside))))


def channels(opened: GroupedModel) -> list[list[int]]:
    """Shapes of the convolutions of its dense ancestor, largest first."""
    assert opened.dense is not None
    return sorted(([*t.dims] for t in opened.dense().graph.initializer if len(t.dims) == 4), reverse=True)


# ---- state dicts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", [R8_CONV, R18, VGG, PRERESNET], ids=lambda arch: arch.name)
def test_a_state_dict_opens_with_the_widths_of_its_tensors(tmp_path: Path, arch: Architecture) -> None:
    full = network(arch)
    module, x = narrow(full, at_random(RNG(1))), images()
    opened = open_model(save(tmp_path / "model.pth", {"state_dict": module.state_dict()}))
    assert_computes(opened, module(x), x)
    session = onnxruntime.InferenceSession(opened.model.SerializeToString())
    (got,) = session.run(None, {"input": x[:1].numpy()})
    np.testing.assert_allclose(got, module(x[:1]).detach(), rtol=0, atol=1e-5)
    assert opened.pruned
    assert f"convolutions narrower, assumed {opened.assumed}" in opened.description
    convs = sorted(([*m.weight.shape] for m in full.modules() if isinstance(m, nn.Conv2d)), reverse=True)
    assert channels(opened) == convs


def test_channels_gone_are_channels_that_nothing_reads(tmp_path: Path) -> None:
    """The narrow network computes what the full one does whose other channels are read by nobody."""
    full, kept = network(R8_CONV), {}

    def keep(group: str, size: int) -> np.ndarray:
        return kept.setdefault(group, at_random(RNG(len(kept)))(group, size))

    module = narrow(full, keep)
    for name, wire in wires_of(full).items():
        layer = full.get_submodule(name)
        if isinstance(layer, nn.Conv2d | nn.Linear) and wire.reads != (IMAGE,):
            layer.weight.data[:, np.setdiff1d(np.arange(layer.weight.shape[1]), kept[wire.reads[0]])] = 0
    x = images()
    assert_computes(open_model(save(tmp_path / "model.pth", layer_names(module.state_dict()))), full(x), x)


def test_widths_of_the_architecture_are_no_pruning(tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "model.pth", random_state(R18)))
    assert (opened.pruned, opened.dense) == (False, None)
    assert "narrower" not in opened.description


def test_names_in_errors_are_the_files(tmp_path: Path) -> None:
    state = {f"module.{n}": t for n, t in layer_names(random_state(R8_CONV)).items()}
    for name in ("conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"):
        state[f"module.layer2.0.{name}"] = state[f"module.layer2.0.{name}"][:20]
    says = r"^module\.layer2\.0\.conv2 yields 20 channels, but its shortcut has 32$"
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        open_model(save(tmp_path / "model.pth", state))
    assert "export the network to ONNX or TorchScript" in caught.value.hint


# ---- whole modules ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blocks", [(2, 2, 2, 2), (1, 1, 1, 1)], ids=["all blocks", "fewer blocks"])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_whole_module_opens_with_the_widths_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, depth: int, blocks: tuple[int, ...]
) -> None:
    """A ResNet-10, or -26, is not one of more blocks that lost some."""
    module = narrow(liven(torchvision_resnet(monkeypatch, depth, blocks=blocks)), at_random(RNG(2)))
    x = images()
    opened = open_model(save(tmp_path / "model.pth", module))
    assert_computes(opened, module(x), x)
    assert (opened.pruned, opened.dense is not None, opened.assumed) == (True, depth == 18 and blocks[0] == 2, "")
    assert "convolutions narrower, " in opened.description


def test_widths_that_a_layer_claims_and_does_not_read_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch-Pruning leaves such where it prunes isomorphic layers together."""
    module = narrow(liven(torchvision_resnet(monkeypatch, blocks=(1, 1, 1, 1))), at_random(RNG(3)))
    module.layer3[0].conv2.out_channels, module.layer3[0].bn2.num_features = 64, 64
    x = images()
    assert_computes(open_model(save(tmp_path / "model.pth", module)), module(x), x)


# ---- the dense ancestor ----------------------------------------------------------------------------------------------
def test_a_masked_wide_network_is_not_measured_against_the_plain_one(tmp_path: Path) -> None:
    module = widened(network(R8_CONV), "stage_2.0")
    prune.random_unstructured(module.stage_2[0].conv_a, "weight", 0.5)
    opened = open_model(save(tmp_path / "model.pth", module.state_dict()))
    assert (opened.pruned, opened.dense) == (True, None)
    x = images()
    assert_computes(opened, module(x), x)


def test_a_network_narrower_and_wider_has_an_ancestor_that_nobody_knows(tmp_path: Path) -> None:
    module = widened(narrow(network(R8_CONV), lambda group, size: np.arange(size - 3)), "stage_2.0")
    opened = open_model(save(tmp_path / "model.pth", module.state_dict()))
    assert (opened.pruned, opened.dense) == (True, None)


def test_pruning_begins_with_a_wide_network_too_and_not_with_a_narrow_one(tmp_path: Path) -> None:
    wide, x = widened(network(R8_CONV), "stage_2.0"), images()
    found = open_dense(save(tmp_path / "wide.pth", wide.state_dict()))
    torch.testing.assert_close(found.module(x), wide(x))
    with pytest.raises(UsageError, match="pruned already"):
        open_dense(save(tmp_path / "narrow.pth", narrow(wide, at_random(RNG(4))).state_dict()))


def test_a_checkpoint_of_ours_may_be_narrow_or_wide(tmp_path: Path) -> None:
    for name, module, pruned in (("narrow", narrow(network(R8_CONV), at_random(RNG(5))), True),
                                 ("wide", widened(network(R8_CONV), "stage_2.0"), False)):
        checkpoint.save(tmp_path / name, module, R8_CONV, {})
        opened, x = open_model(tmp_path / name), images()
        assert_computes(opened, module(x), x)
        assert (opened.system, opened.pruned, opened.dense is not None) == ("gkp", pruned, pruned)


# ---- never another network -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [layer_names, dict], ids=["layer", "canonical"])
def test_zeros_of_a_shortcut_without_parameters_have_no_place_among_fewer_channels(tmp_path: Path, names: Any) -> None:
    """Half of them as many as before in front, or all behind, or where channels were pruned: the tensors do not say."""
    half = narrow(network(R8_PAD), lambda group, size: np.arange(size // 2))
    with pytest.raises(UnsupportedModelError, match=r"downsample.*where its zeros stand beside 8 channels.*is not in the file"):
        open_model(save(tmp_path / "model.pth", names(half.state_dict())))
    inside = narrow(network(R8_PAD), lambda group, size: np.arange(size // 2 if group.endswith(".conv_a") else size))
    x = images()
    opened = open_model(save(tmp_path / "model.pth", names(inside.state_dict())))
    assert_computes(opened, forward(layer_names(inside.state_dict()), x, "pad" if names is dict else "pad_both"), x)


def test_one_channel_is_not_added_to_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch would."""
    module = liven(torchvision_resnet(monkeypatch, blocks=(2, 1, 1, 1)))
    module.layer1[1].conv2 = nn.Conv2d(64, 1, 3, 1, 1, bias=False)
    module.layer1[1].bn2 = nn.BatchNorm2d(1)
    module.eval()(images())
    for value in (module, module.state_dict()):
        with pytest.raises(UnsupportedModelError, match=r"layer1\.1\.conv2 yields 1 channels, but its shortcut has 64"):
            open_model(save(tmp_path / "model.pth", value))


def shapes_of(state: dict[str, torch.Tensor], **changes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(changes.get(name.replace(".", "_"), tuple(t.shape))) for name, t in state.items()}


def grouped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ResNeXt-like: a convolution of four groups."""
    return shapes_of(state, layer2_0_conv2_weight=(128, 32, 3, 3))


def wide_stream(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of another architecture, ResNet-12 of Lee et al. for one: all of it is twice as wide."""
    double = {n: t.repeat_interleave(2, 0) if t.ndim and n != "fc.weight" and n != "fc.bias" else t for n, t in state.items()}
    return {n: t.repeat_interleave(2, 1) if t.ndim > 1 and t.shape[1] > 3 else t for n, t in double.items()}


def preactivation(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms in front of the convolutions, of their inputs; the last one is the root's."""
    norms = {f"{layer}.0.bn1": width for layer, width in (("layer2", 64), ("layer3", 128), ("layer4", 256))} | {"bn1": 512}
    return {n: torch.ones(norms[n.rpartition(".")[0]]) if n.rpartition(".")[0] in norms and t.ndim else t
            for n, t in state.items()}


def one_plane(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For grey images."""
    return shapes_of(state, conv1_weight=(64, 1, 3, 3))


def flattened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The classifier reads every pixel of the last maps."""
    return shapes_of(state, fc_weight=(10, 2048))


@pytest.mark.parametrize("change", [grouped, wide_stream, preactivation, one_plane, flattened])
def test_networks_that_only_share_the_names_are_refused(tmp_path: Path, change: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(save(tmp_path / "model.pth", change(random_state(R18))))
    assert "ONNX" in caught.value.hint


def test_a_vgg_whose_classifier_reads_more_pixels_is_refused(tmp_path: Path) -> None:
    """Of images of 64x64, or without the last pooling."""
    state = dict(narrow(network(VGG), at_random(RNG(6))).state_dict())
    state["classifier.weight"] = state["classifier.weight"].repeat(1, 4)
    with pytest.raises(UnsupportedModelError, match=r"^classifier reads \d+ channels, but gets \d+$"):
        open_model(save(tmp_path / "model.pth", state))


def test_a_narrow_resnet_is_the_one_written_out(tmp_path: Path) -> None:
    state, x = narrow(network(R18), at_random(RNG(7))).state_dict(), images()
    assert_computes(open_model(save(tmp_path / "model.pth", state)), forward(state, x), x)
