"""GConv-Prune's files: masked checkpoints, GroupConv2d exports as modules and as state dicts, configurations."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from narrow_kit import at_random, narrow
from torch import nn
from torch.nn.utils import prune
from torch_kit import (
    R8_CONV,
    State,
    assert_computes,
    branches,
    classes_as,
    forward,
    images,
    layer_names,
    liven,
    moves,
    random_state,
    recognised,
    save,
    shared,
)
from whole_modules import changes, outcome

from gkp.converter import node as branched_node
from gkp.converter.sources import open_model
from gkp.errors import FileError, UnsupportedModelError

G = 4


class GroupConv2d(nn.Module):
    """Its gathers, its grouped conv, its bias, in the published order."""

    def __init__(self, c: int, f: int, stride: int, bias: bool) -> None:
        super().__init__()
        rng = np.random.default_rng(c + f)
        self.ind_in = nn.Parameter(torch.from_numpy(rng.permutation(c)), requires_grad=False)
        self.ind_out = nn.Parameter(torch.from_numpy(rng.permutation(f)), requires_grad=False)
        self.conv2d = nn.Conv2d(c, f, 3, stride, 1, groups=G, bias=False)
        self.bias = nn.Parameter(torch.randn(f)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.index_select(self.conv2d(torch.index_select(x, 1, self.ind_in)), 1, self.ind_out)
        return y if self.bias is None else y + self.bias.reshape(1, -1, 1, 1)


class Block(nn.Module):
    def __init__(self, conv: type, c: int, f: int, bias: bool) -> None:
        super().__init__()
        stride = f // c
        self.conv1, self.bn1, self.relu = conv(c, f, stride, bias), nn.BatchNorm2d(f), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(f, f, 1, bias), nn.BatchNorm2d(f)
        short = nn.Sequential(nn.Conv2d(c, f, 1, stride, bias=False), nn.BatchNorm2d(f))
        self.downsample = short if stride == 2 else nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, conv: type, block: type, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(block(conv, c, f, bias)) for c, f in ((16, 16), (16, 32), (32, 64))
        )
        self.avgpool, self.fc = nn.AvgPool2d(8), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


def exported(monkeypatch: pytest.MonkeyPatch, bias: bool = False) -> nn.Module:
    net, block, conv = classes_as(
        monkeypatch, gumi_DOT_models_DOT_resnet__ResNet=ResNet, gumi_DOT_models_DOT_resnet__BasicBlock=Block,
        gumi_DOT_ops_DOT_group_conv2d__GroupConv2d=GroupConv2d,
    )
    torch.manual_seed(0)
    return liven(net(conv, block, bias))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_exported_module_computes_what_its_own_forward_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, legacy: bool, bias: bool
) -> None:
    module = exported(monkeypatch, bias)
    opened = open_model(save(tmp_path / "gconv.pth.tar", module, legacy))
    assert (opened.system, opened.pruned) == ("gconv_prune", True)
    x = images()
    assert_computes(opened, module(x), x)


def test_a_network_without_groups_opens_at_any_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net, block = classes_as(monkeypatch, gumi_DOT_models_DOT_resnet__ResNet=ResNet, gumi_DOT_models_DOT_resnet__BasicBlock=Block)
    torch.manual_seed(0)
    module, x = liven(net(lambda c, f, stride, bias: nn.Conv2d(c, f, 3, stride, 1, bias=bias), block)), images()
    module.layer1[0].downsample = None  # as in the network, which has no shortcut there
    monkeypatch.setattr(Block, "forward", _forward)
    for value, pruned in ((module, False), (narrow(module, at_random(np.random.default_rng(0))), True)):
        opened = open_model(save(tmp_path / "model.pth.tar", value))
        assert_computes(opened, value(x), x)
        assert (opened.system, opened.pruned, opened.dense is not None) == ("gconv_prune", pruned, pruned)
    prune.l1_unstructured(module.layer2[0].conv1, "weight", 0.5)
    assert_computes(open_model(save(tmp_path / "masked.pth.tar", module)), module(x), x)


def _forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_of_an_export_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str) -> None:
    module = exported(monkeypatch)
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    opened = open_model(save(tmp_path / "gconv.pth.tar", {"state_dict": state, "epoch": 3}))
    x = images()
    assert_computes(opened, module(x), x)


def test_export_keeps_its_gathers_and_is_recognised_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = exported(monkeypatch)
    opened = open_model(save(tmp_path / "gconv.pth.tar", module))
    assert [node.op_type for node in opened.model.graph.node].count("Gather") == 12
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1, 1, 1] + [G] * 6
    form = branched_node.read(next(n for n in graph.branched() if n.name == "stage_3.0.conv_b"))
    conv = module.layer3[0].conv2
    np.testing.assert_array_equal(np.concatenate([b.in_index for b in form.branches]).reshape(G, -1),
                                  np.sort(conv.ind_in.reshape(G, -1), axis=1))


@pytest.mark.parametrize("damage", ["ind_in", "ind_out", "conv2d.weight"])
def test_damaged_export_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    state = exported(monkeypatch).state_dict()
    name = f"layer1.0.conv1.{damage}"
    state[name] = state[name] + 7 if damage.startswith("ind") else state[name][:, :3]
    with pytest.raises(FileError, match=r"layer1\.0\.conv1"):
        open_model(save(tmp_path / "gconv.pth.tar", {"state_dict": state}))


def test_the_bias_of_the_inner_convolution_is_permuted_with_its_outputs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: Any = exported(monkeypatch, bias=True)
    module.layer2[0].conv1.conv2d.bias = nn.Parameter(torch.randn(32))
    opened = open_model(save(tmp_path / "gconv.pth.tar", module))
    x = images()
    assert_computes(opened, module(x), x)


@pytest.mark.parametrize("place", ["relu", "layer2.0.relu", "avgpool"])
def test_another_layer_than_the_architectures_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    module = exported(monkeypatch)
    module.set_submodule(place, nn.Hardtanh())
    with pytest.raises(UnsupportedModelError, match=place):
        open_model(save(tmp_path / "gconv.pth.tar", module))


@pytest.mark.slow
def test_one_change_anywhere_is_exact_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = exported(monkeypatch)
    some = random.Random(0).sample(list(changes(module)), 30)
    found = Counter(outcome(tmp_path / "file", copy.deepcopy(module), change, images(1)) for _, change in some)
    assert found.keys() >= {"refused", "exact"}


# ---- masked checkpoints ----------------------------------------------------------------------------------------------
def masked_state() -> tuple[State, State]:
    """(what the checkpoint holds: weights with junk under the masks; what the network computes with)."""
    dense, held = layer_names(random_state(R8_CONV)), {}
    rng = np.random.default_rng(0)
    for name in [n for n in dense if n.startswith("layer") and "conv" in n and n.endswith(".weight")]:
        f, c = dense[name].shape[:2]
        block = np.kron(np.eye(G), np.ones((f // G, c // G)))
        mask = torch.from_numpy(block[rng.permutation(f)][:, rng.permutation(c)]).float()
        held[name.replace(".weight", ".mask")] = mask
        held[name] = dense[name].clone()
        dense[name] = dense[name] * mask[:, :, None, None]
    return {**dense, **held}, dense


@pytest.mark.parametrize("infix", ["", ".conv2d"], ids=["plain", "legacy names"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_masks_are_applied_to_the_weights(tmp_path: Path, infix: str, prefix: str) -> None:
    state, dense = masked_state()
    layers = [n.removesuffix(".mask") for n in state if n.endswith(".mask")]
    state = {prefix + (n.replace(".weight", f"{infix}.weight") if n.removesuffix(".weight") in layers else n): t
             for n, t in state.items()}
    checkpoint = {"epoch": 60, "state_dict": state, "acc": 91.0, "best_acc": 92.0, "optimizer": {}}
    opened = open_model(save(tmp_path / "model_best.pth.tar", checkpoint))
    assert (opened.system, opened.pruned) == ("gconv_prune", True)
    x = images()
    assert_computes(opened, forward(dense, x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1, 1, 1] + [G] * 6


def test_masks_of_ones_are_not_pruning(tmp_path: Path) -> None:
    state, _ = masked_state()
    state = {n: torch.ones_like(t) if n.endswith(".mask") else t for n, t in state.items()}
    assert not open_model(save(tmp_path / "checkpoint.pth.tar", {"state_dict": state})).pruned


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    state, _ = masked_state()
    state["layer2.0.conv2.mask"] = torch.ones(32, 16)
    with pytest.raises(FileError, match="mask"):
        open_model(save(tmp_path / "checkpoint.pth.tar", {"state_dict": state}))


# ---- files of old PyTorch ----------------------------------------------------------------------------------------------
def old_backend(*args: object) -> object:
    """What modules held as `_backend` before PyTorch 1.3: an instance that pickles as a call."""
    raise AssertionError("nothing calls this")


class Backend:
    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return old_backend, self.args


def of_2019(monkeypatch: pytest.MonkeyPatch, module: nn.Module, *args: object) -> nn.Module:
    """The module with the attributes that PyTorch 1.0 gave it, and no younger ones."""
    home = ModuleType("torch.nn.backends.thnn")
    home._get_thnn_function_backend = old_backend  # type: ignore[attr-defined]
    old_backend.__module__, old_backend.__qualname__ = home.__name__, "_get_thnn_function_backend"
    monkeypatch.setitem(sys.modules, "torch.nn.backends", ModuleType("torch.nn.backends"))
    monkeypatch.setattr(sys.modules["torch.nn.backends"], "thnn", home, raising=False)
    monkeypatch.setitem(sys.modules, home.__name__, home)
    young = ("_non_persistent_buffers_set", "padding_mode", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
             "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_load_state_dict_post_hooks",
             "_backward_pre_hooks", "_state_dict_pre_hooks", "_reversed_padding_repeated_twice")
    backend = Backend(*args)
    for part in module.modules():
        for name in young:
            part.__dict__.pop(name, None)
        part.__dict__["_backend"] = backend
    return module


def test_exports_of_2019_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = exported(monkeypatch, bias=True)
    x = images()
    expected = own(x)
    module = of_2019(monkeypatch, profiled(own, thop_2019))
    opened = open_model(save(tmp_path / "gconv.pth.tar", module, legacy=True))
    assert_computes(opened, expected, x)


def test_the_old_backend_with_arguments_is_no_honest_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = of_2019(monkeypatch, exported(monkeypatch), "something")
    with pytest.raises(FileError, match="arguments"):
        open_model(save(tmp_path / "gconv.pth.tar", module, legacy=True))


# ---- what its profiler leaves behind -----------------------------------------------------------------------------------
def thop_2019(module: nn.Module) -> bool:
    """On layers."""
    return not list(module.children())


def thop_today(module: nn.Module) -> bool:
    """On what it has no rule for: the network, its blocks, and GroupConv2d, but not layers and sequences."""
    return not isinstance(module, nn.Sequential) and not type(module).__module__.startswith("torch.")


def profiled(module: nn.Module, counts: Callable[[nn.Module], bool]) -> nn.Module:
    for part in [m for m in module.modules() if counts(m)]:
        part.register_buffer("total_ops", torch.full((1,), 1e6, dtype=torch.float64))
        part.register_buffer("total_params", torch.full((1,), 1e3, dtype=torch.float64))
    return module


@pytest.mark.parametrize("counts", [thop_2019, thop_today])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_exports_that_were_profiled_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counts: Callable[[nn.Module], bool], parallel: bool, whole: bool
) -> None:
    own = exported(monkeypatch)
    module = profiled(nn.DataParallel(own) if parallel else own, counts)
    opened = open_model(save(tmp_path / "gconv.pth.tar", module if whole else {"state_dict": module.state_dict()}))
    x = images()
    assert_computes(opened, own(x), x)


@pytest.mark.parametrize("counts", [thop_2019, thop_today])
@pytest.mark.parametrize("parallel", [False, True])
def test_masked_checkpoints_that_were_profiled_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counts: Callable[[nn.Module], bool], parallel: bool
) -> None:
    shape = nn.DataParallel(exported(monkeypatch)) if parallel else exported(monkeypatch)
    counted = {n: t for n, t in profiled(shape, counts).state_dict().items() if "total_" in n}
    state, dense = masked_state()
    state = {f"module.{n}" if parallel else n: t for n, t in state.items()} | counted
    opened = open_model(save(tmp_path / "checkpoint.pth.tar", {"state_dict": state, "epoch": 3}))
    assert opened.pruned
    x = images()
    assert_computes(opened, forward(dense, x), x)


def test_errors_name_the_tensors_of_the_file(tmp_path: Path) -> None:
    state, _ = masked_state()
    strange = {**state, "layer2.0.attention.weight": torch.ones(3)}
    for held, name in ((strange, "holds the unexpected tensor layer2.0.attention.weight"),
                       ({n: t for n, t in state.items() if n != "layer2.0.bn1.bias"}, "lacks layer2.0.bn1.bias"),
                       ({n: t for n, t in state.items() if not n.startswith("layer3.0.conv2")}, "lacks layer3.0.conv2.weight")):
        with pytest.raises(UnsupportedModelError) as caught:
            open_model(save(tmp_path / "checkpoint.pth.tar", {"state_dict": held}))
        assert name in caught.value.message


# ---- configurations --------------------------------------------------------------------------------------------------
def test_published_group_configuration_is_said_to_hold_no_weights() -> None:
    with pytest.raises(UnsupportedModelError, match="group configuration"):
        open_model(shared("gconv_prune/resnet34_A.json"))


def test_group_configuration_with_placeholders_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "resnet34.json"
    path.write_text(json.dumps({"module.conv1": {"G": -1, "F": 64, "C": 3, "id": 2}}))
    with pytest.raises(UnsupportedModelError, match="group configuration"):
        open_model(path)


@pytest.mark.parametrize("text", ['{"prune_params": {"n_clusters": 8}}', "{", "[]"])
def test_other_json_is_not_taken_for_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "setting.json"
    path.write_text(text)
    with pytest.raises(UnsupportedModelError, match="no source knows"):
        open_model(path)
