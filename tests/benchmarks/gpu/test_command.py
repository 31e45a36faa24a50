"""How the GPU suite is called: the command line, make bench-gpu, and a machine with PyTorch and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_kit import assert_refused, blocked, blocked_gkp, gkp

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "bench_gpu.py"
BASE = ("click", "rich", "rich_click", "msgspec", "onnx", "onnx_graphsurgeon", "onnxscript", "onnxruntime", "openvino",
        "polygraphy", "tensorrt_rtx", "jinja2", "pytest", "hypothesis")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the suite would run")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@no_gpu
@pytest.mark.parametrize("options", [("--suite", "gpu"), ("--calibrate", "trt")])
def test_without_a_gpu_it_is_one_line_and_exit_code_4(options: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(gkp("bench", *options, "--json", tmp_path / "x.json"), 4, "no NVIDIA GPU", "try:")
    assert not list(tmp_path.iterdir())


def test_without_pytorch_it_is_one_line_and_exit_code_4() -> None:
    assert_refused(blocked_gkp(("torch",), "bench", "--suite", "gpu"), 4, "PyTorch", "gkp[torch]")


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


def test_the_script_needs_numpy_and_pytorch_only(tmp_path: Path) -> None:
    """It also finds gkp in the checkout: the editable installation is taken away."""
    out = tmp_path / "found.json"
    body = ("sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
            f"sys.path.insert(0, {str(TOOL.parent)!r})\n"
            "import bench_gpu, pathlib\n"
            "bench_gpu.use_checkout()\n"
            "from gkp.benchmarks.gpu.networks import Case\n"
            "from gkp.benchmarks.gpu.suite import Settings\n"
            "from gkp.benchmarks.gpu.sweep import Shape\n"
            "from gkp.benchmarks.networks import resnet20, tmi_style\n"
            "small = Settings(device='cpu', budget_s=100, seconds=0, batches=(1,), precisions=('fp32',),\n"
            "                 cases=(Case('small', resnet20, tmi_style, (3, 8, 8)),), main=(Shape(8, 4, batch=1),), rest=(),\n"
            "                 gathers=(Shape(16, 4, batch=1),))\n"
            f"bench_gpu.run(pathlib.Path({str(out)!r}), small)\n")
    outcome = blocked(BASE, body)
    assert outcome.code == 0, outcome.err
    found = json.loads(out.read_text())
    assert sum(row["ms"] is not None for row in found["rows"]) == 6
    assert found["gather_gbs"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    assert "0%  3x3, 8 channels, batch 1, fp32" in outcome.err


@with_gpu
@pytest.mark.slow
def test_a_small_suite_on_the_gpu(tmp_path: Path) -> None:
    """Every engine that the machine has: PyTorch's four always run, and with CUDA events."""
    from dataclasses import replace

    from gkp.benchmarks.gpu.suite import CASES, Settings, run_suite  # type: ignore[attr-defined]
    from gkp.benchmarks.gpu.sweep import Shape

    found = run_suite(replace(Settings(), budget_s=200.0, seconds=0.05, cases=CASES[1:], batches=(2,), main=(Shape(64, 8),),
                              rest=(), gathers=(Shape(64, 8),)), lambda text, share: None)
    timed = {(r.engine, r.precision): r.clock for r in found.rows if r.ms}
    for engine in ("CUDA graph", "channels_last", "PyTorch eager", "torch.compile"):
        assert timed[engine, "fp16"] == timed[engine, "fp32"] == "events"
    assert all(p.ratio for p in found.points)
    assert found.environment["gpu"]
