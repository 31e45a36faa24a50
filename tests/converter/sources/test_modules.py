"""A whole-module pickle opens as the network that it holds, or is refused by the name of the submodule that differs."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch_kit import assert_computes, classes_as, images, liven, save
from whole_modules import changes, outcome, torchvision_resnet

from gkp.converter.sources import open_model
from gkp.converter.sources.base import OpenOptions
from gkp.converter.sources.dense import open_dense
from gkp.errors import UnsupportedModelError, UsageError

BLOCKS = (1, 1, 1, 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's ResNet with a 3x3 stem and without max-pooling, as for CIFAR."""
    return liven(torchvision_resnet(monkeypatch, blocks=BLOCKS))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with the 7x7 stem."""
    return liven(torchvision_resnet(monkeypatch, small_stem=False, blocks=BLOCKS))


def opens(path: Path, module: nn.Module, size: int) -> None:
    """The file opens, and computes what the module does."""
    x = images(2, size)
    opened = open_model(save(path, module), OpenOptions({"": (1, 3, size, size)}))
    assert_computes(opened, module(x), x)
    assert not opened.assumed
    assert opened.description.endswith("resnet18, every submodule compared")


@pytest.mark.parametrize(("depth", "stem"), [(18, True), (18, False), (50, False)])
def test_torchvisions_own_networks_open_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, depth: int, stem: bool
) -> None:
    module = liven(torchvision_resnet(monkeypatch, depth, stem, (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)))
    x = images(1, 32)
    opened = open_model(save(tmp_path / "model.pt", module), OpenOptions({"": (1, 3, 32, 32)}))
    assert (opened.system, opened.pruned) == ("torch", False)
    assert_computes(opened, module(x), x)


# ---- another pooling is built -----------------------------------------------------------------------------------------
def test_a_max_pooling_behind_a_3x3_stem_is_kept(small: Any, tmp_path: Path) -> None:
    small.maxpool = nn.MaxPool2d(3, 2, 1)
    opens(tmp_path / "model.pt", small, 32)


@pytest.mark.parametrize("pool", [nn.Identity(), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                                  nn.MaxPool2d(2), nn.MaxPool2d(2, 2, ceil_mode=True)], ids=str)
def test_another_pooling_behind_the_stem_is_built(large: Any, tmp_path: Path, pool: nn.Module) -> None:
    large.maxpool = pool
    opens(tmp_path / "model.pt", large, 50)


def test_another_pooling_is_no_network_to_prune(large: Any, tmp_path: Path) -> None:
    large.maxpool = nn.AvgPool2d(3, 2, 1)
    with pytest.raises(UnsupportedModelError, match=r"maxpool is .*AvgPool2d.*MaxPool2d\(kernel_size=\(3, 3\)"):
        open_dense(save(tmp_path / "model.pt", large))


def test_windows_of_the_last_pooling_must_be_the_last_maps(large: Any, tmp_path: Path) -> None:
    large.avgpool = nn.AvgPool2d(2)
    opens(tmp_path / "model.pt", large, 64)
    with pytest.raises(UsageError, match="pools last maps of 2x2 pixels, and these are 3x3"):
        open_model(tmp_path / "model.pt", OpenOptions({"": (1, 3, 96, 96)}))


def test_norms_that_were_synchronised_are_norms(small: Any, tmp_path: Path) -> None:
    x = images()
    expected = small(x)
    opened = open_model(save(tmp_path / "model.pt", nn.SyncBatchNorm.convert_sync_batchnorm(small)))
    assert_computes(opened, expected, x)


# ---- anything else is refused by name ---------------------------------------------------------------------------------
def leaky(net: Any) -> None:
    net.layer2[0].relu = nn.LeakyReLU(0.1)


def hook(net: Any) -> None:
    net.layer2[0].register_forward_hook(nn.functional.relu)


def pre_hook(net: Any) -> None:
    net.layer2[0].conv1.register_forward_pre_hook(nn.functional.relu)


def method(net: Any) -> None:
    net.layer2[0].forward = nn.functional.relu


def hidden_module(net: Any) -> None:
    vars(net.layer2[0])["relu"] = nn.functional.leaky_relu


def hidden_weight(net: Any) -> None:
    vars(net.layer2[0].conv1)["weight"] = torch.ones(3)


def more(net: Any) -> None:
    net.layer2.add_module("1", nn.ReLU6())


def gone(net: Any) -> None:
    del net.layer2[0].relu


def epsilon(net: Any) -> None:
    net.layer2[0].bn1.eps = "1e-5"


def no_statistics(net: Any) -> None:
    net.layer2[0].bn1.track_running_stats = False


def mode(net: Any) -> None:
    net.layer2[0].conv1.padding_mode = "circular"


def transient(net: Any) -> None:
    del net.layer2[0].conv1._parameters["bias"]
    net.layer2[0].conv1.register_buffer("bias", torch.ones(128), persistent=False)


def swapped(net: Any) -> None:
    net.layer2[0].downsample._modules = dict(reversed(net.layer2[0].downsample._modules.items()))


@pytest.mark.parametrize("change", [leaky, hook, pre_hook, method, hidden_module, hidden_weight, more, gone, epsilon,
                                    no_statistics, mode, transient, swapped])
def test_what_differs_is_named(small: Any, tmp_path: Path, change: Callable[[Any], None]) -> None:
    change(small)
    with pytest.raises(UnsupportedModelError, match=r"layer2") as caught:
        open_model(save(tmp_path / "model.pt", small))
    assert "ONNX" in caught.value.hint


def test_a_subclass_is_another_class(monkeypatch: pytest.MonkeyPatch, small: Any, tmp_path: Path) -> None:
    (own,) = classes_as(monkeypatch, mine_DOT_layers__Conv=nn.Conv2d)
    small.layer2[0].conv1.__class__ = own
    with pytest.raises(UnsupportedModelError, match=r"layer2\.0\.conv1 is mine\.layers\.Conv, .*Conv2d\(stride"):
        open_model(save(tmp_path / "model.pt", small))


def test_a_hook_of_the_network_itself_is_named(small: Any, tmp_path: Path) -> None:
    small.register_forward_hook(nn.functional.relu)
    with pytest.raises(UnsupportedModelError, match="has forward hooks, which gkp cannot run"):
        open_model(save(tmp_path / "model.pt", small))


@pytest.mark.parametrize("change", [lambda wrapper: wrapper.register_forward_hook(nn.functional.relu),
                                    lambda wrapper: wrapper.register_forward_pre_hook(nn.functional.relu),
                                    lambda wrapper: setattr(wrapper, "forward", nn.functional.relu)])
def test_what_a_wrapper_does_beside_calling_the_network_is_named(
    small: Any, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    wrapper = nn.DataParallel(small)
    change(wrapper)
    with pytest.raises(UnsupportedModelError, match=r"DataParallel has forward.*, which gkp cannot run"):
        open_model(save(tmp_path / "model.pt", wrapper))


def test_a_subclass_of_the_network_with_another_forward_is_another_class(
    monkeypatch: pytest.MonkeyPatch, small: Any, tmp_path: Path
) -> None:
    (own,) = classes_as(monkeypatch, mine_DOT_nets__Net=type(small))
    monkeypatch.setattr(own, "forward", lambda self, x: 2 * super(own, self).forward(x))
    small.__class__ = own
    with pytest.raises(UnsupportedModelError, match=r"pickled module of class mine\.nets\.Net") as caught:
        open_model(save(tmp_path / "model.pt", small))
    assert "--arch" in caught.value.hint


def test_the_hooks_of_torchs_pruning_are_no_difference(small: Any, tmp_path: Path) -> None:
    prune.random_unstructured(small.layer2[0].conv1, "weight", amount=0.5)
    x = images(2, 32)
    assert_computes(open_model(save(tmp_path / "model.pt", small)), small(x), x)


def test_a_name_without_end_is_shown_short(small: Any, tmp_path: Path) -> None:
    vars(small.layer2[0])["x" * 100_000] = nn.Module
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(save(tmp_path / "model.pt", small))
    assert len(caught.value.message) < 400


# ---- any change -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("stem", "size"), [("small", 32), ("large", 64)])
def test_one_change_anywhere_is_exact_or_refused(
    stem: str, size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    net: Any = request.getfixturevalue(stem)
    some = random.Random(size).sample(list(changes(net)), 20)
    found = Counter(outcome(tmp_path / "model.pt", copy.deepcopy(net), change, images(1, size)) for _, change in some)
    assert found.keys() >= {"refused", "exact"}
