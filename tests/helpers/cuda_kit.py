"""Shared libraries from a few lines of C, and one that answers like the driver of an NVIDIA GPU."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from gkp.converter.native.building.toolchain import LIBRARIES, LINK, environment, find

_DRIVER = """
int cuDriverGetVersion(int* version) { *version = @VERSION@; return 0; }
int cuInit(unsigned flags) { return flags ? 1 : @INIT@; }
int cuDeviceGetCount(int* count) { *count = @COUNT@; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 40) return 101;
  *value = attribute == 75 ? @MAJOR@ : attribute == 76 ? @MINOR@ : -1;
  return 0;
}
int cuDeviceGetName(char* name, int bytes, int device) {
  if (device != 40) return 101;
  strncpy(name, "@NAME@", bytes);
  return 0;
}
int cuCtxCreate_v2(void** context, unsigned flags, int device) { __builtin_trap(); }
int cuDevicePrimaryCtxRetain(void** context, int device) { __builtin_trap(); }
"""


def shared_library(path: Path, source: str) -> Path:
    """Compile functions with the linkage of C."""
    code, compiler = path.parent / f"{path.name}.cpp", find()
    code.write_text(f'#include <string.h>\nextern "C" {{\n{source}\n}}\n')
    command = [*compiler.command, *LINK, *compiler.flags(None, platform.machine()), "-fPIC", str(code), "-o", str(path)]
    subprocess.run([*command, *LIBRARIES], check=True, capture_output=True, env=environment(str(path.parent)), timeout=120)
    return path


def driver(path: Path, *, capability: tuple[int, int] = (8, 9), name: str = "NVIDIA Stand-in", version: int = 12040,
           count: int = 1, init: int = 0) -> Path:
    """A driver with `count` GPUs; init: what cuInit returns (100: no device)."""
    source = _DRIVER
    for key, value in {"VERSION": version, "INIT": init, "COUNT": count, "MAJOR": capability[0], "MINOR": capability[1],
                       "NAME": name}.items():
        source = source.replace(f"@{key}@", str(value))
    return shared_library(path, source)
