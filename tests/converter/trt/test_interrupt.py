"""Ctrl-C while an engine is built, with a real signal in a real process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
HELPERS = Path(__file__).parents[2] / "helpers"
CODE = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from engine_kit import grouped_net
from gkp.converter.trt.backend import find_backend
from gkp.converter.trt.build import build_engines
from gkp.options.trt import TrtOptions
model, backend = grouped_net(size=64), find_backend("tensorrt_rtx")
count = 0
def progress(text, share):
    if count == 1 and share == 0:
        print("building", flush=True)
try:
    while True:
        count += 1
        build_engines(model, TrtOptions(compute_capability=((8, 6),)), backend, progress=progress)
except KeyboardInterrupt:
    print("interrupted", flush=True)
count = -1
print(len(build_engines(model, TrtOptions(compute_capability=((8, 6),)), backend)), "engine after it", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05, 0.11, 0.3])
def test_ctrl_c_ends_the_build_quickly_and_the_process_lives_on(delay: float) -> None:
    child = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "building\n"
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 10
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out, err) == (0, "1 engine after it\n", "")


def test_ctrl_c_that_nothing_catches_ends_the_process_as_any_other() -> None:
    child = subprocess.Popen([sys.executable, "-c", CODE.replace("except KeyboardInterrupt", "except ValueError")],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "building\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
