"""Plain checkpoints: known architectures are rebuilt, others need the user's own code, and the rest is explained."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch_kit import (
    R8_CONV,
    R8_PAD,
    R18,
    State,
    assert_computes,
    branches,
    classes_as,
    forward,
    images,
    layer_names,
    liven,
    random_state,
    recognised,
    save,
)
from whole_modules import torchvision_resnet

from gkp.converter.sources import open_model
from gkp.converter.sources.base import OpenOptions
from gkp.errors import UnsupportedModelError, UsageError

MODULE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

    def broken():
        raise OSError("no such dataset")

    def text():
        return "resnet20"

    NET = Net()
"""
SHAPE = {"": (1, 3, 16, 16)}


def mean_net(state: State, x: torch.Tensor) -> torch.Tensor:
    y = nn.functional.conv2d(x, state["conv.weight"], state["conv.bias"], padding=1)
    return nn.functional.linear(torch.relu(y).mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A package in the current folder, under a name that no other test imports."""
    name = f"mynet_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def my_state() -> State:
    torch.manual_seed(0)
    return dict(nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 5)}).state_dict())


# ---- known architectures ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net", "model"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict_of_a_known_network(tmp_path: Path, key: str | None, legacy: bool) -> None:
    state = layer_names(random_state(R8_CONV))
    value = state if key is None else {key: {f"module.{n}": t for n, t in state.items()}, "epoch": 3, "acc": 91.2}
    opened = open_model(save(tmp_path / "model.pth", value, legacy))
    assert (opened.system, opened.pruned) == ("torch", False)
    x = images()
    assert_computes(opened, forward(state, x), x)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod.module."])
def test_a_checkpoint_of_lightning_opens(tmp_path: Path, prefix: str) -> None:
    state = layer_names(random_state(R8_CONV))
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(16, 3, 3, 3)}}
    checkpoint = {"epoch": 3, "global_step": 120, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {"state_dict": {}}},
                  "state_dict": {prefix + name: tensor for name, tensor in state.items()}, "lr_schedulers": [{"last_epoch": 3}],
                  "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "best_k": {}}},
                  "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}],
                  "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1, "net": {"depth": 8}}}
    x = images()
    assert_computes(open_model(save(tmp_path / "epoch=3.ckpt", checkpoint)), forward(state, x), x)


def test_a_prefix_is_named_in_errors(tmp_path: Path) -> None:
    state = {f"model.{n}": t for n, t in layer_names(random_state(R8_CONV)).items()}
    del state["model.layer1.0.bn1.bias"]
    with pytest.raises(UnsupportedModelError, match=r"lacks model\.layer1\.0\.bn1\.bias"):
        open_model(save(tmp_path / "model.pth", state))


@pytest.mark.parametrize("beside", [["conv1.weight"], ["loss.weight"], None], ids=["one", "another", "all"])
def test_a_prefix_of_some_names_only_is_none(tmp_path: Path, beside: list[str] | None) -> None:
    """Names would collide without it, or something beside the network be taken for a part of it."""
    state = layer_names(random_state(R8_CONV))
    both = {f"model.{n}": t for n, t in state.items()} | {n: state["conv1.weight"] for n in beside or ()}
    with pytest.raises(UnsupportedModelError):
        open_model(save(tmp_path / "model.pth", both if beside else both | state))


def test_half_precision_is_computed_in_single(tmp_path: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in random_state(R8_PAD).items()}
    opened = open_model(save(tmp_path / "model.pth", state))
    x = images()
    assert_computes(opened, forward(layer_names({n: t.float() for n, t in state.items()}), x), x)


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_state_dict_says_what_it_was_assumed_to_be(tmp_path: Path, key: str | None) -> None:
    state = random_state(R18)
    opened = open_model(save(tmp_path / "model.pth", state if key is None else {key: state}))
    assert opened.assumed == "resnet18 with ReLU and no max-pooling"
    assert "assumed resnet18 with ReLU" in opened.description


# ---- masks of torch.nn.utils.prune -----------------------------------------------------------------------------------
def pruned_by_torch(module: nn.Module) -> nn.Module:
    """By filters, by single weights, and by both in turn, which makes a container of masks."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    for number, conv in enumerate(convs[1:]):
        if number % 3 != 1:
            prune.ln_structured(conv, "weight", 0.5, n=1, dim=0)
        if number % 3:
            prune.l1_unstructured(conv, "weight", 0.3)
    return module


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("parallel", [False, True])
def test_masks_of_a_pickled_module_are_multiplied_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool, parallel: bool
) -> None:
    module = pruned_by_torch(liven(torchvision_resnet(monkeypatch)))
    opened = open_model(save(tmp_path / "model.pt", nn.DataParallel(module) if parallel else module, legacy))
    assert (opened.system, opened.pruned) == ("torch", True)
    assert "of the masked weights kept" in opened.description
    x = images()
    assert_computes(opened, module(x), x)


def test_masks_of_a_pickled_module_reach_an_own_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, my_package: str, my_state: State
) -> None:
    (kind,) = classes_as(monkeypatch, somewhere_DOT_nets__Net=nn.ModuleDict)
    module = kind({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 5)})
    module.load_state_dict(my_state)
    prune.l1_unstructured(module["conv"], "weight", 0.4)
    prune.l1_unstructured(module["fc"], "bias", 0.4)
    module.register_buffer("total_ops", torch.ones(1))
    opened = open_model(save(tmp_path / "model.pt", module), OpenOptions(SHAPE, arch=f"{my_package}:Net"))
    assert opened.pruned
    x = images(2, 16)
    masked = {**my_state, "conv.weight": module["conv"].weight, "fc.bias": module["fc"].bias}
    assert_computes(opened, mean_net(masked, x), x)


def test_what_only_looks_like_half_a_pair_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, my_package: str, my_state: State
) -> None:
    (kind,) = classes_as(monkeypatch, somewhere_DOT_nets__Net=nn.ModuleDict)
    module = kind({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 5)})
    module.load_state_dict(my_state)
    module.register_buffer("attention_mask", torch.ones(4))
    (tmp_path / f"{my_package}.py").open("a").write(textwrap.dedent("""
        class Attentive(Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("attention_mask", torch.zeros(4))
    """))
    opened = open_model(save(tmp_path / "model.pt", module), OpenOptions(SHAPE, arch=f"{my_package}:Attentive"))
    assert not opened.pruned
    x = images(2, 16)
    assert_computes(opened, mean_net(my_state, x), x)


# ---- the user's own architecture -------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "module."])
def test_own_architecture_is_filled(tmp_path: Path, my_package: str, my_state: State, prefix: str) -> None:
    path = save(tmp_path / "model.pth", {"state_dict": {prefix + n: t for n, t in my_state.items()}})
    opened = open_model(path, OpenOptions(SHAPE, arch=f"{my_package}:Net"))
    x = images(2, 16)
    assert_computes(opened, mean_net(my_state, x), x)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_counts_of_a_profiler_do_not_reach_an_own_architecture(
    tmp_path: Path, my_package: str, my_state: State, prefix: str
) -> None:
    counted = {prefix + n: t for n, t in my_state.items()} | {"total_ops": torch.ones(1), f"{prefix}conv.total_ops": torch.ones(1)}
    opened = open_model(save(tmp_path / "model.pth", counted), OpenOptions(SHAPE, arch=f"{my_package}:Net"))
    x = images(2, 16)
    assert_computes(opened, mean_net(my_state, x), x)


def test_masks_reach_an_own_architecture(tmp_path: Path, my_package: str, my_state: State) -> None:
    mask = torch.zeros(8, 3, 1, 1)
    mask[:4, 0], mask[4:, 1:] = 1, 1
    masked = {n: t for n, t in my_state.items() if n != "conv.weight"}
    masked |= {"conv.weight_orig": my_state["conv.weight"], "conv.weight_mask": mask.expand(8, 3, 3, 3).clone()}
    opened = open_model(save(tmp_path / "ticket.pth", masked), OpenOptions(SHAPE, arch=f"{my_package}:Net"))
    x = images(2, 16)
    assert_computes(opened, mean_net({**my_state, "conv.weight": my_state["conv.weight"] * mask}, x), x)
    assert (opened.system, opened.pruned, branches(recognised(opened))) == ("structure_lth", True, {"conv": 2})


@pytest.mark.parametrize(
    ("arch", "says"),
    [("nowhere_at_all:Net", "ModuleNotFoundError"), ("{}:Missing", "there is no Missing"), ("{}:broken", "no such dataset"),
     ("{}:text", "returns str"), ("{}", "pkg:callable"), ("{}:", "pkg:callable"), ("{}:NET", "TypeError"), ("{}:__name__", "is a str, which cannot be called")],
)
def test_own_architecture_that_fails_is_explained(
    tmp_path: Path, my_package: str, my_state: State, arch: str, says: str
) -> None:
    path = save(tmp_path / "model.pth", my_state)
    with pytest.raises(UsageError, match=says) as caught:
        open_model(path, OpenOptions(SHAPE, arch=arch.format(my_package)))
    assert caught.value.hint


def test_state_dict_that_does_not_fit_the_own_architecture_is_explained(
    tmp_path: Path, my_package: str, my_state: State
) -> None:
    path = save(tmp_path / "model.pth", {**my_state, "head.weight": torch.ones(1)})
    with pytest.raises(UsageError, match=r"head\.weight"):
        open_model(path, OpenOptions(SHAPE, arch=f"{my_package}:Net"))


# ---- what cannot be opened -------------------------------------------------------------------------------------------
def test_module_of_an_unknown_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kind,) = classes_as(monkeypatch, somewhere_DOT_nets__Wonder=nn.Conv2d)
    with pytest.raises(UnsupportedModelError, match=r"somewhere\.nets\.Wonder") as caught:
        open_model(save(tmp_path / "model.pt", kind(3, 4, 3)))
    assert "--arch" in caught.value.hint
    assert "ONNX" in caught.value.hint


@pytest.mark.parametrize("value", [{"weights": 1}, [1, 2], {"a.weight": torch.ones(2, 2)}, np.ones(3)])
def test_file_without_a_known_network_is_explained(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(save(tmp_path / "x.pt", value))
    assert "--arch" in caught.value.hint
