"""BranchedConv2d computes what BranchedConv defines, trains, and keeps its structure in its state dict."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.branched import Branch, BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.pruning.models.branched import BranchedConv2d


@st.composite
def structures(draw: st.DrawFn) -> BranchedConv:
    """Any structure: overlapping inputs, equal and unequal sizes, outputs in no branch, asymmetric pads."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels, n, equal = draw(st.integers(1, 7)), draw(st.sampled_from((3, 2, 4, 1, 0))), draw(st.booleans())
    size = draw(st.integers(1, 3))
    outs = [size if equal else int(rng.integers(1, 4)) for _ in range(n)]
    ins = [channels // 2 + 1 if equal else int(rng.integers(1, channels + 1)) for _ in range(n)]
    filters = sum(outs) + draw(st.integers(0 if n else 1, 2))
    order = np.split(rng.permutation(filters), np.cumsum(outs))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    triples = [
        (rng.permutation(channels)[:i], out, rng.standard_normal((len(out), i, *kernel)).astype(np.float32))
        for i, out in zip(ins, order[:n], strict=True)
    ]
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4) | st.integers(0, 2).map(lambda p: (p,) * 4))
    strides, dilations = (draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) for _ in range(2))
    conv = {"kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": dilations}
    bias = rng.standard_normal(filters).astype(np.float32) if draw(st.booleans()) else None
    return BranchedConv.build(channels, filters, triples, bias=bias, **conv)


def run(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(x)))


def image(form: BranchedConv, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, form.in_channels, 7, 8)).astype(np.float32)


def equal_form(branches: int = 4, kernel: int = 3) -> BranchedConv:
    rng = np.random.default_rng(1)
    outs = np.split(rng.permutation(16), branches)
    triples = [(rng.permutation(12)[:5], o, rng.standard_normal((len(o), 5, kernel, kernel))) for o in outs]
    triples = [(i, o, w.astype(np.float32)) for i, o, w in triples]
    return BranchedConv.build(12, 16, triples, kernel_shape=(kernel, kernel), pads=(kernel // 2,) * 4)


@settings(max_examples=150, deadline=None)
@given(structures())
def test_module_computes_the_definition(form: BranchedConv) -> None:
    x = image(form)
    np.testing.assert_allclose(run(BranchedConv2d(form), x), form(x), rtol=1e-4, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(structures())
def test_round_trip_through_the_module_is_exact(form: BranchedConv) -> None:
    back = BranchedConv2d(form).to_branched()
    assert (back.strides, back.pads, back.dilations) == (form.strides, form.pads, form.dilations)
    np.testing.assert_array_equal(back.bias, form.bias)
    assert len(back.branches) == len(form.branches)
    for a, b in zip(back.branches, form.branches, strict=True):
        for field in ("in_index", "out_index", "weight"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_equal_branches_run_as_one_grouped_conv() -> None:
    module = BranchedConv2d(equal_form())
    assert module.weight.shape == (16, 5, 3, 3)
    traced = torch.jit.trace(module, torch.zeros(1, 12, 6, 6))
    assert str(traced.inlined_graph).count("aten::_convolution") == 1


def test_permuted_grouped_conv_without_permutation_needs_no_gather() -> None:
    weight = np.ones((8, 2, 1, 1), np.float32)
    module = BranchedConv2d(BranchedConv.from_grouped(weight, 4))
    traced = torch.jit.trace(module, torch.zeros(1, 8, 3, 3))
    assert "index_select" not in str(traced.inlined_graph)


def test_index_lists_are_in_the_state_dict() -> None:
    form = equal_form()
    state = BranchedConv2d(form).state_dict()
    assert sorted(state) == ["channels", "in_index", "in_sizes", "out_index", "out_sizes", "weight"]
    assert state["in_index"].tolist() == [int(c) for b in form.branches for c in b.in_index]
    assert state["out_sizes"].tolist() == [4, 4, 4, 4]
    assert state["channels"].tolist() == [16, 12]


def test_unequal_branches_have_a_weight_each() -> None:
    branches = (Branch(np.array([0]), np.array([2]), np.ones((1, 1, 1, 1), np.float32)),
                Branch(np.array([1, 0]), np.array([0]), np.ones((1, 2, 1, 1), np.float32)))
    form = BranchedConv(2, 3, branches, np.array([1, 2, 3], np.float32), (1, 1), (1, 1), (0,) * 4, (1, 1))
    state = BranchedConv2d(form).state_dict()
    assert state["weight_0"].shape == (1, 1, 1, 1)
    assert state["weight_1"].shape == (1, 2, 1, 1)
    assert state["bias"].tolist() == [1, 2, 3]


def test_loading_a_state_dict_takes_over_its_structure() -> None:
    form = equal_form()
    other = form.permute_outputs(np.random.default_rng(2).permutation(16))
    module = BranchedConv2d(form)
    module.load_state_dict(BranchedConv2d(other).state_dict())
    np.testing.assert_allclose(run(module, image(form)), other(image(form)), rtol=1e-4, atol=1e-4)


def test_deep_copy_is_independent() -> None:
    module = BranchedConv2d(equal_form())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
    assert not run(twin, image(equal_form())).any()
    assert run(module, image(equal_form())).any()


def test_gradients_equal_those_of_the_dense_conv_inside_the_branches() -> None:
    form = equal_form()
    module, x = BranchedConv2d(form), torch.from_numpy(image(form))
    dense = torch.nn.Conv2d(12, 16, 3, padding=1, bias=False)
    dense.weight.data = torch.from_numpy(form.to_dense())
    for conv in (module, dense):
        conv(x).square().sum().backward()
    for b, grad in zip(form.branches, module.weight.grad.chunk(4), strict=True):
        np.testing.assert_allclose(grad, dense.weight.grad[np.ix_(b.out_index, b.in_index)], rtol=1e-3, atol=1e-3)


def test_one_dimensional_conv_is_refused() -> None:
    form = BranchedConv.from_dense(np.ones((2, 2, 3), np.float32))
    with pytest.raises(UnsupportedModelError, match="kernel"):
        BranchedConv2d(form)
