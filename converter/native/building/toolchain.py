"""Compilers: finding one, and building model.so with it.

Kernels are compiled for the wanted processor, everything else for any of its family (model.cpp checks what is there
before a kernel runs). Builds are deterministic: the same sources and compiler give the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from gkp.converter.native.building import tiles
from gkp.converter.native.kernels.cpu import (
    AMX_BF16,
    AMX_INT8,
    AVX_VNNI,
    BF16,
    CPUS,
    DOTPROD,
    FP16,
    I8MM,
    MADD,
    NEON,
    PERMUTE,
    VECTORS,
    VNNI,
    Cpu,
)
from gkp.errors import BackendMissingError, FileError
from gkp.files import private_folder
from gkp.require import install
from gkp.runtime.environment import cpu_flags, cpu_vendor, vector_floats

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-fno-exceptions",
         "-fno-rtti", "-fno-stack-protector", "-Wno-psabi")
LINK = ("-shared", "-nostdlib", "-Wl,-Bsymbolic", "-Wl,-soname,model.so", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s")
LIBRARIES = ("-lc", "-lm", "-lpthread")
ANY_CPU = frozenset({"model.cpp", "weights.S"})
"""Sources that are compiled without the processor's flags: what runs before the processor is known to fit."""

_WITH_512 = {"avx512_vnni": VNNI, "avx512vbmi": PERMUTE, "avx512_fp16": FP16}
_WITH_256 = {"avx_vnni": AVX_VNNI}
_ARM = {"asimddp": DOTPROD, "i8mm": I8MM, "asimdhp": FP16}
"""Instructions beside those that all processors with such vectors have, by the operating system's name of the flag."""
_WITH_TILES = {AMX_INT8: {"amx_tile", "amx_int8", "avx512_vnni", "avx512vbmi"},
               AMX_BF16: {"amx_tile", "amx_bf16", "avx512_bf16"}}
"""Their flags, and those of what their kernels use besides."""
_FULL_RATE_BF16 = ("AuthenticAMD",)
"""Vendors whose AVX512-BF16 multiplies twice as many numbers in a cycle as fp32; Intel's, half as many (ADR 0035)."""
_OLDEST = {"clang": 16, "gcc": 12}
_GLIBC = "2.28"  # what zig links against, so that the library opens on boards with an old system
_DYING = 10.0
"""Seconds for killed processes to be gone."""
_ZIG = ("-fno-sanitize=all", "-g0", "-fomit-frame-pointer")


Done = Callable[[float], None]


class CompileError(BackendMissingError):
    """The compiler refused the generated source, or is broken. __cause__ holds everything it printed."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler that is installed here. kind: "clang", "gcc" or "zig"; version: e.g. "clang 19.1.7"."""

    kind: str
    command: tuple[str, ...]
    version: str

    def flags(self, cpu: Cpu | None, machine: str) -> list[str]:
        """What selects the processor (None: any processor of the machine's family)."""
        own = list(cpu.flags) if cpu else []
        if machine == "aarch64":
            own.append("-mno-outline-atomics")  # they are calls into the compiler's own library
        if self.kind != "zig":
            return own
        named = [f"-mcpu={_zig_cpu(f)}" if f.startswith("-march=") else f for f in own]
        return ["-target", f"{machine}-linux-gnu.{_GLIBC}", *([] if cpu else ["-mcpu=baseline"]), *named, *_ZIG]


def find(cpu: Cpu | None = None) -> Toolchain:
    """The best compiler for a processor: the environment's GKP_CXX, else clang++ (16 or newer), ziglang from PyPI, g++ (12
    or newer; its kernels reach about half the speed). Only zig compiles for another machine. BackendMissingError."""
    chosen = os.environ.get("GKP_CXX")
    if chosen:
        made = _probe(shlex.split(chosen))
        if made is None:
            raise BackendMissingError(f"GKP_CXX={chosen!r} is no C++ compiler that works here",
                                      "give the command of clang++, g++ or zig c++, or unset GKP_CXX")
        return made
    abroad = cpu is not None and machine(cpu) != platform.machine()
    names = ["clang++", *(f"clang++-{n}" for n in range(29, _OLDEST["clang"] - 1, -1))]
    commands = [*([] if abroad else [[n] for n in names]), _zig_command(), *([] if abroad else [["g++"]])]
    for command in commands:
        found = _probe(command)
        if found is not None and _major(found) >= _OLDEST.get(found.kind, 0):
            return found
    raise BackendMissingError(f"there is no C++ compiler for {machine(cpu)} here", install("native"))


def host_cpu() -> Cpu:
    """The processor of this machine, with everything that it can do fast, and that the kernel lets this process do."""
    here = cpu_flags()
    if platform.machine() == "aarch64":
        found = [name for flag, name in _ARM.items() if flag in here]
        flags = ("-march=armv8.2-a" + "".join(f"+{name}" for name in found),) if found else CPUS["aarch64"].flags
        return replace(CPUS["aarch64"], name="host", flags=flags, triple=None, instructions=(VECTORS, NEON, *found))
    if vector_floats() < 16:
        more = [name for flag, name in _WITH_256.items() if flag in here]
        return Cpu("host", 8, 16, ("-march=native",), instructions=(VECTORS, MADD, *more))
    more = [name for flag, name in {**_WITH_256, **_WITH_512}.items() if flag in here]
    if "avx512_bf16" in here and cpu_vendor() in _FULL_RATE_BF16:
        more.append(BF16)
    tiled = _tiled(here)
    if tiled and tiles.refusal() is None:
        more += tiled
    return Cpu("host", 16, 32, ("-march=native", "-mprefer-vector-width=512"), instructions=(VECTORS, MADD, *more))


def tiles_denied() -> str | None:
    """Why the kernel denies this process AMX, which the processor has. None: it does not, or there is nothing to deny."""
    return tiles.refusal() if _tiled(cpu_flags()) else None


def machine(cpu: Cpu | None) -> str:
    """Family of a processor, as in `uname -m`."""
    if cpu is not None and cpu.triple:
        return cpu.triple.split("-")[0]
    return "x86_64" if cpu is not None and cpu.name.startswith("x86-64") else platform.machine()


def build(folder: Path, cpu: Cpu, toolchain: Toolchain | None = None, done: Done = lambda share: None) -> Path:
    """Compile every source in the folder (as gkp.converter.native.building.source wrote it) and link model.so there. done:
    is told the share of the sources. BackendMissingError without a compiler, CompileError when it refuses."""
    toolchain = toolchain or find(cpu)
    sources = sorted(p.name for p in folder.iterdir() if p.suffix in (".cpp", ".S"))
    return link(folder, compile_objects(folder, sources, cpu, toolchain, done), cpu, toolchain)


def compile_objects(folder: Path, sources: Sequence[str], cpu: Cpu, toolchain: Toolchain | None = None,
                    done: Done = lambda share: None) -> list[str]:
    """Compile sources of the folder side by side, on as many cores as there are; the names of the objects, in the folder,
    in the same order. done: is told the share of the sources."""
    made = toolchain or find(cpu)
    objects = [f"{Path(name).stem}.o" for name in sources]
    commands = []
    for name, obj in zip(sources, objects, strict=True):
        selected = made.flags(None if name in ANY_CPU else cpu, machine(cpu))
        general = () if name.endswith(".S") else FLAGS
        commands.append((name, [*made.command, *general, *selected, "-c", name, "-o", obj]))
    _run_all(commands, folder, done)
    return objects


def link(folder: Path, objects: Sequence[str], cpu: Cpu, toolchain: Toolchain | None = None,
         output: str = "model.so") -> Path:
    """Link objects of the folder into a library that needs libc only; its path."""
    made = toolchain or find(cpu)
    _run_all([(output, [*made.command, *LINK, *made.flags(None, machine(cpu)), *objects, "-o", output, *LIBRARIES])], folder)
    return folder / output


def _tiled(flags: frozenset[str]) -> list[str]:
    return [name for name, needed in _WITH_TILES.items() if needed <= flags]


# ---- finding --------------------------------------------------------------------------------------------------------
def _zig_command() -> list[str]:
    """The program inside the package: `python -m ziglang` would start a Python for every file."""
    spec = importlib.util.find_spec("ziglang")
    places = (spec.submodule_search_locations or []) if spec else []
    return [str(Path(places[0]) / "zig"), "c++"] if places else ["zig", "c++"]


def _probe(command: Sequence[str]) -> Toolchain | None:
    path = shutil.which(command[0]) if command else None
    if path is None:
        return None
    try:
        shown = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True, timeout=60, check=False,
                               env=environment(None))
    except (OSError, subprocess.TimeoutExpired):
        return None
    number = re.search(r"\d+\.\d+\.\d+", shown.stdout)
    clang, gcc = "clang" in shown.stdout, "g++" in shown.stdout or "Free Software Foundation" in shown.stdout
    if shown.returncode != 0 or number is None or not (clang or gcc):
        return None
    kind = "zig" if Path(path).name == "zig" else "clang" if clang else "gcc"
    return Toolchain(kind, (path, *command[1:]), f"{kind} {number[0]}")


def _major(toolchain: Toolchain) -> int:
    return int(toolchain.version.split()[1].split(".")[0])


def _zig_cpu(flag: str) -> str:
    """zig's name for the processor of an -march flag."""
    name, *features = flag.removeprefix("-march=").replace("-", "_").split("+")
    own = {"armv8_a": "generic", "armv8.2_a": "generic+v8_2a", "fp16": "fullfp16"}
    return "+".join(own.get(part, part) for part in (name, *features))


# ---- running --------------------------------------------------------------------------------------------------------
def environment(scratch: str | None) -> dict[str, str]:
    """The compilers' environment. zig keeps parts of libc that it has compiled in a cache of ours; everything else it
    writes goes into `scratch`, for its cache of objects does not see when an included binary file changes."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gkp" / "zig"
    if scratch is not None:
        try:
            private_folder(base)
        except OSError:
            base = Path(scratch)
    return {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(base), "ZIG_LOCAL_CACHE_DIR": scratch or str(base), "LC_ALL": "C"}


def _run_all(commands: Sequence[tuple[str, list[str]]], folder: Path, done: Done = lambda share: None) -> None:
    """Run (what it makes, command) in the folder, as many at a time as there are cores. done: is told the share that ended.
    On an error or an interruption every child ends, with the children of its own."""
    cores, waiting = len(os.sched_getaffinity(0)), list(reversed(commands))
    with tempfile.TemporaryDirectory(prefix="gkp-") as scratch, _children() as (running, lifeline):
        variables = environment(scratch)
        while waiting or running:
            while waiting and len(running) < cores:
                name, command = waiting.pop()
                output = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - _check closes it
                with _signals_later():  # a child that is not among the running ones would outlive an interruption
                    running[subprocess.Popen(command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=output,
                                             stderr=subprocess.STDOUT, start_new_session=True,
                                             pass_fds=[lifeline])] = (name, output)
            time.sleep(0.002)
            for child in [c for c in running if c.poll() is not None]:
                _check(child, *running.pop(child))
                done(1 - (len(waiting) + len(running)) / len(commands))


@contextlib.contextmanager
def _children() -> Iterator[tuple[dict[subprocess.Popen[bytes], tuple[str, IO[bytes]]], int]]:
    """The running children, and a descriptor for them to inherit. When the block is left they are killed, and it returns
    when their descendants have ended as well: the pipe of the descriptor is at its end only then. Until then they write
    into folders that are about to be removed."""
    running: dict[subprocess.Popen[bytes], tuple[str, IO[bytes]]] = {}
    ended, lifeline = os.pipe()
    try:
        yield running, lifeline
    finally:
        os.close(lifeline)
        for child, (_, output) in running.items():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            output.close()
        select.select([ended], [], [], _DYING)
        os.close(ended)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block is left. (Other threads than the main one get neither.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {n: h for n in (signal.SIGINT, signal.SIGTERM) if callable(h := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda got, _: came.append(got))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _check(child: subprocess.Popen[bytes], name: str, output: IO[bytes]) -> None:
    """CompileError unless the child ended well."""
    with output:
        if child.returncode == 0:
            return
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {child.returncode}")
    if "No space left on device" in text:
        raise FileError(f"the disk is full while compiling {name}", "free some space")
    raise CompileError(f"the compiler failed on {name}: {first[:200]}",
                       "run with -v for all that it printed; GKP_CXX names another compiler") from RuntimeError(text)
