"""Kernels compiled for another processor and run on an emulated one."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from native_kit import AARCH64, emulator, zig_tools

from gkp.converter.native.building import toolchain
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import FUNCTION, Kernel
from gkp.converter.native.kernels.prelude import prelude

Bytes = npt.NDArray[np.uint8]
_DRIVER = '''
#include <stdio.h>
#include <stdlib.h>
typedef void (*Kernel)(const void*, const void*, void*, const unsigned char*, int, int);
#define KERNEL(n) extern "C" void k##n(const void*, const void*, void*, const unsigned char*, int, int);
@DECLARED@
static const Kernel kernels[] = {@NAMES@};
// "runs" holds, for every run: kernel, parts, four sizes, then the source, the residual, the target and the data.
int main() {
  FILE* runs = fopen("runs", "rb");
  FILE* targets = fopen("targets", "wb");
  long head[6];
  while (fread(head, sizeof head, 1, runs) == 1) {
    void* a[4];
    for (int i = 0; i < 4; ++i) {
      const size_t size = static_cast<size_t>(head[2 + i]);
      a[i] = aligned_alloc(64, (size + 127) / 64 * 64);
      if (fread(a[i], 1, size, runs) != size) return 1;
    }
    for (int part = 0; part < head[1]; ++part)
      kernels[head[0]](a[0], a[1], a[2], static_cast<const unsigned char*>(a[3]), part, static_cast<int>(head[1]));
    fwrite(a[2], 1, static_cast<size_t>(head[4]), targets);
    for (int i = 0; i < 4; ++i) free(a[i]);
  }
  return fclose(targets);
}
'''


def emulated(kernels: Sequence[Kernel], operands: Sequence[Sequence[Bytes]], cpu: Cpu, parts: int,
             command: Sequence[str] = AARCH64) -> list[Any]:
    """Each kernel run on its operands (source, residual, target); the bytes of the targets. Skips the test where zig or the
    emulator is absent."""
    run, tools = emulator(command), zig_tools()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gkp.h").write_text(prelude(cpu))
        (folder / "kernels.cpp").write_text("\n".join(
            k.source.replace(f"void {FUNCTION}", f"void k{n}") for n, k in enumerate(kernels)))
        driver = _DRIVER.replace("@DECLARED@", "\n".join(f"KERNEL({n})" for n in range(len(kernels))))
        (folder / "driver.cpp").write_text(driver.replace("@NAMES@", ", ".join(f"k{n}" for n in range(len(kernels)))))
        with (folder / "runs").open("wb") as file:
            for n, (kernel, arrays) in enumerate(zip(kernels, operands, strict=True)):
                every = [bytes(a) for a in (*arrays, np.frombuffer(kernel.data, np.uint8))]
                file.write(struct.pack("<6q", n, parts, *map(len, every)) + b"".join(every))
        objects = toolchain.compile_objects(folder, ["driver.cpp", "kernels.cpp"], cpu, tools)
        target = tools.flags(None, toolchain.machine(cpu))[:2]
        subprocess.run([tools.command[0], "build-exe", *target, "-fno-compiler-rt", "-fno-ubsan-rt", "-lc", *objects,
                        "-femit-bin=driver"], cwd=folder, check=True, capture_output=True,
                       env=toolchain.environment(str(folder)))
        subprocess.run([*run, "./driver"], cwd=folder, check=True, capture_output=True, timeout=300)
        flat, found = np.fromfile(folder / "targets", np.uint8), []
        for arrays in operands:
            found.append(flat[:arrays[2].size])
            flat = flat[arrays[2].size:]
    return found
