"""Whole programs: laid out in memory, compiled and run as users run them, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from interpret import interpret
from kernel_kit import NARROW, cpus
from native_kit import native_run, qemu_run, sanitized_run
from plan_kit import Array, Chance, assert_right, built, feeds_for, random_program, resnet20

from gkp.branched import BranchedConv
from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.planning.plan import Place
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Activation, Affine, Binary, Conv, Grid, Port, Program, Reshape, Value
from gkp.errors import UnsupportedModelError
from gkp.runtime.native import NativeRunner

CPU = host_cpu()
AARCH64 = CPUS["aarch64"]


def check(program: Program, cpu: Cpu, timer: Chance | None = None, runs: tuple[tuple[int, int], ...] = ((1, 1), (3, 2), (1, 8)),
          shared: bool | None = None) -> None:
    """runs: (batch, threads). Each handle runs twice, on different images: what the first run left in the arena counts."""
    plan = make_plan(program, cpu, timer)
    with built(plan, shared) as path:
        for batch, threads in runs:
            runner = NativeRunner(path, threads)
            for seed in range(2):
                feeds = feeds_for(program, batch, seed)
                assert_right(program, feeds, runner.run(feeds), f"batch {batch}, {threads} threads, run {seed}")
            runner.close()


# ---- inputs ---------------------------------------------------------------------------------------------------------
def test_pixels_become_integers_of_the_first_convolution_where_the_users_array_is_read() -> None:
    """Two images on two threads, normalised by numbers that are exact."""
    values = (Value(3, 9, 21), Value(3, 9, 21, UINT8, Grid(2.0 ** -5, 77)), Value(8, 9, 21))
    rng = np.random.default_rng(0)
    weight = (rng.integers(-127, 128, (8, 3, 3, 3)) * 2.0 ** -6).astype(np.float32)
    conv = BranchedConv.from_dense(weight, pads=(1, 1, 1, 1), scale=np.full(8, 2.0 ** -6, np.float32))
    normalise = Affine(0, 1, np.array([1, 0.5, -0.25], np.float32) / 32, np.array([-4, 0.5, 4], np.float32))
    program = Program(values, (normalise, Conv(1, 2, conv)), (Port("x", 0, (3, 9, 21), UINT8),), (Port("y", 2, (8, 9, 21)),))
    plan = make_plan(program, CPU)
    assert [call.kind for call in plan.calls if "conv" not in call.kind] == ["pack", "unpack"]
    x = rng.integers(0, 256, (2, 3, 9, 21)).astype(np.uint8)
    assert (native_run(plan, {"x": x}, 2)[0] == interpret(program, [x])[0]).all()


# ---- random programs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cpu", cpus())
def test_random_programs_planned_by_the_model(cpu: Cpu) -> None:
    check(random_program(np.random.default_rng((1, cpu.lanes)), 20), cpu)


@pytest.mark.parametrize("cpu", cpus())
@pytest.mark.parametrize("seed", range(3))
def test_random_programs_planned_by_chance(seed: int, cpu: Cpu) -> None:
    """Every way and every layout is chosen sometimes, sensible or not."""
    check(random_program(np.random.default_rng((2, seed, cpu.lanes)), 14), cpu, Chance(seed))


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Program, Path]]:
    """Some program, compiled for two images in flight on each thread."""
    program = random_program(np.random.default_rng(11), 12, (16, 16))
    with built(make_plan(program, CPU), 2) as path:
        yield program, path


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_and_images_gives_the_same(threads: int, network: tuple[Program, Path]) -> None:
    program, path = network
    runner = NativeRunner(path, threads)
    for batch in (1, 3, 2 * threads + 1):
        feeds = feeds_for(program, batch)
        assert_right(program, feeds, runner.run(feeds), f"batch {batch}")
    runner.close()


def test_resnet20_with_overlapping_branches() -> None:
    check(resnet20(np.random.default_rng(0)), CPU, runs=((1, 1), (5, 2)), shared=True)


# ---- corners --------------------------------------------------------------------------------------------------------
def conv(rng: np.random.Generator, ins: int, outs: int, kernel: tuple[int, int], pads: tuple[int, int, int, int]) -> BranchedConv:
    weight = rng.standard_normal((outs, ins, *kernel)) / np.sqrt(ins * kernel[0] * kernel[1])
    return BranchedConv.from_dense(weight.astype(np.float32), rng.standard_normal(outs).astype(np.float32), pads=pads)


@pytest.mark.parametrize("side", range(4))
def test_a_halo_on_one_side_stays_zero_when_memory_is_shared(side: int) -> None:
    """Larger values have lain where the small one with the halo lies."""
    rng, pads = np.random.default_rng(side), [0, 0, 0, 0]
    pads[side] = 1
    kernel = (2, 1) if side % 2 == 0 else (1, 2)
    values = (Value(64, 5, 5),) * 3 + (Value(32, 5, 5),) * 2
    steps = [Conv(0, 1, conv(rng, 64, 64, (1, 1), (0, 0, 0, 0))), Conv(1, 2, conv(rng, 64, 64, (1, 1), (0, 0, 0, 0))),
             Conv(2, 3, conv(rng, 64, 32, (1, 1), (0, 0, 0, 0))), Conv(3, 4, conv(rng, 32, 32, kernel, (pads[0], pads[1], pads[2], pads[3])))]
    program = Program(values, tuple(steps), (Port("x", 0, (64, 5, 5)),), (Port("y", 4, (32, 5, 5)),))
    check(program, CPU, runs=((3, 1),))


def test_a_value_may_be_output_and_read_on_and_inputs_may_be_unused_or_read_often() -> None:
    rng, shape = np.random.default_rng(0), (6, 7, 5)
    values = (Value(*shape),) * 5
    steps = (Conv(0, 2, conv(rng, 6, 6, (3, 3), (1, 1, 1, 1)), Activation.RELU), Binary(0, 0, 3, "mul"), Binary(2, 0, 4, "add"))
    ports = (Port("x", 0, shape), Port("unused", 1, shape))
    check(Program(values, steps, ports, (Port("y", 2, shape), Port("z", 4, shape), Port("square", 3, shape))), CPU)


def test_a_program_without_convolutions() -> None:
    values = (Value(5, 3, 4), Value(60, 1, 1), Value(60, 1, 1))
    steps = (Reshape(0, 1), Affine(1, 2, np.arange(60, dtype=np.float32), np.ones(60, np.float32)))
    check(Program(values, steps, (Port("x", 0, (5, 3, 4)),), (Port("y", 2, (60,)),)), CPU)


def test_inputs_at_any_address(network: tuple[Program, Path]) -> None:
    """A multiple of 4 bytes is enough."""
    program, path = network
    runner = NativeRunner(path, 1)
    for shift in (1, 3, 7):
        feeds = feeds_for(program, 2)
        for name, x in feeds.items():
            memory = np.zeros(x.size + 16 + shift, np.float32)
            first = -(memory.ctypes.data // 4) % 16 + shift
            memory[first:first + x.size] = x.ravel()
            feeds[name] = memory[first:first + x.size].reshape(x.shape)
            assert feeds[name].ctypes.data % 64 == 4 * shift
        assert_right(program, feeds, runner.run(feeds), f"shifted by {shift} floats")
    runner.close()


def test_concurrent_handles_do_not_meet(network: tuple[Program, Path]) -> None:
    program, path = network
    results: dict[int, tuple[dict[str, Array], list[Array]]] = {}

    def work(number: int) -> None:
        runner = NativeRunner(path, 1 + number % 2)
        for turn in range(20):
            feeds = feeds_for(program, 1 + number, 100 * number + turn)
            results[100 * number + turn] = feeds, runner.run(feeds)
        runner.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 80
    for key, (feeds, got) in results.items():
        assert_right(program, feeds, got, f"handle and turn {key}")


# ---- the plan -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cpu", [NARROW, *CPUS.values()], ids=["narrow", *CPUS])
def test_the_same_program_gives_the_same_plan(cpu: Cpu) -> None:
    plans = [make_plan(random_program(np.random.default_rng(5), 16), cpu) for _ in range(2)]
    first, second = ([(c.kernel, c.x, c.r, c.y, c.layer, c.kind, c.macs) for c in p.calls] for p in plans)
    assert first == second
    assert plans[0].arena == plans[1].arena
    assert source.describe(plans[0], 0) == source.describe(plans[1], 0)


def test_the_plan_does_not_depend_on_the_process() -> None:
    """Nothing is decided by the order of a set."""
    code = ("import hashlib, numpy as np; from plan_kit import resnet20; from gkp.converter.native.kernels.cpu import CPUS; "
            "from gkp.converter.native.planning.planner import make_plan; plan = make_plan(resnet20(np.random.default_rng(0)), CPUS['x86-64-v3']); "
            "print(hashlib.sha256(repr([(c.kernel, c.x, c.r, c.y, c.kind) for c in plan.calls]).encode()).hexdigest())")
    helpers = str(Path(__file__).resolve().parents[3] / "helpers")
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")]))}).stdout
            for seed in ("1", "2")]
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_reads_what_was_written_within_its_arena(seed: int) -> None:
    program = random_program(np.random.default_rng(seed), 14)
    plan = make_plan(program, CPU, Chance(seed))
    written: set[Place] = {Place("input", n) for n in range(len(program.inputs))}
    for call in plan.calls:
        operands = [call.x] if call.r is None else [call.x, call.r]
        assert set(operands) <= written
        assert call.y not in operands or (call.y == call.r != call.x and call.kind.startswith(("conv", "winograd")))
        written.add(call.y)
        for place in (*operands, call.y):
            assert place.where != "arena" or (place.at % 64 == 0 and 0 <= place.at < plan.arena)
    assert {Place("output", n) for n in range(len(program.outputs))} <= written
    assert all(call.y.where != "input" for call in plan.calls)


def test_layers_keep_their_names_and_multiplications() -> None:
    program = resnet20(np.random.default_rng(0))
    plan = make_plan(program, CPU)
    for step in program.steps:
        if isinstance(step, Conv) and step.layer:
            calls = [c for c in plan.calls if c.layer == step.layer]
            target = program.values[step.target]
            assert 0 < sum(c.macs for c in calls) <= step.conv.macs((target.height, target.width))
    assert sum(c.kind.startswith("conv ") and "winograd" not in c.kind for c in plan.calls) + \
        sum(c.kind.endswith(" out") for c in plan.calls) == sum(isinstance(s, Conv) for s in program.steps)


def test_memory_is_shared() -> None:
    """A chain of 20 layers takes a few buffers, not 20."""
    rng, shape = np.random.default_rng(0), (32, 16, 16)
    steps = tuple(Conv(n, n + 1, conv(rng, 32, 32, (3, 3), (1, 1, 1, 1))) for n in range(20))
    program = Program((Value(*shape),) * 21, steps, (Port("x", 0, shape),), (Port("y", 20, shape),))
    assert make_plan(program, CPU).arena < 6 * Value(*shape).bytes * (18 / 16) ** 2


# ---- sanitizers and other processors ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("cpu", cpus())
def test_sanitizers_find_nothing_in_random_programs(cpu: Cpu) -> None:
    program = random_program(np.random.default_rng((3, cpu.lanes)), 18)
    feeds = feeds_for(program, 3)
    assert_right(program, feeds, sanitized_run(make_plan(program, cpu, Chance(cpu.lanes)), feeds, threads=2), "sanitized")


@pytest.mark.slow
@pytest.mark.parametrize(("sanitize", "batch", "threads"), [("address,undefined", 2, 1), ("thread", 5, 4)])
def test_sanitizers_find_nothing_in_resnet20(sanitize: str, batch: int, threads: int) -> None:
    """The thread sanitizer sees the parts of one kernel run side by side."""
    program = resnet20(np.random.default_rng(0), 16)
    feeds = feeds_for(program, batch)
    assert_right(program, feeds, sanitized_run(make_plan(program, CPU), feeds, threads, sanitize=sanitize), sanitize)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_programs_on_aarch64(seed: int) -> None:
    program = random_program(np.random.default_rng((4, seed)), 12)
    feeds = feeds_for(program, 2)
    got = qemu_run(make_plan(program, AARCH64, Chance(seed) if seed else None), feeds, threads=1 + seed)
    assert_right(program, feeds, got, f"seed {seed}")


@pytest.mark.slow
def test_resnet20_on_aarch64() -> None:
    program = resnet20(np.random.default_rng(0), 16)
    feeds = feeds_for(program, 2)
    assert_right(program, feeds, qemu_run(make_plan(program, AARCH64), feeds), "aarch64")


def test_values_too_large_for_the_kernels_are_refused_before_anything_is_made() -> None:
    values = (Value(16, 5000, 5000), Value(16, 5000, 5000))
    program = Program(values, (Affine(0, 1, np.ones(16, np.float32), np.zeros(16, np.float32)),),
                      (Port("x", 0, (16, 5000, 5000)),), (Port("y", 1, (16, 5000, 5000)),))
    with pytest.raises(UnsupportedModelError, match="1525 MiB per image"):
        make_plan(program, CPU)
