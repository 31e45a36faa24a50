"""--target native --precision fp16: where there is arithmetic in it, refused elsewhere, and for networks that it cannot hold."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from native_kit import AARCH64, qemu_run
from onnx_kit import Net
from plan_kit import assert_right, feeds_for

from gkp.converter.convert import ConvertOptions, convert
from gkp.converter.graph import Graph
from gkp.converter.native.building import toolchain
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.dtypes import FLOAT16
from gkp.converter.native.kernels.cpu import CPUS, FP16, NEON
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.reading.frontend import program as read
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.rivals import rival_engines
from gkp.converter.targets import make_target
from gkp.errors import UnsupportedModelError, UsageError, VerificationError
from gkp.options.targets import NativeOptions

needs_fp16 = pytest.mark.skipif(FP16 not in host_cpu().instructions, reason="this processor has no arithmetic in fp16")


def network(path: Path, scale: float = 1.0) -> Path:
    """Its first convolution multiplies by `scale`, the last one divides."""
    net = Net(2, 16, 12, 12)
    y = net.op("Relu", net.conv("x", net.weight(32, 4, 3, 3) * np.float32(scale), group=4, pads=[1] * 4))
    y = net.conv(y, net.weight(32, 32, 1, 1) / np.float32(scale))
    path.write_bytes(net.model(net.op("Relu", y)).SerializeToString())
    return path


def options(output: Path, cpu: str | None = None, precision: str = "fp16") -> ConvertOptions:
    return ConvertOptions(target=NativeOptions(cpu=cpu), precision=precision, benchmark=False, threads=1, output=output)


@pytest.mark.parametrize(("machine", "floats", "flags", "offered"), [
    ("x86_64", 16, {"avx512_fp16", "avx512_vnni"}, True), ("x86_64", 16, {"avx512_bf16"}, False), ("x86_64", 8, {"avx_vnni"}, False),
    ("aarch64", 4, {"asimdhp", "asimddp"}, True), ("aarch64", 4, {"asimddp"}, False)])
def test_a_processor_has_fp16_where_it_says_so(machine: str, floats: int, flags: set[str], offered: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(toolchain, "vector_floats", lambda: floats)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cpu = host_cpu()
    assert (FP16 in cpu.instructions) == offered
    assert (NEON in cpu.instructions) == (machine == "aarch64")
    if machine == "aarch64":
        assert cpu.flags == (f"-march=armv8.2-a+dotprod{'+fp16' if offered else ''}",)


@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64-v4-vnni", "aarch64", "aarch64-dotprod"])
def test_a_processor_without_it_is_told_what_there_is(cpu: str) -> None:
    with pytest.raises(UsageError, match=f"no fp16 for {cpu}: its processor lacks arithmetic in fp16") as caught:
        make_target(NativeOptions(cpu=cpu), "fp16").require("fp16")
    assert "fp32 or int8" in caught.value.hint
    make_target(NativeOptions(cpu="aarch64-fp16"), "fp16").require("fp16")


@needs_fp16
def test_an_artefact_rounds_to_fp16_and_says_so(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    made, full = convert(path, options(tmp_path / "out")), convert(path, options(tmp_path / "full", precision="fp32"))
    assert made.manifest.precision == "fp16"
    assert any("added to sums of fp32 after 128 multiply-adds" in note for note in made.manifest.notes)
    x = np.random.default_rng(0).standard_normal((2, 16, 12, 12)).astype(np.float32)
    got, want = (np.asarray(artefact.run(x)) for artefact in (made, full))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 3e-3


@needs_fp16
@pytest.mark.parametrize("scale", [1e5, 1e9])
def test_what_fp16_cannot_hold_is_refused_with_the_layers_name(scale: float, tmp_path: Path) -> None:
    """Values beyond its range, and weights."""
    with pytest.raises(UnsupportedModelError, match="fp16 cannot hold what the network computes: conv_") as caught:
        convert(network(tmp_path / "net.onnx", scale), options(tmp_path / "out"))
    assert "fp32 or bf16" in caught.value.hint
    assert not (tmp_path / "out").exists()


@needs_fp16
def test_sums_that_overflow_on_the_way_to_a_small_result_are_refused(tmp_path: Path) -> None:
    """No value of the network is large, but what a layer adds up first is: infinity stays infinity."""
    net = Net(2, 4, 32, 32)
    y = net.conv("x", net.weight(16, 4, 3, 3) / np.float32(1e5), bias=np.full(16, 10, np.float32), pads=[1] * 4)
    signs = np.where(np.arange(16) < 8, 1, -1).reshape(1, 16, 1, 1)
    y = net.conv(y, (np.full((16, 16, 3, 3), 3e3) * signs).astype(np.float32), bias=np.ones(16, np.float32))
    y = net.conv(net.op("Relu", y), net.weight(16, 16, 3, 3))
    path = tmp_path / "net.onnx"
    path.write_bytes(net.model(y).SerializeToString())
    with pytest.raises(VerificationError, match="overflows fp16, whose largest number is 65504"):
        convert(path, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_rivals_of_fp16_on_the_cpu_compute_in_fp32() -> None:
    """No stock engine of CPUs has it, and none is missing for it."""
    engines = rival_engines(make_target(NativeOptions(cpu="aarch64-fp16"), "fp16"))
    assert {engine.precision for engine in engines.own} == {"fp32"}
    assert {engine.name for engine in engines.own} >= {"ort"}
    assert not any(rival.precision == "fp16" for rival in engines.missing)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="cross-compiles from x86-64 to 64-bit ARM")
def test_another_processor_is_verified_in_the_same_arithmetic(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    path = network(tmp_path / "net.onnx")
    made = convert(path, options(tmp_path / "out", "aarch64-fp16")).manifest
    assert made.verification is not None
    assert made.verification.passed
    assert max(check.max_abs_error / check.max_abs_reference for check in made.verification.checks if check.max_abs_reference) > 1e-5
    assert any("fp16" in layer.reason for layer in made.layers)


def test_an_emulated_processor_runs_a_network_and_one_without_fp16_refuses_it(tmp_path: Path) -> None:
    program = fuse(read(Graph(onnx.load(network(tmp_path / "net.onnx")))))
    plan = make_plan(program, CPUS["aarch64-fp16"], narrow=FLOAT16)
    assert sum("Fp16" in call.kernel.source for call in plan.calls) >= 2
    feeds = feeds_for(program, 2)
    assert_right(program, feeds, qemu_run(plan, feeds), "aarch64-fp16", 5e-3)
    with pytest.raises(AssertionError, match="the kernels need FP16, which this processor"):
        qemu_run(plan, feeds, command=(AARCH64[0], "-cpu", "cortex-a72", *AARCH64[1:]))
