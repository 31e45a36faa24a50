"""The conditions of a measurement: machine, runtime versions, load."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from gkp.runtime.cuda import ask_driver

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "ncnn", "ziglang", "tensorrt", "tensorrt-rtx-cu12",
             "tensorrt-rtx-cu13", "onnx", "torch", "numpy")


def fingerprint() -> dict[str, Any]:
    """CPU model, cores, GPU and driver where there are, operating system, Python, package versions, load average."""
    driver = ask_driver()
    gpu = {"gpu": driver.name, "cuda_driver": driver.version} if driver and driver.name else {}
    return {"cpu": cpu_model(), "cores": physical_cores(), **gpu, "os": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(), "packages": {p: v for p in _PACKAGES if (v := version(p))},
            "load_average": round(os.getloadavg()[0], 2)}


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Name of the processor, with the widest vector extension it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = fields.get("flags", "").split()
    vectors = next((f" ({f.upper()})" for f in ("avx512f", "avx2") if f in flags), "")
    return fields.get("model name", platform.machine()) + vectors


def vector_floats() -> int:
    """Floats per vector register: the channel block of the runtimes' fast convolution kernels."""
    return 16 if "AVX512" in cpu_model() else 8


def physical_cores() -> int:
    """Physical cores this process may use."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    return max(1, min(len(cores), len(allowed)))
