"""Libraries with kernels on AMX's tiles: they ask for these themselves, and refuse to load where they are missing or denied."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from denied_kit import denied
from integer_kit import has
from native_kit import Array, qemu_run, two_step_plan

from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.kernels.cpu import AMX_INT8, CPUS, VECTORS, Cpu
from gkp.converter.native.kernels.emit import unit
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.planning.plan import Call, Place, Plan
from gkp.converter.native.program import Port
from gkp.errors import BackendMissingError
from gkp.runtime.native import NativeRunner

pytestmark = pytest.mark.skipif(not has("avx2"), reason="AMX is of x86-64 processors")
needs_amx = pytest.mark.skipif(not has("amx_tile", "amx_int8"), reason="this processor has no AMX")
AVX2 = replace(CPUS["x86-64-v3"], name="avx2 and amx")
"""All that the kernel here needs besides, so that a processor with AVX2 gets as far as AMX."""
_PRODUCT = """
  (void)r;
  if (part > 0) return;
  alignas(64) unsigned char config[64] = {1};
  for (int t = 0; t < 3; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;  // bytes of a row, rows
  int sums[256];
  asm volatile("ldtilecfg %0" : : "m"(config));
  asm volatile("tilezero %%tmm0\\n tileloadd (%0,%3,1), %%tmm1\\n tileloadd (%1,%3,1), %%tmm2\\n tdpbusd %%tmm2, %%tmm1, %%tmm0\\n"
               "tilestored %%tmm0, (%2,%3,1)\\n tilerelease" : : "r"(x), "r"(data), "r"(sums), "r"(64l) : "memory");
  for (int i = 0; i < 256; ++i) y[i] = static_cast<float>(sums[i]);
"""
WEIGHTS = np.random.default_rng(0).integers(-128, 128, (64, 16)).astype(np.int8)
X = np.random.default_rng(1).integers(0, 256, (9, 16, 64)).astype(np.uint8)
PRODUCTS = (X.astype(np.int64) @ WEIGHTS.astype(np.int64)).astype(np.float32)


def product_plan(cpu: Cpu) -> Plan:
    """x: bytes [16, 64] -> their products with WEIGHTS [64, 16], which lie in fours."""
    data = WEIGHTS.reshape(16, 4, 16).transpose(0, 2, 1).tobytes()
    kernel = Kernel(unit(_PRODUCT, x=UINT8), data, (VECTORS, AMX_INT8))
    return Plan(cpu, (Call(kernel, Place("input", 0), None, Place("output", 0), "product"),), 0, (Port("x", 0, (16, 64), UINT8),),
                (Port("y", 1, (16, 16)),))


def built(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    source.write(plan, folder)
    return build(folder, plan.cpu)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(product_plan(AVX2), tmp_path_factory.mktemp("tiles") / "made")


def run(library: Path, threads: int) -> Array:
    runner = NativeRunner(library, threads)
    try:
        return runner.run({"x": X})[0]
    finally:
        runner.close()


@needs_amx
@pytest.mark.parametrize("threads", [1, 3])
def test_every_thread_of_a_library_that_asked_has_tiles(threads: int, library: Path) -> None:
    np.testing.assert_array_equal(run(library, threads), PRODUCTS)


@needs_amx
def test_a_process_that_never_heard_of_tiles_loads_it_and_so_does_what_it_forks(library: Path, tmp_path: Path) -> None:
    """As a worker of a split model, or a C program: nothing but the library asks."""
    np.save(tmp_path / "x.npy", X)
    code = ("import os\nfrom pathlib import Path\nimport numpy as np\nfrom gkp.runtime.native import NativeRunner\n"
            f"x, library = np.load({str(tmp_path / 'x.npy')!r}), Path({str(library)!r})\n"
            "def run(name):\n    np.save(name, NativeRunner(library, 2).run({'x': x})[0])\n"
            f"run({str(tmp_path / 'first.npy')!r})\nif os.fork() == 0:\n    run({str(tmp_path / 'forked.npy')!r})\n    os._exit(0)\n"
            "os.wait()\n")
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("first", "forked"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), PRODUCTS)


@needs_amx
def test_denied_by_the_kernel_it_is_refused_and_libraries_without_tiles_are_not(library: Path, tmp_path: Path) -> None:
    """The other one is compiled for this very processor, AMX included."""
    other = built(two_step_plan(host_cpu()), tmp_path / "other")
    found = denied(
        "import ctypes\nfrom pathlib import Path\nimport numpy as np\nfrom gkp.errors import BackendMissingError\n"
        "from gkp.runtime.native import NativeRunner\n"
        f"library, handle = Path({str(library)!r}), ctypes.c_void_p()\n"
        "try:\n    NativeRunner(library, 2)\nexcept BackendMissingError as e:\n    print(e.message, '/', e.hint)\n"
        "print(ctypes.CDLL(str(library)).gkp_create(1, ctypes.byref(handle)), handle.value)\n"
        f"runner = NativeRunner(Path({str(other)!r}), 1)\nprint(runner.run({{'x': np.ones((1, 3, 5, 7), 'float32')}})[0].flat[0])\n")
    words, status, product = found.splitlines()
    assert "native kernels: the kernels need AMX, which the operating system denies this process" in words
    assert "ARCH_REQ_XCOMP_PERM" in words
    assert status == "6 None"
    assert product == "4.0"


@pytest.mark.skipif(has("amx_tile", "amx_int8"), reason="this processor has AMX")
def test_a_processor_without_tiles_gets_words_not_a_signal(library: Path) -> None:
    with pytest.raises(BackendMissingError, match="the kernels need AMX-TILE, which this processor or operating system lacks"):
        run(library, 1)


def test_an_emulated_processor_without_tiles_gets_words_not_a_signal() -> None:
    with pytest.raises(AssertionError, match="the kernels need AMX-TILE, which this processor or operating system lacks"):
        qemu_run(product_plan(AVX2), {"x": X}, command=("qemu-x86_64", "-cpu", "Haswell"))
    np.testing.assert_allclose(qemu_run(two_step_plan(AVX2), {"x": np.ones((1, 3, 5, 7), np.float32)},
                                        command=("qemu-x86_64", "-cpu", "Haswell"))[0], 4)
