"""How long kernels take: by the model, or measured once and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan_kit import assert_right, built, feeds_for, resnet20

from gkp.branched import BranchedConv
from gkp.converter.cache import Seconds
from gkp.converter.native.building import toolchain
from gkp.converter.native.building.toolchain import Toolchain, host_cpu
from gkp.converter.native.building.tune import Measured
from gkp.converter.native.dtypes import DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import kernel
from gkp.converter.native.kernels.kernel import Draft, Recipe, recipe
from gkp.converter.native.kernels.layout import planar
from gkp.converter.native.kernels.way import Trial
from gkp.converter.native.planning.geometry import geometry
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.planning.timer import Model
from gkp.converter.native.planning.ways import conv_ways, time_ways
from gkp.converter.native.program import Conv, Port, Program, Value
from gkp.errors import GkpError
from gkp.runtime.native import NativeRunner

CPU = host_cpu()
BROKEN = ("false",)
BUFFER = planar(Value(16, 1, 1))


def sums(times: int) -> Trial:
    """Adds up its weights so many times."""
    body = ("(void)x, (void)r, (void)part, (void)parts;\nconst float* w = reinterpret_cast<const float*>(data);\nV a{};\n"
            f"for (int n = 0; n < {times}; ++n)\n  for (int i = 0; i < 1024; i += LANES) a = a * a + load(w + i);\n"
            "store(y, a);\n")
    return Trial(recipe(lambda: kernel(body, bytes(4096))), BUFFER, None, BUFFER, cycles=float(times))


def unbuildable(version: str) -> Toolchain:
    """Fails whenever something is compiled."""
    return Toolchain("clang", BROKEN, version)


def test_longer_kernels_take_longer(tmp_path: Path) -> None:
    found = Measured(CPU, cache=Seconds(tmp_path / "kernels.json")).seconds([sums(1000), sums(1), sums(100)])
    assert found[0] > 3 * found[2] > 9 * found[1] > 0
    assert found[0] < 0.1


def reads(size: int) -> Trial:
    """Reads the first 128 kB of so many bytes of weights."""
    body = ("(void)x, (void)r, (void)part, (void)parts;\nconst float* w = reinterpret_cast<const float*>(data);\nV a{}, b{};\n"
            "for (int i = 0; i < 32768; i += 2 * LANES) a += load(w + i), b += load(w + i + LANES);\nstore(y, a + b);\n")
    return Trial(recipe(lambda: kernel(body, bytes(size))), BUFFER, None, BUFFER, cycles=1.0)


def test_large_weights_are_in_memory_when_a_call_begins(tmp_path: Path) -> None:
    small, large = Measured(CPU, cache=Seconds(tmp_path / "kernels.json")).seconds([reads(200 << 10), reads(300 << 10)])
    assert large > 1.5 * small


def test_what_was_measured_is_not_compiled_again(tmp_path: Path) -> None:
    """Not in the same session, nor in the next one; what is new is."""
    path, tools = tmp_path / "kernels.json", toolchain.find(CPU)
    said: list[str] = []
    first = Measured(CPU, tools, Seconds(path), lambda text, share: said.append(text))
    seconds = first.seconds([sums(5), sums(6), sums(5)])
    assert seconds[0] == seconds[2] != seconds[1]
    assert said[0] == "compiling 2 kernels to try"
    again = Measured(CPU, unbuildable(tools.version), Seconds(path))
    assert again.seconds([sums(6), sums(5)]) == [seconds[1], seconds[0]]
    with pytest.raises(GkpError):
        again.seconds([sums(7)])


def changed_data(trial: Trial) -> Trial:
    return replace(trial, recipe=Recipe(lambda: replace(trial.recipe.draft, key="other counts")))


def changed_type(trial: Trial) -> Trial:
    return replace(trial, x=planar(Value(16, 1, 1, DType("int32", "int", 4))))


@pytest.mark.parametrize("what", ["compiler", "processor", "lanes", "counts", "type"])
def test_another_compiler_processor_or_size_is_measured_anew(what: str, tmp_path: Path) -> None:
    path, tools = tmp_path / "kernels.json", toolchain.find(CPU)
    Measured(CPU, tools, Seconds(path)).seconds([sums(5)])
    cpu: Cpu = {"processor": replace(CPU, flags=(*CPU.flags, "-mno-fma")), "lanes": replace(CPU, lanes=4 if CPU.lanes != 4 else 8)}.get(what, CPU)
    timer = Measured(cpu, unbuildable(tools.version + (" changed" if what == "compiler" else "")), Seconds(path))
    with pytest.raises(GkpError):
        timer.seconds([{"counts": changed_data, "type": changed_type}.get(what, lambda trial: trial)(sums(5))])


def test_weights_do_not_count_only_their_sizes_do(tmp_path: Path) -> None:
    """Layers of one shape are measured once."""
    def never() -> bytes:
        raise AssertionError("made weights for a kernel that is known")

    timer = Measured(CPU, cache=Seconds(tmp_path / "kernels.json"))
    known = timer.seconds([sums(5)])
    other = replace(sums(5), recipe=Recipe(lambda: replace(sums(5).recipe.draft, fill=never)))
    assert timer.seconds([other]) == known


def test_the_model_runs_nothing() -> None:
    def never() -> bytes:
        raise AssertionError("the model needs no weights")

    trials = [Trial(Recipe(lambda: Draft("no C++", "", never)), BUFFER, None, BUFFER, cycles) for cycles in (4e9, 2e9)]
    seconds = Model().seconds(trials)
    assert seconds[0] == 2 * seconds[1] > 0
    assert not Model().measures
    assert Measured.measures


class Preferring:
    """Says that ways whose source contains `word` are fast."""

    measures = False

    def __init__(self, word: str) -> None:
        self.word, self.asked = word, 0

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        self.asked += 1
        return [1e-6 if self.word in t.recipe.source else 1e-3 for t in trials]


def tiny() -> Program:
    """Two convolutions."""
    rng, shape = np.random.default_rng(0), (16, 8, 8)
    convs = [BranchedConv.from_dense(rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12, pads=(1, 1, 1, 1)) for _ in range(2)]
    return Program((Value(*shape),) * 3, tuple(Conv(n, n + 1, c, layer=f"layer {n}") for n, c in enumerate(convs)),
                   (Port("x", 0, shape),), (Port("y", 2, shape),))


def test_the_fastest_way_of_each_pair_of_layouts_is_kept() -> None:
    program = tiny()
    ways = conv_ways(program, geometry(program, CPU.lanes), CPU)
    timer = Preferring("tile: channel 1x")
    kept = time_ways(ways, timer)
    assert timer.asked == 1, "all kernels are compiled in one go"
    for number, found in kept.items():
        assert len(found) == len({w.kinds for w in found}) == len({w.kinds for w in ways[number]})
        for way in found:
            assert way.seconds == pytest.approx(sum(timer.seconds(way.trials)))
            assert way.seconds == min(sum(timer.seconds(w.trials)) for w in ways[number] if w.kinds == way.kinds)


@pytest.mark.parametrize(("word", "label"), [("tile: pixel", "pixel"), ("tile: channel", "channel")])
def test_the_plan_follows_the_timer(word: str, label: str) -> None:
    calls = make_plan(tiny(), CPU, Preferring(word)).calls
    assert all(label in c.kind for c in calls if c.layer)


def test_a_tuned_network_is_right_and_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    program = tiny()
    plan = make_plan(program, CPU, Measured(CPU, cache=Seconds(path)))
    again = make_plan(program, CPU, Measured(CPU, unbuildable(toolchain.find(CPU).version), Seconds(path)))
    assert [(c.kernel, c.kind) for c in plan.calls] == [(c.kernel, c.kind) for c in again.calls]
    with built(plan) as library:
        runner = NativeRunner(library, 2)
        feeds = feeds_for(program, 3)
        assert_right(program, feeds, runner.run(feeds), "tuned")
        runner.close()


def test_the_model_knows_that_grouped_layers_are_cheaper() -> None:
    """Where nothing can be measured its order must make sense: direct kernels with 9/16 of the multiplications cost less."""
    def cost(branches: int) -> float:
        program = resnet20(np.random.default_rng(0), 32, branches)
        ways = conv_ways(program, geometry(program, CPU.lanes), CPU)
        found = time_ways({n: [w for w in some if "winograd" not in w.name] for n, some in ways.items()}, Model())
        return sum(min(w.seconds for w in ways) for ways in found.values())

    assert cost(4) < 0.75 * cost(1)
