"""What is fused computes the same, and what others need is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpret import interpret
from onnx_kit import assert_close
from program_kit import check_program, kinds, only

from gkp.branched import BranchedConv
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    Conv,
    Copy,
    Depthwise,
    Pool,
    Port,
    Program,
    Reshape,
    Step,
    Value,
)
from gkp.converter.native.reading.fuse import fuse

C, PLANE = 4, (5, 6)


def conv(source: int, target: int, seed: int = 0, **more: Any) -> Conv:
    weight = np.random.default_rng(seed).standard_normal((C, C, 3, 3)).astype(np.float32) / 6
    form = BranchedConv.from_grouped(weight, 1, np.arange(C, dtype=np.float32) - 1, pads=(1, 1, 1, 1))
    return Conv(source, target, form, **more)


def depthwise(source: int, target: int) -> Depthwise:
    weight = np.random.default_rng(1).standard_normal((C, 3, 3)).astype(np.float32)
    return Depthwise(source, target, weight, np.ones(C, np.float32), (1, 1), (1, 1, 1, 1), (1, 1))


def act(source: int, target: int, kind: Activation = Activation.RELU) -> Affine:
    return Affine(source, target, np.ones(C, np.float32), np.zeros(C, np.float32), kind)


def affine(source: int, target: int, kind: Activation = Activation.NONE) -> Affine:
    return Affine(source, target, np.float32([1, -2, 0.5, 3]), np.float32([0, 1, -1, 2]), kind)


def fused(*steps: Step, outputs: tuple[int, ...] | None = None) -> Program:
    """The steps over one input (value 0), fused, and compared with what they were. All values have one shape."""
    count = max(s.target for s in steps) + 1
    ports = tuple(Port(f"y{v}", v, (C, *PLANE)) for v in outputs or (count - 1,))
    plain = Program((Value(C, *PLANE),) * count, steps, (Port("x", 0, (C, *PLANE)),), ports)
    check_program(plain)
    found = fuse(plain)
    check_program(found)
    x = np.random.default_rng(5).standard_normal((2, C, *PLANE)).astype(np.float32)
    assert_close(interpret(found, [x], double=True), interpret(plain, [x], double=True), tol=1e-6)
    assert [p.name for p in found.outputs] == [p.name for p in ports]
    return found


@pytest.mark.parametrize("kind", [k for k in Activation if k is not Activation.NONE])
@pytest.mark.parametrize("make", [conv, depthwise, affine, lambda s, t: Binary(s, s, t, "mul")])
def test_activation_goes_into_what_makes_its_input(make: Any, kind: Activation) -> None:
    (step,) = fused(make(0, 1), act(1, 2, kind)).steps
    assert step.activation is kind


def test_activation_of_a_pool_stays() -> None:
    pool = Pool(0, 1, True, (3, 3), (1, 1), (1, 1, 1, 1))
    assert kinds(fused(pool, act(1, 2))) == {"Pool": 1, "Affine": 1}


def test_raw_value_with_another_reader_or_as_an_output_is_kept() -> None:
    assert kinds(fused(conv(0, 1), act(1, 2), Binary(1, 2, 3, "mul"))) == {"Conv": 1, "Affine": 1, "Binary": 1}
    found = fused(conv(0, 1), act(1, 2), outputs=(1, 2))
    assert kinds(found) == {"Conv": 1, "Affine": 1}
    assert [p.value for p in found.outputs] == [1, 2]


def test_scales_and_shifts_go_into_the_weights() -> None:
    for make in (conv, depthwise, affine):
        (step,) = fused(make(0, 1), affine(1, 2, Activation.SILU)).steps
        assert step.activation is Activation.SILU


def test_scale_behind_an_activation_stays() -> None:
    assert kinds(fused(conv(0, 1), act(1, 2), affine(2, 3))) == {"Conv": 1, "Affine": 1}


def test_residual_and_the_activation_after_it() -> None:
    (step,) = fused(conv(0, 1), act(1, 2, Activation.SILU), Binary(0, 2, 3, "add"), act(3, 4)).steps
    assert (step.residual, step.activation, step.final) == (0, Activation.SILU, Activation.RELU)


def test_residual_goes_into_the_convolution_that_is_computed_last() -> None:
    found = fused(conv(0, 1, 1), depthwise(0, 2), Binary(1, 2, 3, "add"), act(3, 4))
    first, second = found.steps
    assert isinstance(first, Conv)
    assert first.residual is None
    assert isinstance(second, Depthwise)
    assert second.residual == first.target


def test_convolution_waits_for_a_residual_that_is_computed_later() -> None:
    found = fused(conv(0, 1), Pool(0, 2, False, (3, 3), (1, 1), (1, 1, 1, 1)), Binary(1, 2, 3, "add"))
    assert [type(s) for s in found.steps] == [Pool, Conv]
    assert only(found, Conv).residual == 1


def test_two_residuals_in_a_row_take_two_steps() -> None:
    assert kinds(fused(conv(0, 1), Binary(1, 0, 2, "add"), Binary(2, 0, 3, "add"))) == {"Conv": 1, "Binary": 1}


def test_sums_that_are_no_residuals() -> None:
    assert kinds(fused(conv(0, 1), Binary(1, 1, 2, "add"))) == {"Conv": 1, "Binary": 1}
    assert kinds(fused(conv(0, 1), Binary(1, 0, 2, "sub"))) == {"Conv": 1, "Binary": 1}
    assert kinds(fused(conv(0, 1), Binary(1, 0, 2, "add"), Binary(1, 2, 3, "mul"))) == {"Conv": 1, "Binary": 2}


def test_sum_that_is_broadcast_stays() -> None:
    values = (Value(C, *PLANE), Value(C, 1, 1), Value(C, 1, 1), Value(C, *PLANE))
    weight = np.ones((C, C, 1, 1), np.float32)
    steps = (Pool(0, 1, False, PLANE, (1, 1), (0, 0, 0, 0)), Conv(1, 2, BranchedConv.from_grouped(weight, 1)),
             Binary(0, 2, 3, "add"))
    ports = (Port("x", 0, (C, *PLANE)),), (Port("y", 3, (C, *PLANE)),)
    assert kinds(fuse(Program(values, steps, *ports))) == {"Pool": 1, "Conv": 1, "Binary": 1}


@pytest.mark.parametrize(("gate", "result"), [(Activation.SIGMOID, Activation.SILU),
                                              (Activation.HARDSIGMOID, Activation.HARDSWISH)])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_self_gated_activation_goes_into_the_convolution(gate: Activation, result: Activation, order: Any) -> None:
    (step,) = fused(conv(0, 1), act(1, 2, gate), Binary(*order, 3, "mul")).steps  # type: ignore[call-arg]
    assert step.activation is result


def test_gate_that_others_read_stays() -> None:
    found = fused(act(0, 1, Activation.SIGMOID), Binary(0, 1, 2, "mul"), outputs=(1, 2))
    assert kinds(found) == {"Affine": 1, "Binary": 1}


def test_copies_and_reshapes_that_change_nothing_vanish() -> None:
    same = Copy(1, 2, np.arange(C))
    assert kinds(fused(conv(0, 1), same, Reshape(2, 3), act(3, 4, Activation.NONE), act(4, 5))) == {"Conv": 1}
    assert kinds(fused(conv(0, 1), Copy(1, 2, np.array([1, 0, 2, 2])))) == {"Conv": 1, "Copy": 1}


def test_a_convolution_writes_its_channels_in_the_order_that_is_wanted() -> None:
    order = Copy(1, 2, np.array([1, 3, 2, 0]))
    assert kinds(fused(conv(0, 1), order)) == {"Conv": 1}
    assert kinds(fused(conv(0, 1), order, outputs=(1, 2))) == {"Conv": 1, "Copy": 1}


def test_every_output_has_a_step_of_its_own() -> None:
    assert kinds(fused(Copy(0, 1, np.arange(C)))) == {"Copy": 1}
    found = fused(conv(0, 1), Copy(1, 2, np.arange(C)), outputs=(1, 2))
    assert kinds(found) == {"Conv": 1, "Copy": 1}
    assert kinds(fused(conv(0, 1), Copy(1, 2, np.arange(C)), act(2, 3), outputs=(2, 3))) == {"Conv": 1, "Affine": 1}


def test_dead_steps_and_unused_values_vanish_but_inputs_stay() -> None:
    found = fused(conv(0, 1), conv(1, 2), conv(0, 3), outputs=(3,))
    assert kinds(found) == {"Conv": 1}
    assert len(found.values) == 2
    unused = fuse(Program((Value(1, 1, 1), Value(C, *PLANE), Value(C, *PLANE)), (conv(1, 2),),
                          (Port("a", 0, (1,)), Port("b", 1, (C, *PLANE))), (Port("y", 2, (C, *PLANE)),)))
    assert [p.value for p in unused.inputs] == [0, 1]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 9), st.sampled_from(list(Activation))),
                min_size=1, max_size=9), st.sets(st.integers(1, 9), max_size=2))
def test_random_programs(choices: list[tuple[int, int, int, Activation]], extra: set[int]) -> None:
    steps: list[Step] = []
    for target, (kind, seed, other, activation) in enumerate(choices, 1):
        a, b = seed % target, other % target
        steps.append([conv(a, target, seed), conv(a, target, seed, activation=activation, residual=b),
                      depthwise(a, target), act(a, target, activation), affine(a, target, activation),
                      Binary(a, b, target, ("add", "mul", "sub")[seed % 3]), Copy(a, target, np.arange(C)),
                      Binary(a, b, target, "add", activation)][kind])
    found = fused(*steps, outputs=tuple(sorted({len(steps)} | {v for v in extra if v <= len(steps)})))
    assert len(found.steps) <= len(steps)
