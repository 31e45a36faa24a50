"""AMX is named where the processor has it and the kernel grants its tiles, and asked for once."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
from denied_kit import denied
from integer_kit import has

from gkp.converter.native.building import tiles, toolchain
from gkp.converter.native.building.toolchain import host_cpu, tiles_denied
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, PERMUTE, VNNI

AVX512 = {"avx512_vnni", "avx512vbmi", "avx512_bf16"}
EVERY = AVX512 | {"amx_tile", "amx_int8", "amx_bf16"}
needs_amx = pytest.mark.skipif(not has("amx_tile", "amx_int8"), reason="this processor has no AMX")
_GRANTED = """
import ctypes
mask = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0  # ARCH_GET_XCOMP_PERM
"""


@pytest.fixture
def intel(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain, "vector_floats", lambda: 16)
    monkeypatch.setattr(toolchain, "cpu_vendor", lambda: "GenuineIntel")
    return monkeypatch


@pytest.mark.parametrize(("flags", "named"), [
    (EVERY, {AMX_INT8, AMX_BF16}), (EVERY - {"amx_bf16"}, {AMX_INT8}), (EVERY - {"avx512_bf16"}, {AMX_INT8}),
    (EVERY - {"avx512vbmi"}, {AMX_BF16}), (EVERY - {"amx_tile"}, set()), (AVX512, set())])
def test_a_family_is_named_with_all_that_its_kernels_use(flags: set[str], named: set[str], intel: pytest.MonkeyPatch) -> None:
    intel.setattr(toolchain, "cpu_flags", lambda: frozenset(flags))
    intel.setattr(tiles, "refusal", lambda: None)
    assert {AMX_INT8, AMX_BF16} & set(host_cpu().instructions) == named
    assert tiles_denied() is None
    intel.setattr(tiles, "refusal", lambda: "no")
    assert not {AMX_INT8, AMX_BF16} & set(host_cpu().instructions)
    assert tiles_denied() == ("no" if named else None)


def test_a_processor_without_tiles_is_not_asked_for_them(intel: pytest.MonkeyPatch) -> None:
    def asked() -> str:
        raise AssertionError("asked")

    intel.setattr(toolchain, "cpu_flags", lambda: frozenset(AVX512))
    intel.setattr(tiles, "refusal", asked)
    assert VNNI in host_cpu().instructions
    assert tiles_denied() is None


@needs_amx
def test_to_name_the_processor_gets_the_process_its_tiles_and_what_it_forks() -> None:
    code = ("from gkp.converter.native.building.toolchain import host_cpu\nimport os\n"
            f"{_GRANTED}before = mask.value\nhost_cpu()\n{_GRANTED}after = mask.value\n"
            f"print(before >> 18 & 1, after >> 18 & 1, flush=True)\nif os.fork() == 0:\n    exec({_GRANTED!r})\n"
            "    print(mask.value >> 18 & 1, flush=True)\n    os._exit(0)\nos.wait()\n")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["0", "1", "1"]


@needs_amx
def test_where_the_kernel_denies_them_the_processor_is_named_without() -> None:
    """Once denied, the kernel is not asked again."""
    found = json.loads(denied(
        "import json\nfrom gkp.converter.native.building import tiles\n"
        "from gkp.converter.native.building.toolchain import host_cpu, tiles_denied\n"
        "print(json.dumps([host_cpu().instructions, tiles_denied(), tiles.refusal.cache_info().misses]))\n"))
    assert {VNNI, PERMUTE} <= set(found[0])
    assert not {AMX_INT8, AMX_BF16} & set(found[0])
    assert found[1:] == [os.strerror(1), 1]


@needs_amx
def test_a_thread_with_a_small_signal_stack_is_named_as_the_reason() -> None:
    """The kernel would have to save the tiles there."""
    code = ("import ctypes, struct\nstack = ctypes.create_string_buffer(4096)\n"
            "new = struct.pack('<QixxxxQ', ctypes.addressof(stack), 0, 4096)\n"
            "assert ctypes.CDLL(None).sigaltstack(new, None) == 0\n"
            "from gkp.converter.native.building.toolchain import tiles_denied\nprint(tiles_denied())\n")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "signal stack" in shown
