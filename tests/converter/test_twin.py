"""Which models were pruned, and from what: zeros that leave something out say it, wherever a model comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
import torch_nets
from cli_kit import GROUPED, save
from cli_kit import gkp as command
from fake_target import groups
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_kit import Net
from torch import nn
from torch.nn.utils import prune
from torch_kit import R8_CONV, State, layer_names, liven, random_state

import gkp
from gkp.converter import node as branched_node
from gkp.converter.choose import dense_forms
from gkp.converter.conversion import find_branches, open_source
from gkp.converter.describe import graph_macs
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel
from gkp.converter.sources.base import OpenOptions
from gkp.converter.sources.onnx_file import from_model
from gkp.converter.stages import Job
from gkp.converter.targets.onnx import OnnxTarget
from gkp.converter.twin import dense_twin
from gkp.manifest import Manifest
from gkp.options.convert import convert_options
from gkp.options.targets import OnnxOptions

SHAPE = (1, 3, 8, 8)
PLANE = 8 * 8
SPATIAL = 32 * 32 * 9 * PLANE
"""Multiply-accumulates of a 3x3 convolution of torch_nets.Bottlenecks without groups."""
SOURCES = ["module", "onnx", "torchscript", "torch.export", "state dict"]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return liven(torch_nets.Bottlenecks())


def changed(module: nn.Module, change: Callable[[nn.Conv2d], None], which: slice = slice(None)) -> nn.Module:
    """A copy in which some of the 3x3 convolutions behind the stem are changed."""
    module = copy.deepcopy(module)
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][1:]
    with torch.no_grad():
        for conv in convs[which]:
            change(conv)
    return module


def in_blocks(conv: nn.Conv2d) -> None:
    """Four groups, shuffled."""
    rng, mask = np.random.default_rng(0), torch.zeros(32, 32, 1, 1)
    for rows, columns in zip(np.split(rng.permutation(32), 4), np.split(rng.permutation(32), 4), strict=True):
        mask[np.ix_(rows, columns)] = 1
    conv.weight *= mask


def one_dead_filter(conv: nn.Conv2d) -> None:
    conv.weight[5] = 0


def here_and_there(conv: nn.Conv2d) -> None:
    conv.weight *= torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5


def saved(module: nn.Module, how: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(what is opened, the options that it needs)."""
    path = folder / "model"
    if how == "module":
        return module, {"input_shape": SHAPE}
    if how == "onnx":
        return save(gkp.open(module, input_shape=SHAPE).given, folder / "model.onnx"), {}
    if how == "torchscript":
        torch.jit.save(torch.jit.trace(module, torch.zeros(SHAPE)), path)
        return path, {"input_shape": SHAPE}
    if how == "torch.export":
        torch.export.save(torch.export.export(module, (torch.zeros(SHAPE),)), path)
        return path, {"trust_code": True}
    torch.save(module.state_dict(), path)
    return path, {"input_shape": SHAPE, "arch": "torch_nets:Bottlenecks"}


def told(source: Any, **options: Any) -> Manifest:
    """What a conversion that writes nothing says."""
    return gkp.convert(source, target="onnx", dry_run=True, **options).manifest


def baseline(made: Manifest) -> tuple[str, str]:
    assert made.baseline is not None
    return made.baseline.kind, made.baseline.description


# ---- zeros that leave something out ----------------------------------------------------------------------------------
@pytest.mark.parametrize("how", SOURCES)
def test_blocks_of_zeros_have_a_dense_ancestor_wherever_they_come_from(dense: nn.Module, tmp_path: Path, how: str) -> None:
    source, options = saved(changed(dense, in_blocks), how, tmp_path)
    made = told(source, **options)
    assert baseline(made) == ("twin", "")
    assert sorted(layer.branches for layer in made.layers) == [1] * 5 + [4] * 2
    assert made.macs.dense - made.macs.kept == 2 * SPATIAL * 3 // 4
    assert made.speedup.theoretical == pytest.approx(made.macs.dense / made.macs.kept, abs=1e-4)
    assert made.macs.dense == told(dense, input_shape=SHAPE).macs.kept


@pytest.mark.parametrize("how", ["module", "onnx", "state dict"])
def test_a_dense_model_has_no_dense_ancestor_and_was_not_designed_with_groups(
    dense: nn.Module, tmp_path: Path, how: str
) -> None:
    source, options = saved(dense, how, tmp_path)
    made = told(source, **options)
    kind, words = baseline(made)
    assert kind == "as_is"
    assert "designed" not in words
    assert made.speedup.theoretical is None
    assert made.macs.dense == made.macs.kept
    assert made.notes == []


def test_a_masked_state_dict_of_a_known_network_is_pruned(tmp_path: Path) -> None:
    state = layer_names(random_state(R8_CONV))
    masked = {name: without_half(t) if ".conv" in name else t for name, t in state.items()}
    (whole, half) = (told(torch_save(s, tmp_path / "model.pth")) for s in (state, masked))
    assert (baseline(whole)[0], baseline(half)[0]) == ("as_is", "twin")
    assert half.macs.dense == whole.macs.dense > half.macs.kept


def without_half(weight: torch.Tensor) -> torch.Tensor:
    """Two groups."""
    f, c = weight.shape[:2]
    mask = torch.zeros(f, c, 1, 1)
    mask[: f // 2, : c // 2] = mask[f // 2:, c // 2:] = 1
    return weight * mask


def torch_save(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


def scale_of_zero(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[2].weight.data[::2] = 0
    return module


def masked_by_torch(module: nn.Module) -> nn.Module:
    def half(conv: nn.Conv2d) -> None:
        prune.ln_structured(conv, "weight", 0.5, n=1, dim=0)

    return changed(module, half, slice(1))


@pytest.mark.parametrize("make", [scale_of_zero, masked_by_torch])
def test_dead_channels_make_a_model_pruned_however_they_died(
    dense: nn.Module, make: Callable[[nn.Module], nn.Module]
) -> None:
    made = told(make(dense), input_shape=SHAPE)
    assert baseline(made)[0] == "twin"
    assert made.macs.dense - made.macs.kept == SPATIAL // 2


def test_a_mask_that_the_graph_multiplies_counts() -> None:
    net = Net(1, 8, 4, 4)
    mask = np.kron(np.eye(2), np.ones((4, 4)))[:, :, None, None].astype(np.float32)
    net.nodes.clear()
    weight = net.op("Mul", net.const(net.normal(8, 8, 3, 3)), net.const(mask))
    opened = from_model(net.model(net.op("Conv", "x", weight, pads=[1] * 4)), OpenOptions())
    twin = dense_twin(opened, recognise(Graph(opened.model)))
    assert twin is not None
    assert graph_macs(twin) == 8 * 8 * 9 * 16


# ---- groups of the architecture --------------------------------------------------------------------------------------
DESIGNED = {"resnext": (torch_nets.resnext, slice(1)), "mobilenet": (torch_nets.MobileNet, slice(0)),
           "mobilenet, depthwise": (torch_nets.MobileNet, slice(1))}


@pytest.mark.parametrize("name", ["resnext", "mobilenet", "mobilenet, depthwise"])
def test_the_twin_of_a_model_with_groups_has_them(name: str) -> None:
    make, which = DESIGNED[name]
    torch.manual_seed(0)
    module = liven(make())
    dead = changed(module, one_dead_filter, which)
    if name == "mobilenet":
        with torch.no_grad():
            next(m for m in dead.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)).weight[3] = 0
    whole, made = told(module, input_shape=SHAPE), told(dead, input_shape=SHAPE)
    assert baseline(whole) == ("as_is", "it was designed with groups: without --baseline it has no dense ancestor")
    assert baseline(made) == ("twin", "in the groups of the architecture")
    assert made.macs.dense == whole.macs.dense == whole.macs.kept
    assert made.speedup.theoretical == pytest.approx(whole.macs.kept / made.macs.kept, abs=1e-4)


def test_masks_of_a_module_with_groups_leave_it_these_groups(tmp_path: Path) -> None:
    """The file says that it was pruned, but not that its groups came of that."""
    state = liven(torch_nets.resnext()).state_dict()
    name = "blocks.0.1.0.weight"
    mask = torch.ones_like(state[name])
    mask[:4] = 0
    ticket = {n: t for n, t in state.items() if n != name} | {f"{name}_orig": state[name], f"{name}_mask": mask}
    options = {"arch": "torch_nets:resnext", "input_shape": SHAPE}
    made = told(torch_save(ticket, tmp_path / "ticket.pth"), **options)
    assert made.source.system == "structure_lth"
    assert baseline(made) == ("twin", "in the groups of the architecture")
    assert made.macs.dense == told(torch_nets.resnext(), input_shape=SHAPE).macs.kept


def opened_resnext(change: Callable[[nn.Conv2d], None]) -> GroupedModel:
    model = gkp.open(changed(liven(torch_nets.resnext()), change, slice(1)), input_shape=SHAPE).given
    return from_model(model, OpenOptions())


def test_the_baseline_runs_in_the_groups_of_the_architecture() -> None:
    opened = opened_resnext(one_dead_filter)
    twin = dense_twin(opened, recognise(Graph(opened.model)))
    assert twin is not None
    model = lower(simplify(twin), dense_forms(twin, OnnxTarget(OnnxOptions()))).to_model()
    assert groups(model) == 8


def test_the_twin_of_a_pruning_system_has_no_groups() -> None:
    """Its shortcuts, which only move channels, are none."""
    job = Job(GROUPED, convert_options("onnx"), OnnxTarget(OnnxOptions()))
    found = find_branches(job, open_source(job))
    assert found.kind == "twin"
    assert found.own_groups == frozenset()
    assert any(node for node in found.graph.branched() if branched_node.read(node).is_copy)


# ---- zeros that leave nothing out ------------------------------------------------------------------------------------
def test_zeros_here_and_there_make_no_groups_and_are_said_to_stay(dense: nn.Module) -> None:
    made = told(changed(dense, here_and_there), input_shape=SHAPE)
    kind, words = baseline(made)
    assert kind == "as_is"
    assert words.startswith("no channel or block of it is zero")
    assert all(layer.branches == 1 for layer in made.layers)
    assert made.macs.dense == made.macs.kept == made.macs.executed
    (note,) = made.notes
    assert note.startswith("no channel or block is left out; ")
    assert note.endswith("% of the weights that convolutions multiply are zeros without structure: they stay")


def test_what_is_left_out_and_what_is_not_is_said_together(dense: nn.Module) -> None:
    module = changed(changed(dense, in_blocks, slice(1)), here_and_there, slice(1, 2))
    made = told(module, input_shape=SHAPE)
    assert baseline(made)[0] == "twin"
    (note,) = made.notes
    assert note.startswith(f"{1 - made.macs.kept / made.macs.dense:.1%} of the dense multiply-accumulates are left out; ")


# ---- the property ----------------------------------------------------------------------------------------------------
def network(seed: int, zeros: list[str]) -> onnx.ModelProto:
    """Convolutions with 1, 2 or 4 groups, each with its kind of zeros ("" for none)."""
    net, x = Net(1, 8, 4, 4, seed=seed), "x"
    for kind in zeros:
        group, kernel = int(net.rng.choice([1, 2, 4])), int(net.rng.choice([1, 3]))
        weight = net.weight(8, 8 // group, kernel, kernel)
        mask, stray = np.ones_like(weight), net.rng.random(weight.shape) < 0.5
        if kind == "dead":
            mask[3] = 0
        elif kind == "unread":
            mask[:, 1] = 0
        elif kind == "blocks":
            mask[::2, ::2] = mask[1::2, 1::2] = 0
        elif kind:
            mask = stray if kind == "stray" else 0 * mask
        x = net.conv(x, (weight * mask).astype(np.float32), group=group, bias=net.normal(8), pads=[kernel // 2] * 4)
        x = net.relu(net.bn(x, 8) if net.rng.random() < 0.5 else x)
    return net.model(x)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.lists(st.sampled_from(["", "stray", "dead", "unread", "blocks", "all"]), min_size=1, max_size=4))
def test_any_twin_multiplies_what_the_file_would_without_its_zeros(seed: int, zeros: list[str]) -> None:
    opened = from_model(network(seed, zeros), OpenOptions())
    graph = recognise(Graph(opened.model))
    twin = dense_twin(opened, graph)
    if twin is None:
        assert not {"dead", "unread", "blocks", "all"} & set(zeros)
        return
    whole = recognise(Graph(network(seed, [""] * len(zeros))))
    assert graph_macs(twin) == graph_macs(whole) >= graph_macs(graph)
    forms, full, given_forms = ({n.name: branched_node.read(n) for n in g.branched()} for g in (twin, whole, graph))
    assert forms.keys() == full.keys() == given_forms.keys()
    for name, conv in forms.items():
        assert [b.weight.shape for b in conv.branches] == [b.weight.shape for b in full[name].branches]
        assert all((b.weight != 0).all() for b in conv.branches)
        kept = given_forms[name].to_dense()
        np.testing.assert_array_equal(conv.to_dense()[kept != 0], kept[kept != 0])


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_says_which_baseline_and_a_given_one_counts(dense: nn.Module, tmp_path: Path) -> None:
    masked, _ = saved(changed(dense, in_blocks), "onnx", tmp_path)
    (tmp_path / "dense").mkdir()
    whole, _ = saved(dense, "onnx", tmp_path / "dense")
    kinds = []
    for options in ([], ["--baseline", str(whole)]):
        outcome = command("convert", masked, "--target", "onnx", "--dry-run", "--json", "-", *options)
        made = msgspec.json.decode(outcome.out, type=Manifest)
        kinds.append(baseline(made)[0])
        assert made.macs.dense - made.macs.kept == 2 * SPATIAL * 3 // 4
    assert kinds == ["twin", "given"]

