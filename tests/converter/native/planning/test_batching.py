"""Which calls are computed for several images at a time, and that this changes nothing but the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from int8_kit import by_hand
from onnx_kit import Net
from plan_kit import built, feeds_for, random_program

from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.planning import batching
from gkp.converter.native.planning.plan import Call, Place
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Program
from gkp.converter.native.reading.frontend import program
from gkp.converter.native.reading.fuse import fuse
from gkp.runtime.native import NativeRunner

CPU = host_cpu()
MIB = 1 << 20


def chain(*weights: int) -> list[Call]:
    """Convolutions with so many bytes of weights; call n reads buffer n and writes buffer n + 1."""
    return [Call(Kernel("", bytes(w)), Place("buffer", n), None, Place("buffer", n + 1), macs=1) for n, w in enumerate(weights)]


def whole_net() -> Program:
    """With integers in halos, behind and before what is computed in a group."""
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    for _ in range(3):
        x = net.relu(net.conv3(x, 8, 8, bias=True))
    return fuse(program(by_hand(net.model(x))))


# ---- the choice -----------------------------------------------------------------------------------------------------
def test_weights_that_outweigh_what_moves_are_read_once() -> None:
    calls = chain(MIB // 2, MIB // 2, 2 * MIB, MIB // 2)
    assert batching.together(calls, dict(enumerate([2 * MIB, 2 * MIB, MIB // 8, MIB // 8, MIB // 8]))) == (0, 0, 2, 1)


def test_a_call_with_few_weights_between_heavy_ones_stays_among_them() -> None:
    assert batching.together(chain(MIB, 0, 3 * MIB), dict.fromkeys(range(4), MIB // 8)) == (1, 1, 3)


@pytest.mark.parametrize(("weights", "moved"), [(MIB // 8, 1), (4 * MIB, 8 * MIB)], ids=["weights that stay near", "more that moves"])
def test_other_networks_are_computed_image_by_image(weights: int, moved: int) -> None:
    assert not any(batching.together(chain(weights, weights), dict.fromkeys(range(3), moved)))


def test_what_is_no_convolution_is_not_cut() -> None:
    call = Call(Kernel("", bytes(4 * MIB)), Place("buffer", 0), None, Place("buffer", 1))
    assert batching.together([call], {0: 64, 1: 64}) == (1,)


def test_memory_bounds_the_group() -> None:
    assert [batching.images(own) for own in (4096, 8 * MIB, 100 * MIB)] == [8, 5, 1]


# ---- what is computed -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["integers", 3, 4])
def test_every_image_gets_the_same_bits_as_alone(case: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups from the second or third call on, some calls among them image by image."""
    made = whole_net() if isinstance(case, str) else random_program(np.random.default_rng(case), 12)

    def together(calls: Sequence[Call], sizes: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(0 if n < 2 or n % 4 == 0 else 1 + (call.macs > 0) for n, call in enumerate(calls))

    monkeypatch.setattr(batching, "together", together)
    monkeypatch.setattr(batching, "images", lambda own: 3)
    plan = make_plan(made, CPU)
    assert sum(bool(call.together) for call in plan.calls) >= 3
    assert bool(plan.group.fills) == (case == "integers")
    feeds = feeds_for(made, 7)
    with built(plan, shared=False) as path:
        for threads in (1, 2):
            runner = NativeRunner(path, threads)
            whole = runner.run(feeds)
            for n in range(7):
                alone = runner.run({name: x[n:n + 1] for name, x in feeds.items()})
                for a, b in zip(alone, whole, strict=True):
                    np.testing.assert_array_equal(a[0], b[n])
            runner.close()
