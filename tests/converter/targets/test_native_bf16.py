"""--target native --precision bf16: on processors that are fast in it, and refused elsewhere."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from onnx_kit import Net

from gkp.converter.convert import ConvertOptions, convert
from gkp.converter.native.building import toolchain
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.cpu import AMX_BF16, BF16, VNNI
from gkp.converter.targets import make_target
from gkp.errors import UsageError
from gkp.options.targets import NativeOptions

needs_bf16 = pytest.mark.skipif(not {BF16, AMX_BF16} & set(host_cpu().instructions),
                                reason="this processor has no bf16 that is worth having, or the kernel denies it")


@pytest.mark.parametrize(("vendor", "flags", "offered"), [
    ("AuthenticAMD", {"avx512_bf16", "avx512_vnni"}, True), ("GenuineIntel", {"avx512_bf16", "avx512_vnni"}, False),
    ("AuthenticAMD", {"avx512_vnni"}, False), ("", set(), False)])
def test_a_processor_has_bf16_where_it_is_faster_than_float32(vendor: str, flags: set[str], offered: bool,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(toolchain, "vector_floats", lambda: 16)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = host_cpu().instructions
    assert (BF16 in found) == offered
    assert (VNNI in found) == ("avx512_vnni" in flags)


@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64-v4", "x86-64-v4-vnni", "aarch64"])
def test_a_processor_without_it_is_told_what_there_is(cpu: str) -> None:
    target = make_target(NativeOptions(cpu=cpu), "bf16")
    with pytest.raises(UsageError, match=f"no bf16 for {cpu}") as caught:
        target.require("bf16")
    assert "--target openvino" in caught.value.hint


@needs_bf16
def test_an_artefact_rounds_to_bf16_and_says_so(tmp_path: Path) -> None:
    net = Net(2, 16, 12, 12)
    y = net.op("Relu", net.conv("x", net.weight(32, 4, 3, 3), group=4, pads=[1] * 4))
    y = net.conv(y, net.weight(32, 32, 1, 1))
    path, out = tmp_path / "net.onnx", tmp_path / "out"
    path.write_bytes(net.model(net.op("Relu", y)).SerializeToString())
    made = convert(path, ConvertOptions(target=NativeOptions(), precision="bf16", benchmark=False, threads=1, output=out))
    assert made.manifest.precision == "bf16"
    full = convert(path, ConvertOptions(target=NativeOptions(), benchmark=False, threads=1, output=tmp_path / "full"))
    x = np.random.default_rng(0).standard_normal((2, 16, 12, 12)).astype(np.float32)
    got, want = (np.asarray(artefact.run(x)) for artefact in (made, full))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-4 < error < 3e-2
