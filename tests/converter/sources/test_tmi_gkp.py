"""TMI-GKP's files open as the networks they hold: grouped, pruned, baseline, checkpoints, snapshots."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pickles
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch_kit import (
    R8_PAD,
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
from gkp.converter.graph import spatial
from gkp.converter.sources import open_model
from gkp.converter.sources._torchfile import read_torch, state_dict_of, submodules
from gkp.converter.sources.base import OpenOptions
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.pruning.models.resnet_cifar import CifarBlock, CifarResNet, PadShortcut

GROUPS = 8
R20 = "tmi_gkp/resnet20_cifar10/"


class DownsampleA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.avg = nn.AvgPool2d(kernel_size=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.avg(x)
        return torch.cat((x, x.mul(0)), 1)


class Block(nn.Module):
    """Two convs; in_list and out_list, where there are any, hold one index tensor per conv."""

    def __init__(self, convs: list[nn.Conv2d], widths: tuple[int, int], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.conv2 = convs
        self.bn1, self.bn2 = nn.BatchNorm2d(widths[1]), nn.BatchNorm2d(widths[1])
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for n, (conv, bn) in enumerate(((self.conv1, self.bn1), (self.conv2, self.bn2))):
            y = torch.index_select(y, 1, self.in_list[n]) if hasattr(self, "in_list") else y
            y = bn(torch.index_select(conv(y), 1, self.out_list[n]))
            y = F.relu(y) if n == 0 else y
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(b) for b in blocks)
        self.avgpool, self.linear = nn.AvgPool2d(8), nn.Linear(64, 10)
        self.n_clusters, self.pruning_rate, self.kernel_gcd = GROUPS, 0.4375, 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(self.avgpool(y), 1))


def kept_channels(rng: np.random.Generator, channels: int, groups: int = GROUPS) -> torch.Tensor:
    """9 of 16 channels for each group, ascending, overlapping."""
    kept = [np.sort(rng.permutation(channels)[: channels * 9 // 16]) for _ in range(groups)]
    return torch.from_numpy(np.concatenate(kept))


def block(kind: type, down: type, c: int, f: int, grouped: bool, groups: tuple[int, int] = (GROUPS, GROUPS)) -> nn.Module:
    rng, stride = np.random.default_rng(c + f), f // c
    ins = [kept_channels(rng, c, groups[0]), kept_channels(rng, f, groups[1])]
    if grouped:
        shapes = zip(ins, (stride, 1), groups, strict=True)
        convs = [nn.Conv2d(len(i), f, 3, s, 1, groups=g, bias=False) for i, s, g in shapes]
    else:
        convs = [nn.Conv2d(n, f, 3, s, 1, bias=False) for n, s in ((c, stride), (f, 1))]
        for conv, kept in zip(convs, ins, strict=True):
            mask = torch.zeros(GROUPS, f // GROUPS, conv.in_channels, 1, 1)
            mask.scatter_(2, kept.reshape(GROUPS, 1, -1, 1, 1).expand(-1, f // GROUPS, -1, 1, 1), 1)
            conv.weight.data *= mask.reshape(f, -1, 1, 1)
    made: Any = kind(convs, (c, f), down() if stride == 2 else None)
    made.out_list = [torch.from_numpy(rng.permutation(f)) for _ in range(2)]
    if grouped:
        made.in_list = ins
    else:
        made.preserved_kernel_index = [[list(part) for part in i.numpy().reshape(GROUPS, -1)] for i in ins]
        made.prune_mask = [np.asarray(conv.weight.detach() != 0) for conv in convs]
        made.candidate_methods_list = [(np.eye(f), "K-PCA", ["K-PCA"] * 36)] * 2
    return made


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Any:
    net, kind, down = classes_as(monkeypatch, group_cifar__GroupResNet=Net, group_cifar__GroupBasicblock=Block,
                                 models_DOT_res_utils__DownsampleA=DownsampleA)
    torch.manual_seed(0)
    made = liven(net([block(kind, down, c, f, True) for c, f in ((16, 16), (16, 32), (32, 64))]))
    made.new_weight = made.layer3[0].conv2.weight
    return made


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> Any:
    net, kind, down = classes_as(monkeypatch, prune_cifar__ModifiedResNet=Net, prune_cifar__NewBasicblock=Block,
                                 models_DOT_res_utils__DownsampleA=DownsampleA)
    torch.manual_seed(0)
    made = liven(net([block(kind, down, c, f, False) for c, f in ((16, 16), (16, 32), (32, 64))]))
    made.original_model = copy.deepcopy(made)
    return made


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_grouped_network_computes_what_its_own_forward_computes(grouped: Any, tmp_path: Path, legacy: bool) -> None:
    opened = open_model(save(tmp_path / "grouped", grouped, legacy))
    assert (opened.system, opened.pruned) == ("tmi_gkp", True)
    x = images()
    assert_computes(opened, grouped(x), x)


def test_grouped_network_is_exported_with_its_gathers_and_recognised_without(grouped: Any, tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "grouped", grouped))
    ops = [node.op_type for node in opened.model.graph.node]
    assert ops.count("Gather") == 12
    graph = recognised(opened)
    assert moves(graph) == []
    found = branches(graph)
    assert sorted(found.values()) == [1] + [GROUPS] * 6
    form = branched_node.read(next(n for n in graph.branched() if n.name == "stage_2.0.conv_b"))
    np.testing.assert_array_equal(np.concatenate([b.in_index for b in form.branches]), grouped.layer2[0].in_list[1])
    outs = np.argsort(grouped.layer2[0].out_list[1].numpy())
    np.testing.assert_array_equal(np.concatenate([b.out_index for b in form.branches]), outs)


def test_pruned_network_is_opened_without_the_original_it_carries(pruned: Any, tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "pruned", pruned))
    assert (opened.system, opened.pruned) == ("tmi_gkp", True)
    x = images()
    assert_computes(opened, pruned(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1] + [GROUPS] * 6


def fine_tuned(net: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What TMI-GKP saves beside the network, as objects: its optimizer and its scheduler after two steps."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for _ in range(2):
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


@pytest.mark.parametrize("parallel", [False, True])
def test_checkpoint_is_opened_from_the_module_in_it(grouped: Any, tmp_path: Path, parallel: bool) -> None:
    module = nn.DataParallel(grouped) if parallel else grouped
    optimizer, scheduler = fine_tuned(module)
    checkpoint = {"model_state_dict": module.state_dict(), "epoch": 9, "optimizer": optimizer, "scheduler": scheduler,
                  "model": module, "loss": torch.ones(())}
    opened = open_model(save(tmp_path / "most_recent_checkpoint.pt", checkpoint))
    assert opened.pruned
    x = images()
    assert_computes(opened, grouped(x), x)


def test_state_dict_of_a_grouped_network_is_refused_with_what_to_convert_instead(grouped: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "epoch_1.pt", {"model_state_dict": grouped.state_dict(), "epoch": 1})
    with pytest.raises(UnsupportedModelError, match="in_list") as caught:
        open_model(path)
    assert "finetuned" in caught.value.hint
    assert "ONNX" in caught.value.hint


@pytest.mark.parametrize("name", ["dill._dill._create_type", "dill._dill._load_type"])
def test_a_module_saved_by_dill_is_refused_with_advice_that_holds(tmp_path: Path, name: str) -> None:
    """SR-GKP keeps some of its networks so. A state dict of them would be refused, too: see the test above."""
    path = tmp_path / "grouped.dill"
    path.write_bytes(torch_pickles.whole(torch_pickles.name(name) + torch_pickles.tuple_of(torch_pickles.text("GroupResNet"))
                                         + b"R"))
    with pytest.raises(UnsafeFileError, match="dill") as caught:
        open_model(path)
    assert "ONNX" in caught.value.hint
    assert "state_dict" not in caught.value.hint


@pytest.mark.parametrize("export", ["onnx", "torchscript"])
def test_exports_of_a_grouped_network_open_exactly(grouped: Any, tmp_path: Path, export: str) -> None:
    x, path = images(1), tmp_path / "exported"
    if export == "onnx":
        torch.onnx.export(grouped, (x,), path.with_suffix(".onnx"), input_names=["input"], dynamo=False)
        opened = open_model(path.with_suffix(".onnx"))
    else:
        torch.jit.save(torch.jit.trace(grouped, x), path)
        opened = open_model(path, OpenOptions({"": (1, 3, 32, 32)}))
    assert_computes(opened, grouped(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1] + [GROUPS] * 6


def test_every_convolution_may_have_a_group_count_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As LeanFlex-GKP chooses them."""
    net, kind, down = classes_as(monkeypatch, group_cifar__GroupResNet=Net, group_cifar__GroupBasicblock=Block,
                                 models_DOT_res_utils__DownsampleA=DownsampleA)
    torch.manual_seed(0)
    shapes = ((16, 16, (2, 16)), (16, 32, (4, 8)), (32, 64, (16, 2)))
    made = liven(net([block(kind, down, c, f, True, groups) for c, f, groups in shapes]))
    opened = open_model(save(tmp_path / "grouped", made))
    x = images()
    assert_computes(opened, made(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1, 2, 2, 4, 8, 16, 16]


def test_snapshot_is_the_dense_network(tmp_path: Path) -> None:
    state = random_state(R8_PAD)
    snapshot = {"model_state_dict": state, "epoch": 40, "loss": torch.ones(())}
    opened = open_model(save(tmp_path / "epoch_40.pt", snapshot))
    assert (opened.system, opened.pruned) == ("tmi_gkp", False)
    x = images()
    assert_computes(opened, forward(layer_names(state), x), x)


def test_masks_of_torch_in_a_baseline_are_multiplied_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind, block, down = classes_as(monkeypatch, models_DOT_resnet__CifarResNet=CifarResNet,
                                   models_DOT_resnet__ResNetBasicblock=CifarBlock, models_DOT_resnet__DownsampleA=PadShortcut)
    torch.manual_seed(0)
    net = liven(kind((1, 1, 1)))
    for stage in (net.stage_1, net.stage_2, net.stage_3):
        stage[0].__class__ = block
        if isinstance(stage[0].downsample, PadShortcut):
            stage[0].downsample.__class__ = down
            stage[0].downsample.avg = nn.AvgPool2d(1, 2)
    prune.ln_structured(net.stage_2[0].conv_a, "weight", 0.5, n=1, dim=0)
    x = images()
    expected = net(x)
    net.avgpool = nn.AvgPool2d(8)
    del net.normalize  # of ours alone
    opened = open_model(save(tmp_path / "baseline", net))
    assert (opened.system, opened.pruned) == ("tmi_gkp", True)
    assert_computes(opened, expected, x)


# ---- ImageNet: bottlenecks -------------------------------------------------------------------------------------------
class Bottleneck(nn.Module):
    def __init__(self, c: int, width: int, stride: int, multi: bool) -> None:
        super().__init__()
        rng = np.random.default_rng(width)
        shapes = ((c, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        ins, outs = [], []
        for n, (i, o, k, s) in enumerate(shapes, 1):
            chosen, conv = kept_channels(rng, i), nn.Conv2d(i, o, k, s, k // 2, bias=False)
            if multi or n == 2:
                conv = nn.Conv2d(len(chosen), o, k, s, k // 2, groups=GROUPS, bias=False)
                ins.append(chosen)
                outs.append(torch.from_numpy(rng.permutation(o)))
            setattr(self, f"conv{n}", conv)
            setattr(self, f"bn{n}", nn.BatchNorm2d(o))
        self.in_list, self.out_list = (ins, outs) if multi else (ins[0], outs[0])
        self.downsample = nn.Sequential(nn.Conv2d(c, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lists = zip(self.in_list, self.out_list, strict=True) if isinstance(self.in_list, list) else None
        y = x
        for n in (1, 2, 3):
            pair = next(lists) if lists else (self.in_list, self.out_list) if n == 2 else None
            conv, bn = getattr(self, f"conv{n}"), getattr(self, f"bn{n}")
            y = bn(conv(y) if pair is None else conv(y[:, pair[0]])[:, pair[1]])
            y = F.relu(y) if n < 3 else y
        return F.relu(y + self.downsample(x))


class ImageNet(nn.Module):
    def __init__(self, kind: type, multi: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool, self.avgpool = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        for n, (c, width) in enumerate(((64, 64), (256, 128), (512, 256), (1024, 512)), 1):
            setattr(self, f"layer{n}", nn.Sequential(kind(c, width, 1 if n == 1 else 2, multi)))
        self.fc = nn.Linear(2048, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


@pytest.mark.parametrize("multi", [False, True], ids=["3x3 only", "all three"])
def test_bottlenecks_are_opened_with_tensors_or_lists_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, multi: bool
) -> None:
    net, kind = classes_as(monkeypatch, group_imagenet__GroupResNet=ImageNet,
                           group_imagenet__GroupBottleneck=Bottleneck)
    torch.manual_seed(0)
    model = liven(net(kind, multi))
    opened = open_model(save(tmp_path / "grouped", model), OpenOptions({"": (1, 3, 64, 64)}))
    x = images(1, 64)
    assert_computes(opened, model(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert list(branches(graph).values()).count(GROUPS) == (12 if multi else 4)


# ---- what is damaged or different ------------------------------------------------------------------------------------
def no_permutation(net: Any) -> None:
    net.layer1[0].out_list[0][0] = net.layer1[0].out_list[0][1]


def too_large(net: Any) -> None:
    net.layer3[0].in_list[1][5] = 64


def lists_missing(net: Any) -> None:
    net.layer2[0].in_list = net.layer2[0].in_list[:1]


@pytest.mark.parametrize("damage", [no_permutation, too_large, lists_missing])
def test_damaged_lists_are_refused(grouped: Any, tmp_path: Path, damage: Any) -> None:
    damage(grouped)
    with pytest.raises(FileError, match="layer"):
        open_model(save(tmp_path / "grouped", grouped))


def test_conv_with_other_settings_than_the_architectures_is_refused(grouped: Any, tmp_path: Path) -> None:
    grouped.layer1[0].conv2.stride = (2, 2)
    with pytest.raises(UnsupportedModelError, match=r"layer1\.0\.conv2"):
        open_model(save(tmp_path / "grouped", grouped))


def test_shortcut_with_another_stride_is_refused(grouped: Any, tmp_path: Path) -> None:
    grouped.layer2[0].shortcut.avg.stride = 3
    with pytest.raises(UnsupportedModelError, match="pools"):
        open_model(save(tmp_path / "grouped", grouped))


@pytest.mark.parametrize("place", ["conv1.stride", "conv1.padding", "layer2.0.shortcut.avg.kernel_size"])
def test_a_setting_that_unfolds_without_end_is_named_by_its_type(grouped: Any, tmp_path: Path, place: str) -> None:
    endless: tuple[Any, ...] = (3, 3)
    for _ in range(60):
        endless = (endless, endless)
    module, _, name = place.rpartition(".")
    setattr(grouped.get_submodule(module), name, endless)
    with pytest.raises(UnsupportedModelError, match="'a tuple', 'a tuple'"):
        open_model(save(tmp_path / "grouped", grouped))


def test_epsilon_of_the_norms_is_the_files_own(grouped: Any, tmp_path: Path) -> None:
    grouped.layer1[0].bn1.eps = 0.5
    opened = open_model(save(tmp_path / "grouped", grouped))
    x = images()
    assert_computes(opened, grouped(x), x)


def shortcut_without_a_module(net: Any) -> None:
    net.layer1[0].shortcut = 1


def hook(net: Any) -> None:
    net.layer2[0].shortcut.register_forward_hook(F.relu)


def order(net: Any) -> None:
    part = net.layer1[0]
    part._modules = {key: part._modules[key] for key in ("conv2", "conv1", "bn1", "bn2")}


@pytest.mark.parametrize("change", [shortcut_without_a_module, hook, order])
def test_another_block_is_refused_by_name(grouped: Any, tmp_path: Path, change: Any) -> None:
    change(grouped)
    with pytest.raises(UnsupportedModelError, match=r"layer[12]\.0"):
        open_model(save(tmp_path / "grouped", grouped))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["grouped", "pruned"])
def test_one_change_anywhere_is_exact_or_refused(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    net: Any = request.getfixturevalue(network)
    some = random.Random(0).sample(list(changes(net)), 30)
    found = Counter(outcome(tmp_path / "file", copy.deepcopy(net), change, images(1)) for _, change in some)
    assert found.keys() >= {"refused", "exact"}


# ---- the published files ---------------------------------------------------------------------------------------------
def published_forward(path: Path, x: torch.Tensor) -> torch.Tensor:
    """The published grouped network, computed from the numbers in the file."""
    record: Any = read_torch(path)
    parts = dict(submodules(record))
    state = {name: torch.from_numpy(array) for name, array in state_dict_of(record).items()}

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(y, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    y = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for number in range(3):
            name, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            lists, short = parts[name].fields, y
            if stride == 2:
                short = torch.cat((y[:, :, ::2, ::2], torch.zeros_like(y[:, :, ::2, ::2])), 1)
            for n in (1, 2):
                chosen = y[:, torch.from_numpy(lists["in_list"][n - 1])]
                z = F.conv2d(chosen, state[f"{name}.conv{n}.weight"], None, stride if n == 1 else 1, 1, 1, GROUPS)
                y = norm(z[:, torch.from_numpy(lists["out_list"][n - 1])], f"{name}.bn{n}")
                y = F.relu(y) if n == 1 else y
            y = F.relu(y + short)
    return F.linear(y.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def test_published_grouped_network() -> None:
    path = shared(R20 + "grouped")
    opened = open_model(path)
    x = images(4)
    assert_computes(opened, published_forward(path, x), x)
    graph = recognised(opened)
    convs = [(branched_node.read(n), spatial(n.outputs[0]) or ()) for n in graph.branched()]
    macs = sum(form.macs(plane) for form, plane in convs if not form.is_copy)
    assert moves(graph) == []
    assert round((macs + 640) / 1e6, 2) == pytest.approx(23.00, abs=0.01)


def test_published_baseline() -> None:
    opened = open_model(shared(R20 + "baseline"))
    assert (opened.system, opened.pruned) == ("tmi_gkp", False)
    record: Any = read_torch(shared(R20 + "baseline"))
    x = images(4)
    state = layer_names({name: torch.from_numpy(array) for name, array in state_dict_of(record).items()})
    assert_computes(opened, forward(state, x), x)
