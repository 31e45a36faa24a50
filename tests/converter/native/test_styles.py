"""Networks of many styles, as PyTorch exports them, compile whole and compute what PyTorch computes."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from interpret import interpret
from native_kit import native_runs
from program_kit import check_program, one_form_graph
from torch_kit import images, liven
from torch_nets import EfficientNet, ShuffleNet
from torch_styles import STYLES, ConvNeXt, GhostNet, ResNeSt, Sundry

from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Program
from gkp.converter.native.reading.parts import parts

_TOLERANCE = 5e-5


def exported(net: torch.nn.Module, dynamo: bool, x: torch.Tensor) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        torch.onnx.export(net, (x,), buffer, dynamo=False)
        return onnx.load_from_string(buffer.getvalue())


def compiled_whole(model: onnx.ModelProto) -> Program:
    (part,) = parts(one_form_graph(model), hybrid=False)
    assert part.program is not None
    check_program(part.program)
    return part.program


def agree(got: Any, want: torch.Tensor) -> None:
    scale = float(want.abs().max())
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=_TOLERANCE * scale)


@pytest.mark.parametrize("style", [*STYLES, EfficientNet, ShuffleNet])
def test_every_style_runs_in_native_kernels_alone(style: Any) -> None:
    torch.manual_seed(0)
    net, x = liven(style()), images(2)
    found = compiled_whole(exported(net, False, x))
    plan = make_plan(found, host_cpu())
    agree(native_runs(plan, [({found.inputs[0].name: x.numpy()}, 1)], together=True)[0][0], net(x))


@pytest.mark.slow
@pytest.mark.parametrize("style", [s for s in STYLES if s is not Sundry])  # it writes Softplus with Where
def test_what_the_newer_exporter_writes_is_understood_too(style: Any) -> None:
    torch.manual_seed(0)
    net, x = liven(style()), images(2)
    agree(interpret(compiled_whole(exported(net, True, x)), [x.numpy()])[0], net(x))


def test_nothing_is_moved_in_convnext() -> None:
    counts = Counter(type(s).__name__ for s in compiled_whole(exported(liven(ConvNeXt()), False, images(2))).steps)
    assert counts == {"Conv": 7, "Depthwise": 2, "Normalise": 5, "Pool": 1}


def test_split_attention_moves_vectors_only() -> None:
    found = compiled_whole(exported(liven(ResNeSt()), False, images(2)))
    moved = [s for s in found.steps if type(s).__name__ in ("Copy", "Reshape", "Permute")]
    assert all(found.values[s.target].size <= 16 for s in moved)


def test_channels_that_a_ghost_module_cuts_off_are_not_computed() -> None:
    found = compiled_whole(exported(liven(GhostNet()), False, images(2)))
    assert all(v.channels <= 15 for v in found.values)
