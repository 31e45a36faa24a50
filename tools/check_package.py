"""Installs a wheel with each extra, in an environment of its own, and runs a command of it.

usage: python tools/check_package.py WHEEL [EXTRA ...]     (without EXTRA: base, and all in CASES)

What the commands work on is made by this Python, in which gkp must be installed with the extra dev.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import gkp

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "resnet20_cifar10"
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Case:
    """What shows that an extra works. commands: run one after the other, where `make_files` wrote its files; others: extras
    that the command needs besides; serves: the last command goes on until it is told to end; gpu: needs an NVIDIA GPU."""

    commands: tuple[str, ...]
    others: tuple[str, ...] = ()
    serves: bool = False
    gpu: bool = False


_CONVERT = "gkp-convert model.onnx --no-benchmark --threads 1 -q"
CASES = {
    "base": Case(("gkp --version", "gkp run model.native --input x.npy -q")),
    "convert": Case(("gkp inspect model.onnx -q",)),
    "torch": Case(("gkp-convert grouped.pt --target onnx -q -o torch.onnx",)),
    "ort": Case((f"{_CONVERT} --target ort -o out.ort", "gkp run out.ort --input x.npy -q")),
    "gpu": Case((f"{_CONVERT} --target ort --provider cuda -o out.ort", "gkp run out.ort --input x.npy -q"), gpu=True),
    "openvino": Case((f"{_CONVERT} --target openvino -o out.openvino", "gkp run out.openvino --input x.npy -q")),
    "trt": Case((f"{_CONVERT} --target trt --backend tensorrt -o out.trt",), gpu=True),
    "trt-rtx": Case((f"{_CONVERT} --target trt --backend tensorrt_rtx --compute-capability 86 -o out.trt",)),
    "native": Case((f"{_CONVERT} --target native -o out.native", "gkp run out.native --input x.npy -q")),
    "quant": Case((f"{_CONVERT} --target ort --precision int8 --calibration random --calibration-images 8 -o int8.ort",)),
    "images": Case((f"{_CONVERT} --target ort -o out.ort", "gkp eval out.ort --data folder:pictures -q"), others=("ort",)),
    "prune": Case(("gkp prune gconv-prune --baseline dense.pt --epochs 0 -o pruned -q",)),
    "bench": Case((f"{_CONVERT} --target ort -o out.ort", "gkp bench out.ort --batch 1 --seconds 0.2 -q")),
    "report": Case((f"{_CONVERT} --target onnx -o out.onnx --report page.html",), others=("convert",)),
    "worker": Case(("gkp serve two/device_0 --insecure --listen 127.0.0.1:0 --threads 1 --json -",), serves=True),
    "edge": Case(("gkp split model.onnx --devices 2 --mode spatial -o parts -q", "gkp run parts --local --input x.npy -q")),
    "ray": Case(("python -c 'import ray; ray.init(num_cpus=1, include_dashboard=False); print(ray.nodes())'",
                 "gkp edge up --help")),
    "docs": Case((f"python -m sphinx -q -W -c {ROOT}/docs {ROOT} site",)),
}


@dataclass(frozen=True)
class Outcome:
    """failure: what the command that failed printed, "" when all went well. seconds: to install, and to run."""

    failure: str
    installing: float
    running: float


def make_files(folder: Path, extras: Iterable[str]) -> None:
    """What the commands of these extras work on: the example as checkpoints, as ONNX, compiled, and split; an input; images
    in folders. GkpError or CalledProcessError when the gkp that is installed here cannot make them."""
    words = " ".join(command for extra in extras for command in CASES[extra].commands)
    for name in ("grouped.pt", "dense.pt"):
        shutil.copy(EXAMPLE / name, folder)
    numbers = np.random.default_rng(0)
    np.save(folder / "x.npy", numbers.standard_normal((1, 3, 32, 32)).astype(np.float32))
    if "model.onnx" in words:
        gkp.convert(folder / "grouped.pt", "onnx", folder / "as_onnx")
        shutil.copy(folder / "as_onnx" / "model.onnx", folder)
    if "model.native" in words:
        gkp.convert(folder / "grouped.pt", "native", folder / "model.native", benchmark=False, threads=1)
    if "two/" in words:
        split = "split grouped.pt --devices 2 --mode replicas -o two -q"
        subprocess.run([sys.executable, "-m", "gkp.entry", *split.split()], cwd=folder, check=True)
    if "pictures" in words:
        for label in range(10):
            place = folder / "pictures" / f"class_{label}"
            place.mkdir(parents=True)
            Image.fromarray(numbers.integers(0, 256, (32, 32, 3), np.uint8)).save(place / "one.png")


def check(wheel: Path, extra: str, files: Path, environment: Path) -> Outcome:
    """Install the wheel with an extra of CASES into a new environment (or one that is there, besides what it has), and run
    the extra's commands in a copy of `files`."""
    case, begin = CASES[extra], time.monotonic()
    asked = ",".join(name for name in (extra, *case.others) if name != "base")
    done = _install(f"{wheel.resolve()}[{asked}]" if asked else str(wheel.resolve()), environment)
    installed = time.monotonic()
    if done.returncode:
        return Outcome(done.stdout + done.stderr, installed - begin, 0)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "files"
        shutil.copytree(files, place)
        failure = next(filter(None, (_run(words, place, environment, case.serves and words == case.commands[-1])
                                     for words in case.commands)), "")
    return Outcome(failure, installed - begin, time.monotonic() - installed)


def _install(what: str, environment: Path) -> subprocess.CompletedProcess[str]:
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python, constraints = environment / "bin" / "python", ROOT / "constraints.txt"
    words = ["--python", str(python), "install", "--quiet", "--no-compile", "--constraint", str(constraints)]
    return subprocess.run([sys.executable, "-m", "pip", *words, what], capture_output=True, text=True, check=False,
                          timeout=_TIMEOUT_S)


def _run(words: str, place: Path, environment: Path, serves: bool) -> str:
    """What a failed command printed; "" when it ended with 0. serves: it is ended as soon as it has printed a line."""
    program, *arguments = shlex.split(words)
    env = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(environment / "bin" / program), *arguments], cwd=place, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        first = process.stdout.readline() if serves else ""
        if first:
            process.send_signal(signal.SIGTERM)
        output = first + process.communicate(timeout=_TIMEOUT_S)[0]
    finally:
        process.kill()
        process.wait()
    return "" if process.returncode == 0 else f"$ {words}\n{output}exit {process.returncode}"


def main(arguments: Sequence[str]) -> int:
    """See the module. 1 when a case failed, 2 for arguments that cannot be."""
    wheel, *asked = [*map(str, arguments)] or [""]
    if not Path(wheel).is_file() or not set(asked) <= set(CASES):
        print(f"usage: check_package.py WHEEL [{' | '.join(CASES)} ...]", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        files.mkdir()
        make_files(files, asked or CASES)
        for extra in asked or CASES:
            if CASES[extra].gpu and not Path("/proc/driver/nvidia").exists():
                print(f"{extra}: not here: it needs an NVIDIA GPU", flush=True)
                continue
            found = check(Path(wheel), extra, files, Path(name) / "environment")
            shutil.rmtree(Path(name) / "environment")
            print(f"{extra}: {'FAILED' if found.failure else 'works'} (installed in {found.installing:.0f} s, "
                  f"ran {found.running:.0f} s)\n{found.failure}".rstrip(), flush=True)
            failed += [extra] * bool(found.failure)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
