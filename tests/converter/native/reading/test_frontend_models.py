"""Whole networks, as published and as exported by PyTorch, against what they compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from dense_nets import DeepLab, UNet, Yolo
from interpret import interpret
from onnx_kit import assert_close, feeds_of
from program_kit import check_program, kinds, one_form_graph, translated
from torch_kit import liven, shared
from torch_nets import DenseNet, EfficientNet, MobileNet, ShuffleNet

from gkp.benchmarks.networks import block_diagonal, resnet50
from gkp.converter.graph import Graph
from gkp.converter.native.program import Activation, Affine, Conv, Depthwise, Program
from gkp.converter.native.reading.frontend import program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel, OpenOptions, open_any


def compared(opened: GroupedModel, batch: int = 2, tol: float = 2e-5) -> Program:
    """The fused program of an opened model, compared with the checkpoint's own reference."""
    feeds = feeds_of(opened.model, batch)
    name, shape = next(iter(feeds)), next(iter(feeds.values())).shape
    x = np.random.default_rng(3).standard_normal((batch, *shape[1:])).astype(np.float32)
    found = fuse(program(simplify(recognise(Graph(opened.model)))))
    check_program(found)
    assert_close(interpret(found, [x]), opened.reference({name: x}), tol=tol)
    return found


@pytest.mark.parametrize("name", ["tmi_gkp/resnet20_cifar10/grouped", "tmi_gkp/resnet20_cifar10/baseline",
                                  "dsp/resnet20_g4.pt"])
def test_published_resnet20_is_nothing_but_convolutions_shortcuts_and_one_pool(name: str) -> None:
    found = compared(open_any(shared(name), OpenOptions()))
    counts = kinds(found)
    assert counts == ({"Conv": 22, "Pool": 1} if "dsp" in name else {"Conv": 20, "Copy": 2, "Pool": 1})
    convs = [s for s in found.steps if isinstance(s, Conv)]
    assert sum(s.residual is not None for s in convs) == 9
    assert all(s.final is Activation.RELU for s in convs if s.residual is not None)
    assert len(found.values) == len(found.steps) + 1


def opened(module: Any, *shape: int) -> GroupedModel:
    return open_any(liven(module), OpenOptions(input_shapes={"": shape}))


def test_mobilenet_v2() -> None:
    found = compared(opened(MobileNet(), 1, 3, 32, 32))
    assert kinds(found) == {"Conv": 8, "Depthwise": 3, "Pool": 1}
    assert {s.activation for s in found.steps if isinstance(s, Depthwise)} == {Activation.RELU6}
    assert sum(isinstance(s, Conv) and s.residual is not None for s in found.steps) == 2


def test_squeeze_excite_with_silu_and_hardswish() -> None:
    found = compared(opened(EfficientNet(), 1, 3, 32, 32))
    assert kinds(found) == {"Conv": 10, "Depthwise": 2, "Pool": 3, "Binary": 2, "Softmax": 1}
    counts = Counter(s.activation for s in found.steps if isinstance(s, Conv | Depthwise))
    assert counts[Activation.SILU] == 5
    assert counts[Activation.HARDSWISH] == 2
    assert counts[Activation.HARDSIGMOID] == counts[Activation.SIGMOID] == 1


def test_densenet_with_concatenations() -> None:
    found = compared(opened(DenseNet(), 1, 3, 16, 16))
    counts = kinds(found)
    assert (counts["Conv"], counts["Pool"], counts["Binary"]) == (6, 3, 0)
    assert all(s.activation is Activation.RELU for s in found.steps if isinstance(s, Affine))


def test_shufflenet_v2() -> None:
    counts = kinds(compared(opened(ShuffleNet(), 1, 3, 32, 32)))
    assert (counts["Conv"], counts["Depthwise"], counts["Affine"]) == (8, 3, 0)


@pytest.mark.parametrize("net", [MobileNet, EfficientNet, DenseNet, ShuffleNet, Yolo])
def test_the_exported_model_as_it_is_and_unfused(net: Any) -> None:
    translated(opened(net(), 2, 3, 32, 32).model)


def test_unet_with_transposed_convolutions() -> None:
    counts = kinds(compared(opened(UNet(), 1, 3, 32, 32)))
    assert counts == {"Conv": 5 * 2 + 4 * 3 + 1, "Pool": 4, "Interleave": 4, "Copy": 8}


def test_unet_with_bilinear_interpolation() -> None:
    counts = kinds(compared(opened(UNet(learned=False), 1, 3, 32, 32)))
    assert counts == {"Conv": 5 * 2 + 4 * 3 + 1, "Pool": 4, "Resize": 4, "Copy": 8}


def test_deeplab_with_dilated_branches() -> None:
    counts = kinds(compared(opened(DeepLab(), 1, 3, 32, 40)))
    assert counts == {"Conv": 10, "Pool": 1, "Resize": 2, "Copy": 4}


def test_yolo_with_its_boxes_decoded() -> None:
    found = compared(opened(Yolo(), 1, 3, 32, 32))
    counts = kinds(found)
    assert (counts["Softmax"], counts["ConstantBinary"], counts["Resize"]) == (1, 3, 1)
    assert found.outputs[0].shape == (7, 8 * 8 + 4 * 4)


@pytest.mark.slow
def test_resnet50_with_block_diagonal_convolutions() -> None:
    found = compared(open_any(resnet50(block_diagonal), OpenOptions(input_shapes={"": (1, 3, 32, 32)})), batch=1)
    assert kinds(found) == {"Conv": 54, "Pool": 1}  # the last plane is a single pixel
    assert sum(isinstance(s, Conv) and len(s.conv.branches) == 8 for s in found.steps) == 16


def test_program_leaves_the_graph_as_it_was() -> None:
    graph = one_form_graph(opened(MobileNet(), 1, 3, 32, 32).model)
    before = graph.to_model().SerializeToString()
    program(graph)
    assert graph.to_model().SerializeToString() == before
