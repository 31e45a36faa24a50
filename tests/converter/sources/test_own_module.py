"""--arch: functions of the user's own and of packages that the user has are found, told the number of classes, and filled."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch_kit import State, assert_computes, images, save

from gkp.converter.sources import GroupedModel, open_model
from gkp.converter.sources.base import OpenOptions
from gkp.errors import BackendMissingError, UsageError

SHAPE = {"": (1, 3, 16, 16)}


class Net(nn.Module):
    """A stem, and a classifier that is linear or a 1x1 convolution."""

    def __init__(self, num_classes: int = 5, conv_head: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1) if conv_head else nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x).mean((2, 3), keepdim=True)
        return self.head(y if isinstance(self.head, nn.Conv2d) else y.flatten(1)).flatten(1)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package `torchvision` and one `timm` of our own, with functions as theirs; what these are called with."""
    made: list[dict[str, Any]] = []

    def small_net(*, weights: object = None, progress: bool = True, **more: Any) -> nn.Module:
        assert weights is None  # nothing is downloaded
        made.append(more)
        return Net(**more)

    def squeeze_net(pretrained: bool = False, **more: Any) -> nn.Module:
        assert not pretrained
        return Net(**more, conv_head=True)

    def stubborn(num_classes: int = 5) -> nn.Module:
        return Net()

    functions = {"small_net": small_net, "small_net_2": small_net, "squeeze_net": squeeze_net, "stubborn": stubborn,
                 "fixed": lambda: Net(), "wrapped": Wrapped, "kinds": SimpleNamespace(small=small_net), "count": 3}
    for name in ("torchvision", "timm"):
        package, models = ModuleType(name), ModuleType(f"{name}.models")
        package.models = models  # type: ignore[attr-defined]
        vars(models).update(functions)
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.models", models)
    return made


def net(num_classes: int = 5, conv_head: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(num_classes, conv_head).eval()


def opened(path: Path, state: State, arch: str, prefix: str = "") -> GroupedModel:
    named = {prefix + name: tensor for name, tensor in state.items()}
    return open_model(save(path / "x.pth", {"state_dict": named}), OpenOptions(SHAPE, arch=arch))


# ---- the number of classes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["small_net", "kinds.small"])
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_number_of_classes_is_the_files(tmp_path: Path, calls: list[dict[str, Any]], package: str, name: str) -> None:
    module, x = net(7), images(2, 16)
    assert_computes(opened(tmp_path, module.state_dict(), f"{package}.models:{name}"), module(x), x)
    assert calls == [{}, {"num_classes": 7}]


def test_a_number_of_classes_that_fits_is_not_given(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    module, x = net(), images(2, 16)
    assert_computes(opened(tmp_path, module.state_dict(), "torchvision.models:small_net"), module(x), x)
    assert calls == [{}]


def test_a_classifier_can_be_a_convolution(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    module, x = net(3, conv_head=True), images(2, 16)
    assert_computes(opened(tmp_path, module.state_dict(), "timm.models:squeeze_net"), module(x), x)


@pytest.mark.parametrize("name", ["fixed", "stubborn"])
def test_who_cannot_be_told_the_number_does_not_fit(tmp_path: Path, calls: list[dict[str, Any]], name: str) -> None:
    with pytest.raises(UsageError, match=r"head\.weight has shape \[7, 8\], in the module \[5, 8\]"):
        opened(tmp_path, net(7).state_dict(), f"timm.models:{name}")


def test_other_widths_are_no_number_of_classes(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    state = net(7).state_dict()
    with pytest.raises(UsageError, match=r"features\.1\.bias has shape \[9\], in the module \[8\]"):
        opened(tmp_path, {**state, "features.1.bias": torch.ones(9)}, "timm.models:small_net")
    assert calls == [{}]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_quantised_weights_are_not_taken_for_floats(tmp_path: Path, calls: list[dict[str, Any]], dtype: torch.dtype) -> None:
    state = net().state_dict()
    with pytest.raises(UsageError, match=r"features\.0\.weight holds .* numbers"):
        opened(tmp_path, {**state, "features.0.weight": state["features.0.weight"].to(dtype)}, "timm.models:small_net")


# ---- prefixes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod.", "a.b.c.d.e.f.g.h."])
def test_a_prefix_of_the_file_is_left_out(tmp_path: Path, calls: list[dict[str, Any]], prefix: str) -> None:
    module, x = net(7), images(2, 16)
    assert_computes(opened(tmp_path, module.state_dict(), "timm.models:small_net", prefix), module(x), x)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net."])
def test_a_prefix_of_the_module_is_added(tmp_path: Path, calls: list[dict[str, Any]], prefix: str) -> None:
    module, x = net(), images(2, 16)
    assert_computes(opened(tmp_path, module.state_dict(), "timm.models:wrapped", prefix), module(x), x)


def test_a_prefix_of_some_names_stays(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    """Names that would collide without it, and names of another module beside the network."""
    state = {f"model.{name}": tensor for name, tensor in net().state_dict().items()}
    for more in ({"head.weight": torch.ones(5, 8)}, {"loss.weight": torch.ones(5)}):
        with pytest.raises(UsageError, match=r"does not fit .* it lacks features\.0\.weight and \d more"):
            opened(tmp_path, {**state, **more}, "timm.models:small_net")


def test_what_does_not_fit_is_told_by_whole_names_and_numbers(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    state, long = net().state_dict(), f"extra.{'part_' * 20}weight"
    given = {name: tensor for name, tensor in state.items() if not name.startswith("features.1.")}
    given |= {long: torch.ones(1), "more.weight": torch.ones(2), "features.0.weight": torch.ones(8, 3, 5, 5)}
    with pytest.raises(UsageError, match="does not fit") as caught:
        opened(tmp_path, given, "timm.models:fixed")
    assert caught.value.message == (
        f"the state dict does not fit the module of --arch timm.models:fixed: it lacks features.1.weight and 3 more; the module has no "
        f"{long} and 1 more; features.0.weight has shape [8, 3, 5, 5], in the module [8, 3, 3, 3]")


def test_another_prefix_is_another_network(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        opened(tmp_path, net().state_dict(), "timm.models:wrapped", "encoder.")


# ---- what is not there -----------------------------------------------------------------------------------------------
def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """It may be installed where the tests run, and imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("arch", "hint"), [
    ("torchvision.models:smal_net", "torchvision.models:small_net, torchvision.models:small_net_2"),
    ("timm.models:small_net.a1_in1k", "did you mean timm.models:small_net?"),
    ("timm.models:resnet50\x1b[2J", "importable"),
    ("timm.models:kinds.smal", "importable"),
])
def test_a_name_that_is_not_theirs_is_said_with_what_is_close(
    tmp_path: Path, calls: list[dict[str, Any]], arch: str, hint: str
) -> None:
    with pytest.raises(UsageError, match="there is no") as caught:
        opened(tmp_path, net().state_dict(), arch)
    assert hint in caught.value.hint


def test_what_cannot_be_called_is_no_architecture(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="is a int, which cannot be called"):
        opened(tmp_path, net().state_dict(), "timm.models:count")


def test_a_module_that_the_package_lacks_is_a_wrong_name(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"No module named 'timm\.nets'"):
        opened(tmp_path, net().state_dict(), "timm.nets:small_net")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
@pytest.mark.parametrize("through_own_code", [False, True])
def test_a_package_that_is_not_installed_is_said_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, through_own_code: bool
) -> None:
    class Absent:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    forget(monkeypatch, package)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"mine_of_{package}.py").write_text(f"import {package}.models\n")
    arch = f"mine_of_{package}:make" if through_own_code else f"{package}.models:small_net"
    with pytest.raises(BackendMissingError, match=f"needs {package}, which is not installed") as caught:
        opened(tmp_path, net().state_dict(), arch)
    assert (caught.value.hint, caught.value.exit_code) == (f"pip install {package}", 4)


def test_a_package_that_does_not_fit_this_torch_is_said_to_be_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "torchvision")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendMissingError, match="does not work here: operator torchvision::nms does not exist") as caught:
        opened(tmp_path, net().state_dict(), "torchvision.models:small_net")
    assert "PyTorch" in caught.value.hint
