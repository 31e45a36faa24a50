"""examples/native_c: the commands of its README build and run a C program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_kit import ROOT, save, small_net

import gkp

README = ROOT / "examples" / "native_c" / "README.md"


def commands() -> list[str]:
    """The indented lines of the README, continued ones joined. The conversion measures nothing here."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    assert [line.split()[0] for line in found] == ["gkp-convert", "cc", "demo/classify"]
    return [f"{line} --no-benchmark" if line.startswith("gkp-convert") else line for line in found]


def test_the_commands_of_the_readme_work(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    x.tofile(tmp_path / "IMAGE")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh", "-euc", "\n".join(commands())], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    with gkp.load(tmp_path / "demo" / "grouped.native") as model:
        scores = model.run(x)[0]
    found = re.fullmatch(r"class (\d+), score (\S+)\n", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) == int(scores.argmax())
    assert float(found[2]) == pytest.approx(float(scores.max()), rel=1e-4)


def test_a_model_that_takes_pixels_is_given_bytes(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    gkp.convert(save(small_net(size=32), tmp_path / "m.onnx"), target="native", output=tmp_path / "out", threads=1, benchmark=False,
                input_type="uint8", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    subprocess.run([compiler, "-I", "out", str(README.with_name("classify.c")), "out/model.so", "-Wl,-rpath,$ORIGIN/out", "-o",
                    "classify"], cwd=tmp_path, check=True)
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), np.uint8)
    x.tofile(tmp_path / "IMAGE")
    done = subprocess.run(["./classify", "IMAGE"], cwd=tmp_path, capture_output=True, text=True, check=True)
    with gkp.load(tmp_path / "out") as model:
        scores = model.run(x)[0]
    assert done.stdout.startswith(f"class {scores.argmax()}, score ")
    assert float(done.stdout.split()[-1]) == pytest.approx(float(scores.max()), rel=1e-4)


def test_a_wrong_image_is_refused_by_the_program(tmp_path: Path) -> None:
    """The program checks what it reads; -Wall and -Wextra find nothing in it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    gkp.convert(save(small_net(size=32), tmp_path / "m.onnx"), target="native", output=tmp_path / "out", threads=1, benchmark=False)
    subprocess.run([compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-I", "out", str(README.with_name("classify.c")),
                    "out/model.so", "-Wl,-rpath,$ORIGIN/out", "-o", "classify"], cwd=tmp_path, check=True)
    (tmp_path / "IMAGE").write_bytes(b"short")
    done = subprocess.run(["./classify", "IMAGE"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "3072 float32 numbers" in done.stderr
