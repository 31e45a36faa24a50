"""How the GPU suite is called: the command line, and make bench-gpu."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_kit import assert_refused, blocked, blocked_gkp, gkp

from gkp.benchmarks.gpu.suite import Settings

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "bench_gpu.py"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the suite would run")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@no_gpu
@pytest.mark.parametrize("options", [("--suite", "gpu"), ("--calibrate", "trt")])
def test_without_a_gpu_it_is_one_line_and_exit_code_4(options: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(gkp("bench", *options, "--json", tmp_path / "x.json"), 4, "no NVIDIA GPU", "try:")
    assert not list(tmp_path.iterdir())


def test_without_pytorch_it_is_one_line_and_exit_code_4() -> None:
    assert_refused(blocked_gkp(("torch",), "bench", "--suite", "gpu"), 4, "PyTorch", ".[torch]")


@pytest.mark.parametrize("options", [(), ("--suite", "gpu", "--calibrate", "trt"), ("--suite", "gpu", "model.ort"),
                                     ("--calibrate", "trt", "model.ort")])
def test_one_thing_at_a_time(options: tuple[str, ...]) -> None:
    assert_refused(gkp("bench", *options), 2, "--suite cpu|gpu", "--calibrate trt")


@no_gpu
def test_the_script_says_the_same(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 4
    assert done.stderr.startswith("error: PyTorch finds no NVIDIA GPU here")
    assert len(done.stderr.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_the_script_explains_itself() -> None:
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "usage: bench_gpu.py [FILE.json]" in done.stderr


def test_make_calls_the_script_with_any_python_and_installs_nothing() -> None:
    done = subprocess.run(["make", "-n", "--no-print-directory", "bench-gpu", "PYTHON=some-python", "JSON=out.json"], cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "some-python tools/bench_gpu.py out.json\n"


@pytest.mark.parametrize(("absent", "words"), [("torch", ("measuring a GPU needs PyTorch", ".[torch]")),
                                               ("onnx", ("needs onnx", ".[convert]"))])
def test_the_script_says_in_one_line_what_is_absent(absent: str, words: tuple[str, str], tmp_path: Path) -> None:
    outcome = blocked((absent,), f"import sys\nsys.path.insert(0, {str(TOOL.parent)!r})\nimport bench_gpu\n"
                      f"sys.exit(bench_gpu.main([{str(tmp_path / 'x.json')!r}]))\n")
    assert_refused(outcome, 4, *words)
    assert not list(tmp_path.iterdir())


def test_the_script_needs_gkp(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", TOOL], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 2)
    assert done.stderr.startswith("error: this Python has no gkp")
    assert ".[torch,gpu,trt]" in done.stderr


def test_the_file_of_the_script_is_written_after_every_job(settings: Settings, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bench_gpu_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    path, seen = tmp_path / "found.json", []

    def progress(text: str, share: float | None) -> None:
        seen.append(len(json.loads(path.read_bytes())["rows"]) if path.exists() else None)

    tool.run(path, settings, progress)
    assert seen[0] is None
    counts = [n for n in seen[1:] if n is not None]
    assert len(counts) == len(seen) - 1
    assert counts == sorted(counts)
    assert json.loads(path.read_bytes())["gather_gbs"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


@with_gpu
@pytest.mark.slow
def test_a_small_suite_on_the_gpu(tmp_path: Path) -> None:
    """Every engine that the machine has: PyTorch's three always run."""
    from dataclasses import replace

    from gkp.benchmarks.cases import gpu_cases
    from gkp.benchmarks.gpu.suite import run_suite
    from gkp.benchmarks.gpu.sweep import Shape

    found = run_suite(replace(Settings(), budget_s=200.0, seconds=0.05, cases=gpu_cases()[1:], batches=(2,),
                              main=(Shape(64, 8),), rest=(), gathers=(Shape(64, 8),)), lambda text, share: None)
    timed = {(r.engine, r.precision) for r in found.rows if r.ms}
    for engine in ("channels_last", "PyTorch eager", "torch.compile"):
        assert {(engine, "fp16"), (engine, "fp32")} <= timed
    assert all(p.ratio for p in found.points)
    assert found.environment["gpu"]
