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
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Flags of processors that add products of bytes in 32 bits."""
_NARROW = {"VNNI": {"avx512_vnni", "avx_vnni"}, "BF16": {"avx512_bf16"}, "FP16": {"avx512_fp16"}, "AMX": {"amx_int8"}}
"""Flags of what computes in less than float32, by the names that are shown."""


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
    """Name of the processor, with what tells apart those of one name: family and model, the widest vector extension, and
    what it computes in less than float32 ("AMD EPYC, family 25 model 17 (AVX512F, VNNI, BF16)")."""
    fields = _cpuinfo()
    if not fields:
        return platform.processor() or platform.machine()
    flags = _flags(fields)
    features = [f.upper() for f in ("avx512f", "avx2") if f in flags][:1]
    features += [name for name, any_of in _NARROW.items() if any_of.intersection(flags)]
    number = f", family {fields['cpu family']} model {fields['model']}" if {"cpu family", "model"} <= fields.keys() else ""
    return f"{fields.get('model name', platform.machine())}{number}" + (f" ({', '.join(features)})" if features else "")


def saturates_bytes() -> bool:
    """Do int8 kernels add two products of bytes in 16 bits here, and saturate (pmaddubsw)? x86-64 processors without
    VNNI and AMX do."""
    fields = _cpuinfo()
    return "flags" in fields and not any(flag in _flags(fields) for flag in _WIDE_SUMS)


def cpu_flags() -> frozenset[str]:
    """What the processor has, by the kernel's names; empty where there is nothing to read."""
    return frozenset(_flags(_cpuinfo()))


def cpu_vendor() -> str:
    """Who made the processor, in the words of cpuid ("AuthenticAMD"); empty where there is nothing to read."""
    return _cpuinfo().get("vendor_id", "")


def _cpuinfo() -> dict[str, str]:
    """Of one processor, as the kernel describes it (x86-64: with flags); empty where there is none to read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}


def _flags(fields: dict[str, str]) -> list[str]:
    return fields.get("flags", fields.get("Features", "")).split()


def vector_floats() -> int:
    """Floats per vector register: the channel block of the runtimes' fast convolution kernels."""
    return 16 if "avx512f" in cpu_flags() else 8


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
