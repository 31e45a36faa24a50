"""Compilers are found, give libraries that need libc only, the same every time, and fail with words."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from native_kit import native_run, two_step_plan

from gkp.converter.native.building import source, toolchain
from gkp.converter.native.building.toolchain import CompileError, build, find, host_cpu
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.kernel import Kernel
from gkp.errors import BackendMissingError
from gkp.runtime.native import NativeRunner

PLAN = two_step_plan(host_cpu())
LIBC = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def made(folder: Path, **change: object) -> Path:
    folder.mkdir(parents=True)
    plan = replace(PLAN, **change)
    source.write(plan, folder)
    return build(folder, plan.cpu)


def tool(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"no {command[0]} here")
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def compilers() -> list[str]:
    return [name for name in ("clang++", "g++") if shutil.which(name)]


@pytest.mark.parametrize("compiler", ["", *compilers()])
def test_the_library_needs_libc_only_and_exports_its_interface_only(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler:
        monkeypatch.setenv("GKP_CXX", compiler)
    library = made(tmp_path / "a")
    needed = {line.split("[")[1].rstrip("]") for line in tool("readelf", "-d", library).splitlines() if "(NEEDED)" in line}
    assert needed <= LIBC
    exported = {line.split()[-1] for line in tool("nm", "-D", "--defined-only", library).splitlines()}
    assert exported == {"gkp_create", "gkp_run", "gkp_profile", "gkp_destroy", "gkp_describe", "gkp_last_error"}
    runner = NativeRunner(library, 2)
    x = np.random.default_rng(0).standard_normal((3, 3, 5, 7), np.float32)
    np.testing.assert_allclose(runner.run({"x": x})[0], 3 * x + 1, rtol=1e-5, atol=1e-5)
    runner.close()


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    assert made(tmp_path / "a").read_bytes() == made(tmp_path / "elsewhere" / "b").read_bytes()


def test_other_weights_in_the_same_folder_are_seen(tmp_path: Path) -> None:
    x = np.ones((1, 3, 5, 7), np.float32)
    for factor in (2.0, 5.0):
        source.write(two_step_plan(host_cpu(), factor=factor), tmp_path)
        runner = NativeRunner(build(tmp_path, host_cpu()), 1)
        assert runner.run({"x": x})[0].flat[0] == factor + 2
        runner.close()


@pytest.mark.parametrize("compiler", compilers())
def test_the_script_builds_with_the_files_of_its_folder(compiler: str, tmp_path: Path) -> None:
    source.write(PLAN, tmp_path)
    done = subprocess.run([tmp_path / "build.sh"], env={"PATH": os.environ["PATH"], "CXX": compiler}, cwd="/", capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    runner = NativeRunner(tmp_path / "model.so", 1)
    assert runner.run({"x": np.ones((1, 3, 5, 7), np.float32)})[0].flat[0] == 4
    runner.close()


@pytest.mark.parametrize("name", sorted(CPUS))
def test_every_processor_can_be_compiled_for(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    library = made(tmp_path / "a", cpu=CPUS[name])
    assert ("AArch64" if name.startswith("aarch64") else "X86-64") in tool("readelf", "-h", library)


def test_a_refused_kernel_is_named_and_the_cause_tells_all(tmp_path: Path) -> None:
    broken = replace(PLAN.calls[0], kernel=Kernel("this is no C++;\nnor is this;\n"))
    with pytest.raises(CompileError, match=r"kernel_0\.cpp: .*error") as caught:
        made(tmp_path / "a", calls=(broken, PLAN.calls[1]))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert "nor is this" in str(caught.value.__cause__) or "this is no" in str(caught.value.__cause__)
    assert not (tmp_path / "a" / "model.so").exists()


def test_without_a_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GKP_CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    for cpu in (None, host_cpu(), *CPUS.values()):
        with pytest.raises(BackendMissingError) as caught:
            find(cpu)
        assert ".[native]" in caught.value.hint


@pytest.mark.parametrize("command", ["no-such-compiler", "true", "false", sys.executable, "/"])
def test_an_override_that_is_no_compiler_is_refused(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKP_CXX", command)
    with pytest.raises(BackendMissingError, match="GKP_CXX") as caught:
        find()
    assert caught.value.hint


def fake_compiler(folder: Path, name: str, answer: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
    (folder / name).chmod(0o755)


def test_clang_comes_first_and_gcc_last_and_old_ones_never(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GKP_CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    fake_compiler(tmp_path, "g++", "g++ (Distribution 11.4.0) 11.4.0")
    with pytest.raises(BackendMissingError):
        find()
    fake_compiler(tmp_path, "g++", "g++ (Distribution 13.1.0-3) 13.1.0")
    assert find().kind == "gcc"
    fake_compiler(tmp_path, "zig", "clang version 21.1.0")
    assert find().kind == "zig"
    fake_compiler(tmp_path, "clang++", "clang version 14.0.6")
    assert find().kind == "zig"
    fake_compiler(tmp_path, "clang++-18", "Distribution clang version 18.1.8 (1)")
    assert (find().kind, find().version) == ("clang", "clang 18.1.8")
    fake_compiler(tmp_path, "clang++", "clang version 16.0.0")
    assert find().version == "clang 16.0.0"
    abroad = CPUS["x86-64-v3" if os.uname().machine == "aarch64" else "aarch64"]
    assert find(abroad).kind == "zig"


def test_an_interruption_ends_the_compilers(tmp_path: Path) -> None:
    """The fake compiler starts a child of its own, as zig does, and both write their number."""
    source.write(PLAN, tmp_path)
    script = tmp_path / "slow++"
    script.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'clang version 19.1.0' && exit\n"
                      f"sleep 300 &\necho $$ $! >> {tmp_path}/numbers\nwait\n")
    script.chmod(0o755)
    code = ("from pathlib import Path\nfrom gkp.converter.native.building.toolchain import build, host_cpu\n"
            f"build(Path({str(tmp_path)!r}), host_cpu())\n")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "GKP_CXX": str(script)}, stderr=subprocess.PIPE)
    numbers = tmp_path / "numbers"
    deadline = time.monotonic() + 30
    while not (numbers.exists() and numbers.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    left = [int(number) for number in numbers.read_text().split()]
    deadline = time.monotonic() + 30  # a process that was killed is not gone at once
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, left))


def test_an_interruption_waits_for_what_the_compilers_started(tmp_path: Path) -> None:
    """A process of a compiler's that dies late writes into the folder for temporary files, which must be gone in the end."""
    source.write(PLAN, tmp_path)
    script, temporary = tmp_path / "slow++", tmp_path / "tmp"
    temporary.mkdir()
    write = f"touch {tmp_path}/started; for i in 1 2 3 4 5 6 7 8; do sleep 0.1; touch $ZIG_LOCAL_CACHE_DIR/$i; done"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'clang version 19.1.0' && exit\n"
                      f"setsid sh -c '{write}' &\nsleep 300\n")
    script.chmod(0o755)
    code = ("from pathlib import Path\nfrom gkp.converter.native.building.toolchain import build, host_cpu\n"
            f"build(Path({str(tmp_path)!r}), host_cpu())\n")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE,
                               env={**os.environ, "GKP_CXX": str(script), "TMPDIR": str(temporary)})
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert b"KeyboardInterrupt" in errors
    assert b"OSError" not in errors
    time.sleep(1)
    assert list(temporary.iterdir()) == []


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home", "tmp", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    native_run(PLAN, {"x": np.ones((1, 3, 5, 7), np.float32)})
    assert not list((tmp_path / "home").iterdir())
    assert not list((tmp_path / "tmp").iterdir())
    assert {p.name for p in (tmp_path / "cache").iterdir()} <= {"gkp"}


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native_run(PLAN, {"x": np.ones((1, 3, 5, 7), np.float32)})[0].flat[0] == 4
