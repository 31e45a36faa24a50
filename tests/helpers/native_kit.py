"""Plans run in every way there is: through the runner, under sanitizers, on an emulated processor. And trivial plans."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gkp.converter.native.building import source, toolchain
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import unit
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.planning.plan import Call, Fill, Group, Place, Plan
from gkp.converter.native.program import Port
from gkp.runtime.native import NativeRunner

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
AARCH64 = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
DRIVER = Path(__file__).with_name("native_driver.c")


# ---- running --------------------------------------------------------------------------------------------------------
def native_run(plan: Plan, feeds: Feeds, threads: int = 1, shared: bool | None = None) -> list[Array]:
    """Through gkp.runtime.native. float32 arrays [batch, *shape] by input name; the outputs in the plan's order."""
    return native_runs(plan, [(feeds, threads)], shared)[0]


def native_runs(plan: Plan, runs: Sequence[tuple[Feeds, int]], shared: bool | None = None, together: bool = False) -> list[list[Array]]:
    """Several with different numbers of threads. together: as put_together."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        source.write(plan, folder, shared)
        if together:
            put_together(folder)
        library = toolchain.build(folder, plan.cpu)
        for feeds, threads in runs:
            runner = NativeRunner(library, threads)
            try:
                found.append(runner.run(feeds))
            finally:
                runner.close()
        return found


def put_together(folder: Path) -> None:
    """A namespace around each kernel, with a prelude of its own, in two files: faster where kernels are many."""
    (folder / "gkp.h").write_text((folder / "gkp.h").read_text().replace("#pragma once", ""))
    files = sorted(folder.glob("kernel_*.cpp"))
    texts = [f"namespace of_{path.stem} {{\n{path.read_text()}\n}}\n" for path in files]
    for path in files:
        path.unlink()
    for half in range(2):  # two cores
        (folder / f"kernels_{half}.cpp").write_text("".join(texts[half::2]))


def sanitized_run(plan: Plan, feeds: Feeds, threads: int = 1, shared: bool | None = None,
                  sanitize: str = "address,undefined") -> list[Array]:
    """As a C program, with every access and every undefined operation checked: AssertionError with the report when there
    is one. Every array ends where its memory ends. Skips the test without a compiler that has sanitizers."""
    compiler = _sanitizing_compiler()

    def compile_program(folder: Path) -> list[str]:
        flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-O1", "-g1", *toolchain.FLAGS, *plan.cpu.flags]
        flags.remove("-O3")
        shutil.copy(DRIVER, folder / "driver.cpp")
        sources = sorted(p.name for p in folder.glob("*.cpp"))
        _ok(subprocess.run([compiler, *flags, *sources, "-x", "assembler-with-cpp", "weights.S", "-o", "driver", "-lm",
                            "-lpthread"], cwd=folder, capture_output=True, text=True))
        return ["./driver"]

    return _run_program(plan, feeds, threads, shared, compile_program)


def qemu_run(plan: Plan, feeds: Feeds, threads: int = 1, shared: bool | None = None, command: Sequence[str] = AARCH64) -> list[Array]:
    """A C program that links model.so, on an emulated processor, both compiled with zig. Skips the test where zig, the
    emulator or the libc that it needs is absent."""
    run, tools = emulator(command), zig_tools()
    target = tools.flags(None, toolchain.machine(plan.cpu))[:2]

    def compile_program(folder: Path) -> list[str]:
        toolchain.build(folder, plan.cpu, tools)
        shutil.copy(DRIVER, folder / "driver.cpp")
        toolchain.compile_objects(folder, ["driver.cpp"], plan.cpu, tools)
        # not `zig c++`, which would first compile a run-time library that nothing here needs
        _ok(subprocess.run([tools.command[0], "build-exe", *target, "-fno-compiler-rt", "-fno-ubsan-rt", "-lc", "driver.o", "model.so",
                            "-femit-bin=driver", "-rpath", "$ORIGIN"], cwd=folder,
                           capture_output=True, text=True, env=toolchain.environment(str(folder))))
        return [*run, "./driver"]

    return _run_program(plan, feeds, threads, shared, compile_program)


def emulator(command: Sequence[str]) -> list[str]:
    """The command; skips the test where it or the libc that it needs is absent."""
    path = shutil.which(command[0])
    if path is None or not all(Path(e).exists() for e in command[1:] if e.startswith("/")):
        pytest.skip(f"no {' '.join(command)} here (Debian packages qemu-user and libc6-arm64-cross)")
    return [path, *command[1:]]


def zig_tools() -> toolchain.Toolchain:
    """Skips the test where zig is absent."""
    return toolchain.Toolchain("zig", (pytest.importorskip("ziglang").__path__[0] + "/zig", "c++"), "zig")


def _run_program(plan: Plan, feeds: Feeds, threads: int, shared: bool | None, compile_program: Callable[[Path], list[str]]
                 ) -> list[Array]:
    batch = len(next(iter(feeds.values())))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.write(plan, folder, shared)
        command = compile_program(folder)
        data = b"".join(np.ascontiguousarray(feeds[p.name], np.float32).tobytes() for p in plan.inputs)
        (folder / "inputs").write_bytes(data)
        counts = [str(int(np.prod(p.shape))) for p in (*plan.inputs, *plan.outputs)]
        _ok(subprocess.run([*command, str(threads), str(batch), str(len(plan.inputs)), *counts], cwd=folder,
                           capture_output=True, text=True, timeout=300))
        flat, results = np.fromfile(folder / "outputs", np.float32), []
        for port in plan.outputs:
            size = batch * int(np.prod(port.shape))
            results.append(flat[:size].reshape(batch, *port.shape))
            flat = flat[size:]
        return results


@cache
def _sanitizing_compiler() -> str:
    for name in ("clang++", "g++"):
        path = shutil.which(name)
        if path is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "a.cpp").write_text("int main() {}")
                made = subprocess.run([path, "-fsanitize=address,undefined", "a.cpp"], cwd=folder, capture_output=True)
                if made.returncode == 0:
                    return path
    pytest.skip("no clang++ or g++ with sanitizers here")


def _ok(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


# ---- trivial plans --------------------------------------------------------------------------------------------------
def scale_kernel(size: int, factor: float) -> Kernel:
    """y = factor * x over `size` floats; the factor is the kernel's weight."""
    body = (f"  for (int i = first_of({size}, part, parts); i < first_of({size}, part + 1, parts); ++i)\n"
            "    y[i] = *reinterpret_cast<const float*>(data) * x[i];\n")
    return Kernel(_function(body), np.float32([factor]).tobytes())


def add_kernel(size: int) -> Kernel:
    """y = x + r + 1 over `size` floats, by vectors."""
    body = (f"  int i = first_of({size}, part, parts), end = first_of({size}, part + 1, parts);\n"
            "  for (; i + LANES <= end; i += LANES) store(y + i, load(x + i) + load(r + i) + 1.0f);\n"
            "  for (; i < end; ++i) y[i] = x[i] + r[i] + 1.0f;\n")
    return Kernel(_function(body))


def _function(body: str) -> str:
    return unit(f"(void)r, (void)data;\n{body}")


def two_step_plan(cpu: Cpu, shape: tuple[int, ...] = (3, 5, 7), factor: float = 2.0) -> Plan:
    """x -> factor * x + x + 1, factor * x lying in the arena."""
    size = int(np.prod(shape))
    calls = (Call(scale_kernel(size, factor), Place("input", 0), None, Place("arena", 64), "first", "scale", size),
             Call(add_kernel(size), Place("arena", 64), Place("input", 0), Place("output", 0), "second", "add", 0))
    return Plan(cpu, calls, 64 + 4 * size, (Port("x", 0, shape),), (Port("y", 1, shape),))


def grouped_plan(cpu: Cpu, images: int = 3, parts: int = 2, own: int = 0) -> Plan:
    """x [40] -> z + (3 * (2 * x) + z + 1) + 1, z being 7 of a fill that nobody writes. 2 * x lies where the images of a
    group share memory, 3 * (2 * x) where none do; in the arena it lies where 2 * x did. own: bytes of memory of each."""
    shared, z, last = Place("arena", 64), Place("arena", 512, 0), Place("arena", 1024, 448)
    calls = (Call(scale_kernel(40, 2.0), Place("input", 0), None, shared), Call(scale_kernel(40, 3.0), shared, None, last),
             Call(add_kernel(40), last, z, Place("arena", 64, 192), together=parts),
             Call(add_kernel(40), z, Place("arena", 64, 192), Place("output", 0)))
    seven = np.float32([7]).view(np.uint8).tolist()
    fills = tuple(Fill(4 * n + k, 1, value) for n in range(40) for k, value in enumerate(seven))
    return Plan(cpu, calls, 1280, (Port("x", 0, (40,)),), (Port("y", 1, (40,)),), {},
                tuple(replace(f, first=f.first + 512) for f in fills), Group(images, own or 640, fills))


def two_port_plan(cpu: Cpu) -> Plan:
    """a [40], b [40] -> b + a + 1, 3 * a."""
    calls = (Call(add_kernel(40), Place("input", 1), Place("input", 0), Place("output", 0)),
             Call(scale_kernel(40, 3.0), Place("input", 0), None, Place("output", 1)))
    return Plan(cpu, calls, 0, (Port("a", 0, (40,)), Port("b", 1, (40,))), (Port("sum", 2, (40,)), Port("triple", 3, (40,))))
