"""--cpu: libraries for other processors, verified here by their own kernels, and honest where they cannot run."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import ROOT, assert_refused, save, small_net
from cli_kit import gkp as command
from native_kit import AARCH64
from onnx_kit import feeds_of, run_ort

import gkp
from gkp import manifest
from gkp.converter.native.building.toolchain import environment
from gkp.errors import BackendMissingError
from gkp.options.targets import CpuName
from gkp.runtime.environment import vector_floats

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the tests cross-compile from x86-64 to 64-bit ARM")


@pytest.fixture(scope="module")
def given() -> onnx.ModelProto:
    return small_net(size=16, channels=32)


@pytest.fixture(scope="module")
def arm(given: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ziglang", reason="only zig compiles for another processor")
    folder = tmp_path_factory.mktemp("arm")
    baseline = save(small_net(size=16, channels=32, groups=1), folder / "dense.onnx")
    gkp.convert(save(given, folder / "m.onnx"), target="native", output=folder / "out", threads=1, cpu="aarch64",
                baseline=baseline)
    return folder / "out"


def test_it_is_verified_by_the_same_kernels_and_measures_nothing(arm: Path) -> None:
    made = manifest.read(arm)
    assert (arm / "model.so").read_bytes()[18] == 183  # ELF: EM_AARCH64
    assert made.verification is not None
    assert made.verification.passed
    assert "the kernels for aarch64, compiled for this processor" in made.verification.engine
    assert made.latency_ms == manifest.Latencies()
    assert made.measurements == []
    assert any("nothing was measured" in note and "aarch64" in note for note in made.notes)
    assert set(made.files) == {"model.so", "model.h", "dense.onnx"}, "the baseline is measured over there"
    assert made.memory is not None


def test_it_does_not_open_here(arm: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError, match="aarch64 processors, this machine is x86_64"):
        gkp.load(arm)
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 16, 16), np.float32))
    assert_refused(command("run", arm, "--input", tmp_path / "x.npy"), 4, "aarch64", "--cpu host")
    assert_refused(command("bench", arm), 4, "aarch64")


def test_a_c_program_runs_it_on_an_emulated_processor(arm: Path, given: onnx.ModelProto, tmp_path: Path) -> None:
    emulator = shutil.which(AARCH64[0])
    if emulator is None or not Path(AARCH64[2]).is_dir():
        pytest.skip("no qemu-aarch64 with an ARM libc here (Debian packages qemu-user and libc6-arm64-cross)")
    zig = str(Path(pytest.importorskip("ziglang").__path__[0]) / "zig")
    x = feeds_of(given)["x"]
    x.tofile(tmp_path / "IMAGE")
    target = ["-target", "aarch64-linux-gnu.2.28", "-mcpu=baseline"]
    program = str(ROOT / "examples" / "native_c" / "classify.c")
    env = environment(str(tmp_path))
    subprocess.run([zig, "cc", *target, "-O1", "-fno-sanitize=all", "-I", str(arm), "-c", program, "-o", "classify.o"],
                   cwd=tmp_path, env=env, check=True)
    shutil.copy(arm / "model.so", tmp_path)
    subprocess.run([zig, "build-exe", *target[:2], "-fno-compiler-rt", "-fno-ubsan-rt", "-lc", "classify.o", "model.so",
                    "-femit-bin=classify", "-rpath", "$ORIGIN"], cwd=tmp_path, env=env, check=True)
    done = subprocess.run([emulator, *AARCH64[1:], "./classify", "IMAGE"], cwd=tmp_path, check=True, capture_output=True,
                          text=True)
    want = run_ort(given, {"x": x})[0][0]
    words = done.stdout.replace(",", "").split()
    assert int(words[1]) == int(want.argmax())
    assert float(words[3]) == pytest.approx(float(want.max()), abs=1e-4)


@pytest.mark.parametrize(("cpu", "lanes"), [("x86-64-v3", 8), ("x86-64-v4", 16)])
def test_the_families_of_this_processor(cpu: CpuName, lanes: int, given: onnx.ModelProto, tmp_path: Path) -> None:
    """Where the processor has the instructions the artefact runs; where not, it says so."""
    made: Any = gkp.convert(save(given, tmp_path / "m.onnx"), target="native", output=tmp_path / "out", threads=1, cpu=cpu,
                            benchmark=False)
    assert made.manifest.verification.passed
    x = feeds_of(given)
    if vector_floats() >= lanes:
        assert cpu in made.manifest.verification.engine
        np.testing.assert_allclose(made.run(x), run_ort(given, x)[0], atol=1e-4)
    else:
        assert "shorter vectors" in " ".join(made.manifest.notes)
        with pytest.raises(BackendMissingError, match="need"):
            made.run(x)
