"""The driver's answers, from a library that stands in for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_kit import driver, shared_library

from gkp.runtime.cuda import Driver, ask_driver, device_capability, device_name, driver_version


@pytest.mark.parametrize(("capability", "version", "told"), [((8, 9), 12040, "12.4"), ((12, 0), 13000, "13.0"),
                                                             ((7, 5), 11080, "11.8")])
def test_a_gpu_is_described(capability: tuple[int, int], version: int, told: str, tmp_path: Path) -> None:
    library = driver(tmp_path / "libcuda.so.1", capability=capability, version=version, name="NVIDIA RTX 9090")
    assert ask_driver(str(library)) == Driver(told, "NVIDIA RTX 9090", capability)


@pytest.mark.parametrize("broken", [{"count": 0}, {"init": 100}, {"init": 3}])
def test_a_driver_without_a_gpu_has_a_version_only(broken: dict[str, int], tmp_path: Path) -> None:
    assert ask_driver(str(driver(tmp_path / "libcuda.so.1", **broken))) == Driver("12.4")


def test_a_name_from_the_driver_is_printable(tmp_path: Path) -> None:
    found = ask_driver(str(driver(tmp_path / "libcuda.so.1", name="GPU\\x1b[2J")))
    assert found is not None
    assert found.name == "GPU?[2J"


def test_what_is_no_driver_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    for path in (tmp_path / "missing.so", tmp_path / "text.so", tmp_path,
                 shared_library(tmp_path / "other.so", "int main_of_something_else(void) { return 0; }"),
                 shared_library(tmp_path / "half.so", "int cuDriverGetVersion(int* v) { *v = 12000; return 0; }"),
                 driver(tmp_path / "old.so", version=0)):
        assert ask_driver(str(path)) is None, path.name


def test_the_driver_of_this_process_is_asked(tmp_path: Path) -> None:
    """Found by its name, as the loader finds it."""
    driver(tmp_path / "libcuda.so.1", capability=(8, 6), name="Stand-in")
    body = "from gkp.runtime.cuda import *\nprint(device_capability(), device_name(), driver_version())"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=True,
                          env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert done.stdout == "(8, 6) Stand-in 12.4\n"


def test_a_machine_without_a_driver_has_no_gpu() -> None:
    if ask_driver() is not None:
        pytest.skip("there is a driver here")
    assert (device_capability(), device_name(), driver_version()) == (None, None, None)
